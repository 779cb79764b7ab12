"""Writing captions: with and without caches, in any batch, and against slow and obvious searches."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from vlm.errors import UsageError
from vlm.models.caption_search import WrittenCaptions, draw_tokens, largest, write_captions
from vlm.models.coca import text_log_likelihoods
from vlm.models.decoding_options import DecodingOptions
from vlm.models.model import build_network

PAD, START, END, VOCABULARY, CONTEXT = 0, 1, 2, 12, 12
NUM_IMAGES = 9
END_BIAS = 0.3


class FakeTokenizer:
    """Words are numbers; no piece is made of others."""

    def __init__(self, start: int = START, end: int = END, pad: int = PAD) -> None:
        self.start_token, self.end_token, self.pad_token = start, end, pad
        self.context_length, self.vocab_size = CONTEXT, VOCABULARY

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = np.full((len(texts), CONTEXT), self.pad_token)
        for row, text in zip(rows, texts, strict=True):
            pieces = [self.start_token, *map(int, text.split()), self.end_token]
            row[: len(pieces)] = pieces
        return rows

    def decode(self, tokens: Any) -> str:
        raise NotImplementedError

    save = fingerprint = decode


TOKENIZER: Any = FakeTokenizer()


def build(dtype: torch.dtype = torch.float64, *, correct_mask: bool = False, **text: Any) -> Any:
    """A small captioner of random weights, large enough that images differ and captions end at different places."""
    torch.manual_seed(4)
    text_config = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 2}
    vision_config = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    pooler = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 6, "output_tokens": True}
    config = {
        "embed_dim": 24,
        "vision_cfg": vision_config | pooler,
        "text_cfg": text_config | {"embed_cls": True, "output_tokens": True, "pad_id": PAD} | text,
        "multimodal_cfg": text_config,
        "custom_text": True,
    }
    network: Any = build_network(config).eval().to(dtype)
    network.text.correct_cls_mask = correct_mask
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(2.5)
        # towards the tokens that end captions in the tests, so that many captions end
        decoder = network.text_decoder
        decoder.ln_final.bias.copy_(decoder.text_projection[:, [END, 9]].sum(dim=1) * END_BIAS)
    return network


@pytest.fixture(scope="module", params=[torch.float64, torch.float32])
def network(request) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def double_network() -> Any:
    return build()


def images_for(network: Any, number: int = NUM_IMAGES) -> torch.Tensor:
    kind = network.logit_scale.dtype
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(kind)


@torch.no_grad()
def write(network: Any, pixels: torch.Tensor, options: DecodingOptions, **others: Any) -> WrittenCaptions:
    return write_captions(network, pixels, others.pop("tokenizer", TOKENIZER), options, **others)


def texts_of(written: WrittenCaptions, image: int = 0) -> list[list[int]]:
    rows = zip(written.tokens[image].tolist(), written.lengths[image].tolist(), strict=True)
    return [row[:length] for row, length in rows]


WAYS = {
    "greedy": DecodingOptions(),
    "prompt": DecodingOptions(prompt="7 4", max_length=9),
    "beams": DecodingOptions(beams=4, captions=3),
    "groups": DecodingOptions(beams=6, beam_groups=3, captions=6, diversity_penalty=1.0),
    "controlled": DecodingOptions(beams=3, repetition_penalty=1.4, no_repeat_ngram=2, min_length=5, max_length=10),
    "sampled": DecodingOptions(sample=True, captions=3, temperature=1.5),
    "top-k": DecodingOptions(sample=True, top_k=4, captions=2, prompt="5"),
    "top-p": DecodingOptions(sample=True, top_p=0.8, no_repeat_ngram=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_cached_decoding_gives_the_tokens_of_uncached(network, way):
    pixels = images_for(network)
    cached, uncached = write(network, pixels, WAYS[way]), write(network, pixels, WAYS[way], is_cached=False)
    assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.equal(cached.lengths, uncached.lengths)
    assert torch.allclose(cached.log_likelihoods, uncached.log_likelihoods, atol=1e-5)
    # not trivially: captions differ, and end at different places, so that images left the batch
    assert len({tuple(row) for image in range(NUM_IMAGES) for row in texts_of(cached, image)}) > 3
    assert way == "prompt" or len(set(cached.lengths.flatten().tolist())) > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_cls": False, "pool_type": "last"},
        {"ls_init_value": 0.5},
        {"pad_id": START},
        {"pad_id": 5, "correct_mask": True},
        {"no_causal_mask": True},
    ],
)
def test_every_kind_of_text_tower_gives_the_tokens_of_uncached(changes):
    """A prompt with the number of padding is hidden from later tokens, by open_clip's mask one place aside."""
    network = build(**changes)
    for options in (DecodingOptions(prompt="5 7"), DecodingOptions(beams=3)):
        cached, uncached = (write(network, images_for(network), options, is_cached=way) for way in (True, False))
        assert torch.equal(cached.tokens, uncached.tokens)


@pytest.mark.parametrize("way", WAYS)
def test_the_batch_changes_nothing(double_network, way):
    pixels = images_for(double_network)
    together = write(double_network, pixels, WAYS[way], seeds=range(100, 109))
    for image in (0, 4, 8):
        alone = write(double_network, pixels[image : image + 1], WAYS[way], seeds=[100 + image])
        assert torch.equal(alone.tokens[0], together.tokens[image])
        assert torch.allclose(alone.log_likelihoods[0], together.log_likelihoods[image])


def log_probabilities(network: Any, pixels: torch.Tensor, row: list[int]) -> torch.Tensor:
    """Of the next token, by open_clip's own forward."""
    with torch.no_grad():
        logits = network(pixels, torch.tensor([row]), output_labels=False)["logits"][0, -1]
    return logits.log_softmax(dim=0)


def test_greedy_takes_the_likeliest_token_each_time(double_network):
    pixels = images_for(double_network, 3)
    written = write(double_network, pixels, DecodingOptions())
    for image in range(3):
        row = texts_of(written, image)[0]
        for place in range(1, len(row)):
            scores = log_probabilities(double_network, pixels[image : image + 1], row[:place])
            scores[[START, PAD]] = -torch.inf
            assert int(scores.argmax()) == row[place]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_enough_for_all_find_the_best_caption_of_all(double_network, length_penalty):
    pixels = images_for(double_network, 2)
    options = DecodingOptions(beams=200, captions=3, max_length=4, length_penalty=length_penalty)
    written = write(double_network, pixels, options)
    allowed = [token for token in range(VOCABULARY) if token not in (START, PAD)]
    for image in range(2):
        worth: dict[tuple[int, ...], float] = {}
        for tokens in product(allowed, repeat=3):
            end = tokens.index(END) + 1 if END in tokens else 3
            worth[tokens[:end]] = 0
        rows = torch.tensor([[START, *tokens, *[PAD] * (3 - len(tokens))] for tokens in worth])
        with torch.no_grad():
            several = pixels[image : image + 1].expand(len(rows), -1, -1, -1)
            scores = double_network(several, rows)["logits"].log_softmax(dim=-1)
        for number, tokens in enumerate(worth):
            total = sum(float(scores[number, place, token]) for place, token in enumerate(tokens))
            worth[tokens] = total / len(tokens) ** length_penalty
        best = sorted(worth, key=lambda tokens: -worth[tokens])[:3]
        assert [tuple(row[1:]) for row in texts_of(written, image)] == best


def test_one_beam_is_greedy_and_equal_groups_find_the_same(double_network):
    pixels = images_for(double_network)
    two = write(double_network, pixels, DecodingOptions(beams=2, captions=2))
    same = write(double_network, pixels, DecodingOptions(beams=6, beam_groups=3, captions=2, diversity_penalty=0))
    assert torch.equal(same.tokens, two.tokens)
    many = DecodingOptions(beams=4, captions=4, beam_groups=4, diversity_penalty=0)
    assert torch.equal(
        write(double_network, pixels, many).tokens[:, 0], write(double_network, pixels, DecodingOptions()).tokens[:, 0]
    )


def test_diverse_beams_differ_more(double_network):
    pixels = images_for(double_network)

    def num_first_words(penalty: float) -> int:
        options = DecodingOptions(beams=6, beam_groups=6, captions=6, diversity_penalty=penalty, min_length=4)
        written = write(double_network, pixels, options)
        return sum(len({row[1] for row in texts_of(written, image)}) for image in range(NUM_IMAGES))

    # each group first takes the word that none before it has taken
    assert num_first_words(100.0) == 6 * NUM_IMAGES
    assert num_first_words(0.0) == NUM_IMAGES


@pytest.mark.parametrize("way", ["greedy", "beams", "sampled", "groups"])
def test_log_likelihoods_are_those_of_the_text(double_network, way):
    """Of captions that ended, as a ranking of texts computes them."""
    pixels = images_for(double_network)
    written = write(double_network, pixels, WAYS[way])
    num_compared = 0
    for image in range(NUM_IMAGES):
        for row, value in zip(texts_of(written, image), written.log_likelihoods[image], strict=True):
            if row[-1] == END:
                with torch.no_grad():
                    expected = text_log_likelihoods(
                        double_network, pixels[image : image + 1], torch.tensor([row]), pad_token=PAD
                    )
                assert float(value) == pytest.approx(float(expected), abs=1e-5)
                num_compared += 1
    assert num_compared > 3


def test_lengths_prompt_and_repetition_are_as_asked(double_network):
    pixels = images_for(double_network)
    options = DecodingOptions(prompt="9 3", min_length=8, max_length=10, no_repeat_ngram=1, sample=True, captions=4)
    written = write(double_network, pixels, options)
    for image in range(NUM_IMAGES):
        for row in texts_of(written, image):
            assert row[:3] == [START, 9, 3]
            assert 8 <= len(row) <= 10
            assert len(set(row)) == len(row)
            assert PAD not in row
            assert END not in row[:-1]
    # the words run out before the caption is long enough: it ends, rather than say what is forbidden
    exhausted = write(double_network, pixels, DecodingOptions(min_length=12, no_repeat_ngram=1))
    assert set(exhausted.lengths.flatten().tolist()) == {11}


def test_repetition_is_penalised_as_by_transformers(double_network):
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    pixels = images_for(double_network, 1)
    options = DecodingOptions(repetition_penalty=1.5, no_repeat_ngram=2)
    row = texts_of(write(double_network, pixels, options))[0]
    processors = [RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)]
    for place in range(1, len(row)):
        scores = log_probabilities(double_network, pixels, row[:place])[None]
        for process in processors:
            scores = process(torch.tensor([row[:place]]), scores)  # pyright: ignore[reportArgumentType]
        scores[0, [START, PAD]] = -torch.inf
        assert int(scores.argmax()) == row[place]


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"top_p": 0.7, "top_k": 5}, {"temperature": 0.5}])
def test_tokens_are_drawn_with_the_probabilities_of_transformers_warpers(options):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(1, 1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    warped = scores
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in options:
            warped = warper(options[name])(torch.zeros(1, 1, dtype=torch.int64), warped)
    expected = warped.softmax(dim=1)[0]
    # the numbers k / n, so that each token comes up in proportion up to rounding
    uniform = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    drawn = draw_tokens(scores.expand(5000, -1), uniform, DecodingOptions(sample=True, **options))
    shares = torch.bincount(drawn, minlength=1000) / 5000
    assert float((shares - expected).abs().max()) <= 1 / 5000
    assert not bool((shares[expected == 0] > 0).any())


def test_a_flat_distribution_is_sorted_as_a_whole():
    """Where the likeliest 512 tokens hold too little probability."""
    uniform = torch.tensor([0.0, 0.999999], dtype=torch.float64)
    scores = torch.linspace(0, -0.1, 3000, dtype=torch.float64).expand(2, -1)
    drawn = draw_tokens(scores, uniform, DecodingOptions(sample=True, top_p=0.5))
    share = scores[0].softmax(dim=0).cumsum(dim=0)
    assert drawn.tolist() == [0, int((share < 0.5).sum())]


def test_seeds_decide_what_is_drawn_and_more_captions_keep_the_first(double_network):
    pixels = images_for(double_network)
    base = DecodingOptions(sample=True, captions=2)
    first = write(double_network, pixels, base)
    assert torch.equal(first.tokens, write(double_network, pixels, base).tokens)
    assert not torch.equal(
        first.tokens, write(double_network, pixels, DecodingOptions(sample=True, captions=2, seed=50)).tokens
    )
    more = write(double_network, pixels, DecodingOptions(sample=True, captions=5))
    assert torch.equal(more.tokens[:, :2], first.tokens)


@pytest.mark.parametrize("way", ["greedy", "beams", "groups", "sampled"])
def test_attention_and_embedding_come_with_the_captions(double_network, way):
    pixels = images_for(double_network)
    options = WAYS[way]
    written = write(double_network, pixels, options, has_attention=True)
    plain = write(double_network, pixels, options)
    assert torch.equal(written.tokens, plain.tokens)
    assert plain.attention is None
    assert written.attention is not None
    with torch.no_grad():
        assert torch.allclose(written.image_embeddings, double_network.encode_image(pixels))
    # of each token that was written; the one of the image's tokens that follow the class token
    weights = written.attention.sum(dim=-1)
    places = torch.arange(CONTEXT)
    expected = (places >= 1) & (places < written.lengths[:, :, None])
    assert torch.allclose(weights, expected.double())
    # row by row the same as when the caption is given: its tokens as a prompt, one more token written
    row = texts_of(written, 2)[-1]
    prompt = " ".join(map(str, row[1:-1]))
    again = write(double_network, pixels[2:3], DecodingOptions(prompt=prompt, max_length=len(row)), has_attention=True)
    assert again.attention is not None
    assert torch.allclose(again.attention[0, 0, len(row) - 1], written.attention[2, -1, len(row) - 1])


def test_attention_is_refused_where_it_is_not_kept():
    network = build(no_causal_mask=True)
    with pytest.raises(UsageError, match="keeps no attention"):
        write(network, images_for(network), DecodingOptions(), has_attention=True)


@pytest.mark.parametrize("ids", [{"start": 9, "end": 9, "pad": 9}, {"start": 0, "pad": 0, "end": 9}, {"pad": END}])
def test_any_special_tokens_will_do(ids):
    """As GPT-2's, whose only special token is all of them, and T5's, which starts with padding."""
    network, tokenizer = build(), FakeTokenizer(**ids)
    for options in (
        DecodingOptions(),
        DecodingOptions(beams=3, prompt="4 7"),
        DecodingOptions(sample=True, captions=4),
    ):
        written = write(network, images_for(network), options, tokenizer=tokenizer)
        ended = [row for image in range(NUM_IMAGES) for row in texts_of(written, image) if len(row) < CONTEXT]
        assert ended
        for row in ended:
            assert row[0] == tokenizer.start_token
            assert row[-1] == tokenizer.end_token
            assert not {tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token} & set(row[1:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": 3}, r"captions = 3 need as many beams.*--beams 3"),
        ({"beams": 0}, "beams = 0"),
        ({"beams": 4, "beam_groups": 3}, "beams = 4 are not 3 groups"),
        ({"beams": 2, "sample": True}, "exclude each other"),
        ({"top_p": 0.5}, "give sample"),
        ({"sample": True, "top_p": 0.0}, "top_p = 0.0"),
        ({"sample": True, "temperature": 0.0}, "temperature = 0.0"),
        ({"max_length": 1}, "max_length = 1"),
        ({"min_length": 9, "max_length": 5}, "min_length = 9 is above max_length = 5"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty = nan"),
        ({"diversity_penalty": -1.0}, "diversity_penalty = -1.0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DecodingOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 13}, "above the model's context of 12"),
        ({"min_length": 13}, "above the longest caption of 12"),
        ({"prompt": "4 4 4 4", "max_length": 5}, "leaves? no room|fills the 5 tokens"),
    ],
)
def test_lengths_beyond_the_model_are_refused(double_network, options, message):
    with pytest.raises(UsageError, match=message):
        write(double_network, images_for(double_network), DecodingOptions(**options))


@pytest.mark.parametrize("vocabulary", [12, 128 * 6, 128 * 40, 5003])
def test_the_largest_of_many_tokens_are_those_of_topk(vocabulary):
    values = torch.randn(3, 2, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    values[0, 0, -1] = 9.0  # the last token, which fills no block
    values[1, 1, 5:9] = -torch.inf
    wanted = values.topk(9, dim=2)
    found, places = largest(values, 9)
    assert torch.equal(found, wanted.values)
    assert torch.equal(places, wanted.indices)
