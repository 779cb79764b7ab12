"""One run of a side of the embedding benchmark, in its own process, and the vectors it wrote."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from parts.measure_process import BENCH

from vlm.errors import VlmError
from vlm.index.embeddings_folder import Embeddings

# pairs per second over the whole process, and without imports and loading, as the tool itself counts; and the first per
# second of the processor, all processes together
WHOLE_CALL, WORK, PROCESSOR = "whole call", "its work", "whole call, of processor time"

Vectors = dict[str, dict[str, np.ndarray]]
"""Unit vectors of images and texts by the key of the sample."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Inputs of both sides. python: of clip-retrieval's environment. config: open_clip's, of the model's network."""

    folder: Path
    model: Path
    weights: Path
    config: Path
    shards: Path
    python: Path
    pairs: int
    batch_size: int
    workers: int
    threads: int

    def ours(self, backend: str) -> Path:
        """Output folder of vlm embed."""
        return self.folder / f"ours-{backend}"

    @property
    def theirs(self) -> Path:
        """Output folder of clip-retrieval."""
        return self.folder / "clip-retrieval"


def export_ours(setting: Setting) -> dict[str, float]:
    """Seconds of the ONNX export that `vlm embed` then finds beside the model, which needs one in its life."""
    seconds, processor_seconds, _ = _timed(
        [sys.executable, "-m", "vlm", "export", str(setting.model), "--to", "onnx"], 0
    )
    return {"seconds": seconds, "processor_seconds": processor_seconds}


def run_ours(setting: Setting, backend: str) -> dict[str, float]:
    """Rates of `vlm embed` of both modalities; tar indexes are rebuilt, as for unseen shards."""
    for index in setting.shards.glob(".*.vlm-index"):
        index.unlink()
    words = ["embed", str(setting.model), str(setting.shards), str(_fresh(setting.ours(backend))), "--modality", "both"]
    words += ["--batch-size", str(setting.batch_size), "--workers", str(setting.workers), "--device", "cpu", "--json"]
    words += ["--backend", backend]
    seconds, processor_seconds, said = _timed([sys.executable, "-m", "vlm", *words], setting.threads)
    summaries = json.loads(said)
    for what, summary in summaries.items():
        if summary["rows"] != setting.pairs:
            raise VlmError(f"vlm embed made {summary['rows']:,} rows of {what}s of {setting.pairs:,} pairs.")
    return {
        WHOLE_CALL: setting.pairs / seconds,
        WORK: setting.pairs / summaries["image"]["seconds"],
        PROCESSOR: setting.pairs / processor_seconds,
    }


def run_clip_retrieval(setting: Setting) -> dict[str, float]:
    """Rates of clip-retrieval's inference, images and texts in one call."""
    out = _fresh(setting.theirs)
    last = len(list(setting.shards.glob("*.tar"))) - 1
    request = {
        "config": str(setting.config),
        "weights": str(setting.weights),
        "shards": f"{setting.shards}/{{00000..{last:05d}}}.tar",
        "out": str(out),
        "batch_size": setting.batch_size,
        "workers": setting.workers,
    }
    command = [str(setting.python), str(BENCH / "clip_retrieval_embedding.py"), json.dumps(request)]
    seconds, processor_seconds, _ = _timed(command, setting.threads)
    counted: dict[str, Any] = json.loads((out / "stats" / "0.json").read_text(encoding="utf-8"))
    if counted["sample_count"] != setting.pairs:
        raise VlmError(f"clip-retrieval embedded {counted['sample_count']} of {setting.pairs} pairs; see {out}.")
    return {
        WHOLE_CALL: setting.pairs / seconds,
        WORK: setting.pairs / counted["total_duration"],
        PROCESSOR: setting.pairs / processor_seconds,
    }


def vectors_of_ours(setting: Setting, backend: str) -> Vectors:
    """Vectors of our last run by a backend."""
    found: Vectors = {}
    for what in ("image", "text"):
        opened = Embeddings.open(setting.ours(backend) / f"{what}s")
        rows = np.concatenate(list(opened.blocks()))
        found[what] = {origin.key: row for origin, row in zip(opened.origins(), rows, strict=True)}
    return found


def vectors_of_clip_retrieval(setting: Setting) -> Vectors:
    """Vectors of the last run of clip-retrieval, by the keys of its metadata table."""
    (table,) = (setting.theirs / "metadata").glob("*.parquet")
    keys = pq.read_table(table).column("image_path").to_pylist()
    found: Vectors = {}
    for what, name in (("image", "img_emb"), ("text", "text_emb")):
        (matrix,) = (setting.theirs / name).glob("*.npy")
        rows = np.load(matrix).astype(np.float32)
        found[what] = dict(zip(keys, rows / np.linalg.norm(rows, axis=1, keepdims=True), strict=True))
    return found


def agreement(ours: Vectors, theirs: Vectors) -> dict[str, dict[str, float]]:
    """Minimum and mean cosine of a sample's two vectors, for images and texts, raw and centred.

    Vectors of a network with random weights lie so close together that the raw cosine alone says little.
    """
    found = {}
    for what, mine in ours.items():
        if mine.keys() != theirs[what].keys():
            raise VlmError(f"The two sides embedded different samples: {len(mine)} and {len(theirs[what])} {what}s.")
        one, two = np.stack(list(mine.values())), np.stack([theirs[what][key] for key in mine])
        centre = two.mean(axis=0)
        plain, centred = _cosines(one, two), _cosines(one - centre, two - centre)
        found[what] = {
            "least": float(plain.min()),
            "mean": float(plain.mean()),
            "least, centred": float(centred.min()),
            "mean, centred": float(centred.mean()),
        }
    return found


def _cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return (one * two).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1))


def _timed(command: list[str], threads: int) -> tuple[float, float, str]:
    """Run a command; returns its seconds, the processor seconds of it and its processes, and its output.

    threads: OMP_NUM_THREADS; 0 inherits it.
    """
    environment = os.environ | {"PYTHONWARNINGS": "ignore"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    # else each process would compile the checkout's modules anew, which an installed package does not
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = _processor_seconds()
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise VlmError(f"{' '.join(command[:4])} … failed: {done.stderr[-2000:]}")
    return seconds, _processor_seconds() - before, done.stdout


def _processor_seconds() -> float:
    """Of all processes that this one has waited for, and of those that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
