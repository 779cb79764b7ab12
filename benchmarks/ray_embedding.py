#!/usr/bin/env python
"""vlm embed on a Ray cluster of this machine compared with local processes: speed, and the bytes when one is killed.

    benchmarks/run ray_embedding [--shards flickr8k] [--pairs 3000] [--processes 3] [--json]

Every side embeds the same shards by the same model with one thread a process; runs alternate. "Whole command" counts
the start of Python, of Ray and of the processes; "under way" the pairs per second between the first part and the last.
In the last side one process of Ray is killed while a part is half-written. The files of all sides are compared byte by
byte with those of one process. In a minute: --pairs 240 --tars 12 --repeats 1 --width 64 --layers 1.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.embedding_data import Network, write_model, write_shards
from parts.messages import say
from parts.open_clip_environment import shards_of

WHOLE, UNDER_WAY = "whole command", "under way"
ONE, LOCAL, RAY, KILLED = "one process", "local processes", "Ray", "Ray, one killed"
_DEADLINE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of Ray."""

    shards: str = "flickr8k"
    """flickr8k or clothing of ../shared/datasets, or any shards of JPEGs with captions."""

    pairs: int = 3000
    """Number of images; the shards are repeated as often as necessary."""

    tars: int = 24
    """Number of shards they are written to."""

    width: int = 192
    """Width of both towers."""

    layers: int = 4
    """Number of layers of each tower."""

    batch_size: int = 64
    """Batch size in images."""

    processes: int = 3
    """Processes of Ray, and of the local side with several."""

    repeats: int = 2
    """Runs per side; the sides alternate."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of packed data sets."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results."""
    with tempfile.TemporaryDirectory() as name:
        result = _measure(arguments, Path(name))
    result["command"] = shlex.join(["benchmarks/run", "ray_embedding", *sys.argv[1:]])
    if arguments.json:
        show_json(result)
    else:
        _show(arguments, result)


def _measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    (sources,) = shards_of((arguments.shards,), arguments.cache.expanduser(), workers=1).values()
    say(f"Writing {arguments.pairs:,} pairs and the model …")
    write_shards(sources, folder / "shards", pairs=arguments.pairs, shards=arguments.tars)
    model, _, _ = write_model(Network(width=arguments.width, layers=arguments.layers), folder)
    several = ["--processes", str(arguments.processes)]
    sides = {ONE: [], LOCAL: several, RAY: [*several, "--engine", "ray"], KILLED: [*several, "--engine", "ray"]}
    rates: list[dict[str, dict[str, float]]] = []
    expected: dict[str, bytes] = {}
    num_equal = 0
    for repeat in range(arguments.repeats):
        rates.append({})
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            say(f"{name}, run {repeat + 1} of {arguments.repeats} …")
            out = folder / f"{repeat}-{name.replace(' ', '-')}"
            words = ["embed", str(model), str(folder / "shards"), str(out), "--workers", "0", "--device", "cpu"]
            words += ["--batch-size", str(arguments.batch_size), *sides[name]]
            rates[-1][name] = _timed(words, out, arguments.pairs, is_killed=name == KILLED)
            files = _files_of(out)
            expected = expected or files
            if files != expected:
                raise VlmError(f"{name} wrote other files than the first side.")
            num_equal += len(files)
    return {
        "images_per_s": {name: _medians([one[name] for one in rates]) for name in sides},
        "of_local_processes": _ratios(rates),
        "equal_files": num_equal,
        "runs": rates,
    }


def _timed(words: list[str], out: Path, pairs: int, *, is_killed: bool) -> dict[str, float]:
    """The rates of one command; of one whose process is killed, it is killed once a part is whole."""
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm", "--quiet", *words], env=environment, stdout=subprocess.DEVNULL
    )
    if is_killed:
        _kill_one(process, out)
    if process.wait():
        raise VlmError(f"vlm {shlex.join(words)} failed with exit code {process.returncode}.")
    whole = time.perf_counter() - started
    ended = sorted((path.stat().st_mtime, json.loads(path.read_text())["rows"]) for path in out.glob("parts/*.json"))
    rows_later = sum(rows for _, rows in ended[1:])
    return {WHOLE: pairs / whole, UNDER_WAY: rows_later / (ended[-1][0] - ended[0][0])}


def _kill_one(process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(out.glob("parts/*.json")):
            for child in psutil.Process(process.pid).children(recursive=True):
                # as Ray titles a process that is at work
                if "ray::MapWorker" in " ".join(child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.01)
    raise VlmError("No process of Ray could be killed in the middle; give more --pairs.")


def _files_of(folder: Path) -> dict[str, bytes]:
    """All files; the manifest without its time and command."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(files["manifest.json"])
    del manifest["made_at"], manifest["command"]
    files["manifest.json"] = json.dumps(manifest).encode()
    return files


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {kind: median(one[kind] for one in runs) for kind in runs[0]}


def _ratios(rates: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each side relative to the local processes of the same round, the median over the rounds."""
    ratios: dict[str, dict[str, float]] = {}
    for name in rates[0]:
        ratios[name] = {
            kind: median(one[name][kind] / one[LOCAL][kind] for one in rates) for kind in (WHOLE, UNDER_WAY)
        }
    return ratios


def _show(arguments: Arguments, result: dict[str, Any]) -> None:
    rows: list[list[str]] = []
    for name, rate in result["images_per_s"].items():
        ratio = result["of_local_processes"][name]
        rows.append([name, *(f"{rate[kind]:.1f}: {ratio[kind]:.2f} ×" for kind in (WHOLE, UNDER_WAY))])
    title = f"{arguments.pairs:,} images of {arguments.shards} in {arguments.tars} shards, {arguments.processes} "
    show_table(["", WHOLE, UNDER_WAY], rows, title=title + f"processes: images/s, and of that of {LOCAL}")
    print(f"{result['equal_files']:,} files are equal, byte by byte (of manifests all but time and command).")
    print(f"To repeat: {result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
