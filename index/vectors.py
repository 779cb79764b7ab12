"""The float16 rows of a segment: written in blocks, then memory-mapped for training, re-ranking and exact scans."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.files import replacing
from vlm.index.embeddings import Embeddings, unit_rows
from vlm.index.float16 import to_float32
from vlm.index.layout import CURE, WritePoint, unhindered
from vlm.index.parts import open_vectors
from vlm.tensors import Array, Float, Float32, Int64

# float16 holds a unit vector's length to about 1e-3; what is further off was never normalised
_LENGTH_TOLERANCE = 0.01
_ROWS_AT_ONCE = 65_536


class Vectors:
    """Rows on disk, of unit length up to their rounding; they come back as float32 of exactly unit length."""

    def __init__(self, path: Path, rows: int, dimension: int) -> None:
        self.path = path
        self.stored = open_array(path, np.dtype(np.float16), (rows, dimension))

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def dimension(self) -> int:
        """D."""
        return self.stored.shape[1]

    def blocks(self, rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[Float32[Array, "N D"]]:
        """All rows in order."""
        for first in range(0, len(self), rows_at_once):
            yield unit_rows(to_float32(self.stored[first : first + rows_at_once]))

    def take(self, positions: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The rows at the given positions."""
        if len(positions) and positions[-1] - positions[0] == len(positions) - 1 and (np.diff(positions) == 1).all():
            return unit_rows(to_float32(self.stored[positions[0] : positions[-1] + 1]))
        return unit_rows(to_float32(self.stored[positions]))

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """`count` distinct rows (all of them if there are fewer), drawn evenly, in row order."""
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


def write_vectors(
    path: Path, blocks: Iterable[Float[Array, "_ D"]], shape: tuple[int, int], *, reached: WritePoint = unhindered
) -> None:
    """Write blocks of unit vectors as one float16 matrix of a shape (N, D), atomically.

    Raises:
        VlmError: a row is not finite or not of unit length, or there are not N of them; nothing is written.
    """
    rows = 0
    with replacing(path) as file:
        described = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        for block in blocks:
            _check_lengths(block, rows)
            file.write(np.ascontiguousarray(block, np.float16).tobytes())
            rows += len(block)
        if rows != shape[0]:
            raise VlmError(f"{rows:,} vectors came for {shape[0]:,} rows; the embeddings are damaged: embed again.")
        reached(f"{path.name} before its rename")


def stored_blocks(source: Embeddings) -> Iterator[Float[Array, "_ D"]]:
    """The rows of an embeddings folder as they are stored."""
    for part in source.parts:
        vectors = open_vectors(source.folder, part)
        for first in range(0, part.rows, _ROWS_AT_ONCE):
            yield vectors[first : first + _ROWS_AT_ONCE]


def open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a .npy file, memory-mapped.

    Raises:
        VlmError: it cannot be read, or is not of this type and shape.
    """
    try:
        # a mapping of no bytes is refused by the system
        found = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} is damaged ({error}); {CURE}.") from error
    if found.dtype != dtype or found.shape != shape:
        raise VlmError(
            f"{path} is damaged: it holds {found.dtype} of shape {found.shape}, {dtype} of {shape} were written; "
            f"{CURE}."
        )
    # numpy asks and answers a memmap in Python, at microseconds each time
    return np.asarray(found)


def _check_lengths(block: Float[Array, "N D"], first: int) -> None:
    lengths = np.linalg.norm(to_float32(block), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE))
    if len(wrong):
        number = int(wrong[0])
        raise VlmError(
            f"Row {first + number:,} of the embeddings has length {lengths[number]:.4g} ({len(wrong):,} such rows in "
            "its block); 1 was expected: the embeddings are damaged or were never normalised. Embed again."
        )
