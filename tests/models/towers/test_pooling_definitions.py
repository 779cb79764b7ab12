"""Each pooling against its equations, number by number, in double precision."""

import math
from typing import Any

import pytest
import torch

from vlm.models.towers.pooling import POOLINGS, TokenMap
from vlm.models.towers.tower import pool_states
from vlm.models.towers.tower_config import read_image_config

IMAGES, PATCHES, BOUND = 2, 9, 1e-9


def pool_of(pooling: str, width: int, **settings) -> Any:
    torch.manual_seed(0)
    config = read_image_config({"tower": "timm:test_vit", "image_size": 64, "pooling": pooling, **settings})
    return POOLINGS[pooling](width, config).double().eval()


def tokens_of(width: int) -> TokenMap:
    values = torch.randn(IMAGES, PATCHES + 2, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TokenMap(prefix=values[:, :2], patches=values[:, 2:])


def linear(layer, row):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * len(layer.weight)
    return [
        sum(w * x for w, x in zip(weights, row, strict=True)) + b
        for weights, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


def layer_norm(layer, row):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + layer.eps)
    return [
        (x - mean) / deviation * w + b for x, w, b in zip(row, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def softmax(logits):
    raised = [math.exp(logit - max(logits)) for logit in logits]
    return [each / sum(raised) for each in raised]


def attend(query, keys, values, heads):
    """Attention of one query, head by head."""
    size = len(query) // heads
    result = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        logits = [sum(q * k for q, k in zip(query[own], key[own], strict=True)) / math.sqrt(size) for key in keys]
        weights = softmax(logits)
        for channel in range(head * size, (head + 1) * size):
            result.append(sum(w * value[channel] for w, value in zip(weights, values, strict=True)))
    return result


def gelu(x):
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def assert_is(pool, tokens, slow):
    with torch.no_grad():
        found = pool(tokens)
        for image in range(IMAGES):
            wanted = slow(tokens.prefix[image].tolist(), tokens.patches[image].tolist())
            assert found[image].tolist() == pytest.approx(wanted, abs=BOUND, rel=0)


def test_the_mean():
    def slow(prefix, patches):
        return [sum(patch[channel] for patch in patches) / PATCHES for channel in range(8)]

    assert_is(pool_of("avg", 8), tokens_of(8), slow)


def test_the_class_token():
    assert_is(pool_of("token", 8), tokens_of(8), lambda prefix, patches: prefix[0])


@pytest.mark.parametrize("gamma", [1.0, 1.25, 2.0])
def test_simpool(gamma):
    pool = pool_of("simpool", 8, gamma=gamma)
    layer = pool.attention

    def slow(prefix, patches):
        values = [layer_norm(layer.norm, patch) for patch in patches]
        mean = [sum(patch[channel] for patch in patches) / PATCHES for channel in range(8)]
        query = linear(layer.q, mean)
        keys = [linear(layer.k, value) for value in values]
        least = min(min(value) for value in values) - 1e-6
        raised = [[(x - least) ** gamma for x in value] for value in values]
        return [x ** (1 / gamma) + least for x in attend(query, keys, raised, 1)]

    assert_is(pool, tokens_of(8), slow)


def test_the_head_of_a_latent_query():
    width, heads = 128, 2
    pool = pool_of("map", width)
    layer = pool.attention

    def slow(prefix, patches):
        keys, values = [], []
        for patch in patches:
            both = linear(layer.kv, patch)
            keys.append(both[:width])
            values.append(both[width:])
        query = linear(layer.q, layer.latent[0, 0].tolist())
        pooled = linear(layer.proj, attend(query, keys, values, heads))
        hidden = [gelu(x) for x in linear(layer.mlp.fc1, layer_norm(layer.norm, pooled))]
        return [x + y for x, y in zip(pooled, linear(layer.mlp.fc2, hidden), strict=True)]

    assert_is(pool, tokens_of(width), slow)


def multihead(layer, query, rows):
    """torch's attention: one weight for queries, keys and values."""
    width = len(query)
    weights, biases = layer.in_proj_weight.tolist(), layer.in_proj_bias.tolist()

    def project(row, part):
        own = range(part * width, (part + 1) * width)
        return [sum(w * x for w, x in zip(weights[place], row, strict=True)) + biases[place] for place in own]

    keys, values = [project(row, 1) for row in rows], [project(row, 2) for row in rows]
    return linear(layer.out_proj, attend(project(query, 0), keys, values, layer.num_heads))


def convolved(layer, patches):
    """A 3 × 3 convolution of a square grid, zeros around it."""
    side = math.isqrt(len(patches))
    weights, biases = layer.weight.tolist(), layer.bias.tolist()
    rows = []
    for y in range(side):
        for x in range(side):
            row = list(biases)
            for dy in range(3):
                for dx in range(3):
                    if 0 <= y + dy - 1 < side and 0 <= x + dx - 1 < side:
                        patch = patches[(y + dy - 1) * side + x + dx - 1]
                        for channel, kernels in enumerate(weights):
                            row[channel] += sum(kernel[dy][dx] * v for kernel, v in zip(kernels, patch, strict=True))
            rows.append(row)
    return rows


@pytest.mark.parametrize("pool_width", [0, 6])
def test_bag_of_queries(pool_width):
    pool = pool_of("queries", 8, queries=3, rows=2, pool_width=pool_width)

    def encoded(encoder, rows):
        attended = [multihead(encoder.self_attn, row, rows) for row in rows]
        results = []
        for row, added in zip(rows, attended, strict=True):
            row = layer_norm(encoder.norm1, [x + y for x, y in zip(row, added, strict=True)])
            hidden = [max(0.0, x) for x in linear(encoder.linear1, row)]
            more = linear(encoder.linear2, hidden)
            results.append(layer_norm(encoder.norm2, [x + y for x, y in zip(row, more, strict=True)]))
        return results

    def slow(prefix, patches):
        if pool_width:
            patches = [layer_norm(pool.norm_input, row) for row in convolved(pool.reduce, patches)]
        outputs = []
        for block in pool.blocks:
            patches = encoded(block.encoder, patches)
            queries = block.queries[0].tolist()
            among = [multihead(block.among, query, queries) for query in queries]
            for query, added in zip(queries, among, strict=True):
                query = layer_norm(block.norm_queries, [x + y for x, y in zip(query, added, strict=True)])
                outputs.append(layer_norm(block.norm_out, multihead(block.across, query, patches)))
        by_channel = [linear(pool.rows, [output[channel] for output in outputs]) for channel in range(len(outputs[0]))]
        return [row[place] for place in range(2) for row in by_channel]

    assert_is(pool, tokens_of(8), slow)


def test_every_pooling_of_images_is_here():
    assert POOLINGS.keys() == {"avg", "token", "simpool", "map", "queries"}


SLOW_TEXT_POOLINGS = {
    "mean": lambda rows: [sum(channel) / len(rows) for channel in zip(*rows, strict=True)],
    "last": lambda rows: rows[-1],
    "cls": lambda rows: rows[0],
}


@pytest.mark.parametrize("pooling", SLOW_TEXT_POOLINGS)
@pytest.mark.parametrize("begins", [0, 3])
def test_poolings_of_text_read_the_tokens_of_text_alone(pooling, begins):
    lengths = [1, 4, 6]
    states = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    places = torch.arange(9)
    mask = (places >= begins) & (places < begins + torch.tensor(lengths)[:, None])
    # what is no text may be anything finite
    states = torch.where(mask[..., None], states, 1e6)
    found = pool_states(states, mask, pooling)
    for row, length in enumerate(lengths):
        own = states[row, begins : begins + length].tolist()
        assert found[row].tolist() == pytest.approx(SLOW_TEXT_POOLINGS[pooling](own), abs=BOUND, rel=0)
