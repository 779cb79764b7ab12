"""BLEU, ROUGE-L and CIDEr against pycocoevalcap, sacrebleu, and slow versions that follow the papers' formulas."""

import io
import json
import math
import random
import shutil
from collections import Counter
from contextlib import redirect_stdout
from itertools import combinations

import numpy as np
import pytest

from vlm.errors import UsageError
from vlm.evaluation.caption_metrics import (
    CLIP_SCORE_PREFIX,
    add_clip_scores,
    caption_metrics,
    common_subsequence_length,
)
from vlm.evaluation.ptb_tokenizer import caption_words

WORDS = "a the dog cat man runs sits red ball on in of (big) t-shirt isn't 1/2"


def random_captions(rng, num_images, max_words=12):
    """Captions with one to five references, most words of which are the caption's."""
    vocabulary = WORDS.split()
    candidates, references = [], []
    for _ in range(num_images):
        words = rng.choices(vocabulary, k=rng.randint(1, max_words))
        candidates.append(" ".join(words))
        of_image = []
        for _ in range(rng.randint(1, 5)):
            others = [word if rng.random() < 0.8 else rng.choice(vocabulary) for word in words]
            of_image.append(" ".join(others[rng.randint(0, 2) :] or ["dog"]))
        references.append(of_image)
    return candidates, references


CASES = {
    "random": random_captions(random.Random(0), 60),
    "short": random_captions(random.Random(1), 30, max_words=3),
    "one reference": (["a dog runs", "a red ball"], [["a dog runs fast"], ["the ball is red"]]),
    "one image": (["a dog runs in the grass"], [["a dog runs in the grass", "a dog"]]),
    "equal": (["a b c d e"] * 4, [["a b c d e"] * 3] * 4),
    "each its own reference": (["a dog runs", "two cats sleep here"], [["a dog runs"], ["two cats sleep here"]]),
    "nothing in common": (["x y z", "u v"], [["a b c"], ["d e f"]]),
    "empty caption": (["", "a dog", "..."], [["a dog"], ["a dog", "the dog"], ["no words"]]),
    "empty reference": (["a dog", ""], [["", "a dog runs"], ["..."]]),
    "brackets": (["a (brown) dog [big]", "a cat"], [["a brown dog"], ["{a} cat", "(a) (cat)"]]),
    "line breaks": (["a dog\nruns", "a\rcat", "x\u2028y z"], [["a dog runs", "a\r\ndog"], ["a cat"], ["x y\x0bz"]]),
    "joined number": (["1 1/2 cups of milk", "a cup"], [["1 1/2 cups", "cups of milk"], ["1 1/2"]]),
    "nearest of two lengths": (["a b c d", "e"], [["a b c", "a b c d e"], ["e f", "e"]]),
}


def reference_figures(candidates, references):
    """What pycocoevalcap gives for the same words."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {image: [" ".join(caption_words(text)) for text in texts] for image, texts in enumerate(references)}
    written = {image: [" ".join(caption_words(text))] for image, text in enumerate(candidates)}
    with redirect_stdout(io.StringIO()):
        bleu, sentence_bleu = Bleu(4).compute_score(given, written, verbose=0)
    rouge, each_rouge = Rouge().compute_score(given, written)
    cider, each_cider = Cider().compute_score(given, written)
    return [*bleu, rouge, cider], np.array([*sentence_bleu, each_rouge, each_cider])


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_the_reference(case):
    candidates, references = CASES[case]
    of_all, of_each = reference_figures(candidates, references)
    scores = caption_metrics(candidates, references)
    ours = [figure.value for figure in (*scores.bleu, scores.rouge_l, scores.cider_d)]
    assert ours == pytest.approx(of_all, abs=1e-6)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
    np.testing.assert_allclose([scores.per_image[name] for name in names], of_each, atol=1e-6)


def slow_cider(candidates, references, *, is_d):
    """Vedantam et al. 2015, equations 1 to 3 and §4, with dense vectors over all n-grams."""
    words = [list(caption_words(text)) for text in candidates]
    reference_words = [[list(caption_words(text)) for text in texts] for texts in references]

    def ngrams(text, length):
        return Counter(tuple(text[place : place + length]) for place in range(len(text) - length + 1))

    scores = []
    for own, others in zip(words, reference_words, strict=True):
        total = 0.0
        for length in (1, 2, 3, 4):
            images_with = Counter()
            for texts in reference_words:
                images_with.update({ngram for text in texts for ngram in ngrams(text, length)})
            axes = sorted({*images_with, *(ngram for text in words for ngram in ngrams(text, length))})
            idf = np.array([math.log(len(words) / max(1, images_with[ngram])) for ngram in axes])

            def vector(text, length=length, axes=axes, idf=idf):
                return np.array([ngrams(text, length)[ngram] for ngram in axes]) * idf

            for other in others:
                mine, theirs = vector(own), vector(other)
                product = (np.minimum(mine, theirs) if is_d else mine) @ theirs
                norm = np.linalg.norm(mine) * np.linalg.norm(theirs)
                # of texts of at least one word, bigrams differ in number as words do
                penalty = math.exp(-((len(own) - len(other)) ** 2) / 72) if is_d else 1
                total += penalty * (product / norm if norm else 0) / 4 / len(others)
        scores.append(10 * total)
    return scores


@pytest.mark.parametrize("case", ["random", "short", "one reference", "equal", "nothing in common"])
def test_cider_is_that_of_the_formulas(case):
    candidates, references = (values[:12] for values in CASES[case])
    scores = caption_metrics(candidates, references)
    np.testing.assert_allclose(scores.per_image["cider"], slow_cider(candidates, references, is_d=False), atol=1e-9)
    np.testing.assert_allclose(scores.per_image["cider_d"], slow_cider(candidates, references, is_d=True), atol=1e-9)
    assert scores.cider.value >= scores.cider_d.value


def test_a_single_image_has_no_cider_and_says_so():
    scores = caption_metrics(["a dog runs"], ["a dog runs"])
    assert scores.cider_d.value == scores.cider.value == 0
    assert scores.bleu[2].value == pytest.approx(1)
    assert scores.bleu[0].low is None
    assert any("CIDEr weighs words by the 1 images" in warning for warning in scores.warnings)


def test_the_common_subsequence_is_that_of_all_subsequences():
    rng = random.Random(3)
    for _ in range(200):
        first = rng.choices("abcd", k=rng.randint(0, 7))
        second = rng.choices("abcd", k=rng.randint(0, 7))
        subsequences = {places for size in range(len(first) + 1) for places in combinations(first, size)}
        of_second = {places for size in range(len(second) + 1) for places in combinations(second, size)}
        assert common_subsequence_length(first, second) == max(map(len, subsequences & of_second))


def test_rouge_l_of_joined_references_is_one_for_a_caption_like_neither():
    """The caption lies within the long reference, and holds the short one."""
    scores = caption_metrics(["a dog runs"], [["dog", "a dog runs in the grass"]])
    assert scores.rouge_l.value == 1.0
    precision, recall, weight = 1.0, 0.5, 1.44
    best = (1 + weight) * precision * recall / (recall + weight * precision)
    assert scores.rouge_l_single.value == pytest.approx(max(best, (1 + weight) / 3 / (1 + weight / 3)))


def test_bleu_is_that_of_sacrebleu():
    """On words between spaces, of a corpus with common n-grams of all lengths, neither smooths."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    candidates, references = CASES["random"]
    # sacrebleu takes as many references of each image
    references = [(texts * 3)[:3] for texts in references]
    streams = [[texts[number] for texts in references] for number in range(3)]
    theirs = sacrebleu.corpus_bleu(candidates, streams, tokenize="none", smooth_method="none")
    ours = caption_metrics(candidates, references, tokenize=str.split)
    assert 100 * ours.bleu[3].value == pytest.approx(theirs.score, abs=1e-5)
    assert theirs.score > 0


def test_no_line_break_moves_a_caption_to_another_image():
    candidates, references = CASES["random"]
    broken = ["a dog\ra cat\u2028a man", *candidates[1:]]
    scores = caption_metrics(candidates, references)
    with_break = caption_metrics(broken, references)
    assert with_break.per_image["rouge_l"][1:] == scores.per_image["rouge_l"][1:]


def test_intervals_hold_the_figure_and_shrink_with_the_images():
    widths = []
    for num_images in (40, 400):
        scores = caption_metrics(*random_captions(random.Random(5), num_images))
        for figure in scores.figures().values():
            assert figure.low < figure.value < figure.high
        widths.append(scores.bleu[0].half_width + scores.cider_d.half_width)
    assert widths[1] < widths[0] / 2


def test_the_result_is_json_and_names_its_figures():
    scores = caption_metrics(*CASES["random"])
    assert list(scores.figures())[:6] == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "rouge_l_single"]
    assert json.loads(json.dumps(scores.to_json()))["cider_d"]["value"] == scores.cider_d.value
    assert any("Images have 1 to 5 references" in warning for warning in scores.warnings)
    empty = caption_metrics(*CASES["empty caption"])
    assert "2 of 3 captions have no words." in empty.warnings


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "0 captions and references of 0 images"),
        (["a"], [["a"], ["b"]], "1 captions and references of 2 images"),
        (["a", "b"], [["a"], []], "Image 1 has no reference"),
        ("a dog", [["a dog"]], "a single text was given"),
        (["a dog"], "a dog", "a single text was given"),
    ],
)
def test_lists_that_do_not_fit_are_refused(candidates, references, message):
    with pytest.raises(UsageError, match=message):
        caption_metrics(candidates, references)


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_clip_scores_are_those_of_the_paper():
    vectors = {"up": (0, 1), "right": (1, 0), "between": (1, 1), "down": (0, -1), "near": (3, 4)}
    seen = []

    def embed_texts(texts):
        seen.extend(texts)
        return unit([vectors[text.removeprefix(CLIP_SCORE_PREFIX)] for text in texts])

    candidates = ["between", "down", "near", "right"]
    references = [["up", "right"], ["up"], ["up", "near"], "up"]
    scores = add_clip_scores(
        caption_metrics(candidates, references),
        candidates,
        references,
        images=unit([(0, 1)] * 4),
        embed_texts=embed_texts,
    )
    cosines = [0.5**0.5, 0, 0.8, 0]
    assert scores.per_image["clip_score"] == pytest.approx([2.5 * cosine for cosine in cosines], abs=1e-6)
    expected = [2 * 2.5 * 0.5 / (3.5 * 0.5**0.5), 0, 2 * 2 * 1 / 3, 0]
    assert scores.per_image["ref_clip_score"] == pytest.approx(expected, abs=1e-6)
    assert scores.clip_score.value == pytest.approx(np.mean(scores.per_image["clip_score"]))
    assert all(text.startswith("A photo depicts ") for text in seen)


def test_meteor_without_java_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="there is no `java` here"):
        caption_metrics(["a dog"], ["a dog"], meteor=True)


@pytest.mark.slow
def test_meteor_is_that_of_the_reference():
    """Starting the Java program takes half a minute, twice."""
    if shutil.which("java") is None:
        pytest.skip("needs java")
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
    from pycocoevalcap.meteor.meteor import Meteor

    candidates = ["a dog runs", "the cats sit on a mat", "", "x ||| y", "a (brown) dog"]
    references = [["a dog is running", "dogs run"], ["a cat sat on the mat"], ["a man"], ["x y"], ["a brown dog"]]
    meteor = Meteor()
    given = {image: [" ".join(caption_words(text)) for text in texts] for image, texts in enumerate(references)}
    written = {image: [" ".join(caption_words(text))] for image, text in enumerate(candidates)}
    of_all, of_each = meteor.compute_score(given, written)
    for stream in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
        stream.close()
    scores = caption_metrics(candidates, references, meteor=True)
    assert scores.meteor.value == pytest.approx(of_all, abs=1e-6)
    assert scores.per_image["meteor"] == pytest.approx(of_each, abs=1e-6)
    assert scores.per_image["meteor"][2] == 0
