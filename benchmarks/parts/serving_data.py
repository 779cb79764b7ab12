"""The corpus of the serving benchmark: the same vectors and captions as our index and as clip-retrieval's."""

import json
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Origin
from vlm.models.load import load_model

_LINKS = 32
_CONSTRUCTION = 80
_SEARCH = 64
_ROWS_AT_ONCE = 10_000
_NOUNS = ("dog", "boat", "street", "kitchen", "mountain", "child", "market", "horse", "bridge", "garden")
_SCENES = ("at night", "in the snow", "by the sea", "in the rain", "under a tree", "on a roof", "in a crowd", "alone")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where both indexes lie, and what is asked. indices: clip-retrieval's file of folders by name."""

    index: Path
    indices: Path
    captions: list[str]
    queries: np.ndarray
    images: list[np.ndarray]


def write_corpus(folder: Path, *, rows: int, dimension: int, model: Path) -> Corpus:
    """Write both indexes; the vectors lie in clusters around directions of the model's space."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, dimension))
    vectors = centres[rng.integers(0, len(centres), rows)] + 0.7 * rng.standard_normal((rows, dimension))
    # float16 as both store it
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    captions = [f"a {_NOUNS[n % 10]} {_SCENES[n // 10 % 8]}, view {n // 80}" for n in range(rows)]
    queries = vectors[rng.integers(0, rows, 2000)] + 0.3 * rng.standard_normal((2000, dimension)).astype(np.float32)
    images = [rng.integers(0, 255, (180, 240, 3), dtype=np.uint8) for _ in range(64)]
    return Corpus(
        index=_write_ours(folder, vectors, captions, model),
        indices=_write_theirs(folder, vectors, captions),
        captions=captions,
        queries=queries,
        images=images,
    )


def _write_ours(folder: Path, vectors: np.ndarray, captions: list[str], model: Path) -> Path:
    fingerprint = load_model(str(model), device="cpu").fingerprint
    space = EmbeddingSpace(model=str(model), fingerprint=fingerprint, dimension=vectors.shape[1], modality="image")
    writer = EmbeddingsWriter(folder / "embeddings", space=space, identity={})
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        origins = [_origin(row, captions[row]) for row in range(first, min(first + _ROWS_AT_ONCE, len(vectors)))]
        writer.add("/nowhere/0.tar", vectors[first : first + _ROWS_AT_ONCE], origins)
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    tuning = TuningParams(links=_LINKS, ef_construction=_CONSTRUCTION, ef_search=_SEARCH)
    build_index(folder / "embeddings", folder / "index", kind="hnsw", tuning=tuning)
    return folder / "index"


def _origin(row: int, caption: str) -> Origin:
    return Origin(
        uid=f"u{row}",
        key=f"u{row}",
        shard="/nowhere/0.tar",
        number=row,
        image_offset=0,
        image_size=0,
        caption_number=None,
        captions={"": (caption,)},
        metadata={"number": row},
    )


def _write_theirs(folder: Path, vectors: np.ndarray, captions: list[str]) -> Path:
    place = folder / "clip-retrieval"
    (place / "metadata").mkdir(parents=True)
    index = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _CONSTRUCTION
    index.hnsw.efSearch = _SEARCH
    index.add(vectors)
    faiss.write_index(index, str(place / "image.index"))
    names = [f"/nowhere/{row}.jpg" for row in range(len(vectors))]
    pq.write_table(pa.table({"image_path": names, "caption": captions}), place / "metadata" / "metadata_0.parquet")
    (folder / "indices.json").write_text(json.dumps({"bench": str(place)}), encoding="utf-8")
    return folder / "indices.json"
