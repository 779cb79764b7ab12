#!/usr/bin/env python
"""`vlm find` on a folder of real images: first and later updates, kills, and very many files.

    benchmarks/run find [--tars FILE … --model MODEL --kills 20 --many 100000] [--keep FOLDER] [--json]

Each update is a process of its own, whose model counts the images it sees. Steps: the first update; one without a
change; after adding, moving, deleting, editing and copying images; a first update killed at random moments, whose index
is compared with one made at once; a folder of many tiny files.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlm.console import show_json, show_table
from vlm.index.reader import Index

sys.path.insert(0, str(Path(__file__).parent))
from parts import find_folders
from parts.messages import say

_PARTS = Path(__file__).parent / "parts"
_DATASETS = Path(__file__).parents[2] / "shared" / "datasets"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of vlm find."""

    model: str = ""
    """MODEL; by default a tiny one of random weights, which is enough to see what is embedded."""

    tars: tuple[Path, ...] = (_DATASETS / "fashion/fashion.tar", _DATASETS / "clothing/clothing.tar")
    """Tars of images, unpacked into the folder that is searched."""

    kills: int = 20
    """Number of times that a first update is killed."""

    many: int = 100_000
    """Tiny files of the last step; 0 leaves it out."""

    seed: int = 0
    """Random seed of changes and kills."""

    keep: Path | None = None
    """Folder to work in, which stays; by default a temporary one."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the steps and print the results."""
    with tempfile.TemporaryDirectory() as name:
        work = Work(arguments.keep or Path(name), arguments)
        updates = work.updates()
        kills = work.killed_first_update()
        many = work.many_files() if arguments.many else []
    if arguments.json:
        show_json({"updates": updates, "kills": kills, "many": many})
        return
    columns = [
        "step",
        "images",
        "new",
        "changed",
        "moved",
        "gone",
        "seen by the model",
        "scan s",
        "update s",
        "peak MB",
    ]
    for title, rows in (("Updates", updates), (f"{arguments.many:,} tiny files", many)):
        show_table(columns, [_cells(row) for row in rows], title=title)
    show_table(list(kills), [list(kills.values())], title="A first update, killed at random")


def _cells(row: dict[str, Any]) -> list[Any]:
    names = ("step", "images", "new", "changed", "moved", "gone", "seen", "scan_seconds", "seconds", "peak_mb")
    return [row[name] for name in names]


class Work:
    """A folder with the images, the homes of indexes, the model and the log of what it has seen."""

    def __init__(self, folder: Path, arguments: Arguments) -> None:
        self._folder = folder
        self._arguments = arguments
        self._rng = random.Random(arguments.seed)
        self._log = folder / "seen.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._model = arguments.model or str(_make_model(folder / "model"))
        self._photos = folder / "photos"
        find_folders.unpack(arguments.tars, self._photos)
        find_folders.settle()

    def updates(self) -> list[dict[str, Any]]:
        """The first update and those after each kind of change."""
        home = self._folder / "home"
        rows = [self._measure("first", self._photos, home), self._measure("no change", self._photos, home)]
        steps: dict[str, tuple[Callable[[Path, int, random.Random], None], int]] = {
            "100 added": (find_folders.add, 100),
            "50 moved": (find_folders.move, 50),
            "50 deleted": (find_folders.delete, 50),
            "10 edited": (find_folders.edit, 10),
            "20 copied": (find_folders.copy, 20),
        }
        for step, (change, number) in steps.items():
            change(self._photos, number, self._rng)
            find_folders.settle()
            rows.append(self._measure(step, self._photos, home))
        fresh = self._folder / "fresh"
        rows.append(self._measure("the same folder at once", self._photos, fresh))
        if not _same_vectors(home / "index", fresh / "index"):
            sys.exit("The index that was updated differs from one made at once.")
        return rows

    def killed_first_update(self) -> dict[str, Any]:
        """Kill a first update at random moments, let the last process end, and compare with the one made at once."""
        home = self._folder / "killed"
        self._clear_log()
        # a process takes seconds to load its model, which are the same in each: moments of work are drawn
        say("killing …")
        for number in range(self._arguments.kills):
            process = self._start(self._photos, home)
            self._wait_for_work(process)
            time.sleep(self._rng.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            say(f"{number + 1} of {self._arguments.kills}: {self._num_seen():,} images seen so far")
        last = self._measure("last", self._photos, home, keeps_log=True)
        fresh = self._folder / "fresh/index"
        return {
            "kills": self._arguments.kills,
            "images": last["images"],
            "distinct": _num_distinct(home / "index"),
            "seen by the model": last["seen"],
            "same uids, vectors and metadata": _rows(home / "index") == _rows(fresh),
            "same file of vectors": _vectors_file(home).read_bytes()
            == _vectors_file(self._folder / "fresh").read_bytes(),
        }

    def many_files(self) -> list[dict[str, Any]]:
        """The first update of very many files, and two later ones."""
        folder = self._folder / "many"
        if not folder.exists():
            say(f"{self._arguments.many:,} files …")
            find_folders.write_many(folder, self._arguments.many)
        home = self._folder / "home of many"
        rows = [self._measure("first", folder, home), self._measure("no change", folder, home)]
        (folder / "000").rename(folder / "renamed")
        find_folders.settle()
        return [*rows, self._measure("a folder of 1,000 renamed", folder, home)]

    def _measure(self, step: str, folder: Path, home: Path, *, keeps_log: bool = False) -> dict[str, Any]:
        say(f"{step} …")
        if not keeps_log:
            self._clear_log()
        started = time.perf_counter()
        process = self._start(folder, home)
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"The update failed: {step}")
        wall_seconds = time.perf_counter() - started
        return json.loads(out) | {"step": step, "seen": self._num_seen(), "process_seconds": wall_seconds}

    def _start(self, folder: Path, home: Path) -> "subprocess.Popen[bytes]":
        script = str(_PARTS / "counted_update.py")
        words = [sys.executable, script, str(folder), str(home), self._model, str(self._log)]
        return subprocess.Popen(words, stdout=subprocess.PIPE)

    def _wait_for_work(self, process: "subprocess.Popen[bytes]") -> None:
        before = self._num_seen()
        while process.poll() is None and self._num_seen() == before:
            time.sleep(0.002)

    def _num_seen(self) -> int:
        return sum(map(int, self._log.read_text().split())) if self._log.exists() else 0

    def _clear_log(self) -> None:
        self._log.unlink(missing_ok=True)


def _make_model(folder: Path) -> Path:
    """A model folder of the smallest architecture with random weights and open_clip's tokenizer."""
    import torch

    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform
    from vlm.models.load import save_model_folder
    from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config

    if folder.exists():
        return folder
    tokenizer = open_tokenizer("clip", 16)
    config = fit_to_tokenizer(model_config("tiny"), tokenizer)
    torch.manual_seed(0)
    network = build_network(config).eval()
    model = VisionLanguageModel(
        name="tiny", network=network, config=config, view=EvalTransform(size=32), tokenizer=tokenizer
    )
    save_model_folder(folder, model, inputs={})
    return folder


def _rows(index: Path) -> dict[str, Any]:
    """Stored vector, metadata, captions and place by uid."""
    opened = Index.open(index)
    numbers, origins = zip(*opened.snapshot.entries(), strict=True)
    vectors = opened.snapshot.vectors(np.array(numbers))
    rows: dict[str, Any] = {}
    for vector, origin in zip(vectors, origins, strict=True):
        rows[origin.uid] = (vector.tobytes(), origin.metadata, origin.captions, origin.shard, origin.image_size)
    opened.close()
    return rows


def _same_vectors(index: Path, other: Path) -> bool:
    """Whether two indexes have the same rows, and vectors that differ by no more than a batch makes them."""
    rows, others = _rows(index), _rows(other)
    if {uid: row[1:] for uid, row in rows.items()} != {uid: row[1:] for uid, row in others.items()}:
        return False
    for uid, row in rows.items():
        vector, other_vector = (np.frombuffer(data, np.float32) for data in (row[0], others[uid][0]))
        if not np.allclose(vector, other_vector, atol=2e-3):
            return False
    return True


def _num_distinct(index: Path) -> int:
    return len({Path(row[3]).read_bytes() for row in _rows(index).values()})


def _vectors_file(home: Path) -> Path:
    return home / "index/segments/segment-00000.npy"


if __name__ == "__main__":
    run(tyro.cli(Arguments))
