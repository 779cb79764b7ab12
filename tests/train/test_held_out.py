"""Early stopping keeps the best model, and overfitting is told in words, once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vlm.errors import UsageError, VlmError
from vlm.models.load import load_model
from vlm.train.history import overfitting, read_metrics
from vlm.train.run import train

METRIC = "text_to_image_recall@10"


def lines_of(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Lines with (loss, recall), with losses between them, as a run logs them."""
    lines: list[dict[str, float]] = []
    for number, (loss, recall) in enumerate(pairs):
        lines += [
            {"step": 10 * number + 5, "loss": loss + 0.1},
            {"step": 10 * number + 10, "loss": loss, METRIC: recall},
        ]
    return lines


def test_recall_that_falls_while_the_loss_falls_is_told_once():
    told = overfitting(lines_of((2.0, 0.5), (1.0, 0.6), (0.5, 0.58), (0.3, 0.57)), METRIC)
    assert "since step 20 the loss on what is trained on has fallen from 1 to 0.3" in told
    assert "from 60.0% to 57.0%" in told
    assert "--early-stop" in told
    assert not overfitting(lines_of((2.0, 0.5), (1.0, 0.6), (0.5, 0.58), (0.3, 0.57), (0.2, 0.56)), METRIC)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(2.0, 0.5)],
        # one low value is no course
        [(2.0, 0.5), (1.0, 0.6), (0.5, 0.55)],
        [(2.0, 0.5), (1.0, 0.6), (0.5, 0.58), (0.4, 0.61)],
        # half a point is chance
        [(2.0, 0.5), (1.0, 0.6), (0.5, 0.595), (0.4, 0.595)],
        # a loss that does not fall is another trouble
        [(2.0, 0.5), (1.0, 0.6), (1.2, 0.5), (1.3, 0.4)],
    ],
)
def test_what_is_no_overfitting_is_not_called_so(pairs):
    assert overfitting(lines_of(*pairs), METRIC) == ""


def stopping(configure, scene_shards, name: str, **changes):
    changes = {
        "steps": 40,
        "evaluate_every": 2,
        "val": str(scene_shards / "val"),
        "log_every": 2,
        "val_limit": 30,
    } | changes
    # at such a rate nothing is learned for long
    return configure(
        name,
        optimizer={"learning_rate": 0.3},
        safety={"keep_best": METRIC, "early_stop": 2, "checkpoint_every": 1000},
        **changes,
    )


def test_a_run_without_gain_ends_early_with_its_best_weights(configure, scene_shards, logged):
    config = stopping(configure, scene_shards, "run")
    summary = train(config)
    assert summary.steps < 40
    lines = [line for line in read_metrics(Path(config.run) / "metrics.jsonl") if METRIC in line]
    best = max(lines, key=lambda line: line[METRIC])
    assert (
        [line["step"] for line in lines[-2:]]
        == [best["step"] + 2, best["step"] + 4]
        == [summary.steps - 2, summary.steps]
    )
    # what the summary says is of the weights that are kept
    assert summary.metrics[METRIC] == best[METRIC]
    checkpoint = Path(config.run) / f"checkpoints/step-{best['step']:08d}"
    assert load_model(config.run, device="cpu").fingerprint == load_model(str(checkpoint), device="cpu").fingerprint
    assert json.loads((Path(config.run) / "manifest.json").read_text())["details"]["best"]["step"] == best["step"]
    assert "the run ends (--early-stop)" in logged.text
    # interrupted before its model was written, it does not go on
    (Path(config.run) / "manifest.json").unlink()
    assert train(config, resume=True).steps == summary.steps


def test_a_best_checkpoint_that_is_gone_is_fetched_from_the_copies(configure, scene_shards, tmp_path):
    config = stopping(configure, scene_shards, "run")
    train(config)
    fingerprint = load_model(config.run, device="cpu").fingerprint
    run = Path(config.run)
    best = json.loads((run / "manifest.json").read_text())["details"]["best"]["step"]
    # as on another machine: the run is resumed from its last checkpoint, and has no other
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "model")
    (tmp_path / "copies" / run.name).mkdir(parents=True)
    shutil.move(run / f"checkpoints/step-{best:08d}", tmp_path / "copies" / run.name)
    with pytest.raises(VlmError, match=r"absent.*--early-stop 0 --allow safety.early_stop"):
        train(config, resume=True)
    train(replace(config, safety=replace(config.safety, checkpoint_to=str(tmp_path / "copies"))), resume=True)
    assert load_model(config.run, device="cpu").fingerprint == fingerprint


def test_early_stopping_needs_something_to_judge(configure):
    with pytest.raises(UsageError, match="give --val SHARDS"):
        train(configure("run", safety={"early_stop": 2}))
