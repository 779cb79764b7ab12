"""Vectors and tables of other tools: checked against each other before anything is written, then read in blocks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm.errors import UsageError, VlmError
from vlm.index.exchange.columns import Columns, Wishes, choose_columns, readable
from vlm.index.exchange.faiss_rows import FAISS_SUFFIXES, FaissRows, open_faiss
from vlm.index.exchange.pairs import Pair
from vlm.tensors import Array, Float

ROWS_AT_ONCE = 16_384

Slices = Callable[[int, int], Float[Array, "N D"]]


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """A pair that fits together.

    first: the number of its first row in the whole source. dimension: D. columns: None if the table tells nothing.
    faiss: where the vectors are in a FAISS file.
    """

    pair: Pair
    first: int
    rows: int
    dimension: int
    columns: Columns | None
    faiss: FaissRows | None = None

    def vectors(self) -> "Slices | None":
        """What gives the vectors of the rows from one to another; None: they are in the table."""
        if self.faiss is not None:
            rows, offset = self.faiss, self.first if self.pair.is_slice else 0
            return lambda first, last: rows.rows(offset + first, offset + last)
        if self.pair.vectors is None:
            return None
        matrix = _open_matrix(self.pair.vectors)
        return lambda first, last: matrix[first:last]

    @property
    def place(self) -> Path:
        """The file with the vectors."""
        return self.pair.vectors or self.pair.path


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows of a part: `first` is the number in it of the first; records has a dictionary for each row."""

    part: SourcePart
    first: int
    vectors: Float[Array, "N D"]
    records: list[dict[str, Any]] | None


def open_parts(pairs: Sequence[Pair], wishes: Wishes) -> list[SourcePart]:
    """The parts with rows in them, all of one dimension; only heads of files are read.

    Raises:
        UsageError: a matrix and its table have different numbers of rows, two parts different dimensions, a matrix is
            none, a column is missing, or there is not one row.
        VlmError: a file is damaged.
    """
    parts: list[SourcePart] = []
    faiss = _open_faiss(pairs[0])
    for pair in pairs:
        part = _open_part(pair, wishes, faiss, first=parts[-1].first + parts[-1].rows if parts else 0)
        if not part.rows:
            continue
        if parts and part.dimension != parts[0].dimension:
            raise UsageError(
                f"{parts[0].place} has vectors of {parts[0].dimension} dimensions, {part.place} of {part.dimension}: "
                "they are of two models; import them apart."
            )
        wishes = part.columns.as_wishes() if part.columns else wishes
        parts.append(part)
    if not parts:
        raise UsageError(f"There is not one row in {pairs[0].path}" + (" or the other files." if pairs[1:] else "."))
    if faiss is not None:
        tables = str(pairs[0].path) + (f" to {pairs[-1].path.name}" if pairs[1:] else "")
        _check_count(faiss.path, len(faiss), tables, parts[-1].first + parts[-1].rows)
    return parts


def read_blocks(part: SourcePart) -> Iterator[Block]:
    """All rows of a part in order, the matrix memory-mapped.

    Raises:
        VlmError: the table is damaged, or a vector in it has another length than the rest.
    """
    given = part.vectors()
    if part.columns is None:
        assert given is not None
        for first in range(0, part.rows, ROWS_AT_ONCE):
            vectors = given(first, min(first + ROWS_AT_ONCE, part.rows))
            yield Block(part=part, first=first, vectors=vectors, records=None)
        return
    first, columns = 0, part.columns
    wanted = [*columns.described, *([columns.embedding] if columns.embedding else [])]
    for batch in _batches(part.pair.path, wanted):
        last = first + len(batch)
        vectors = given(first, last) if given else _vectors_in(batch, part, columns.embedding)
        yield Block(part=part, first=first, vectors=vectors, records=readable(batch, columns.described))
        first = last


def read_names(part: SourcePart) -> pa.ChunkedArray | None:
    """What the uid column of a part says, as texts; None: rows have numbers only.

    Raises:
        UsageError: a row has no uid.
        VlmError: the table is damaged.
    """
    if part.columns is None or not part.columns.uid:
        return None
    name, path = part.columns.uid, part.pair.path
    batches = [batch.column(name).cast(pa.string()) for batch in _batches(path, [name])]
    names = pa.chunked_array(batches, pa.string())
    if names.null_count:
        row = pc.index(names.is_null(), True).as_py()
        raise UsageError(
            f"Row {row:,} of {path} has no {name!r} ({names.null_count:,} such); choose another --uid-column."
        )
    return names


def _open_part(pair: Pair, wishes: Wishes, faiss: FaissRows | None, first: int) -> SourcePart:
    """A pair as it is; `faiss` has the vectors of all if it is there."""
    count, dimension = _shape(pair, faiss)
    if pair.table is None:
        return SourcePart(pair=pair, first=first, rows=count, dimension=dimension, columns=None, faiss=faiss)
    with _explaining(pair.table) as table:
        rows, schema = table.metadata.num_rows, table.schema_arrow
    if pair.vectors is not None and not pair.is_slice:
        _check_count(pair.vectors, count, str(pair.table), rows)
    columns = choose_columns(schema, wishes, pair.table, has_vectors=pair.vectors is None)
    return SourcePart(
        pair=pair,
        first=first,
        rows=rows,
        dimension=dimension if pair.vectors else _dimension_in(pair.table, columns.embedding),
        columns=columns if columns.described or columns.embedding else None,
        faiss=faiss,
    )


def _open_faiss(pair: Pair) -> FaissRows | None:
    """Where the vectors of a source are in a FAISS file, it is the only one."""
    is_faiss = pair.vectors is not None and pair.vectors.suffix in FAISS_SUFFIXES
    return open_faiss(pair.vectors) if is_faiss and pair.vectors else None


def _shape(pair: Pair, faiss: FaissRows | None) -> tuple[int, int]:
    """Rows and dimension of the file with the vectors; zeros where they are in the table."""
    if faiss is not None:
        return len(faiss), faiss.dimension
    matrix = _open_matrix(pair.vectors) if pair.vectors else np.zeros((0, 0))
    return matrix.shape[0], matrix.shape[1]


def _check_count(vectors: Path, count: int, table: str, rows: int) -> None:
    if count != rows:
        raise UsageError(
            f"{vectors} has {count:,} rows and {table} {rows:,}. Rows are joined by position, so these do not belong "
            "together; nothing was imported."
        )


def _open_matrix(path: Path) -> Float[Array, "N D"]:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} cannot be read as an array ({error}); it is damaged or no .npy file.") from error
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating) or not matrix.shape[1]:
        raise UsageError(
            f"{path} holds {matrix.dtype} of shape {matrix.shape}; a floating-point row for each item is needed."
        )
    return matrix


def _dimension_in(path: Path, column: str) -> int:
    """The length of the first vector, 0 if there is none."""
    for batch in _batches(path, [column], rows_at_once=256):
        lengths = _lengths(batch.column(0)).drop_null()
        if len(lengths):
            return lengths[0].as_py()
    return 0


def _vectors_in(batch: pa.RecordBatch, part: SourcePart, column: str) -> Float[Array, "N D"]:
    """The vectors of a batch; NaN where there is none."""
    lists = batch.column(column)
    lengths = _lengths(lists)
    other = [length for length in lengths.drop_null().unique().to_pylist() if length != part.dimension]
    if other:
        raise VlmError(f"{part.place} has vectors of {part.dimension} and of {other[0]} numbers; nothing was imported.")
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    vectors = np.full((len(lists), part.dimension), np.nan, flat.dtype)
    vectors[lengths.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, part.dimension)
    return vectors


def _lengths(lists: pa.Array) -> pa.Array:
    return pc.call_function("list_value_length", [lists])


def _batches(path: Path, names: Sequence[str], rows_at_once: int = ROWS_AT_ONCE) -> Iterator[pa.RecordBatch]:
    with _explaining(path) as table:
        for batch in table.iter_batches(batch_size=rows_at_once, columns=list(names)):
            # a name chooses the fields within it too
            yield batch.select(list(names))


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise VlmError(f"{path} cannot be read as Parquet ({error}).") from error
