"""Poly-encoders beside a slow version, on the token states of each kind of text tower, and on disk."""

import json
import math
import threading

import pytest
import torch
from torch.nn import functional as F

from tests.random_model import random_model
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError, VlmError
from vlm.models.poly_encoder import (
    WEIGHTS,
    FittedPolyEncoder,
    PolyEncoder,
    PolyEncoderSize,
    is_reranker_folder,
    read_poly_encoder,
    save_poly_encoder,
    token_states,
)

SIZE = PolyEncoderSize(codes=3, width=6, dimension=5)


def small(seed=0):
    torch.manual_seed(seed)
    network = PolyEncoder(SIZE, cosine_weight=2.0).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return network


def softmax(numbers):
    largest = max(numbers)
    powers = [math.exp(number - largest) for number in numbers]
    return [power / sum(powers) for power in powers]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def slow_score(network, states, text, candidate):
    """Of one text with these token states and one candidate, number by number (Humeau et al. 2020, §4.4)."""
    gain, shift = network.norm.weight.tolist(), network.norm.bias.tolist()
    h = []
    for state in states:
        mean = sum(state) / len(state)
        spread = math.sqrt(sum((number - mean) ** 2 for number in state) / len(state) + network.norm.eps)
        normed = [(number - mean) / spread * g + s for number, g, s in zip(state, gain, shift, strict=True)]
        h.append([dot(row, normed) for row in network.project.weight.tolist()])
    views = []
    for code in network.codes.tolist():
        weights = softmax([dot(code, token) for token in h])
        views.append([sum(w * token[d] for w, token in zip(weights, h, strict=True)) for d in range(SIZE.dimension)])
    mapped = [dot(row, candidate) for row in network.candidates.weight.tolist()]
    weights = softmax([dot(mapped, view) for view in views])
    context = [sum(w * view[d] for w, view in zip(weights, views, strict=True)) for d in range(SIZE.dimension)]
    return dot(context, mapped) + network.cosine_weight.item() * dot(text, candidate)


def test_scores_are_those_of_a_slow_version():
    network = small()
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, 7, SIZE.width, generator=generator, dtype=torch.float64)
    lengths = [7, 1, 4, 5]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    texts = F.normalize(torch.randn(4, SIZE.dimension, generator=generator, dtype=torch.float64), dim=1)
    candidates = F.normalize(torch.randn(4, 9, SIZE.dimension, generator=generator, dtype=torch.float64), dim=2)
    found = network(states, mask, texts, candidates)
    for text in range(4):
        own = states[text, : lengths[text]].tolist()
        for number in range(9):
            wanted = slow_score(network, own, texts[text].tolist(), candidates[text, number].tolist())
            assert found[text, number].item() == pytest.approx(wanted, rel=1e-9)


def test_a_text_without_tokens_is_scored_by_its_cosine_alone():
    network = small()
    texts = F.normalize(torch.randn(1, SIZE.dimension, dtype=torch.float64), dim=1)
    found = network(torch.randn(1, 4, SIZE.width).double(), torch.zeros(1, 4, dtype=torch.bool), texts, texts[:, None])
    assert found.item() == pytest.approx(network.cosine_weight.item())


@pytest.mark.parametrize("architecture", ["micro", "micro-coca", "vit_tiny+bag@24", "vit_tiny+ngram@24"])
def test_states_and_vectors_are_those_of_the_tower(architecture, scene_tokenizer):
    if "+" in architecture:
        architecture = architecture.replace("vit_tiny", "timm:test_vit")
    model = random_model(architecture, open_tokenizer(str(scene_tokenizer), 24))
    texts = ["a red star", "a very large blue circle above a small square"]
    states, mask, vectors = token_states(model, texts)
    torch.testing.assert_close(vectors, model.embed_texts(texts))
    assert states.shape[:2] == mask.shape
    assert mask.sum(dim=1)[0] < mask.sum(dim=1)[1]
    # what stands after a text, and which texts come along, changes none of its states
    alone, alone_mask, _ = token_states(model, texts[:1])
    torch.testing.assert_close(alone[alone_mask], states[0][mask[0]], rtol=1e-4, atol=1e-5)


def test_texts_that_another_thread_embeds_meanwhile_change_nothing(scene_tokenizer, monkeypatch):
    model = random_model("micro", open_tokenizer(str(scene_tokenizer), 24))
    texts = ["a red star", "a blue circle"]
    expected, _, _ = token_states(model, texts)
    calling, encode_text = threading.get_ident(), model.network.encode_text

    def encode_while_others_do(tokens):
        vectors = encode_text(tokens)
        if threading.get_ident() == calling:
            other = threading.Thread(target=model.embed_texts, args=(["a green heart", "two squares"],))
            other.start()
            other.join()
        return vectors

    monkeypatch.setattr(model.network, "encode_text", encode_while_others_do)
    states, _, _ = token_states(model, texts)
    torch.testing.assert_close(states, expected)


def test_a_tower_without_known_states_is_refused(scene_tokenizer):
    model = random_model("micro", open_tokenizer(str(scene_tokenizer), 24))
    model.network.ln_final = torch.nn.Identity()
    del model.network.ln_final
    with pytest.raises(UsageError, match="token states are not known"):
        token_states(model, ["a star"])


def test_a_folder_holds_what_was_fitted_and_damage_is_found(tmp_path):
    fitted = FittedPolyEncoder(network=small().float(), model_fingerprint="abc", model="runs/a")
    folder = tmp_path / "reranker"
    save_poly_encoder(folder, fitted, configuration={"codes": 3}, details={"evidence": {}})
    again = read_poly_encoder(folder)
    assert is_reranker_folder(folder)
    assert (again.fingerprint, again.model, again.network.size) == (fitted.fingerprint, "runs/a", SIZE)
    other = FittedPolyEncoder(network=small(1).float(), model_fingerprint="abc", model="runs/a")
    assert other.fingerprint != fitted.fingerprint
    with pytest.raises(UsageError, match="exists already"):
        save_poly_encoder(folder, other, configuration={}, details={})
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | {"fingerprint": "x"}))
    with pytest.raises(VlmError, match="its weights were changed"):
        read_poly_encoder(folder)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(VlmError, match="cannot be read"):
        read_poly_encoder(folder)
