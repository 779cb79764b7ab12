"""A model tuned for captions: what it lost since the start is told and held, and a constant captioner is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.errors import UsageError
from vlm.evaluation.caption_evaluator import sameness
from vlm.models.load import load_model
from vlm.train.drift import DriftGuard
from vlm.train.history import read_metrics
from vlm.train.run import train
from vlm.train.validation import open_validation

COCA: Any = {"architecture": "micro-coca"}


def tuned(configure, scene_shards, name: str, start: str, **changes: Any) -> list[dict[str, Any]]:
    """The evaluations of a run that tunes `start` for captions at a rate that harms it."""
    changes = {
        "steps": 4,
        "evaluate_every": 2,
        "val": str(scene_shards / "val"),
        "objective": {"objective": "caption"},
        "optimizer": {"learning_rate": 0.2},
    } | changes
    config = configure(name, model={"start_from": start, "tokenizer": "clip"}, **changes)
    train(config)
    return [line for line in read_metrics(Path(config.run) / "metrics.jsonl") if "text_to_image_recall@1" in line]


@pytest.fixture
def start(configure) -> str:
    config = configure("start", model=COCA, steps=25, objective={"objective": "clip + caption"})
    train(config)
    return config.run


def test_what_tuning_for_captions_costs_is_told_and_held(configure, scene_shards, start, logged):
    free = tuned(configure, scene_shards, "free", start)
    assert all(line["drift/text_to_image_recall@1"] <= 1 for line in free)
    begun_with = free[0]["text_to_image_recall@1"] - free[0]["drift/text_to_image_recall@1"]
    assert free[-1]["text_to_image_recall@1"] - free[-1]["drift/text_to_image_recall@1"] == pytest.approx(begun_with)
    assert "Since the start: text_to_image_recall@1" in logged.text
    # so much is lost that there is something to hold
    worst = min(free[-1]["drift/text_to_image_recall@1"], free[-1]["drift/image_to_text_recall@1"])
    assert worst < -0.02

    for decay in (0.0, 0.5):
        optimizer = {"learning_rate": 0.2, "average_decay": decay}
        held = tuned(configure, scene_shards, f"held-{decay}", start, safety={"max_drift": 0.02}, optimizer=optimizer)
        assert all(line["drift/text_to_image_recall@1"] >= -0.02 for line in held)
        assert all(line["drift/image_to_text_recall@1"] >= -0.02 for line in held)
    assert "weights are drawn back" in logged.text


def test_the_decoder_and_whole_numbers_are_not_drawn_back():
    network: Any = torch.nn.ModuleDict({"visual": torch.nn.BatchNorm1d(2), "text_decoder": torch.nn.Linear(2, 2)})
    guard = DriftGuard.of(network, bound=0.1)
    with torch.no_grad():
        network["visual"].weight.add_(4)
        network["text_decoder"].weight.zero_()
        network["visual"].num_batches_tracked.add_(5)
    figures = iter([{"top1": 0.9}, {"top1": 0.5}, {"top1": 0.7}, {"top1": 0.85}])
    values = guard.measure(network, lambda: next(figures))
    assert values == {"top1": 0.85, "drift/top1": pytest.approx(-0.05)}
    # two halves are left of the four that were added: one of four
    assert torch.allclose(network["visual"].weight, torch.full((2,), 2.0))
    assert not network["text_decoder"].weight.any()
    assert int(network["visual"].num_batches_tracked) == 5
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    average["visual.weight"].fill_(9.0)
    guard.draw_back(average)
    assert torch.allclose(average["visual.weight"], torch.full((2,), 3.0))


def test_the_start_is_measured_once_also_where_it_has_no_such_figures(logged):
    network = torch.nn.Linear(2, 2)
    guard = DriftGuard.of(network, bound=0.0)
    measured: list[int] = []

    def measure() -> dict[str, float]:
        measured.append(len(measured))
        return {"captions/cider": 0.5}

    for times in (2, 3):
        assert guard.measure(network, measure) == {"captions/cider": 0.5}
        assert len(measured) == times
    assert logged.text.count("First the figures of the start") == 1
    assert "Since the start" not in logged.text


@pytest.mark.parametrize("changes", [{}, {"model": COCA}])
def test_a_bound_without_a_start_or_figures_is_refused(configure, changes):
    with pytest.raises(UsageError, match="give --start-from, and --val"):
        train(configure("run", safety={"max_drift": 0.1}, **changes))


def test_a_constant_captioner_is_named_at_the_end_of_training(configure, scene_shards, logged):
    changes = {"steps": 1, "val": str(scene_shards / "val"), "objective": {"objective": "caption"}}
    config = configure("run", model=COCA, **changes)
    train(config)
    assert "different captions for" in logged.text
    validation, model = open_validation(config), load_model(config.run)
    assert validation is not None
    with torch.no_grad():
        # whatever is seen, all tokens are as likely
        model.network.get_parameter("text_decoder.text_projection").zero_()
    assert validation.check_captions(model) == 1
    assert "The model says the same of every image" in logged.text


def test_sameness_is_told_from_half_of_the_images_on():
    assert "of every image" in sameness(["a dog", "a dog"])
    assert "'a dog' of 60% of 5 images (3 different captions)" in sameness(["a dog"] * 3 + ["a cat", "a cow"])
    assert not sameness(["a dog", "a cat", "a cow"])
    assert not sameness(["a dog"])
    assert not sameness([])
