#!/usr/bin/env python
"""How the cost of each stage grows with the corpus: pack, load, embed, caption, build, search, serve, 10^3 to 10^6.

    benchmarks/run growth [--sizes 1000 10000 100000] [--keep FOLDER] [--json]

Every size is a corpus of small JPEGs with captions of their own; each stage is a process of its own. Shown are CPU
seconds, which other programs disturb least, the peak memory, and the power of the size with which the CPU seconds
beyond those for one sample grow from each size to the next (1 is linear). Loader and server must not need more memory
for a larger corpus: the loader's is that of all its processes, shared pages counted once, the server's what it cannot
give back (anonymous pages). 10^6 take hours; with --keep, an interrupted run goes on.
"""

import io
import json
import math
import shlex
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError
from vlm.files import write_text

sys.path.insert(0, str(Path(__file__).parent))
from parts.measure_process import Side
from parts.messages import say

PARTS = Path(__file__).parent / "parts"
ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pack", "load", "embed", "caption", "build", "search", "serve")
LINEAR = ("pack", "load", "embed", "caption")
GOAL = 1.05
_DRAWN_IMAGES = 1000
_SAMPLES_PER_SHARD = 10_000
_QUERIES = 200


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of growth."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Numbers of samples, ascending."""

    pixels: int = 64
    """Size of the JPEGs."""

    without: tuple[str, ...] = ()
    """Stages to leave out."""

    keep: Path | None = None
    """Folder for the corpora and results, from which an interrupted run resumes."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the stages at every size and print the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.keep or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _make_models(arguments, folder)
        start = _stage_costs(arguments, folder, 1)
        sizes = {size: _stage_costs(arguments, folder, size) for size in arguments.sizes}
    result = {
        "command": shlex.join(["benchmarks/run", "growth", *sys.argv[1:]]),
        "start": start,
        "sizes": {str(size): costs for size, costs in sizes.items()},
        "powers": _powers(start, sizes),
    }
    if arguments.json:
        show_json(result)
    else:
        _show(result, arguments)


def _make_models(arguments: Arguments, folder: Path) -> None:
    """A tiny CoCa after one step, which embeds and captions."""
    if (folder / "run").is_dir():
        return
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


def _stage_costs(arguments: Arguments, folder: Path, size: int) -> dict[str, dict[str, float]]:
    """CPU seconds and megabytes of each stage, from the results of an earlier run where there are any."""
    kept = folder / f"costs-{size}.json"
    costs: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for stage in STAGES:
        if stage in costs or stage in arguments.without:
            continue
        say(f"{size:,} samples: {stage} …")
        costs[stage] = _run_stage(arguments, folder, size, stage)
        write_text(kept, json.dumps(costs, indent=1))
    return costs


def _run_stage(arguments: Arguments, folder: Path, size: int, stage: str) -> dict[str, float]:
    place = folder / str(size)
    shards, embeddings, index = place / "shards", place / "embeddings", place / "index"
    model = str(folder / "run")
    if stage == "pack":
        corpus = _corpus(folder, size, arguments.pixels)
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


def _vlm(words: list[str]) -> dict[str, float]:
    """A command's CPU seconds and its peak memory."""
    command = [sys.executable, str(PARTS / "measure_command.py"), str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"vlm {shlex.join(words)} failed; run it to see why. {done.stderr[-500:]}")
    cost = json.loads(done.stdout)
    return {"cpu_s": cost["cpu"], "seconds": cost["wall"], "mb": cost["megabytes"]}


def _load(shards: Path, size: int, pixels: int) -> dict[str, float]:
    """One epoch of the loader, its processes' CPU seconds; the memory of all of them at the end."""
    batch = min(64, size)
    with Side(sys.executable, "vlm_loader.py", threads=1) as side:
        request = {"shards": [str(path) for path in sorted(shards.glob("*.tar"))], "size": pixels, "batch": batch}
        answer = side.ask(**request, workers=1, epochs=1, is_float=False)
    return {"cpu_s": answer["cpu_s"], "seconds": answer["seconds"], "mb": answer["memory_mb"][-1]}


def _serve(index: Path) -> dict[str, float]:
    """A server's CPU seconds until its first answer and for some searches by text; its anonymous memory after them."""
    port = _free_port()
    command = [sys.executable, "-m", "vlm", "serve", str(index), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        began = time.monotonic()
        for number in range(_QUERIES):
            _search(process, port, f"sample number {number}")
        usage = psutil.Process(process.pid).cpu_times()
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
        return {
            "cpu_s": usage.user + usage.system,
            "seconds": time.monotonic() - began,
            "mb": anonymous_kb * 1024 / 1e6,
        }
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _search(process: subprocess.Popen[bytes], port: int, text: str) -> None:
    body = json.dumps({"texts": [text], "top": 10}).encode()
    url = f"http://127.0.0.1:{port}/api/v1/indexes/index/search"
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"})):
                return
        except OSError as error:
            if process.poll() is not None:
                raise VlmError("vlm serve ended; run it on an index of the kept folder to see why.") from error
            if isinstance(error, urllib.request.HTTPError):
                raise VlmError(f"vlm serve refused a search: {error.read().decode()[:300]}") from error
            time.sleep(0.05)


def _powers(
    start: dict[str, dict[str, float]], sizes: dict[int, dict[str, dict[str, float]]]
) -> dict[str, dict[str, float]]:
    """For each stage the power from each size to the next, and over all: CPU seconds beyond those for one sample."""
    powers: dict[str, dict[str, float]] = {}
    for stage in next(iter(sizes.values())):
        work = {size: max(costs[stage]["cpu_s"] - start[stage]["cpu_s"], 1e-3) for size, costs in sizes.items()}
        found = {f"{few:,} to {many:,}": power for few, many, power in _pairwise_powers(work)}
        powers[stage] = found
    return powers


def _pairwise_powers(work: dict[int, float]) -> Iterator[tuple[int, int, float]]:
    for few, many in pairwise(work):
        yield few, many, math.log(work[many] / work[few]) / math.log(many / few)


def _show(result: dict[str, Any], arguments: Arguments) -> None:
    columns = ["stage", *(f"{size:,}: {what}" for size in arguments.sizes for what in ("CPU s", "MB"))]
    steps = list(next(iter(result["powers"].values())))
    rows: list[list[object]] = []
    for stage, powers in result["powers"].items():
        row: list[object] = [stage]
        for size in arguments.sizes:
            costs = result["sizes"][str(size)][stage]
            row += [f"{costs['cpu_s']:.1f}", f"{costs['mb']:.0f}"]
        goal = f"≤ {GOAL}" if stage in LINEAR else ""
        rows.append([*row, *(f"{powers[step]:.2f}" for step in steps), goal])
    show_table([*columns, *(f"power {step}" for step in steps), "goal"], rows, title="Cost by size of the corpus")
    print(f"To repeat: {result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
