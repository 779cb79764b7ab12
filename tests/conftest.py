"""Fixtures of all rooms."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too: kills, several processes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests, unless they are asked for; each promise has a shorter test as well."""
    if config.getoption("--slow") or config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)


@pytest.fixture
def free_port():
    """A function that names a port of this machine nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures and captions; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "datasets"
    if not folder.is_dir():
        pytest.skip("../shared/datasets is not there")
    return folder


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory) -> Path:
    """A folder with shards of drawn scenes: train/ (96 in 3 shards) and val/ (40 distinct ones)."""
    from vlm.data.pack import PackConfig, pack
    from vlm.data.sources.source import SceneOptions, SourceOptions
    from vlm.data.sources.source_registry import open_source

    folder = tmp_path_factory.mktemp("scenes")
    train = SceneOptions(split="train", number=96, pixels=32)
    val = SceneOptions(split="val", number=40, pixels=32, is_distinct=True)
    for scenes in (train, val):
        source = open_source("scenes", SourceOptions(scenes=scenes))
        pack(source, folder / scenes.split, PackConfig(samples_per_shard=40))
    return folder


@pytest.fixture(scope="session")
def scene_tokenizer(scene_shards, tmp_path_factory) -> Path:
    """A SentencePiece model of the scenes' captions."""
    from vlm.api.data import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "scenes.model"
    train_tokenizer(str(scene_shards / "train"), path, vocabulary=300, languages=("en",))
    return path


@pytest.fixture(autouse=True)
def logged(caplog):
    """What the package logs at INFO and above while a test calls it directly."""
    with caplog.at_level(logging.INFO, logger="vlm"):
        yield caplog


@pytest.fixture(autouse=True)
def micro_architectures(monkeypatch):
    """Networks small enough to train in a second, with dropout-like randomness in the image tower."""
    from vlm.models.model import ARCHITECTURES

    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1, "patch_dropout": 0.25}
    text = {"context_length": 24, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1}
    micro: dict[str, Any] = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    micro_coca = {
        "embed_dim": 32,
        "vision_cfg": vision
        | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8, "output_tokens": True},
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 24, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    monkeypatch.setitem(ARCHITECTURES, "micro", micro)
    monkeypatch.setitem(ARCHITECTURES, "micro-coca", micro_coca)
