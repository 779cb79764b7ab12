#!/usr/bin/env python
"""How the cost of each stage grows with the corpus: pack, load, embed, build, search, serve, caption.

    benchmarks/run growth [--minutes 15] [--sizes 1000 2000 …] [--keep FOLDER] [--json]

Every size is a corpus of small JPEGs with captions of their own; each stage is a process of its own with one thread.
CPU seconds of it and its children are fitted as start + work · size^power (1 is linear), which other programs disturb
least; memory as a line. Loader and server must not need more memory for a larger corpus: shown are the peak of their
processes' resident pages, and those of them that are not of files at the end. Sizes go up as long as the minutes
allow; what was left out is told, and nothing is extrapolated. With --keep, a run goes on where the last one ended, and
10^6 takes as many hours as it takes.
"""

import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import simplejpeg
import tyro
from scipy.optimize import curve_fit
from scipy.stats import linregress, t

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError
from vlm.files import write_text
from vlm.manifest import MANIFEST

sys.path.insert(0, str(Path(__file__).parent))
from parts.measure_process import Side
from parts.measure_server import anonymous_mb, peak_mb
from parts.messages import say

PARTS = Path(__file__).parent / "parts"
ROOT = Path(__file__).resolve().parents[1]
# the longest last, so that what it takes is not missing for the others
STAGES = ("pack", "load", "embed", "build", "search", "serve", "caption")
GOALS = {"pack": 1.05, "load": 1.05, "embed": 1.05, "caption": 1.05}
_NEEDS = {"load": "pack", "embed": "pack", "caption": "pack", "build": "embed", "search": "build", "serve": "build"}
_OUTPUTS = {"pack": "shards", "embed": "embeddings", "build": "index", "caption": "captions"}
_START_RUNS = 3
_SHARE_OF_A_STAGE = 0.4
_HARDLY_MORE = 1.25
_LEAST_SIZES = 3
_DRAWN_IMAGES = 1000
_SAMPLES_PER_SHARD = 10_000
_QUERIES = 200
_PATIENCE_SECONDS = 1800.0

Costs = dict[str, float]
"""Of one run: CPU seconds (cpu_s), seconds by the clock, megabytes at the peak (peak_mb), perhaps own_mb."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of growth."""

    sizes: tuple[int, ...] = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
    """Numbers of samples, ascending."""

    minutes: float = 15.0
    """Time for all; a stage that would take too much of what is left is left out, at this size and all larger ones."""

    pixels: int = 64
    """Size of the JPEGs."""

    without: tuple[str, ...] = ()
    """Stages to leave out."""

    keep: Path | None = None
    """Folder for the corpora and results, from which an interrupted run resumes."""

    json: bool = False
    """Print the results as JSON."""


class Runs:
    """All runs of stages, kept in a file. of[stage][size]: the costs of each run, three of one sample."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last: Costs | None = None
        kept = json.loads(file.read_text()) if file.is_file() else {}
        self.of: dict[str, dict[int, list[Costs]]] = {
            stage: {int(size): runs for size, runs in kept.get(stage, {}).items()} for stage in STAGES
        }

    def add(self, stage: str, size: int, costs: Costs) -> None:
        """Keep the costs of one run."""
        self._last = costs
        self.of[stage].setdefault(size, []).append(costs)
        write_text(self._file, json.dumps(self.of, indent=1))

    def estimate(self, stage: str, size: int) -> float:
        """Seconds that a stage will take: its CPU time in proportion, and as slow as the last run on this machine."""
        largest = max(self.of[stage])
        start, cpu_s = self.of[stage][1][-1]["cpu_s"], self.of[stage][largest][-1]["cpu_s"]
        # one sample is all start: how long the first real size takes is not known
        work = max(cpu_s - start, 0.0) * size / largest if largest > 1 else start
        return (start + work) * self._slowness

    @property
    def _slowness(self) -> float:
        return self._last["seconds"] / self._last["cpu_s"] if self._last else 1.0


def run(arguments: Arguments) -> None:
    """Run the stages at every size that fits and print the results."""
    ends = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.keep or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _make_models(arguments, folder)
        runs = Runs(folder / "costs.json")
        left_out = _run_all(arguments, folder, runs, ends)
    result = {
        "command": shlex.join(["benchmarks/run", "growth", *sys.argv[1:]]),
        "runs": runs.of,
        "fits": {stage: fit_growth(costs) for stage, costs in runs.of.items() if len(costs) > 1},
        "left_out": left_out,
    }
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _run_all(arguments: Arguments, folder: Path, runs: Runs, ends: float) -> dict[str, list[int]]:
    """Run what fits; returns for each stage the sizes that were left out."""
    left_out: dict[str, list[int]] = {}
    stages = [stage for stage in STAGES if stage not in arguments.without]
    first_runs = [(1, number) for number in range(_START_RUNS)]
    for size, number in [*first_runs, *((size, 0) for size in arguments.sizes)]:
        for stage in stages:
            if len(runs.of[stage].get(size, [])) > number:
                continue
            remaining = ends - time.monotonic()
            is_too_long = size > 1 and runs.estimate(stage, size) > _SHARE_OF_A_STAGE * remaining
            if stage in left_out or _NEEDS.get(stage) in left_out or is_too_long:
                left_out.setdefault(stage, []).append(size)
                continue
            say(f"{size:,} samples: {stage} …")
            place = folder / f"{size}-{number}"
            # what a stage that was interrupted has left would be resumed, and only the rest be counted
            if stage in _OUTPUTS:
                shutil.rmtree(place / _OUTPUTS[stage], ignore_errors=True)
            runs.add(stage, size, _run_stage(arguments, place, size, stage))
    return left_out


def fit_growth(costs: dict[int, list[Costs]]) -> dict[str, Any]:
    """The power of the size with which CPU time grows, and the megabytes that 10,000 more samples take.

    Each with its 95% interval, [low, high]. power: None where the largest size takes hardly more than the start.
    """
    sizes = np.array([size for size, runs in costs.items() for _ in runs], float)
    cpu = np.array([run["cpu_s"] for runs in costs.values() for run in runs])
    fit: dict[str, Any] = {"sizes": [size for size in costs if size > 1], "power": None}
    if len(fit["sizes"]) < _LEAST_SIZES:
        return fit
    start = median(run["cpu_s"] for run in costs[1])
    if cpu[sizes.argmax()] > _HARDLY_MORE * start:
        # in logarithms, since noise is a share of the time; all three together, so that the start's noise counts, too
        first = (math.log(start), math.log(max(cpu.max() - start, 1e-3) / sizes.max()), 1.0)
        best, covariance = curve_fit(_log_cost, sizes, np.log(cpu), first, maxfev=20_000)
        fit |= {"start_s": math.exp(best[0]), "power": float(best[2])}
        fit["power_interval"] = _interval(float(best[2]), math.sqrt(covariance[2, 2]), len(sizes) - 3)
    for name in ("peak_mb", "own_mb"):
        pairs = [(size, run[name]) for size, runs in costs.items() for run in runs if size > 1 and name in run]
        if pairs:
            # of one sample even the libraries' code is not all in memory
            line = linregress(*np.array(pairs).T)
            slope, error = 1e4 * float(line.slope), 1e4 * float(line.stderr)
            fit[name] = {"per_10000": slope, "interval": _interval(slope, error, len(pairs) - 2)}
    return fit


def _log_cost(sizes: np.ndarray, log_start: float, log_work: float, power: float) -> np.ndarray:
    return np.logaddexp(log_start, log_work + power * np.log(sizes))


def _interval(value: float, error: float, freedom: int) -> list[float]:
    reach = float(t.ppf(0.975, freedom)) * error
    return [value - reach, value + reach]


def _make_models(arguments: Arguments, folder: Path) -> None:
    """A tiny CoCa after one step, which embeds and captions."""
    if (folder / "run" / MANIFEST).is_file():
        return
    shutil.rmtree(folder / "run", ignore_errors=True)
    source = _corpus(folder, 1_000, arguments.pixels)
    words = ["train", "tiny-coca", "--data", str(source), "--tokenizer", "clip", "--run", str(folder / "run")]
    _vlm([*words, "--steps", "1", "--batch-size", "32"])


def _corpus(folder: Path, size: int, pixels: int) -> Path:
    """A tar of `size` small JPEGs, of which 1,000 differ, with a caption each that no other has."""
    path = folder / f"corpus-{size}.tar"
    if path.is_file():
        return path
    rng = np.random.default_rng(0)
    smooth = (
        rng.integers(0, 256, (_DRAWN_IMAGES, 8, 8, 3), dtype=np.uint8).repeat(pixels // 8, 1).repeat(pixels // 8, 2)
    )
    jpegs = [simplejpeg.encode_jpeg(image, quality=85) for image in smooth]
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        for number in range(size):
            for suffix, data in (("jpg", jpegs[number % len(jpegs)]), ("txt", f"sample number {number}".encode())):
                member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    unfinished.rename(path)
    return path


def _run_stage(arguments: Arguments, place: Path, size: int, stage: str) -> Costs:
    shards, embeddings, index = place / "shards", place / "embeddings", place / "index"
    model = str(place.parent / "run")
    if stage == "pack":
        corpus = _corpus(place.parent, size, arguments.pixels)
        return _vlm(["pack", str(corpus), str(shards), "--samples-per-shard", str(_SAMPLES_PER_SHARD)])
    if stage == "load":
        return _load(shards, size, arguments.pixels)
    if stage == "embed":
        return _vlm(["embed", model, str(shards), str(embeddings)])
    if stage == "caption":
        captions = ["--out", str(place / "captions"), "--max-length", "8"]
        return _vlm(["caption", model, str(shards), *captions])
    if stage == "build":
        return _vlm(["index", "build", str(embeddings), str(index), "--kind", "ivf" if size > 1 else "flat"])
    if stage == "search":
        queries = place / "queries.txt"
        write_text(queries, "".join(f"sample number {number}\n" for number in range(_QUERIES)))
        return _vlm(["search", str(index), "--queries", str(queries), "--json"])
    return _serve(index)


def _vlm(words: list[str]) -> Costs:
    """A command's CPU seconds and its peak memory."""
    command = [sys.executable, str(PARTS / "measure_command.py"), str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=_one_thread())
    if done.returncode:
        raise VlmError(f"vlm {shlex.join(words)} failed; run it to see why. {done.stderr[-500:]}")
    cost = json.loads(done.stdout)
    return {"cpu_s": cost["cpu"], "seconds": cost["wall"], "peak_mb": cost["megabytes"]}


def _one_thread() -> dict[str, str]:
    """Threads that wait for others take CPU time, which would stand for work."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _load(shards: Path, size: int, pixels: int) -> Costs:
    """One epoch of the loader: CPU seconds of its processes, their peak memory, and their memory at the end."""
    batch = min(64, size)
    with Side(sys.executable, "vlm_loader.py", threads=1) as side:
        request = {"shards": [str(path) for path in sorted(shards.glob("*.tar"))], "size": pixels, "batch": batch}
        answer = side.ask(**request, workers=1, epochs=1, is_float=False)
    memory = {"peak_mb": answer["peak_mb"], "own_mb": answer["anonymous_mb"]}
    return {"cpu_s": answer["cpu_s"], "seconds": answer["seconds"], **memory}


def _serve(index: Path) -> Costs:
    """A server's CPU seconds until it listens and for some searches by text; its memory after them."""
    command = [sys.executable, "-m", "vlm", "serve", str(index), "--port", "0", "--json"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=_one_thread()
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise VlmError(f"{shlex.join(command)} ended; run it on an index of the kept folder to see why.")
        url = json.loads(line)["address"].rstrip("/") + "/api/v1/indexes/index/search"
        for number in range(_QUERIES):
            _search(url, f"sample number {number}")
        server = psutil.Process(process.pid)
        usage = server.cpu_times()
        return {
            "cpu_s": usage.user + usage.system,
            "seconds": time.monotonic() - began,
            "peak_mb": peak_mb(server),
            "own_mb": anonymous_mb(server),
        }
    finally:
        process.terminate()
        process.communicate()


def _search(url: str, text: str) -> None:
    """One search; a server that had no turn on a busy machine is asked again."""
    body = json.dumps({"texts": [text], "top": 10}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    ends = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as response:
                response.read()
                return
        except urllib.request.HTTPError as error:
            message = error.read().decode()[:300]
            # 503 and 504: too busy, or longer than a request may take
            if error.code not in (503, 504) or time.monotonic() > ends:
                raise VlmError(f"vlm serve refused a search: {message}") from error


def _show(result: dict[str, Any]) -> None:
    sizes = sorted({size for runs in result["runs"].values() for size in runs})
    columns = ["stage", *(f"{size:,}" for size in sizes)]
    cpu: list[list[object]] = []
    for stage, runs in result["runs"].items():
        if runs:
            cpu.append([stage, *(_median_of(runs.get(size, []), "cpu_s", "{:.1f}") for size in sizes)])
    cpu_fits = {stage: _power_text(fit, GOALS.get(stage)) for stage, fit in result["fits"].items()}
    rows = [[*row, *cpu_fits.get(str(row[0]), ("–", ""))] for row in cpu]
    show_table([*columns, "power (95%)", "goal"], rows, title="CPU seconds by number of samples")
    memory: list[list[object]] = []
    for stage, runs in result["runs"].items():
        for name, what in (("peak_mb", "peak"), ("own_mb", "not from files")):
            if any(name in run for of_size in runs.values() for run in of_size):
                cells = [_median_of(runs.get(size, []), name, "{:.0f}") for size in sizes]
                memory.append([f"{stage}, {what}", *cells, _slope_text(result["fits"].get(stage, {}).get(name))])
    show_table([*columns, "MB for 10,000 more (95%)"], memory, title="Megabytes by number of samples")
    for stage, left_out in result["left_out"].items():
        print(f"Left out, for the time: {stage} of {', '.join(f'{size:,}' for size in left_out)} samples.")
    print(f"To repeat: {result['command']}")


def _median_of(runs: Sequence[Costs], name: str, form: str) -> str:
    return form.format(median(run[name] for run in runs)) if runs else "–"


def _power_text(fit: dict[str, Any], goal: float | None) -> tuple[str, str]:
    goal_text = f"≤ {goal}" if goal else ""
    if fit["power"] is None:
        is_short = len(fit["sizes"]) < _LEAST_SIZES
        return "too few sizes" if is_short else "hardly more than the start", goal_text
    low, high = fit["power_interval"]
    return f"{fit['power']:.2f} ({low:.2f} to {high:.2f})", goal_text


def _slope_text(slope: dict[str, Any] | None) -> str:
    if slope is None:
        return "–"
    low, high = slope["interval"]
    return f"{slope['per_10000']:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
