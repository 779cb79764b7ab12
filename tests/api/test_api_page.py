"""The examples of docs/api.md, run one after the other in one process, on a few drawn pictures; its table of verbs."""

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import vlm
from vlm.api.training import train
from vlm.cli.main import VERBS
from vlm.data.sources.source import SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.train.presets import open_preset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
EXAMPLE = re.compile(r"^```(python|toml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# the comment behind a call of print says what it prints
PRINTED = re.compile(r"print\(.*\)  # (.+)$", re.MULTILINE)
NUM_PHOTOS = 120


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """`photos/` in the working folder: images with a text file each."""
    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=NUM_PHOTOS, is_distinct=True)))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(NUM_PHOTOS):
        pair = source.read(number)
        (folder / f"{number:03}.png").write_bytes(pair.image)
        (folder / f"{number:03}.txt").write_text(pair.captions["en"][0])
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.usefixtures("photos")
def test_the_examples_run_and_print_what_they_say(capsys):
    examples = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) >= 5
    names: dict[str, object] = {}
    for language, example in examples:
        if language != "python":
            continue
        exec(compile(example, str(PAGE), "exec"), names)
        printed = capsys.readouterr().out
        for expected in PRINTED.findall(example):
            assert expected in printed


def test_the_configuration_of_the_page_is_one(tmp_path):
    [example] = [
        example for language, example in EXAMPLE.findall(PAGE.read_text(encoding="utf-8")) if language == "toml"
    ]
    (tmp_path / "run.toml").write_text(example)
    config = open_preset(str(tmp_path / "run.toml"))
    assert (config.epochs, config.optimizer.learning_rate) == (20.0, 1e-3)
    assert config.optimizer.warmup_steps == open_preset("tiny").optimizer.warmup_steps


ROW = re.compile(r"^\| `vlm ([^`]+)` \| `vlm\.([\w.]+)`", re.MULTILINE)
CALLS = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
SHOWN = {"json", "html", "files", "null", "open", "yes"}
# options that a call has by another name, in its object, or not at all: what they say is shown or asked of people
OTHERWISE = {
    "train": {"config": "settings"},
    "scale": {"config": "settings"},
    "mixture": {"config": "settings"},
    "models": {"fetch": "vlm.fetch_model"},
    "runs compare": {"out": "RunComparison.draw"},
    "eval": {"models": "model"},
    "classify": {"model": "vlm.load", "device": "vlm.load", "backend": "vlm.load"},
    "caption": {"model": "vlm.load", "device": "vlm.load", "precision": "vlm.load"}
    | {"out": "vlm.caption_shards", "workers": "vlm.caption_shards", "processes": "vlm.caption_shards"}
    | {"engine": "vlm.caption_shards", "ray_address": "vlm.caption_shards", "allow_damage": "vlm.caption_shards"},
    "explain": {"out": "Explanation.save"},
    "relate": {"captions_only": "images"},
    "index build": dict.fromkeys(
        ("nlist", "nprobe", "hnsw_m", "ef_construction", "ef_search", "refine_factor"), "tuning"
    ),
    "index add": {"source": "items", "model": "vlm.open_index"},
    "index update": {"source": "items", "model": "vlm.open_index"},
    "index set": {"table": "values"},
    "index delete": {"uid": "uids"},
    "index compact": {"discard_previous": "keep_previous"},
    "index fit-reranker": {"reranker": "out"}
    | dict.fromkeys(("codes", "candidates", "epochs", "learning_rate"), "options")
    | dict.fromkeys(("held_out", "max_images", "language", "seed"), "options"),
    "search": {"model": "vlm.open_index", "rerank": "vlm.open_index", "backend": "vlm.open_index"}
    | {"queries": "SearchIndex.search_many", "min_probability": "relevant"},
    "find": {"min_probability": "relevant", "no_update": "update"},
    "watch": {"poll": "poll_seconds"},
}
# defaults of another form: a preset, a text for numbers, a switch that a call needs not
OTHER_DEFAULTS = {("doctor", "workers"), ("index set", "key"), ("search", "rerank_top"), ("caption", "decoding")}


def test_every_verb_has_a_call_in_the_table():
    assert list(CALLS) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_call_has_the_options_of_its_verb(verb):
    name, *method = CALLS[verb].split(".")
    assert name in vlm.__all__
    # vlm.train is a package that passes on what it is called with
    call = train if name == "train" else functools.reduce(getattr, method, getattr(vlm, name))
    parameters = inspect.signature(call).parameters
    module, verb_class, _ = VERBS[verb]
    options = dataclasses.fields(getattr(importlib.import_module(f"vlm.cli.{module}"), verb_class))
    for option in options:
        otherwise = OTHERWISE.get(verb, {}).get(option.name)
        if otherwise:
            assert "." in otherwise or otherwise in parameters
        if otherwise or option.name in SHOWN - parameters.keys() or (option.name == "index" and method):
            continue
        assert option.name in parameters, f"vlm {verb}: {CALLS[verb]} has no {option.name}"
        if (verb, option.name) not in OTHER_DEFAULTS:
            assert plain(parameters[option.name].default) == plain(option.default), f"vlm {verb}: {option.name}"


def plain(default: Any) -> Any:
    """A default in one form: no value, an empty text and an empty list are alike, and so are a path and its text."""
    if default in (dataclasses.MISSING, inspect.Parameter.empty):
        return None
    return (str(default) if isinstance(default, Path) else default) or None
