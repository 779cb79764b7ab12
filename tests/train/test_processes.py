"""Training in several processes: under `accelerate launch` one is killed, and the run resumes under other splits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import preloaded
from tests.data.tar_fixture import write_tar
from vlm.train.history import read_metrics

STEPS = 30
BATCH = 12
DAMAGED = {0: {3: "unreadable image"}, 2: {0: "no caption", 5: "unreadable json"}}


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory) -> Path:
    """Three shards of 40, 1 and 16 samples, three of them unusable: 30 batches of 12 are six epochs."""
    folder = tmp_path_factory.mktemp("damaged")
    for number, size in enumerate((40, 1, 16)):
        bad = DAMAGED.get(number, {})
        write_tar(folder / f"{number}.tar", [bad.get(place, "") for place in range(size)], prefix="k")
    return folder


def launched(words: list[str], *, processes: int, port: int) -> list[str]:
    """The command under accelerate's launcher."""
    # what accelerate calls multi_gpu is torchrun; with ACCELERATE_USE_CPU it starts gloo processes
    launcher = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    ranks = f"{launcher} --num_processes {processes} --main_process_port {port}".split()
    return [*words[:2], *ranks, *words[1:]]


def command(shards: Path, tokenizer: Path, run: Path, *, workers: int) -> list[str]:
    launch = [sys.executable, "-m", "vlm"]
    options = {
        "data": shards,
        "run": run,
        "tokenizer": tokenizer,
        "steps": STEPS,
        "batch-size": BATCH,
        "log-every": 1,
        "checkpoint-every": 4,
        "warmup-steps": 2,
        "max-bad": 0.5,
        "workers": workers,
    }
    return [*launch, "train", "tiny", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def history(run: Path) -> list[tuple]:
    lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return [(line["step"], line["samples"], line["loss"]) for line in lines]


def accounts(run: Path) -> dict[str, dict]:
    files = [run / "ledger.json", *sorted((run / "ledger").iterdir())]
    return {path.name: json.loads(path.read_text()) for path in files}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def whole(damaged_shards, scene_tokenizer, tmp_path_factory) -> Path:
    """The uninterrupted run, in two processes."""
    run, port = tmp_path_factory.mktemp("whole") / "run", 29_500 + random.randrange(500)
    words = command(damaged_shards, scene_tokenizer, run, workers=0)
    preloaded.run_ranks(words, processes=2, port=port, env=environment())
    return run


@pytest.fixture(scope="module")
def killed(damaged_shards, scene_tokenizer, tmp_path_factory) -> Path:
    """The same run after one of its two processes, either, was killed between two checkpoints."""
    run, port = tmp_path_factory.mktemp("killed") / "run", 29_500 + random.randrange(500)
    words = launched(command(damaged_shards, scene_tokenizer, run, workers=1), processes=2, port=port)
    launcher = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and launcher.poll() is None:
            done = len(history(run))
            if done >= 10 and done % 4:
                break
            time.sleep(0.005)
        trainers = psutil.Process(launcher.pid).children()
        assert len(trainers) == 2, trainers
        random.choice(trainers).send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    assert not (run / "manifest.json").exists()
    return run


def test_the_ledger_of_the_whole_run_adds_up(whole):
    files = accounts(whole)
    assert len(files) == 1 + STEPS * BATCH // 57
    for name, content in files.items():
        total = content["total"]
        assert total["asked"] == total["seen"] + total["replaced"], name
        assert sum(total["corrupt"].values()) == total["replaced"] == total["stood_in"], name
        if name != "ledger.json":
            assert (total["asked"], total["replaced"], total["repeated"]) == (57, 3, 0)
    failures = {(Path(told["shard"]).name, told["key"], told["reason"]) for told in files["ledger.json"]["failures"]}
    assert failures == {
        ("0.tar", "k0-3", "unreadable image"),
        ("2.tar", "k2-0", "no caption"),
        ("2.tar", "k2-5", "unreadable json"),
    }


@pytest.mark.parametrize(
    ("processes", "workers"),
    [(2, 1), (1, 3), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_a_run_that_lost_a_process_goes_on_identically_under_any_split(
    processes, workers, whole, killed, damaged_shards, scene_tokenizer, tmp_path, free_port
):
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    before = history(run)
    words = [*command(damaged_shards, scene_tokenizer, run, workers=workers), "--resume"]
    preloaded.run_ranks(words, processes=processes, port=free_port(), env=environment())
    want = history(whole)
    assert before == want[: len(before)]
    assert [line[:2] for line in history(run)] == [line[:2] for line in want]
    if processes == 2:
        assert history(run) == want
    assert accounts(run) == accounts(whole)
