"""Fixture: what the oracle of an index knows of its rows, and how they are inserted."""

from dataclasses import dataclass

import numpy as np

from tests.index.index_fixture import insert_batch
from tests.index.origin_fixture import make_origin
from vlm.index.embeddings_folder import EmbeddingSpace, Origin, normalize_rows
from vlm.index.engine_writer import InsertBatch

DIMENSION = 8
SPACE = EmbeddingSpace(model="given", fingerprint="given", dimension=DIMENSION, modality="image")
COLOURS = ("red", "green", "blue")


@dataclass(frozen=True)
class Row:
    """What the oracle knows of a row."""

    vector: np.ndarray
    colour: str
    size: int


Rows = dict[str, Row]


def origin(uid: str, row: Row) -> Origin:
    """The row's place in the catalogue."""
    return make_origin(uid, {"colour": row.colour, "size": row.size}, {"": (f"a {row.colour} thing",)})


def new_rows(rows: Rows) -> InsertBatch:
    """As they come into an index."""
    return insert_batch(
        np.stack([row.vector for row in rows.values()]), [origin(*item) for item in rows.items()], SPACE
    )


def as_stored(vector: np.ndarray) -> np.ndarray:
    """The row that an index compares: rounded to float16, then of unit length."""
    return normalize_rows(vector.astype(np.float16)[None])[0]
