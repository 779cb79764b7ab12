"""Fixture: folders as clip-retrieval and autofaiss leave them, written by hand, and their import."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.index.embeddings_folder import UNKNOWN
from vlm.index.interop.import_layouts import ColumnChoice
from vlm.index.interop.importer import ImportSummary, import_embeddings

D = 8


def unit(count: int, seed: int = 0, dtype: str = "float16") -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_matrix(path: Path, rows: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)
    return path


def clip_retrieval(folder: Path, counts: tuple[int, ...] = (3, 2), *, width: int = 1) -> np.ndarray:
    """Its inference over several partitions, numbers padded with zeros to `width`; the image embeddings."""
    everything = []
    for part, count in enumerate(counts):
        number, images = str(part).zfill(width), unit(count, seed=part)
        write_matrix(folder / "img_emb" / f"img_emb_{number}.npy", images)
        write_matrix(folder / "text_emb" / f"text_emb_{number}.npy", unit(count, seed=100 + part))
        names = [f"{part:05d}{row:04d}" for row in range(count)]
        columns = {
            "image_path": names,
            "caption": [f"caption {name}" if row else None for row, name in enumerate(names)],
            "key": names,
            "url": [f"http://nowhere/{name}.jpg" for name in names],
            "width": [100 * (part + 1) + row for row in range(count)],
            "exif.iso": [100.5, float("nan"), *[200.0] * (count - 2)],
        }
        write_table(folder / "metadata" / f"metadata_{number}.parquet", columns)
        everything.append(images)
    return np.concatenate(everything)


def bring(source: Path, out: Path, *, column_choice: ColumnChoice | None = None, **options: Any) -> ImportSummary:
    given = {"model_spec": UNKNOWN, "load": pytest.fail} | options
    return import_embeddings(source, out, column_choice=column_choice, **given)
