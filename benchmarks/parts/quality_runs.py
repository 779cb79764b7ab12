"""Runs of the quality benchmark: what is trained with which options, and the results, stored line by line."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from parts.messages import say
from parts.quality_data import NETWORK, DataSet, their_network
from parts.quality_metrics import measure

from vlm.data.tokenizers import ClipTokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import VlmError
from vlm.files import append_line, compute_fingerprint, read_lines
from vlm.models.load import load_model, save_model
from vlm.train.presets import open_preset
from vlm.train.run_config import FREE_ON_RESUME

BENCH = Path(__file__).parent
Trainer = Literal["ours", "open_clip"]

# both sides on the CPU, so that their durations are comparable
_ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to be made. name: of its row in the tables. words: options of the recipe, with placeholders.

    epochs: each rounded up to a whole batch, as open_clip counts them. preset: of ours, if not the data set's own.
    """

    data: DataSet
    trainer: Trainer
    name: str
    seed: int
    words: tuple[str, ...]
    epochs: int
    batch_size: int
    preset: str = ""

    @property
    def our_preset(self) -> str:
        """The preset that ours begins with."""
        return self.preset or self.data.name

    @property
    def steps(self) -> int:
        """Optimizer steps, the same for both sides."""
        return ceil(self.data.num_train / self.batch_size) * self.epochs

    @property
    def identity(self) -> str:
        """What its results depend on: another recipe, preset or length is another run."""
        preset = json.dumps(_settings(self.our_preset) if self.trainer == "ours" else their_network())
        numbers = (self.data.num_train, self.seed, self.epochs, self.batch_size)
        return compute_fingerprint(self.data.name, self.trainer, preset, *map(str, numbers), *self.words)

    def filled(self) -> list[str]:
        """The recipe's options with placeholders filled in."""
        places = {
            "{tokenizer}": str(self.data.tokenizer),
            "{first_captions}": self.data.first_captions,
            "{warmup}": str(ceil(self.steps / 10)),
        }
        return [places.get(word, word) for word in self.words]


def _settings(preset: str) -> dict[str, Any]:
    """The settings of a preset that influence the weights, by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in asdict(open_preset(preset)).items():
        flat |= {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in FREE_ON_RESUME}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run, one line of results.jsonl. minutes: of training, including process start."""

    identity: str
    data: str
    trainer: str
    name: str
    seed: int
    metrics: dict[str, float]
    query_interval: tuple[float, float]
    zero_shot: float | None
    parameters: int
    samples: int
    steps: int
    minutes: float
    command: str


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The folder of all results, and the environment of open_clip's trainer. models: folder with its network."""

    folder: Path
    open_clip: Path
    models: Path

    def result(self, run: Run) -> Result:
        """The stored result of a run; if there is none, train and store it.

        Raises:
            VlmError: its trainer fails; the message has the end of its output.
        """
        kept = {found["identity"]: found for found in map(json.loads, read_lines(self.folder / "results.jsonl"))}
        if run.identity in kept:
            # equal recipes may occur in the tables under two names
            found = kept[run.identity] | {"name": run.name}
            return Result(**(found | {"query_interval": tuple(found["query_interval"])}))
        say(f"{run.data.name}, {run.name}, seed {run.seed}: {run.steps:,} steps of {run.batch_size:,} …")
        made = self._make(run)
        append_line(self.folder / "results.jsonl", json.dumps(asdict(made)))
        recall = made.metrics["text_to_image_recall@10"]
        say(f"  text→image recall@10 {recall:.1%}, {made.minutes:.1f} min")
        return made

    def _make(self, run: Run) -> Result:
        folder = self.folder / "runs" / f"{run.data.name}-{run.trainer}-{run.seed}-{run.identity}"
        train = _train_ours if run.trainer == "ours" else self._train_theirs
        trained = train(run, folder)
        figures = measure(load_model(str(folder), device="cpu"), run.data)
        return Result(
            identity=run.identity,
            data=run.data.name,
            trainer=run.trainer,
            name=run.name,
            seed=run.seed,
            **asdict(figures),
            **trained,
        )

    def _train_theirs(self, run: Run, folder: Path) -> dict[str, Any]:
        """Train from scratch, then write the last checkpoint as a model folder, the input of the evaluation."""
        if folder.exists():
            shutil.rmtree(folder)
        words = [
            *("--model", NETWORK, "--train-data", run.data.train, "--dataset-type", "webdataset"),
            *("--train-num-samples", str(run.data.num_train), "--epochs", str(run.epochs)),
            *("--batch-size", str(run.batch_size), "--workers", "1", "--precision", "fp32", "--device", "cpu"),
            *("--seed", str(run.seed), "--save-frequency", "0", "--logs", str(folder.parent), "--name", folder.name),
            *run.filled(),
        ]
        command = [str(self.open_clip), str(BENCH / "open_clip_trainer.py"), str(self.models), *words]
        seconds = _timed(command, folder.with_suffix(".log"))
        checkpoint = torch.load(folder / "checkpoints" / f"epoch_{run.epochs}.pt", weights_only=True)
        steps = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
        if steps != {run.steps}:
            raise VlmError(f"open_clip made {sorted(steps)} steps instead of {run.steps}.")
        config = their_network()
        view = EvalTransform(size=config["vision_cfg"]["image_size"])
        tokenizer = ClipTokenizer(config["text_cfg"]["context_length"])
        save_model(folder / "model", weights=checkpoint["state_dict"], config=config, view=view, tokenizer=tokenizer)
        # all of its batches are complete
        samples = run.steps * run.batch_size
        return {"steps": run.steps, "samples": samples, "minutes": seconds / 60, "command": shlex.join(command)}


def our_words(run: Run, folder: Path) -> list[str]:
    """The command line of `vlm train`; later options override earlier ones."""
    return [
        *(run.our_preset, "--data", run.data.train, "--run", str(folder), "--tokenizer", str(run.data.tokenizer)),
        *("--seed", str(run.seed), "--batch-size", str(run.batch_size), "--steps", str(run.steps), "--json"),
        *("--checkpoint-minutes", "2"),
        *run.filled(),
    ]


def _train_ours(run: Run, folder: Path) -> dict[str, Any]:
    """Train, resuming from the newest checkpoint of an interrupted run."""
    words = our_words(run, folder)
    command = [sys.executable, "-m", "vlm", "train", *words]
    said = folder.with_suffix(".log")
    seconds = _timed([*command, *(["--resume"] if folder.exists() else [])], said)
    summary = json.loads(folder.with_suffix(".json").read_text())
    if summary["steps"] != run.steps or summary["skipped_steps"]:
        raise VlmError(f"{folder} made {summary['steps']} steps, {summary['skipped_steps']} of them skipped.")
    # the run's own clock includes the time before an interruption
    minutes = max(seconds, summary["seconds"]) / 60
    counts = {"steps": summary["steps"], "samples": summary["samples"]}
    return counts | {"minutes": minutes, "command": shlex.join(["vlm", "train", *words])}


def _timed(command: list[str], said: Path) -> float:
    """Duration of a command on the CPU in seconds; its log goes to `said`, its result on stdout next to it as JSON.

    Raises:
        VlmError: it fails.
    """
    said.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with said.open("w") as log, said.with_suffix(".json").open("w") as result:
        done = subprocess.run(command, stdout=result, stderr=log, env=os.environ | _ENVIRONMENT)
    if done.returncode:
        raise VlmError(f"{shlex.join(command[:6])} … failed, see {said}: {said.read_text()[-2000:]}")
    return time.monotonic() - began
