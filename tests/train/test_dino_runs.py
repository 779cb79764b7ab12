"""DINO's prototypes in whole runs: resumed exactly, and in two processes as in one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import preloaded
from tests.train.test_processes import command, environment
from tests.train.test_run import assert_same_weights, interrupt_after
from vlm.train.checkpoint.checkpoint_files import HEADS, list_checkpoints
from vlm.train.history import read_metrics
from vlm.train.run import train

OBJECTIVE = {"objective": "rs-m-clip", "local_views": 2, "prototypes": 32}


def heads_file(run):
    """The head with its teacher and centre, of the newest checkpoint."""
    return list_checkpoints(Path(run) / "checkpoints")[-1] / HEADS


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(configure, history):
    settings = {
        "steps": 6,
        "micro_batch": 5,
        "peak_tflops": 1.0,
        "objective": OBJECTIVE,
        "optimizer": {"average_decay": 0.9, "warmup_steps": 1},
        "safety": {"checkpoint_every": 3},
    }
    whole, again = (configure(name, **settings) for name in ("whole", "again"))
    train(whole)
    interrupt_after(again, whole.run, 3)
    stopped = load_file(heads_file(again.run))
    train(again, resume=True)
    assert history(again.run) == history(whole.run)
    assert_same_weights(again.run, whole.run)
    assert heads_file(again.run).read_bytes() == heads_file(whole.run).read_bytes()
    finished = load_file(heads_file(again.run))
    for name in ("prototypes.centre", "prototypes.prototypes", "prototypes.teacher_prototypes"):
        assert stopped[name].any(), name
        assert (finished[name] != stopped[name]).any(), name


def test_two_processes_are_one(scene_shards, scene_tokenizer, tmp_path, free_port):
    options = ["--steps", "4", "--checkpoint-every", "4", "--objective", "rs-m-clip", "--local-views", "2"]
    options += ["--prototypes", "32", "--ema-decay", "0.9", "--peak-tflops", "1"]
    for processes in (1, 2):
        words = command(scene_shards / "train", scene_tokenizer, tmp_path / str(processes), workers=0) + options
        preloaded.run_ranks(words, processes=processes, port=free_port(), env=environment())
    one, two = (tmp_path / "1", tmp_path / "2")
    for first, second in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        assert second["samples"] == first["samples"]
        for name in ("clip", "dino", "gradient_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    wanted, found = (load_file(heads_file(run)) for run in (one, two))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) < 1e-5, name
