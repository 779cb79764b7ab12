"""Fixture: indexes of random rows, and batches of rows to insert into them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.index.origin_fixture import make_origin
from vlm.index.embeddings_folder import EmbeddingSpace, Origin, normalize_rows
from vlm.index.engine_writer import InsertBatch
from vlm.index.reader import Index

SPACE = EmbeddingSpace(model="given", fingerprint="given", dimension=16, modality="image")
MakeIndex = Callable[..., Path]


def vectors(count: int, seed: int) -> np.ndarray:
    """Random unit rows."""
    return normalize_rows(np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32))


def origins(uids: Sequence[str], **metadata: object) -> list[Origin]:
    """Numbered from 0."""
    return [
        make_origin(
            uid, {"number": number} | metadata, {"": (f"caption of {uid}",)}, shard="/nowhere/1.tar", number=number
        )
        for number, uid in enumerate(uids)
    ]


def make_batch(count: int, seed: int, name: str = "n", **metadata: object) -> InsertBatch:
    """New rows named n0, n1, …"""
    return insert_batch(vectors(count, seed), origins([f"{name}{n}" for n in range(count)], **metadata))


def insert_batch(rows: np.ndarray, origins: Sequence[Origin], space: EmbeddingSpace = SPACE) -> InsertBatch:
    """Unit rows as they would come from an embeddings folder."""
    stored = rows.astype(np.float16)
    return InsertBatch(
        space=space,
        count=len(stored),
        source="",
        shards=tuple(dict.fromkeys(origin.shard for origin in origins)),
        blocks=lambda: [stored],
        origins=lambda: origins,
    )


def uids_of(index: Index, query: np.ndarray, top: int = 5, **more: np.ndarray) -> list[str]:
    """The uids of the results."""
    return [hit.entry.uid for hit in index.search(query[None], top, **more)[0]]
