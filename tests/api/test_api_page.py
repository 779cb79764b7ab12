"""The examples of docs/api.md, run one after the other in one process, on a few drawn pictures."""

import re
from pathlib import Path

import pytest

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
