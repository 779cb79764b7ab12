"""A run killed again and again ends with the weights of one that never was: python -m tests.train.kill_many --kills 30

The kills come at random moments, every other one while a checkpoint is being written, which is slowed for that; with
--processes 2 they hit one of the two processes. After each, the newest checkpoint must be whole and no older than any
that was seen whole before. At the end the weights, the losses of all steps and the ledger must equal, bit for bit,
those of the run that was left alone.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import preloaded
from vlm.train.checkpoint.checkpoint_files import find_damage, list_checkpoints
from vlm.train.history import read_metrics

ROOT = Path(__file__).resolve().parents[2]
BETWEEN = 3
PAUSE_SECONDS = 0.15
DEADLINE_SECONDS = 600.0

SLOWED = """
import sys, time
from vlm.train.checkpoint import checkpoint_files
def slow(real):
    def call(*args, **more):
        time.sleep({pause})
        return real(*args, **more)
    return call
for name in ("save_model", "save_file", "write_text", "fsync_folder"):
    setattr(checkpoint_files, name, slow(getattr(checkpoint_files, name)))
from vlm.cli.main import main
sys.argv[0] = "vlm"
main()
"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is run, and how often it is killed. work: a folder for it. chance: where all randomness comes from."""

    shards: Path
    tokenizer: Path
    work: Path
    kills: int
    processes: int = 1
    workers: int = 1
    steps: int = 0
    chance: random.Random

    @property
    def num_steps(self) -> int:
        """Steps of the run: some for each kill."""
        return self.steps or 2 * BETWEEN * (self.kills + 2)

    def command(self, run: Path, *more: str) -> list[str]:
        """The command line that trains in `run`, with slowed checkpoints."""
        script = self.work / "slowed_train.py"
        script.write_text(SLOWED.format(pause=PAUSE_SECONDS), encoding="utf-8")
        launch = [sys.executable, str(script)]
        if self.processes > 1:
            port = str(29_500 + self.chance.randrange(2000))
            launcher = (
                "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
            )
            words = [*launcher.split(), "--num_processes", str(self.processes), "--main_process_port", port]
            launch = [sys.executable, "-m", *words, str(script)]
        options = {
            "data": self.shards,
            "run": run,
            "tokenizer": self.tokenizer,
            "steps": self.num_steps,
            "batch-size": 16,
            "log-every": 1,
            "checkpoint-every": BETWEEN,
            "warmup-steps": 2,
            "workers": self.workers,
        }
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*launch, "train", "tiny", *given, *more]


def start(trial: Trial, run: Path, *more: str) -> preloaded.Popen | subprocess.Popen:
    """Begin or resume the run in a process group of its own; what it says goes to RUN.log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with run.with_suffix(".log").open("ab") as log:
        start_process = preloaded.Popen if trial.processes == 1 else subprocess.Popen
        return start_process(
            trial.command(run, *more), stdout=log, stderr=log, env=environment, start_new_session=True, cwd=ROOT
        )


def history(run: Path) -> list[tuple]:
    """Step, loss and digest of the samples of each step."""
    lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return [(line["step"], line["loss"], line["samples"]) for line in lines]


def kill(trial: Trial, process: preloaded.Popen | subprocess.Popen) -> None:
    """SIGKILL one of several training processes, or all of the run's."""
    trainers = psutil.Process(process.pid).children() if trial.processes > 1 else []
    if trainers:
        with contextlib.suppress(psutil.NoSuchProcess):
            trial.chance.choice(trainers).send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_until_killed(trial: Trial, run: Path, *, is_writing: bool) -> set[str]:
    """Let the run go on, and kill it; the names of the checkpoints seen whole meanwhile.

    is_writing: in the midst of writing a checkpoint, else at any moment after some steps.
    """
    checkpoints, chance = run / "checkpoints", trial.chance
    steps, finished, pause = chance.randrange(1, 2 * BETWEEN), chance.randrange(2), chance.random() * PAUSE_SECONDS
    process, seen = start(trial, run, "--resume"), {path.name for path in list_checkpoints(checkpoints)}
    at_start, least, deadline = len(seen), None, time.monotonic() + DEADLINE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        if least is None and not has_begun(run, process):
            continue
        done = len(history(run))
        least = done if least is None else min(least, done)
        seen |= {path.name for path in list_checkpoints(checkpoints)}
        is_half = any(checkpoints.glob(".step-*.part"))
        if (is_half and len(seen) - at_start >= finished) if is_writing else done - least >= steps:
            time.sleep(pause * (6 if is_writing else 1))
            break
    if process.poll() is not None:
        raise SystemExit(f"The run ended by itself, see {run.with_suffix('.log')}")
    kill(trial, process)
    return seen


def has_begun(run: Path, process: preloaded.Popen | subprocess.Popen) -> bool:
    """Whether the log has changed since this process was started."""
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > psutil.Process(process.pid).create_time()


def check_checkpoints(run: Path, seen: set[str]) -> None:
    """Every checkpoint there is whole, and none newer was ever seen.

    Raises:
        SystemExit: one was lost.
    """
    found = list_checkpoints(run / "checkpoints")
    for path in found:
        if damage := find_damage(path):
            raise SystemExit(f"{path} is damaged after a kill: {damage}")
    newest = found[-1].name if found else ""
    if seen and max(seen) > newest:
        raise SystemExit(f"{max(seen)} was whole before the kill; the newest now is {newest or 'none'}")


def compare(run: Path, whole: Path) -> None:
    """The killed run ended as the other.

    Raises:
        SystemExit: naming what differs.
    """
    for name in ("model/open_clip_model.safetensors", "ledger.json"):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            raise SystemExit(f"{name} differs")
    if history(run) != history(whole):
        raise SystemExit("The losses or samples of the steps differ")


def kill_many(trial: Trial) -> str:
    """Run all of it; one line about what was found.

    Raises:
        SystemExit: a checkpoint was lost or damaged, or the end differs.
    """
    whole, run = trial.work / "whole", trial.work / "killed"
    if start(trial, whole).wait():
        raise SystemExit(f"The run that is left alone failed, see {whole.with_suffix('.log')}")
    writing = 0
    for number in range(trial.kills):
        seen = run_until_killed(trial, run, is_writing=number % 2 == 1)
        is_half = any((run / "checkpoints").glob(".step-*.part"))
        writing += is_half
        check_checkpoints(run, seen)
        newest = max(seen, default="none")
        print(f"kill {number + 1}: newest {newest}{', another half-written' if is_half else ''}", flush=True)
    if start(trial, run, "--resume").wait():
        raise SystemExit(f"The last part failed, see {run.with_suffix('.log')}")
    compare(run, whole)
    return (
        f"{trial.kills} kills, {writing} while a checkpoint was being written, {trial.num_steps} steps: weights, "
        "losses and ledger equal those of the run that was left alone."
    )


def draw_data(folder: Path) -> tuple[Path, Path]:
    """Shards of drawn scenes, and a tokenizer of their captions."""
    from vlm.api.data import train_tokenizer
    from vlm.data.pack import PackConfig, pack
    from vlm.data.sources.source import SceneOptions, SourceOptions
    from vlm.data.sources.source_registry import open_source

    source = open_source("scenes", SourceOptions(scenes=SceneOptions(split="train", number=96, pixels=32)))
    pack(source, folder / "train", PackConfig(samples_per_shard=40))
    train_tokenizer(str(folder / "train"), folder / "scenes.model", vocabulary=300, languages=("en",))
    return folder / "train", folder / "scenes.model"


def main() -> None:
    """Read the arguments and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shards, tokenizer = draw_data(work)
        trial = Trial(
            shards=shards,
            tokenizer=tokenizer,
            work=work,
            kills=given.kills,
            processes=given.processes,
            workers=given.workers,
            chance=random.Random(given.seed),
        )
        print(kill_many(trial))


if __name__ == "__main__":
    main()
