"""What an open index is, whichever engine has its rows: a snapshot of a version, its catalogue; and what opens one.

FAISS keeps the rows in the index folder (`vlm.index.reader`), Milvus in a collection (`vlm.index.milvus`).
The manifest names the engine: every command and call that takes an index folder opens it by `open_engine_index` here.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import numpy as np
from pyroaring import BitMap

from vlm.errors import UsageError
from vlm.index.ann.faiss_search import CopyToGpu
from vlm.index.embeddings_folder import Modality, Origin
from vlm.index.facets import FieldSummary, ValueCount
from vlm.index.filter_language import Condition
from vlm.index.index_files import EngineDetails
from vlm.index.row_bitmaps import row_ids, to_bitmap
from vlm.manifest import MANIFEST, Manifest, read_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Float, Float32, Int64

# imported where they are used: a search needs neither a writer nor a check
if TYPE_CHECKING:
    from vlm.index.engine_writer import EngineWriter
    from vlm.index.verify import CheckReport

Engine = Literal["faiss", "milvus"]
ScoredRows = tuple[Float32[Array, "Q _"], Int64[Array, "Q _"]]
"""Cosines, best first, and rows; where there are fewer, the score is -inf and the row -1."""

# the squared length of a unit vector in float32 is no further from 1
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Entry(Origin):
    """One row of an index: its number, which is never used again, and what it was made from."""

    row: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FilteredRows:
    """The rows of a filter that a server evaluates in each search; counted and listed only if that is asked for.

    expression: the filter as the server takes it.
    """

    expression: str
    count: Callable[[], int]
    list_rows: Callable[[], Int64[Array, " N"]]

    @cached_property
    def _count(self) -> int:
        return self.count()

    def __len__(self) -> int:
        return self._count


RowSelection = Int64[Array, " N"] | BitMap | FilteredRows
"""The rows that a filter selects: their numbers, ascending, the set of them, or what lets the server select them."""


def row_numbers(selection: RowSelection) -> Int64[Array, " N"]:
    """The numbers of the selected rows, ascending."""
    if isinstance(selection, FilteredRows):
        return selection.list_rows()
    return row_ids(selection) if isinstance(selection, BitMap) else selection


def row_set(selection: RowSelection) -> BitMap:
    """The set of the selected rows."""
    return selection if isinstance(selection, BitMap) else to_bitmap(row_numbers(selection))


class EngineCatalogue(ABC):
    """What the rows of one version were made from, by row, uid or filter; for reading only."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of the given rows, in their order, live or deleted.

        Raises:
            VlmError: one is missing.
        """

    @abstractmethod
    def find(self, uid: str) -> Entry | None:
        """The entry of this uid, if there is one."""

    @abstractmethod
    def rows_by_uid(self, uids: Iterable[str]) -> dict[str, int]:
        """The row of each of these uids that exists."""

    @abstractmethod
    def rows(self) -> Int64[Array, " N"]:
        """All row numbers, ascending."""

    @abstractmethod
    def where(self, condition: Condition, *, optional_fields: Collection[str] = ()) -> RowSelection:
        """The rows that a condition selects.

        optional_fields: may be named although no row has them, and then match none.

        Raises:
            UsageError: it names another field that no row has, or compares numbers with texts.
        """

    @abstractmethod
    def rank_text(self, words: str, top: int) -> list[tuple[int, float]]:
        """The rows whose captions contain all the words, each with a score of which the lowest is the best."""

    @abstractmethod
    def field_names(self) -> list[str]:
        """The metadata fields that have values, by name, those of deleted rows among them."""

    @abstractmethod
    def distinct_values(self, field: str, limit: int) -> list[int | float | str]:
        """The first values of a field in their order, numbers before texts, those of deleted rows among them."""

    @abstractmethod
    def values_like(self, field: str, text: str, limit: int) -> list[str]:
        """The texts of a field that differ from this one at most in the case of A to Z; reads the whole field."""

    @abstractmethod
    def field_values(self, field: str) -> list[tuple[int | float | str, int]]:
        """Each value of a field with its row."""

    @abstractmethod
    def field_summaries(self) -> list[FieldSummary]:
        """The columns of the metadata, by name."""

    @abstractmethod
    def count_values(self, field: str, *, top: int, rows: RowSelection | None = None) -> list[ValueCount]:
        """The `top` most frequent values of a column among the given rows, or among all of this version."""

    @abstractmethod
    def image_ends(self) -> dict[str, int]:
        """By the address of each shard or image file the byte at which its last image ends, 0 without images."""

    @abstractmethod
    def sample_numbers(self, address: str) -> list[int]:
        """The positions in a shard of the samples that have a row."""

    @abstractmethod
    def close(self) -> None:
        """Release what it has open."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineSnapshot(ABC):
    """One version of an index; later changes do not affect it."""

    folder: Path
    manifest: Manifest
    details: EngineDetails
    catalogue: EngineCatalogue

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    @property
    def number(self) -> int:
        """The version's number, `generation` on disk."""
        return self.manifest.generation

    @cached_property
    def rows(self) -> Int64[Array, " N"]:
        """All live rows, ascending."""
        return self._list_rows()

    @abstractmethod
    def _list_rows(self) -> Int64[Array, " N"]: ...

    def live(self, rows: Int64[Array, " N"]) -> Int64[Array, " M"]:
        """Those of some row numbers that are live rows, each once, ascending."""
        return np.intersect1d(self.rows, rows)

    @abstractmethod
    def vectors(self, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The stored unit vectors of live or deleted rows, in the given order; all of them must be there."""

    @abstractmethod
    def nearest(self, queries: Float32[Array, "Q D"], top: int, allowed_rows: RowSelection | None = None) -> ScoredRows:
        """The `top` live rows nearest to each unit vector, or of the allowed ones (as from `EngineCatalogue.where`)."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result: `score` is the cosine of query and row, in [-1, 1]."""

    score: float
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class SegmentInfo:
    """One segment; `rows` are its live ones, `dead` its deleted ones."""

    number: int
    kind: str
    parameters: dict[str, int]
    rerank: int
    rows: int
    dead: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class IndexInfo(Result):
    """An index in numbers.

    kind, parameters: of the segment with most rows. dead: deleted rows that segments hold until `vlm index compact`.
    fresh: live rows outside that segment.
    kept_bytes: of files that are kept for a rollback to the version before alone.
    map_rows: rows that had a place when the map was made; 0 without a map.
    engine: faiss or milvus. address, collection: where Milvus has the rows.
    """

    folder: str
    kind: str
    parameters: dict[str, int]
    rows: int
    dead: int
    fresh: int
    dimension: int
    modality: Modality
    metric: str
    bytes: int
    kept_bytes: int
    generation: int
    model: str
    model_fingerprint: str
    embeddings_fingerprint: str
    num_shards: int
    map_rows: int
    made_by: str
    made_at: str
    segments: tuple[SegmentInfo, ...]
    evidence: dict[str, Any]
    engine: str = "faiss"
    address: str = ""
    collection: str = ""


SnapshotT = TypeVar("SnapshotT", bound=EngineSnapshot)


class EngineIndex(ABC, Generic[SnapshotT]):
    """An index folder open for reading: one version of it, until `refresh` moves to the newest."""

    def __init__(self, snapshot: SnapshotT, stamp: tuple[int, ...]) -> None:
        self.snapshot: SnapshotT = snapshot
        self._stamp = stamp
        self._refresh_lock = threading.Lock()
        self._is_closed = False

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.snapshot.folder

    @property
    def manifest(self) -> Manifest:
        """The manifest of this version."""
        return self.snapshot.manifest

    @property
    def details(self) -> EngineDetails:
        """The manifest's details, typed."""
        return self.snapshot.details

    @property
    def catalogue(self) -> EngineCatalogue:
        """The catalogue of this version."""
        return self.snapshot.catalogue

    def __len__(self) -> int:
        return len(self.snapshot)

    def refresh(self) -> bool:
        """Move to the newest version, if there is a newer one; whether it moved.

        Costs one stat of the manifest while nothing has changed. Searches under way finish on the old version.

        Raises:
            UsageError: it is closed.
            VlmError: the folder is gone or damaged; the old version stays open.
        """
        self.require_open()
        # one thread opens the new version; the others wait and find it open
        with self._refresh_lock:
            # read before the version is opened: a commit in between shows at the next call
            stamp = manifest_stamp(self.folder)
            if stamp == self._stamp:
                return False
            before = self.manifest
            self._open_newest()
            self._stamp = stamp
            # the file may be newer and yet say the same, as after a copy of the folder
            return self.manifest != before

    @abstractmethod
    def _open_newest(self) -> None:
        """Replace the snapshot by one of the newest version."""

    def close(self) -> None:
        """Release what the catalogue has open."""
        # first, so that a search in another thread is refused instead of failing within SQLite
        self._is_closed = True
        self.catalogue.close()

    def require_open(self) -> None:
        """Refuse what is asked after `close`.

        Raises:
            UsageError: it is closed.
        """
        if self._is_closed:
            raise UsageError(f"The index {self.folder} is closed; open it again, as with vlm.open_index.")

    def require_model(self, fingerprint: str, name: str) -> None:
        """Refuse a model whose vectors cannot be compared with those of this index.

        Raises:
            UsageError: its fingerprint is another.
        """
        space = self.details.space
        if fingerprint == space.fingerprint:
            return
        # the same name with other weights is a mistake of its own, with another cure
        if name == space.model:
            raise UsageError(
                f"{name} has changed since it embedded {self.folder}: its fingerprint was {space.fingerprint} and is "
                f"now {fingerprint}. Put the old model back, or embed and index again."
            )
        raise UsageError(
            f"{self.folder} was embedded by {space.model} (fingerprint {space.fingerprint}); {name} is another model "
            f"(fingerprint {fingerprint}), and their vectors cannot be compared. Query with {space.model}, or embed "
            f"and index again with {name}."
        )

    def search(
        self, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSelection | None = None
    ) -> list[list[Hit]]:
        """The `top` rows nearest to each query, best first. Fewer only if there are fewer rows.

        Ties are ordered by row; which of several rows tied at the end are among the `top` is up to the engine.

        allowed_rows: only these rows are returned (as from `EngineCatalogue.where`), deleted ones never.

        Raises:
            UsageError: another dimension, a query that is zero or not finite, or top < 1.
        """
        snapshot = self.snapshot
        scores, rows = _nearest(snapshot, queries, top, allowed_rows)
        # several queries share results, whose entries are read once
        distinct_rows = np.unique(rows[rows >= 0]).tolist()
        entries = dict(zip(distinct_rows, snapshot.catalogue.entries(distinct_rows), strict=True))
        results = []
        for query_scores, query_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            hits = zip(query_scores, query_rows, strict=True)
            results.append([Hit(score=score, entry=entries[row]) for score, row in hits if row >= 0])
        return results

    def nearest(self, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSelection | None = None) -> ScoredRows:
        """As `search`, but scores and rows alone, without reading the catalogue."""
        return _nearest(self.snapshot, queries, top, allowed_rows)

    @abstractmethod
    def info(self) -> IndexInfo:
        """The index in numbers."""


def manifest_stamp(folder: Path) -> tuple[int, ...]:
    """What changes whenever the manifest is replaced; all zero if there is none."""
    try:
        stat = os.stat(folder / MANIFEST)
    except OSError:
        return (0, 0, 0, 0)
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def _nearest(
    snapshot: EngineSnapshot, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSelection | None
) -> ScoredRows:
    units = normalize_queries(queries, top, snapshot.details.space.dimension)
    # segments look rows up by bisection, which gives wrong rows for unsorted ones
    if isinstance(allowed_rows, np.ndarray) and not (np.diff(allowed_rows) > 0).all():
        raise UsageError("allowed_rows must be distinct and ascending, as np.unique makes them.")
    scores, rows = snapshot.nearest(units, top, allowed_rows)
    # rounding may lead out of the range; in place, which takes half the time of a copy by clip
    np.minimum(scores, 1, out=scores)
    np.maximum(scores, -1, out=scores)
    return scores, rows


def normalize_queries(queries: Float[Array, "Q D"], top: int, dimension: int) -> Float32[Array, "Q D"]:
    """The queries as float32 of unit length.

    Raises:
        UsageError: another dimension, a query that is zero or not finite, or top < 1.
    """
    if top < 1:
        raise UsageError(f"top = {top} is out of range: ask for at least one result.")
    if queries.shape[1] != dimension:
        raise UsageError(f"Queries have {queries.shape[1]} dimensions, the rows of this index {dimension}.")
    vectors = queries.astype(np.float32, copy=False)
    squares = np.vecdot(vectors, vectors)
    # one query at a time is the rule, and for few numbers Python is faster than numpy
    squares_list = squares.tolist()
    if all([-_ROUNDING < square - 1 < _ROUNDING for square in squares_list]):
        return vectors
    # the comparison is false for NaN too
    if not all([0 < square < inf for square in squares_list]):
        wrong = int(np.argmin((squares > 0) & (squares < np.inf)))
        raise UsageError(f"Query {wrong} has length {np.sqrt(squares[wrong])}: it must be finite and not zero.")
    return vectors / np.sqrt(squares)[:, None]


def engine_of(folder: Path) -> Engine:
    """The engine of a finished index folder.

    Raises:
        UsageError: there is no index, or one of an engine that this version does not know.
    """
    engine = read_manifest(folder, "index").details.get("engine", "faiss")
    if engine not in ("faiss", "milvus"):
        raise UsageError(f"{folder} has the engine {engine!r}, this version knows faiss and milvus: use a newer vlm.")
    return cast(Engine, engine)


def open_engine_index(folder: Path, *, gpu: CopyToGpu | None = None) -> EngineIndex[Any]:
    """Open an index folder by its engine.

    gpu: as of `Index.open`; Milvus searches where its server runs, whatever is said here.

    Raises:
        UsageError: there is no finished index. VlmError: it is damaged, or its server cannot be reached.
    """
    # here, since what an engine's own modules build on must not import them
    if engine_of(folder) == "faiss":
        from vlm.index.reader import Index

        return Index.open(folder, gpu=gpu)
    from vlm.index.milvus.milvus_reader import MilvusIndex

    return MilvusIndex.open(folder)


def open_writer(folder: Path) -> "EngineWriter":
    """The writer of an index folder, by its engine.

    Raises:
        UsageError: there is another writer, or no index. VlmError: it is damaged, or its server cannot be reached.
    """
    if engine_of(folder) == "faiss":
        from vlm.index.writer import IndexWriter

        return IndexWriter(folder)
    from vlm.index.milvus.milvus_writer import MilvusWriter

    return MilvusWriter(folder)


def check_index(folder: Path, *, sample: int = 1000, seed: int = 0) -> "CheckReport":
    """Read and check a whole index, by its engine.

    sample: number of rows whose metadata and distances are computed again.

    Raises:
        UsageError: there is no index. VlmError: its manifest is damaged, or its server cannot be reached.
    """
    if engine_of(folder) == "faiss":
        from vlm.index import verify

        return verify.check_index(folder, sample=sample, seed=seed)
    from vlm.index.milvus.milvus_verify import check_milvus_index

    return check_milvus_index(folder, sample=sample, seed=seed)


def require_faiss(folder: Path, what: str) -> None:
    """Refuse what only FAISS can do, before any work.

    what: needs it, as the message begins.

    Raises:
        UsageError: the index has another engine.
    """
    if engine_of(folder) != "faiss":
        raise UsageError(f"{what} needs the rows of a FAISS index; those of {folder} are kept by Milvus.")
