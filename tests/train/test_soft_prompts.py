"""A frozen language model writes captions through one linear map (LiMBeR)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.caption_search import write_captions
from vlm.models.decoding_options import DecodingOptions
from vlm.models.load import load_model, load_model_folder, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config
from vlm.train.run import train

IMAGE = "timm:test_vit,image_size=32"
WORDS = ["a", "small", "large", "red", "blue", "circle", "square", "two", "stars", "on", "white"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A tiny GPT-2 of random weights, whose tokenizer has one token for start, end and padding, as GPT-2's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("writer")
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>", "<|endoftext|>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=end, unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    ids: dict[str, Any] = {"vocab_size": len(vocabulary), "bos_token_id": 12, "eos_token_id": 12}
    model = GPT2LMHeadModel(GPT2Config(**ids, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(writer) -> VisionLanguageModel:
    tokenizer = open_tokenizer(f"causal:{writer}", 10)
    config = fit_to_tokenizer(model_config(f"{IMAGE}+limber:{writer}@16"), tokenizer)
    torch.manual_seed(0)
    network: Any = build_network(config).eval()
    with torch.no_grad():
        network.visual.memory.proj.weight.mul_(6)
    view = EvalTransform(size=32)
    return VisionLanguageModel(name="test", network=network, config=config, view=view, tokenizer=tokenizer)


def test_rows_end_and_their_padding_is_no_end(writer):
    tokenizer = open_tokenizer(f"causal:{writer}", 6)
    rows = tokenizer.encode(["a small red circle on white", "two stars"])
    assert np.array_equal(rows, [[12, 0, 1, 3, 5, 12], [12, 7, 8, 12, 13, 13]])
    assert tokenizer.decode(rows[1].tolist()) == "two stars"
    assert (tokenizer.pad_token, tokenizer.vocab_size) == (13, 14)


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(),
        DecodingOptions(beams=3, captions=2),
        DecodingOptions(sample=True, captions=2, prompt="a small"),
    ],
)
@torch.no_grad()
def test_the_cache_gives_the_tokens_of_none(model, options):
    network: Any = model.network
    colours = 3 * torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    pixels = colours.expand(-1, -1, 32, 32)
    cached = write_captions(network, pixels, model.tokenizer, options)
    uncached = write_captions(network, pixels, model.tokenizer, options, is_cached=False)
    assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.allclose(cached.log_likelihoods, uncached.log_likelihoods, atol=1e-4)
    assert len({tuple(row) for row in cached.tokens[:, 0].tolist()}) > 1


def test_all_that_is_trained_for_captions_is_one_linear_map(writer, configure):
    from vlm.models.towers.language_model import LazyWriter

    architecture = f"{IMAGE}+limber:{writer}@16"
    config = configure(
        "run",
        model={"architecture": architecture, "tokenizer": "clip", "context_length": 12, "lock": "image"},
        objective={"objective": "caption"},
        steps=6,
    )
    before = {name: tensor.clone() for name, tensor in load_writer(writer).state_dict().items()}
    summary = train(config)
    loaded = load_model(config.run)
    fresh = build_fresh(config)
    changed = {
        name
        for name, tensor in loaded.network.state_dict().items()
        if not torch.equal(tensor, fresh.state_dict()[name])
    }
    assert changed == {"visual.memory.proj.weight", "visual.memory.proj.bias"}
    assert summary.metrics["caption"] < 6
    assert isinstance(loaded.network.get_submodule("text").language_model, LazyWriter)
    after = load_writer(writer).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert loaded.can_caption


def load_writer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def build_fresh(config: Any) -> Any:
    from vlm.train.run_setup import build_model

    return build_model(config, torch.device("cpu")).network


def test_a_saved_captioner_writes_the_same_and_misses_its_language_model(model, tmp_path):
    save_model_folder(tmp_path / "model", model, inputs={})
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    loaded = load_model_folder(tmp_path / "model", torch.device("cpu"), torch.float32)
    assert loaded.caption_images(images) == model.caption_images(images)
    with pytest.raises(UsageError, match="attention"):
        loaded.decode_captions(images, DecodingOptions(), has_attention=True)


def test_a_folder_without_a_language_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a folder"):
        model_config(f"{IMAGE}+limber:{tmp_path / 'absent'}@16")
