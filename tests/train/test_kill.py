"""A run killed by SIGKILL between two checkpoints, in a process of its own, resumes as if it had not been."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import preloaded
from tests.train.kill_many import Trial, kill_many
from vlm.train.history import read_metrics

STEPS = 40


def command(scene_shards, scene_tokenizer, run, workers, *more):
    words = [
        "train",
        "tiny",
        "--data",
        str(scene_shards / "train"),
        "--run",
        str(run),
        "--tokenizer",
        str(scene_tokenizer),
    ]
    words += [
        "--steps",
        str(STEPS),
        "--batch-size",
        "16",
        "--log-every",
        "1",
        "--checkpoint-every",
        "5",
        "--warmup-steps",
        "2",
    ]
    return [sys.executable, "-m", "vlm", *words, "--workers", str(workers), *more]


def signalled(words, run, number, *, is_group=False):
    """Exit code and talk of a run that is sent a signal after its third step, and saves for no other reason.

    is_group: its workers are sent it too, as by timeout and batch systems.
    """
    process = preloaded.Popen(
        [*words, "--checkpoint-every", "1000"], stderr=subprocess.PIPE, text=True, start_new_session=is_group
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and len(history(run)) >= 3):
        time.sleep(0.005)
    if is_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, talk = process.communicate(timeout=120)
    return process.returncode, talk


def history(run):
    return [(line["step"], line["loss"], line["samples"]) for line in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(scene_shards, scene_tokenizer, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    preloaded.run(command(scene_shards, scene_tokenizer, run, 0), check=True, capture_output=True)
    return history(run)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_killed_run_resumes_to_the_same_samples_and_losses(
    workers, uninterrupted, scene_shards, scene_tokenizer, tmp_path
):
    run = tmp_path / "run"
    process = preloaded.Popen(
        command(scene_shards, scene_tokenizer, run, workers), stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        steps = [step for step, _, _ in history(run)] if (run / "metrics.jsonl").exists() else []
        if steps and steps[-1] >= 12 and steps[-1] % 5:
            break
        time.sleep(0.005)
    with_it = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(with_it, timeout=30)
    assert not left, "loader workers outlived the run"
    assert not (run / "manifest.json").exists()
    before = history(run)
    preloaded.run(command(scene_shards, scene_tokenizer, run, workers, "--resume"), check=True, capture_output=True)
    assert before == uninterrupted[: len(before)]
    assert history(run) == uninterrupted


@pytest.mark.parametrize("is_group", [False, True], ids=["the run", "all its processes"])
def test_sigterm_saves_before_it_stops_and_says_how_to_go_on(
    is_group, uninterrupted, scene_shards, scene_tokenizer, tmp_path
):
    run = tmp_path / "run"
    code, talk = signalled(command(scene_shards, scene_tokenizer, run, 1), run, signal.SIGTERM, is_group=is_group)
    assert code == 1
    assert "everything is saved" in talk
    assert f"vlm train {run} --resume" in talk
    preloaded.run([sys.executable, "-m", "vlm", "train", str(run), "--resume"], check=True, capture_output=True)
    assert history(run) == uninterrupted


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on(uninterrupted, scene_shards, scene_tokenizer, tmp_path):
    run = tmp_path / "run"
    code, talk = signalled(command(scene_shards, scene_tokenizer, run, 1), run, signal.SIGUSR1)
    assert code == 0
    assert "SIGUSR1: saving after this step; training continues" in talk
    kept = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert kept[0] == 0
    assert 3 <= kept[1] < kept[2] == STEPS
    assert history(run) == uninterrupted


@pytest.mark.slow
def test_two_kills_one_of_them_while_a_checkpoint_is_written_change_nothing(scene_shards, scene_tokenizer, tmp_path):
    told = kill_many(
        Trial(
            shards=scene_shards / "train",
            tokenizer=scene_tokenizer,
            work=tmp_path,
            kills=2,
            chance=random.Random(os.urandom(8)),
        )
    )
    assert told.startswith("2 kills, ")
