"""Caption metrics on lists of texts: BLEU, ROUGE-L, CIDEr, CIDEr-D and METEOR as COCO's evaluation computes them.

All but METEOR run without Java and give the figures of the reference (pycocoevalcap 1.2) on the same words to 1e-6.
What is called CIDEr there, and in papers on COCO, is CIDEr-D here.

CLIP score and RefCLIPScore compare embeddings, those of any model (`add_clip_scores`).
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.evaluation.bootstrap import Interval, mean_interval, statistic_interval
from vlm.evaluation.measurement import SampleStatistic
from vlm.evaluation.ptb_tokenizer import caption_words
from vlm.results import Result
from vlm.tensor_types import Array, Float, Float32, Float64, Int64, Num

MAX_NGRAM = 4
"""BLEU and CIDEr count n-grams of 1 to 4 words."""

# pycocoevalcap's constants; they decide what no overlap at all gives
_SMALL = 1e-9
_TINY = 1e-15
# ROUGE-L of COCO weighs recall by β² = 1.44
_ROUGE_BETA = 1.2
# CIDEr-D, §4: width of the penalty for another length; all CIDEr figures are times ten
_CIDER_SIGMA = 6.0
_CIDER_SCALE = 10.0
# CLIP score, §3
_CLIP_SCORE_SCALE = 2.5
# put before every text, references too (§3); it is part of the figure
CLIP_SCORE_PREFIX = "A photo depicts "
_FEW_IMAGES = 100

Words = Sequence[str]
Ngram = tuple[str, ...]
NgramCounts = Sequence[Counter[Ngram]]
"""How often each n-gram occurs in a text: of one word, of two, up to `MAX_NGRAM`."""


@dataclass(frozen=True, kw_only=True)
class BleuCounts:
    """What BLEU needs of each caption.

    matches: n-grams that a reference has, each at most as often as there. totals: n-grams, by length.
    lengths: words. reference_lengths: words of the reference nearest in length, of two equally near the shorter.
    """

    matches: Int64[Array, "N 4"]
    totals: Int64[Array, "N 4"]
    lengths: Int64[Array, " N"]
    reference_lengths: Int64[Array, " N"]

    def corpus(self, counts: Int64[Array, "B N"]) -> Float64[Array, "B 4"]:
        """BLEU-1 to BLEU-4 of sets that hold each caption as often as its count says."""
        # a product with floats is BLAS's, with integers a slow loop
        drawn = counts.astype(np.float64)
        lengths = (drawn @ self.lengths, drawn @ self.reference_lengths)
        return _bleu(drawn @ self.matches, drawn @ self.totals, *lengths)

    def sentences(self) -> Float64[Array, "N 4"]:
        """BLEU-1 to BLEU-4 of each caption alone."""
        return _bleu(self.matches, self.totals, self.lengths, self.reference_lengths)


def _bleu(
    matches: Num[Array, "B 4"],
    totals: Num[Array, "B 4"],
    lengths: Num[Array, " B"],
    reference_lengths: Num[Array, " B"],
) -> Float64[Array, "B 4"]:
    """Papineni et al. 2002, §2.3: geometric mean of the precisions, times the brevity penalty."""
    precisions = (matches + _TINY) / (totals + _SMALL)
    means = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, MAX_NGRAM + 1))
    ratio = (lengths + _TINY) / (reference_lengths + _SMALL)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return means * penalty[:, None]


def count_ngrams(words: Words) -> NgramCounts:
    """How often each n-gram of 1 to 4 words occurs."""
    # the reference splits its text once more here, at the no-break space of "1 1/2" too
    parts = " ".join(words).split()
    counts: list[Counter[Ngram]] = []
    for length in range(1, MAX_NGRAM + 1):
        counts.append(Counter(zip(*(parts[start:] for start in range(length)), strict=False)))
    return counts


def bleu_counts(candidates: Sequence[NgramCounts], references: Sequence[Sequence[NgramCounts]]) -> BleuCounts:
    """What BLEU needs of each candidate and its references."""
    matches = np.zeros((len(candidates), MAX_NGRAM), np.int64)
    totals = np.zeros((len(candidates), MAX_NGRAM), np.int64)
    reference_lengths = np.zeros(len(candidates), np.int64)
    for row, (candidate, of_image) in enumerate(zip(candidates, references, strict=True)):
        for order, counts in enumerate(candidate):
            most: Counter[Ngram] = Counter()
            for reference in of_image:
                most |= reference[order]
            matches[row, order] = (counts & most).total()
            totals[row, order] = counts.total()
        length = int(totals[row, 0])
        lengths = (reference[0].total() for reference in of_image)
        reference_lengths[row] = min((abs(other - length), other) for other in lengths)[1]
    return BleuCounts(matches=matches, totals=totals, lengths=totals[:, 0], reference_lengths=reference_lengths)


def rouge_l(candidate: Words, references: Sequence[Words], *, joined: bool = True) -> float:
    """ROUGE-L (Lin 2004, §3) of a caption: F of the longest common subsequence, with β = 1.2.

    joined: as pycocoevalcap does, the best precision over the references and, apart from it, the best recall. A short
        reference gives one and a long one the other, so that a caption equal to neither may score 1. Otherwise, as Lin
        defines it, the best F of any single reference.
    """
    precisions: list[float] = []
    recalls: list[float] = []
    # the reference takes an empty text for one empty word
    candidate = candidate or ("",)
    for reference in references:
        common = common_subsequence_length(candidate, reference or ("",))
        precisions.append(common / len(candidate))
        recalls.append(common / (len(reference) or 1))
    if joined:
        return _f_score(max(precisions), max(recalls))
    return max(map(_f_score, precisions, recalls))


def _f_score(precision: float, recall: float) -> float:
    weight = _ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision) if precision and recall else 0.0


def common_subsequence_length(first: Words, second: Words) -> int:
    """Length of the longest common subsequence, by bits (Crochemore et al. 2001): a whole column in one addition.

    >>> common_subsequence_length("a b c d".split(), "b x d".split())
    2
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    all_ones = (1 << len(first)) - 1
    column = all_ones
    for word in second:
        matching = column & places.get(word, 0)
        column = (column + matching | column - matching) & all_ones
    # each zero is a place where the subsequence grew
    return len(first) - column.bit_count()


@dataclass(frozen=True)
class _TfIdf:
    """An n-gram vector for each length with its norm. num_bigrams: the length in the reference's penalty."""

    vectors: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]
    num_bigrams: int


class CiderWeights:
    """How much each n-gram says, by the number of images whose references have it (Vedantam et al. 2015, §3).

    references: those of each image. With one image every n-gram is in all of them, says nothing, and CIDEr is 0.
    """

    def __init__(self, references: Iterable[Sequence[NgramCounts]]) -> None:
        self._frequencies: Counter[Ngram] = Counter()
        num_images = 0
        for of_image in references:
            num_images += 1
            in_image: set[Ngram] = set()
            for reference in of_image:
                in_image.update(*reference)
            self._frequencies.update(in_image)
        self._log_images = math.log(max(num_images, 1))

    def cider(self, candidate: NgramCounts, references: Sequence[NgramCounts]) -> tuple[float, float]:
        """CIDEr and CIDEr-D of a caption."""
        own = self._vectors(candidate)
        plain = 0.0
        penalised = 0.0
        for reference in map(self._vectors, references):
            difference = own.num_bigrams - reference.num_bigrams
            penalty = math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))
            plain += sum(_cosines(own, reference, clips=False))
            penalised += penalty * sum(_cosines(own, reference, clips=True))
        scale = _CIDER_SCALE / MAX_NGRAM / len(references)
        return plain * scale, penalised * scale

    def _vectors(self, counts: NgramCounts) -> _TfIdf:
        vectors: list[dict[Ngram, float]] = []
        norms: list[float] = []
        for of_length in counts:
            vector: dict[Ngram, float] = {}
            for ngram, count in of_length.items():
                vector[ngram] = count * (self._log_images - math.log(max(1, self._frequencies[ngram])))
            vectors.append(vector)
            norms.append(sum(weight * weight for weight in vector.values()) ** 0.5)
        # the reference counts bigrams, one fewer than words
        return _TfIdf(tuple(vectors), tuple(norms), counts[1].total())


def _cosines(candidate: _TfIdf, reference: _TfIdf, *, clips: bool) -> list[float]:
    """The cosine of the vectors of each length. clips: no n-gram counts for more than the reference has of it."""
    cosines: list[float] = []
    for own, other, own_norm, other_norm in zip(
        candidate.vectors, reference.vectors, candidate.norms, reference.norms, strict=True
    ):
        product = 0.0
        for ngram in own.keys() & other.keys():
            product += (min(own[ngram], other[ngram]) if clips else own[ngram]) * other[ngram]
        norms = own_norm * other_norm
        cosines.append(product / norms if norms else product)
    return cosines


def meteor_scores(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, Float64[Array, " N"]]:
    """METEOR 1.5 (Denkowski and Lavie 2014) of all captions and of each, by the Java program that pycocoevalcap brings.

    A caption without words scores 0.

    Raises:
        UsageError: there is no Java, or pycocoevalcap is not installed.
        VlmError: the program ended without an answer.
    """
    if shutil.which("java") is None:
        raise UsageError("METEOR is a Java program and there is no `java` here: install one, or leave METEOR out.")
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UsageError("METEOR needs the package pycocoevalcap: pip install 'vlm-pipeline[meteor]'.")
    return _run_meteor(Path(package.submodule_search_locations[0]) / "meteor", candidates, references)


def _run_meteor(
    folder: Path, candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, Float64[Array, " N"]]:
    import subprocess

    command = ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def ask(line: str) -> str:
            program.stdin.write(line + "\n")  # pyright: ignore[reportOptionalMemberAccess]
            program.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
            return program.stdout.readline().strip()  # pyright: ignore[reportOptionalMemberAccess]

        statistics: list[str] = []
        for candidate, of_image in zip(candidates, references, strict=True):
            texts = [" ".join(words).replace("|||", "") for words in (*of_image, candidate)]
            statistics.append(ask(" ||| ".join(["SCORE", *texts])))
        scores = [ask(" ||| ".join(["EVAL", *statistics]))]
        # a line for each caption, then one for all
        scores += [program.stdout.readline().strip() for _ in statistics]
        program.stdin.close()
    try:
        values = np.array(list(map(float, scores)))
    except ValueError as error:
        raise VlmError("METEOR's Java program ended without an answer; it needs 2 GB of memory.") from error
    return float(values[-1]), values[:-1]


def clip_scores(images: Float32[Array, "N D"], candidates: Float32[Array, "N D"]) -> Float64[Array, " N"]:
    """CLIP score (Hessel et al. 2021, arXiv:2104.08718, §3) of each caption: 2.5 · max(cos, 0), from unit vectors."""
    cosines = np.einsum("nd,nd->n", images.astype(np.float64), candidates)
    return _CLIP_SCORE_SCALE * np.maximum(cosines, 0.0)


def ref_clip_scores(
    scores: Float[Array, " N"], candidates: Float32[Array, "N D"], references: Sequence[Float32[Array, "_ D"]]
) -> Float64[Array, " N"]:
    """RefCLIPScore: the harmonic mean of the CLIP score and the greatest cosine with a reference (not below 0)."""
    nearest = np.zeros(len(scores))
    for row, (candidate, of_image) in enumerate(zip(candidates, references, strict=True)):
        nearest[row] = max(0.0, float((of_image.astype(np.float64) @ candidate).max()))
    total = scores + nearest
    return np.divide(2 * scores * nearest, total, out=np.zeros(len(scores)), where=total > 0)


@dataclass(frozen=True, kw_only=True)
class CaptionScores(Result):
    """Figures of captions against references, each with its 95% bootstrap interval over images.

    bleu: BLEU-1 to BLEU-4 of the corpus. rouge_l: with the best precision and the best recall of any reference, as
    pycocoevalcap; rouge_l_single: of the best single reference. cider_d: what pycocoevalcap calls CIDEr; up to 10.
    per_image: the same figures of each caption by itself, by name; `bleu_4` is then that of one sentence.
    """

    num_images: int
    bleu: tuple[Interval, ...]
    rouge_l: Interval
    rouge_l_single: Interval
    cider: Interval
    cider_d: Interval
    meteor: Interval | None = None
    clip_score: Interval | None = None
    ref_clip_score: Interval | None = None
    warnings: tuple[str, ...] = ()
    per_image: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def figures(self) -> dict[str, Interval]:
        """All that there are, by name: bleu_1 … bleu_4, rouge_l, …"""
        named = {f"bleu_{order}": value for order, value in enumerate(self.bleu, start=1)}
        for name in ("rouge_l", "rouge_l_single", "cider", "cider_d", "meteor", "clip_score", "ref_clip_score"):
            value = getattr(self, name)
            if value is not None:
                named[name] = value
        return named


def caption_metrics(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    meteor: bool = False,
    tokenize: Callable[[str], Sequence[str]] = caption_words,
    seed: int = 0,
) -> CaptionScores:
    """Compare captions with references: BLEU, ROUGE-L, CIDEr, CIDEr-D and, where Java is at hand, METEOR.

    Args:
        candidates: a caption for each image.
        references: for each image its references, or one.
        meteor: compute METEOR, too; it takes a Java program half a minute to start.
        tokenize: a text's words; COCO's rules unless given. `str.split` takes texts that are words already.
        seed: of the bootstrap.

    Raises:
        UsageError: there are no captions, not as many references, an image has none, or METEOR cannot run.

    >>> scores = caption_metrics(["a dog runs", "two cats"], [["a dog runs"], ["a cat", "two cats sleep"]])
    >>> round(scores.cider_d.value, 2), round(scores.bleu[0].value, 2)
    (6.17, 1.0)
    """
    of_images = check_references(candidates, references)
    words = list(map(tuple, map(tokenize, candidates)))
    reference_words: list[list[tuple[str, ...]]] = []
    for texts in of_images:
        reference_words.append(list(map(tuple, map(tokenize, texts))))
    ngrams = list(map(count_ngrams, words))
    reference_ngrams = [list(map(count_ngrams, texts)) for texts in reference_words]

    counts = bleu_counts(ngrams, reference_ngrams)
    weights = CiderWeights(reference_ngrams)
    ciders = np.array(list(map(weights.cider, ngrams, reference_ngrams)))
    per_image = {f"bleu_{order + 1}": counts.sentences()[:, order] for order in range(MAX_NGRAM)}
    per_image["rouge_l"] = np.array(list(map(rouge_l, words, reference_words)))
    per_image["rouge_l_single"] = np.array(list(map(partial(rouge_l, joined=False), words, reference_words)))
    per_image["cider"] = ciders[:, 0]
    per_image["cider_d"] = ciders[:, 1]
    meteor_interval = None
    if meteor:
        of_all, per_image["meteor"] = meteor_scores(words, reference_words)
        # of all captions it is no mean of theirs, but moves with it
        spread = mean_interval(per_image["meteor"], rng=np.random.default_rng(seed))
        meteor_interval = _moved_to(spread, of_all)
    return CaptionScores(
        num_images=len(words),
        bleu=_bleu_intervals(counts, seed),
        **{name: mean_interval(per_image[name], rng=np.random.default_rng(seed)) for name in _MEANS},
        meteor=meteor_interval,
        warnings=_warnings(words, of_images),
        per_image={name: tuple(values.tolist()) for name, values in per_image.items()},
    )


def add_clip_scores(
    scores: CaptionScores,
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    images: Float32[Array, "N D"],
    embed_texts: Callable[[Sequence[str]], Float32[Array, "T D"]],
    seed: int = 0,
) -> CaptionScores:
    """The scores with CLIP score and RefCLIPScore by the model whose embeddings these are.

    images: a unit vector for each image. embed_texts: the same model's unit vectors of texts.
    The published figures are those of OpenAI's ViT-B/32; another model's stand in no table with them.
    """
    of_images = check_references(candidates, references)
    rows = embed_texts([CLIP_SCORE_PREFIX + text for text in candidates])
    unlike = list(dict.fromkeys(chain.from_iterable(of_images)))
    row_of = {text: row for row, text in enumerate(unlike)}
    reference_rows = embed_texts([CLIP_SCORE_PREFIX + text for text in unlike])
    per_image = {"clip_score": clip_scores(images, rows)}
    rows_of_images: list[Float32[Array, "R D"]] = []
    for texts in of_images:
        rows_of_images.append(reference_rows[list(map(row_of.__getitem__, texts))])
    per_image["ref_clip_score"] = ref_clip_scores(per_image["clip_score"], rows, rows_of_images)
    intervals: dict[str, Interval] = {}
    outcomes = dict(scores.per_image)
    for name, values in per_image.items():
        # the same draws for both scores, as for all others of the same images
        intervals[name] = mean_interval(values, rng=np.random.default_rng(seed))
        outcomes[name] = tuple(values.tolist())
    return replace(scores, **intervals, per_image=outcomes)


_MEANS = ("rouge_l", "rouge_l_single", "cider", "cider_d")


def check_references(candidates: Sequence[str], references: Sequence[str | Sequence[str]]) -> Sequence[Sequence[str]]:
    """The references of each image, one or several.

    Raises:
        UsageError: see `caption_metrics`.
    """
    if isinstance(candidates, str) or isinstance(references, str):
        raise UsageError("Captions are a list of texts, and references a list as long; a single text was given.")
    if not candidates or len(candidates) != len(references):
        raise UsageError(
            f"{len(candidates):,} captions and references of {len(references):,} images: give a caption and at least "
            "one reference for each image."
        )
    of_images: list[Sequence[str]] = []
    for image, texts in enumerate(references):
        texts = (texts,) if isinstance(texts, str) else texts
        if not texts:
            raise UsageError(f"Image {image} has no reference; leave it out, with its caption.")
        of_images.append(texts)
    return of_images


def _bleu_intervals(counts: BleuCounts, seed: int) -> tuple[Interval, ...]:
    intervals: list[Interval] = []
    for order in range(MAX_NGRAM):
        rng = np.random.default_rng(seed)
        intervals.append(statistic_interval(partial(_bleu_of_order, counts, order), len(counts.lengths), rng=rng))
    return tuple(intervals)


def bleu_statistics(candidates: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, SampleStatistic]:
    """BLEU as a function of how often each image counts, by name; raises as `caption_metrics`."""
    of_images = check_references(candidates, references)

    def ngrams_of(texts: Sequence[str]) -> list[NgramCounts]:
        return [count_ngrams(tuple(caption_words(text))) for text in texts]

    ngrams = ngrams_of(candidates)
    reference_ngrams = list(map(ngrams_of, of_images))
    counts = bleu_counts(ngrams, reference_ngrams)
    statistics: dict[str, SampleStatistic] = {}
    for order in range(MAX_NGRAM):
        statistics[f"bleu_{order + 1}"] = SampleStatistic(of_counts=partial(_bleu_of_order, counts, order))
    return statistics


def _bleu_of_order(counts: BleuCounts, order: int, drawn: Int64[Array, "B N"]) -> Float64[Array, " B"]:
    return counts.corpus(drawn)[:, order]


def _moved_to(interval: Interval, value: float) -> Interval:
    if interval.low is None or interval.high is None:
        return Interval(value=value, low=None, high=None)
    shift = value - interval.value
    return Interval(value=value, low=interval.low + shift, high=interval.high + shift)


def _warnings(words: Sequence[Words], references: Sequence[Sequence[str]]) -> tuple[str, ...]:
    warnings: list[str] = []
    if len(words) < _FEW_IMAGES:
        warnings.append(
            f"CIDEr weighs words by the {len(words):,} images measured, which are few: do not compare it with figures "
            "of other sets."
        )
    num_empty = sum(not caption for caption in words)
    if num_empty:
        warnings.append(f"{num_empty:,} of {len(words):,} captions have no words.")
    numbers = sorted(set(map(len, references)))
    if len(numbers) > 1:
        warnings.append(
            f"Images have {numbers[0]} to {numbers[-1]} references; more of them raise BLEU and ROUGE-L of an image."
        )
    return tuple(warnings)
