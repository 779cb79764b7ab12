"""Evaluation during training: its figures are those of one process, whatever the number of processes."""

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests import preloaded
from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import colour_shards
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, PixelMemory
from vlm.train.history import read_metrics
from vlm.train.validation import EvaluationClock, open_validation

SHARED = ("text_to_image", "image_to_text", "shapes/")


def train(scene_shards, tokenizer, run, *, processes, port=0, more=()):
    # with no learning the weights are those of the first step, whatever the number of processes
    options = {
        # several shards, whose batches are shared, and more captions than one batch holds
        "data": scene_shards / "train", "val": scene_shards / "train", "run": run, "tokenizer": tokenizer, "steps": 1,
        "batch-size": 8, "learning-rate": 0, "warmup-steps": 1, "workers": 0, "evaluate-every": 1,
        "image-size": 32, "context-length": 24, "peak-tflops": 1,
    }  # fmt: skip
    words = [sys.executable, "-m", "vlm", "train", "tiny"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        preloaded.run([*words, *more], check=True, capture_output=True, env=environment)
    else:
        preloaded.run_ranks([*words, *more], processes=processes, port=port, env=environment)
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if any(part in name for part in SHARED)} for line in lines]


SUITE = """
[data.shapes]
path = "val"
label = "scene.shape"

[[evaluate]]
evaluator = "zero-shot"
data = "shapes"
"""


@pytest.mark.parametrize("more", [(), pytest.param(("--sharding", "fsdp"), marks=pytest.mark.slow)])
def test_two_processes_measure_bit_for_bit_what_one_does(scene_shards, scene_tokenizer, tmp_path, free_port, more):
    (tmp_path / "suite.toml").write_text(SUITE)
    suite = ("--val-suite", str(tmp_path / "suite.toml"), "--val-suite-root", str(scene_shards))
    alone = train(scene_shards, scene_tokenizer, tmp_path / "alone", processes=1, more=suite)
    together = train(
        scene_shards, scene_tokenizer, tmp_path / "together", processes=2, port=free_port(), more=(*suite, *more)
    )
    assert any(name.startswith("shapes/zero-shot/") for name in alone[0])
    assert len(alone) == 1
    assert len(alone[0]) >= 14
    assert json.dumps(alone) == json.dumps(together)


class Together:
    """One of several processes, which are threads here."""

    def __init__(self, rank, num_processes, board, barrier):
        self.rank, self.num_processes, self.board, self.barrier = rank, num_processes, board, barrier

    def gather(self, parts):
        self.board[self.rank] = parts
        self.barrier.wait(timeout=60)
        gathered = [part for rank in range(self.num_processes) for part in self.board[rank]]
        self.barrier.wait(timeout=60)
        return gathered


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_features_shared_by_processes_are_put_together_in_order(tmp_path, num_processes, monkeypatch):
    """More processes than batches among them, whose networks all run equally often."""
    monkeypatch.setattr("vlm.evaluation.features.TEXTS_AT_ONCE", 2)
    monkeypatch.setattr("vlm.evaluation.features.IMAGES_AT_ONCE", 1)
    monkeypatch.setattr("vlm.evaluation.evaluation_set.IMAGES_AT_ONCE", 1)
    data = open_evaluation_set(colour_shards(tmp_path / "shards"))
    texts = ["red", "green", "blue", "red green", "red"]
    _, images = EvaluatedModel(ColourEncoder()).image_features(data)
    vectors = EvaluatedModel(ColourEncoder()).text_features(texts)
    board, barrier = {}, threading.Barrier(num_processes)

    def compute(rank):
        encoder = CountingEncoder()
        model = EvaluatedModel(encoder, sharing=Together(rank, num_processes, board, barrier))
        return model.image_features(data)[1], model.text_features(texts), encoder.num_calls

    with ThreadPoolExecutor(num_processes) as threads:
        computed = list(threads.map(compute, range(num_processes)))
    for shared, shared_texts, _ in computed:
        assert np.array_equal(shared, images)
        assert np.array_equal(shared_texts, vectors)
    assert len({num_calls for _, _, num_calls in computed}) == 1


class CountingEncoder(ColourEncoder):
    """Counts how often its network runs."""

    num_calls = 0

    def embed_images(self, images):
        self.num_calls += 1
        return super().embed_images(images)

    def embed_texts(self, texts):
        self.num_calls += 1
        return super().embed_texts(texts)


def test_pixels_are_read_once_while_there_is_room(tmp_path, monkeypatch):
    data = open_evaluation_set(colour_shards(tmp_path / "shards"))
    pixels = PixelMemory(max_bytes=10_000)
    features = [EvaluatedModel(ColourEncoder(), pixels=pixels).image_features(data)[1] for _ in range(2)]
    monkeypatch.setattr(type(data), "iter_images", lambda *_, **__: pytest.fail("the images are read again"))
    features.append(EvaluatedModel(ColourEncoder(), pixels=pixels).image_features(data)[1])
    assert all(np.array_equal(features[0], other) for other in features)
    with pytest.raises(pytest.fail.Exception, match="read again"):
        EvaluatedModel(ColourEncoder(), pixels=PixelMemory(max_bytes=10)).image_features(data)


def test_evaluations_that_take_much_of_the_time_are_named_with_a_better_cadence(logged):
    clock = EvaluationClock(evaluate_every=100)
    clock.add(0.0, 50.0)  # reads the images
    clock.add(1000.0, 1010.0)
    assert not logged.text
    clock.add(1110.0, 1120.0)
    assert "Evaluating takes 9% of the time of the run (10.0 s every 100 steps): --evaluate-every 450" in logged.text
    logged.clear()
    clock.add(1220.0, 1230.0)
    assert not logged.text


def test_evaluations_wait_until_they_are_within_the_budget(logged):
    clock = EvaluationClock(evaluate_every=10, budget=0.02, started=100.0)
    now, spent = 100.0, 0.0
    evaluated = []
    for number in range(1, 400):
        now += 7.0
        if clock.allows(now):
            clock.add(now, now + 3.0)
            now += 3.0
            spent += 3.0
            evaluated.append(number)
            # all but the first, of which nobody knows how long it takes
            assert len(evaluated) == 1 or spent <= 0.02 * (now - 100.0)
    assert evaluated[0] == 1
    # and no more seldom than it has to be
    assert spent + 3.0 > 0.02 * (now + 3.0 + 7.0 - 100.0)
    assert logged.text.count("An evaluation takes 3.0 s: it waits for a later multiple of 10 steps") == 1


def test_a_run_beyond_its_budget_evaluates_at_first_and_at_last(scene_shards, scene_tokenizer, tmp_path):
    more = ("--steps", "4", "--log-every", "1", "--val-limit", "20", "--evaluate-budget", "0.000001")
    lines = train(scene_shards, scene_tokenizer, tmp_path / "run", processes=1, more=more)
    assert [bool(values) for values in lines] == [True, False, False, True]


def test_without_a_budget_no_evaluation_waits():
    clock = EvaluationClock(evaluate_every=10)
    clock.add(0.0, 50.0)
    assert clock.allows(51.0)


def test_a_suite_whose_data_is_not_there_is_named_at_once(configure, tmp_path):
    (tmp_path / "suite.toml").write_text(SUITE)
    config = configure("run", val_suite=str(tmp_path / "suite.toml"), val_suite_root=str(tmp_path))
    with pytest.raises(UsageError, match=r"suite.toml: shapes is left out .*--val-suite-root"):
        open_validation(config)
