"""Vectors that people bring themselves, as a question or a file of questions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm.errors import UsageError
from vlm.service.question import Question
from vlm.tensors import Array, Float32, Float64


def unit_vector(given: Path | Sequence[float], dimension: int) -> Float32[Array, " D"]:
    """The vector brought to unit length; of a file the only row.

    Raises:
        UsageError: the file is no vector, or the vector has another dimension, is zero or not finite.
    """
    if isinstance(given, Path):
        rows, name = read_rows(given), str(given)
        if len(rows) != 1:
            raise UsageError(f"{given} holds {len(rows):,} vectors; a question takes one, --queries takes them all.")
        vector = rows[0]
    else:
        vector, name = np.asarray(given, np.float64), "The vector"
    if len(vector) != dimension:
        raise UsageError(f"{name} has {len(vector)} numbers; the rows of this index have {dimension}.")
    largest = float(np.abs(vector).max())
    if not (np.isfinite(largest) and largest > 0):
        raise UsageError(f"{name} has length {largest}: it must be finite and not zero.")
    scaled = vector / largest  # the square of a number such as 1e200 is not finite
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)


def read_rows(path: Path) -> Float64[Array, "N D"]:
    """The rows of an .npy file, which is a matrix or one vector.

    Raises:
        UsageError: it cannot be read or holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as .npy: {error}.") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.ndim not in (1, 2):
        raise UsageError(f"{path} holds no vectors: a matrix of numbers or one row of them is needed.")
    return np.atleast_2d(found).astype(np.float64)


def vector_questions(path: Path, defaults: Question) -> dict[str, Question]:
    """A question for each row of an .npy file, under the row's name; the rest is as in `defaults`.

    Raises: as `read_rows` does.
    """
    rows = enumerate(read_rows(path).tolist())
    return {f"Row {number} (from 0) of {path}": replace(defaults, vectors=(tuple(row),)) for number, row in rows}
