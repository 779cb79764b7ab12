"""A segment of an index: written once, then open for searches by FAISS and for exact scans of its float16 rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm.console import progress
from vlm.errors import VlmError
from vlm.files import replacing
from vlm.index.kinds import KINDS, Copy, Tuning, load_faiss
from vlm.index.kinds.gpu import adder, find_gpu, why_not
from vlm.index.kinds.searching import asker, most_effort, set_effort
from vlm.index.layout import CURE, Segment, WritePoint, segment_file, unhindered
from vlm.index.vectors import Vectors, open_array, write_vectors
from vlm.manifest import FileRecord, record_file
from vlm.tensors import Array, Float, Float32, Int64

if TYPE_CHECKING:
    import faiss

# a bar is shown for work of some seconds only
_ROWS_WORTH_A_BAR = 50_000
# what is written in large pieces the system keeps, and maps, in pages of 2 MB: graphs are walked a tenth faster
_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Written:
    """A segment that lies on disk, and the checksums of its files."""

    segment: Segment
    files: dict[str, FileRecord]


def write_segment(
    folder: Path,
    number: int,
    blocks: Iterable[Float[Array, "_ D"]],
    rows: Int64[Array, " N"],
    *,
    dimension: int,
    kind: str,
    tuning: Tuning,
    reached: WritePoint = unhindered,
) -> Written:
    """Write the three files of a segment, each atomically: the rows first, then the FAISS index trained on them.

    Args:
        blocks: unit vectors, as many as `rows`.
        rows: the catalogue's row of each, ascending.

    Raises:
        UsageError: the kind does not fit the rows.
        VlmError: a vector is not of unit length, or there are more or fewer than `rows`.
    """
    vectors_path, rows_path = folder / segment_file(number, "npy"), folder / segment_file(number, "rows.npy")
    vectors_path.parent.mkdir(exist_ok=True)
    reached(f"{vectors_path.name}")
    count = len(rows)
    write_vectors(vectors_path, blocks, (count, dimension), reached=reached)
    reached(f"{rows_path.name}")
    with replacing(rows_path) as file:
        np.save(file, rows, allow_pickle=False)
    vectors = Vectors(vectors_path, count, dimension)
    gpu = find_gpu()
    prepared = KINDS[kind](vectors, tuning, gpu)
    _fill(vectors, adder(prepared.index, gpu))
    segment = Segment(number=number, kind=kind, parameters=prepared.parameters, rows=count, rerank=prepared.rerank)
    reached(f"{segment.index_file}")
    faiss = load_faiss()
    with replacing(folder / segment.index_file) as file:
        faiss.write_index(prepared.index, faiss.PyCallbackIOWriter(file.write, _BYTES_AT_ONCE))
        reached(f"{segment.index_file} before its rename")
    return Written(segment=segment, files={name: record_file(folder / name) for name in segment.files})


def _fill(vectors: Vectors, add: Callable[[Float32[Array, "N D"]], None]) -> None:
    if len(vectors) < _ROWS_WORTH_A_BAR:
        for block in vectors.blocks():
            add(block)
        return
    with progress(total=len(vectors), what="index", unit=" rows") as shown:
        for block in vectors.blocks():
            add(block)
            shown.update(len(block))


class OpenSegment:
    """A segment open for reading; its files may be unlinked meanwhile.

    ask: searches the FAISS index, here and among all rows. is_approximate: it visits some of the rows only.
    on_gpu: a copy of the FAISS index there, which answers where all rows may; None: there is none.
    """

    on_gpu: "faiss.Index | None" = None

    def __init__(self, folder: Path, described: Segment, dimension: int) -> None:
        self.described = described
        self.rows: Int64[Array, " N"] = open_array(folder / described.rows_file, np.dtype(np.int64), (described.rows,))
        self.vectors = Vectors(folder / described.vectors_file, described.rows, dimension)
        self.index = _read_index(folder / described.index_file, described, dimension)
        self.ask = asker(self.index)
        self.is_approximate = KINDS[described.kind].effort is not None
        # that of a new index: rows rise, so the last tells that none is left out
        self._is_first = not described.rows or self.rows.item(-1) == described.rows - 1

    def __len__(self) -> int:
        return self.described.rows

    def move(self, copy: Copy) -> str:
        """Have a GPU answer where all rows may; if it cannot, why."""
        reason = why_not(self.index)
        if not reason and self.on_gpu is None:
            try:
                self.on_gpu = copy(self.index)
            except RuntimeError as error:  # of CUDA, mostly for want of memory
                reason = f"it cannot be copied there: {str(error).splitlines()[0]}"
        return reason

    def rows_at(self, positions: Int64[Array, "Q K"]) -> Int64[Array, "Q K"]:
        """The catalogue's rows of what is at these positions; of -1 any number."""
        return positions if self._is_first else self.rows.take(positions, mode="wrap")

    def positions_of(self, rows: Int64[Array, " M"]) -> Int64[Array, " K"]:
        """The positions of those of the sorted rows that are here, ascending."""
        if not len(self) or not len(rows):
            return np.zeros(0, np.int64)
        first, last = np.searchsorted(rows, [self.rows[0], self.rows[-1] + 1])
        wanted = rows[first:last]
        found = np.minimum(np.searchsorted(self.rows, wanted), len(self) - 1)
        return found[self.rows[found] == wanted].astype(np.int64)

    def effort(self, share: float) -> int | None:
        """Lists (IVF) or nodes (HNSW) that a search visits if only `share` of the rows may answer.

        They grow as the share shrinks, so that about as many rows are compared as without a filter. None: the kind has
        nothing to choose.
        """
        name, most = KINDS[self.described.kind].effort, most_effort(self.index)
        if name is None or most is None:
            return None
        return min(most, ceil(self.described.parameters[name] / share))


def _read_index(path: Path, described: Segment, dimension: int) -> "faiss.Index":
    """Memory-mapped where this build of FAISS can."""
    faiss = load_faiss()
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    try:
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    except RuntimeError as error:
        raise VlmError(f"{path} is damaged ({error}); {CURE}.") from error
    if index.ntotal != described.rows or index.d != dimension:
        raise VlmError(
            f"{path} holds {index.ntotal:,} rows of {index.d} dimensions, {described.rows:,} of {dimension} were "
            f"written; {CURE}."
        )
    if name := KINDS[described.kind].effort:
        set_effort(index, described.parameters[name])
    return index
