#!/usr/bin/env python
"""Model upgrade without re-embedding the gallery: recall on held-out data, old → new → newer.

    benchmarks/run model_upgrade [--data fashion] [--old RUN --new RUN --newer RUN] [--json]

Projections are fitted to embeddings of the training split (as vlm index fit-head does) and evaluated on val. They are
compared with the orthogonal Procrustes rotation and with the plain ridge regression. Missing models are trained and
kept (--keep FOLDER), minutes each.
"""

import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from vlm.cli.index import show_recall
from vlm.cli.main import print_error
from vlm.console import show_fields, show_json
from vlm.errors import VlmError
from vlm.evaluation.retrieval_metrics import RetrievalResult
from vlm.index.backward_compat import (
    EmbeddingPairs,
    basis_change,
    fit_head,
    make_head,
    measure_head,
    pad_to,
    predict_old,
    project_through,
    query_mixed_rows,
    query_old_rows,
    upgrade_index,
)
from vlm.index.build import build_index
from vlm.index.reader import Index
from vlm.models.variants import CompatibilityProjection

sys.path.insert(0, str(Path(__file__).parent))
from parts.quality_data import prepare
from parts.upgrade_models import Models, open_models


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the model upgrade benchmark."""

    data: Literal["fashion", "flickr8k"] = "fashion"
    """Data set."""

    old: str = ""
    """MODEL that embedded the rows; empty trains a small one."""

    new: str = ""
    """MODEL that replaces it; empty trains a better one."""

    newer: str = ""
    """MODEL of a second upgrade; empty trains one."""

    seed: int = 0
    """Random seed of the fit and of the half that is re-embedded."""

    keep: Path = Path.home() / ".cache" / "vlm" / "bench-upgrade"
    """Folder of the packed data, the runs and the embeddings."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Train missing models, embed, fit, evaluate and print the results."""
    keep = arguments.keep.expanduser().absolute()
    keep.mkdir(parents=True, exist_ok=True)
    given = {"old": arguments.old, "new": arguments.new, "newer": arguments.newer}
    models = open_models(prepare(arguments.data, keep, shards=0), given, keep)
    train, val = models.pairs("old", "new", "train"), models.pairs("old", "new", "val")
    started = time.perf_counter()
    fitted = fit_head(train, seed=arguments.seed)
    seconds = time.perf_counter() - started
    tables = {
        "first upgrade": measure_head(val, fitted.head, seed=arguments.seed),
        "other projections": _other_heads(train, val, fitted.choice.penalty, arguments.seed),
        "second upgrade": _second(models, fitted.head, arguments.seed),
    }
    facts = asdict(fitted.choice) | {"pictures": len(train), "fit_seconds": seconds}
    facts |= {f"{role}_dimension": size for role, size in zip(("old", "new"), _sizes(val), strict=True)}
    facts |= {"head_dimension": fitted.head.dimension} | _through_an_index(models, val, fitted.head)
    _print(tables, facts, as_json=arguments.json)


def _other_heads(train: EmbeddingPairs, val: EmbeddingPairs, penalty: float, seed: int) -> dict[str, RetrievalResult]:
    """New → old, and new → half new, with other matrices."""
    regression = predict_old(train, penalty)
    matrices = {"Procrustes": basis_change(_cross(train)), "regression, plus the new space": _dilation(regression)}
    found = {}
    for name, matrix in matrices.items():
        head = make_head(train, matrix)
        found |= {
            f"{name}: new → old": query_old_rows(val, head),
            f"{name}: new → half new": query_mixed_rows(val, head, seed=seed),
        }
    return found


def _dilation(prediction: np.ndarray) -> np.ndarray:
    """The regression scaled so that no direction grows, plus the new model's dimensions for the part it lacks.

    Its columns are orthonormal, too (the dilation of a contraction: Halmos 1950).
    """
    left, values, right = np.linalg.svd(prediction, full_matrices=True)
    kept = np.zeros(len(right))
    kept[: len(values)] = values / values[0]
    first = (left[:, : len(values)] * kept[: len(values)]) @ right[: len(values)]
    return np.concatenate([first, np.sqrt(1 - kept**2)[:, None] * right])


def _cross(pairs: EmbeddingPairs) -> np.ndarray:
    """Old × new second moments, whose polar factor is the orthogonal Procrustes solution (Schönemann 1966)."""
    images, texts = pairs.old_images.T @ pairs.new_images, pairs.old_texts.T @ pairs.new_texts
    return images / len(pairs) + texts / len(pairs.captions)


def _second(models: Models, first: CompatibilityProjection, seed: int) -> dict[str, RetrievalResult]:
    """The newer model queries rows of the first projection, and rows of the old model that were migrated twice."""
    fitted = fit_head(_behind(models.pairs("new", "newer", "train"), first), seed=seed)
    oldest, middle = models.pairs("old", "newer", "val"), _behind(models.pairs("new", "newer", "val"), first)
    size = first.dimension
    twice = replace(
        oldest, old_images=pad_to(oldest.old_images, size), old_texts=pad_to(oldest.old_texts, size), old=middle.old
    )
    found = measure_head(middle, fitted.head, seed=seed)
    return {
        "newer → old, migrated twice": query_old_rows(twice, fitted.head),
        "newer → new, migrated once": found["new → old"],
        "newer → newer": found["new → new"],
        "newer → newer, no projection": found["new → new, no projection"],
    }


def _behind(pairs: EmbeddingPairs, head: CompatibilityProjection) -> EmbeddingPairs:
    """The pairs with the old side through a projection, as `vlm embed HEAD` would yield it."""
    space = replace(pairs.old, fingerprint=head.fingerprint, dimension=head.dimension)
    return replace(
        pairs,
        old=space,
        old_images=project_through(head, pairs.old_images),
        old_texts=project_through(head, pairs.old_texts),
    )


def _through_an_index(models: Models, val: EmbeddingPairs, head: CompatibilityProjection) -> dict[str, Any]:
    """Recall@10 of the migrated index for caption queries, and the duration of the migration."""
    with tempfile.TemporaryDirectory() as scratch:
        index, out = Path(scratch) / "index", Path(scratch) / "out"
        build_index(models.images("old", "val"), index, kind="flat")
        carried = upgrade_index(index, out, head, head_spec="head")
        opened = Index.open(out)
        hits = opened.search(project_through(head, val.new_texts), 10)
        opened.close()
    asked = zip(hits, val.captions, strict=True)
    found = [any(caption in texts for hit in line for texts in hit.entry.captions.values()) for line, caption in asked]
    return {"index_recall@10_new_on_old": float(np.mean(found)), "carry_seconds": carried.seconds}


def _sizes(pairs: EmbeddingPairs) -> tuple[int, int]:
    return pairs.old.dimension, pairs.new.dimension


def _print(tables: dict[str, dict[str, RetrievalResult]], facts: dict[str, Any], *, as_json: bool) -> None:
    command = shlex.join(["benchmarks/run", "model_upgrade", *sys.argv[1:]])
    if as_json:
        found = {title: {name: one.metrics() for name, one in table.items()} for title, table in tables.items()}
        show_json({"command": command, "threads": torch.get_num_threads()} | facts | found)
        return
    for title, table in tables.items():
        show_recall(table, title=f"{title}, val")
    show_fields(facts)
    print(f"{torch.get_num_threads()} threads. To repeat: {command}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
