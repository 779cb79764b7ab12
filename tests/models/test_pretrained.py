"""MODEL by names and folders of open_clip and of the Hugging Face Hub, without a network."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch

from tests.models.huggingface_fixture import CAPTIONS, clip_folder, siglip_folder
from vlm.errors import UsageError, VlmError
from vlm.models.load import load_model, save_model_folder
from vlm.models.sentence_encoder import load_text_model

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def open_clip_name(tmp_path_factory):
    """A tiny architecture that open_clip knows by its name, with a file of weights."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-of-test.json").write_text(json.dumps(CONFIG))
    (folder / "tiny-of-test-quickgelu.json").write_text(json.dumps(CONFIG | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-of-test")
    torch.save(network.state_dict(), folder / "weights.pt")
    return "tiny-of-test", folder / "weights.pt"


@pytest.fixture
def open_clip_folder(open_clip_name, tmp_path):
    """As open_clip's push_to_hf_hub writes it: a configuration and weights, nothing of ours."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"size": 32}}))
    shutil.copy(open_clip_name[1], folder / "open_clip_pytorch_model.bin")
    return folder


def put_on_hub(folder, cache, name):
    """The cache of the hub as a download of this repository leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def test_a_name_of_open_clip_with_a_file_of_weights(open_clip_name):
    name, weights = open_clip_name
    model = load_model(f"{name}:{weights}", device="cpu")
    network: Any = open_clip.create_model(name, pretrained=str(weights)).eval()
    with torch.inference_mode():
        theirs = network.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)
    assert (model.embed_texts(CAPTIONS) - theirs).abs().max() <= 1e-6


def test_weights_trained_with_quickgelu_are_given_it_under_either_name(open_clip_name, monkeypatch, tmp_path):
    """open_clip lists OpenAI's weights as ViT-B-32:openai, too, builds GELU there and only warns."""
    name, weights = open_clip_name
    known = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(known, name, {"theirs": {"url": "theirs", "quick_gelu": True}, "others": {"url": "others"}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    quick = load_model(f"{name}-quickgelu:{weights}", device="cpu")
    plain = load_model(f"{name}:{weights}", device="cpu")
    theirs = load_model(f"{name}:theirs", device="cpu")
    assert torch.equal(theirs.embed_texts(CAPTIONS), quick.embed_texts(CAPTIONS))
    assert not torch.equal(plain.embed_texts(CAPTIONS), quick.embed_texts(CAPTIONS))
    assert torch.equal(load_model(f"{name}:others", device="cpu").embed_texts(CAPTIONS), plain.embed_texts(CAPTIONS))
    # what was embedded with the one activation is not searched with the other
    assert theirs.fingerprint == quick.fingerprint != plain.fingerprint
    save_model_folder(tmp_path / "saved", theirs, inputs={})
    assert torch.equal(
        load_model(str(tmp_path / "saved"), device="cpu").embed_texts(CAPTIONS), quick.embed_texts(CAPTIONS)
    )


def test_a_file_does_not_say_its_activation_so_the_other_name_is_told(open_clip_name, logged):
    name, weights = open_clip_name
    load_model(f"{name}:{weights}", device="cpu")
    assert f"give {name}-quickgelu:{weights}, or its embeddings are wrong" in logged.text
    logged.clear()
    load_model(f"{name}-quickgelu:{weights}", device="cpu")
    assert "embeddings are wrong" not in logged.text


def write_bad_checkpoint(kind: str, weights: Path, file: Path) -> None:
    if kind == "transformers":
        torch.save({"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3)}, file)
    elif kind == "another size":
        torch.save(torch.load(weights) | {"visual.proj": torch.zeros(3, 3)}, file)
    elif kind == "TorchScript":
        torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    elif kind == "other objects":
        torch.save({"args": Namespace(lr=1), "state_dict": torch.load(weights)}, file)
    elif kind == "a list":
        torch.save([1, 2], file)
    else:
        file.write_bytes(b"" if kind == "nothing" else b"hello")


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("transformers", "pytorch_model.bin", r"of Hugging Face's transformers, not of open_clip: give the folder"),
        ("another size", "epoch_3.pt", r"epoch_3.pt does not hold the weights of tiny-of-test: .*visual\.proj"),
        ("TorchScript", "ViT-B-32.pt", r"TorchScript archive; .* give tiny-of-test-quickgelu:openai"),
        ("other objects", "epoch_3.pt", r"tensors only, no other Python objects\): Weights only"),
        ("a list", "epoch_3.pt", "cannot be read as a checkpoint"),
        ("nothing", "epoch_3.pt", r"epoch_3.pt cannot be read .* EOFError"),
        ("text", "epoch_3.safetensors", "cannot be read .* header"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_holds_no_such_weights_is_one_sentence(open_clip_name, tmp_path, kind, file, message):
    write_bad_checkpoint(kind, open_clip_name[1], tmp_path / file)
    with pytest.raises(VlmError, match=message) as error:
        load_model(f"{open_clip_name[0]}:{tmp_path / file}", device="cpu")
    assert len(str(error.value)) < 600


def test_a_name_alone_asks_for_weights_and_names_them(open_clip_name):
    with pytest.raises(UsageError, match=r"leaves open which weights: give tiny-of-test:FILE"):
        load_model(open_clip_name[0])
    with pytest.raises(UsageError, match=r"'ViT-B-32' leaves open which weights: give one of .*ViT-B-32:openai"):
        load_model("ViT-B-32")


def test_a_name_with_one_set_of_weights_means_these(monkeypatch):
    """Out of reach here, but it is what was looked for."""
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["laion2b_s34b_b79k"])
    with pytest.raises(VlmError, match="The weights of ViT-B-32 are neither cached nor within reach"):
        load_model("ViT-B-32")


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_that_open_clip_wrote(open_clip_name, open_clip_folder, prefix):
    name, weights = open_clip_name
    model = load_model(f"{prefix}{open_clip_folder}", device="cpu")
    assert model.fingerprint == load_model(f"{name}:{weights}", device="cpu").fingerprint


def test_a_folder_without_weights_is_refused_rather_than_drawn(open_clip_folder):
    (open_clip_folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(VlmError, match="cannot be read"):
        load_model(str(open_clip_folder))


def test_the_cleaning_of_open_clips_configuration_is_used(open_clip_folder, tmp_path):
    siglip_folder(tmp_path / "siglip")
    for path in (tmp_path / "siglip").glob("*"):
        if path.name.startswith(("tokenizer", "spiece", "special")):
            shutil.copy(path, open_clip_folder)
    config = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"clean": "canonicalize"}}
    (open_clip_folder / "open_clip_config.json").write_text(json.dumps(config))
    theirs: Any = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    ours = load_model(str(open_clip_folder), device="cpu").tokenizer
    assert np.array_equal(ours.encode(CAPTIONS), theirs(CAPTIONS).numpy())


@pytest.mark.parametrize("spec", ["somebody/tiny-clip", "hf-hub:somebody/tiny-clip"])
def test_a_repository_in_the_cache_of_the_hub(tmp_path, monkeypatch, spec):
    folder = clip_folder(tmp_path / "clip")
    put_on_hub(folder, tmp_path / "cache", "somebody/tiny-clip")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = load_model(spec, device="cpu")
    assert model.name == spec
    assert model.fingerprint == load_model(str(folder), device="cpu").fingerprint


def test_an_open_clip_repository_in_the_cache_of_the_hub(open_clip_folder, tmp_path, monkeypatch):
    put_on_hub(open_clip_folder, tmp_path / "cache", "somebody/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    expected = load_model(str(open_clip_folder), device="cpu").fingerprint
    assert load_model("hf-hub:somebody/tiny", device="cpu").fingerprint == expected


def test_a_mistyped_folder_is_told_apart_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match="'runs/mine': no folder has this name, and on the Hugging Face Hub it is neit"
    ):
        load_model("runs/mine")
    with pytest.raises(UsageError, match=r"runs/mine is not a folder"):
        load_model("local-dir:runs/mine")


def test_its_texts_are_those_of_the_dual_encoder(tmp_path):
    """Not those of a language model, which the same kind of folder can hold."""
    folder = clip_folder(tmp_path / "clip")
    expected = load_model(str(folder), device="cpu").embed_texts(CAPTIONS)
    assert torch.equal(torch.as_tensor(load_text_model(str(folder), device="cpu").embed_texts(CAPTIONS)), expected)
