"""The map of an index: a place in two dimensions for each live row, so that like rows lie together.

`lay_out` makes it by UMAP (McInnes, Healy & Melville 2018, arXiv:1802.03426; umap-learn) of at most `sample` rows,
which a seed draws. Their vectors are reduced by PCA first, their neighbours are exact, and the start is the two
principal axes: the same rows, seed and versions of the libraries give the same map, bit by bit. Every other row is
placed among its nearest laid-out rows. Memory grows with the sample; of the other rows only a block is held.

A file of places is part of the index and never changes. `RowMap` is the map of one version: rows that were added since
lie among their nearest rows that have a place, deleted rows are left out. What is shown of a region are the rows that
come first in a fixed order that has nothing to do with the places: a row that is shown stays while one zooms in, and
others join it.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pyroaring import BitMap

from vlm.console import progress
from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.index.ann.faiss_search import load_faiss
from vlm.index.engine_base import RowSelection, row_set
from vlm.index.index_files import MapRecord, open_array
from vlm.index.reader import IndexSnapshot
from vlm.index.row_bitmaps import contained
from vlm.index.segments import nearest
from vlm.manifest import FileRecord, record_file
from vlm.tensor_types import Array, Bool, Float, Float32, Int64

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

logger = logging.getLogger(__name__)

METHOD = "umap"
SAMPLE = 50_000
"""Rows that UMAP lays out."""

PLACING_NEIGHBOURS = 5
"""Laid-out rows among which another one is placed."""

MOST_PLACED = 5_000
"""Rows added since the map was made that a reader places in one version; a new map has a place for all."""

_PLACE = np.dtype([("row", "<i8"), ("x", "<f4"), ("y", "<f4")])
_X = 2
"""Where x stands among the four bytes each of a place; y follows."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_NEIGHBOURS = 15
_FEWEST = 2 * _NEIGHBOURS
"""Below this number of rows neighbours say little, and the principal axes are the map."""

_DIMENSIONS = 50
_PCA_ROWS = 20_000
_ROWS_AT_ONCE = 16_384
_NEARLY_ZERO = 1e-6

VectorsOf = Callable[[Int64[Array, " N"]], Float32[Array, "N D"]]
"""The unit vectors of rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MapLayout:
    """A place in [-1, 1]² for each row. fitted: how many of them UMAP laid out; the others lie among those."""

    places: Float32[Array, "N 2"]
    fitted: int


def lay_out(rows: Int64[Array, " N"], vectors_of: VectorsOf, *, sample: int = SAMPLE, seed: int = 0) -> MapLayout:
    """Lay out rows on a map.

    Args:
        sample: the most rows that UMAP sees. seed: of the sample and of UMAP.

    Raises:
        UsageError: sample or seed is out of range, or umap-learn is not installed.
    """
    if sample < _FEWEST:
        raise UsageError(f"sample = {sample} is out of range: a map needs at least {_FEWEST}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed = {seed} is out of range: 0 to {2**32 - 1}.")
    check_installed()
    rng = np.random.default_rng(seed)
    is_fitted = np.zeros(len(rows), bool)
    is_fitted[rng.permutation(len(rows))[:sample]] = True
    places = np.zeros((len(rows), 2), np.float32)
    if len(rows) > 2:
        reducer = _fit_reducer(rng.permutation(rows[is_fitted])[:_PCA_ROWS], vectors_of)
        fitted = _reduce_blocks(rows[is_fitted], vectors_of, reducer)
        places[is_fitted] = _run_umap(fitted, seed)
        _place_others(places, rows, is_fitted, vectors_of, reducer, fitted)
    return MapLayout(places=_scaled(places), fitted=int(is_fitted.sum()))


def check_installed() -> None:
    """Refuse to begin what would end without umap-learn.

    Raises:
        UsageError: it is not installed.
    """
    for name in ("umap", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"A map needs {name}: pip install 'vlm-pipeline[map]'.")


def place_among(places: Float[Array, "N K 2"], squared_distances: Float[Array, "N K"]) -> Float32[Array, "N 2"]:
    """The mean of the places of K neighbours, the nearer the heavier.

    >>> place_among(np.array([[[0.0, 0.0], [1.0, 1.0]]]), np.array([[0.5, 0.5]])).tolist()
    [[0.5, 0.5]]
    """
    # a row equal to one that has a place lies there too
    weights = 1 / (np.maximum(squared_distances, 0) + _NEARLY_ZERO)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nk,nkd->nd", weights, places).astype(np.float32)


def _fit_reducer(rows: Int64[Array, " N"], vectors_of: VectorsOf) -> "PCA":
    from sklearn.decomposition import PCA

    vectors = vectors_of(np.sort(rows))
    # rows that are all equal have no variance to take shares of
    with np.errstate(invalid="ignore"):
        return PCA(min(_DIMENSIONS, *vectors.shape), svd_solver="covariance_eigh").fit(vectors)


def _reduce_blocks(rows: Int64[Array, " N"], vectors_of: VectorsOf, reducer: "PCA") -> Float32[Array, "N E"]:
    reduced: list[np.ndarray] = []
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        reduced.append(reducer.transform(vectors_of(rows[first : first + _ROWS_AT_ONCE])).astype(np.float32))
    return np.concatenate(reduced)


def _run_umap(vectors: Float32[Array, "N E"], seed: int) -> Float32[Array, "N 2"]:
    # PCA orders its axes, the first are the principal ones
    start = np.zeros((len(vectors), 2), np.float32)
    start[:, : vectors.shape[1]] = vectors[:, :2]
    if len(vectors) < _FEWEST:
        return start
    with warnings.catch_warnings():
        # that the kind of UMAP that needs TensorFlow cannot be had
        warnings.simplefilter("ignore", ImportWarning)
        from umap import UMAP

    logger.info(f"Laying out {len(vectors):,} rows by UMAP …")
    squared, neighbours = _nearest_vectors(vectors, vectors, _NEIGHBOURS)
    # UMAP divides by the extent of the start, which is zero where rows are equal
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=start.shape).astype(np.float32)
    mapper = UMAP(
        n_neighbors=_NEIGHBOURS,
        # more than the default, so that points can be told apart
        min_dist=0.3,
        # an array as well, which its annotation does not say
        init=start + noise,  # pyright: ignore[reportArgumentType]
        precomputed_knn=(neighbours, np.sqrt(np.maximum(squared, 0)), None),
        random_state=seed,
        n_jobs=1,
    )
    with warnings.catch_warnings():
        # that it cannot place further rows, which is done here
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)
        return np.asarray(mapper.fit_transform(vectors), np.float32)


def _nearest_vectors(
    vectors: Float32[Array, "N E"], queries: Float32[Array, "Q E"], count: int
) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
    """Squared distances and positions of the nearest vectors."""
    index = load_faiss().IndexFlatL2(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    return index.search(np.ascontiguousarray(queries), min(count, len(vectors)))


def _place_others(
    places: Float32[Array, "N 2"],
    rows: Int64[Array, " N"],
    is_fitted: np.ndarray,
    vectors_of: VectorsOf,
    reducer: "PCA",
    fitted: Float32[Array, "F E"],
) -> None:
    others = np.flatnonzero(~is_fitted)
    fitted_places = places[is_fitted]
    with progress(total=len(others), what="placing", unit="row", is_shown=bool(len(others))) as bar:
        for first in range(0, len(others), _ROWS_AT_ONCE):
            positions = others[first : first + _ROWS_AT_ONCE]
            queries = _reduce_blocks(rows[positions], vectors_of, reducer)
            squared, neighbours = _nearest_vectors(fitted, queries, PLACING_NEIGHBOURS)
            places[positions] = place_among(fitted_places[neighbours], squared)
            bar.update(len(positions))


def _scaled(places: Float32[Array, "N 2"]) -> Float32[Array, "N 2"]:
    """Centred, the longer side from -1 to 1."""
    if not len(places):
        return places
    low = places.min(axis=0)
    high = places.max(axis=0)
    return (places - (low + high) / 2) / max(float((high - low).max()) / 2, _NEARLY_ZERO)


def write_map(path: Path, rows: Int64[Array, " N"], places: Float32[Array, "N 2"]) -> FileRecord:
    """Write the places of rows (ascending).

    Raises:
        OSError: the disk is full.
    """
    table = np.empty(len(rows), _PLACE)
    table["row"] = rows
    table["x"] = places[:, 0]
    table["y"] = places[:, 1]
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        np.save(file, table, allow_pickle=False)
    return record_file(path)


def read_map(folder: Path, record: MapRecord) -> tuple[Int64[Array, " N"], Float32[Array, "N 2"]]:
    """The rows (ascending) and their places, as they were written, where they lie in the file.

    Raises:
        VlmError: the file is damaged.
    """
    table = open_array(folder / record.file, _PLACE, (record.rows,))
    places = table.view(np.float32).reshape(-1, _PLACE.itemsize // 4)
    return table["row"], places[:, _X : _X + 2]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowMap:
    """The map of one version of an index.

    rows: live rows that have a place, ascending. places: in [-1, 1]², nearly so for rows that were added since.
    num_new: how many of them were added since the map was made. num_unplaced: live rows without a place.
    """

    record: MapRecord
    rows: Int64[Array, " N"]
    places: Float32[Array, "N 2"]
    num_new: int
    num_unplaced: int

    @classmethod
    def open(cls, snapshot: IndexSnapshot, before: "RowMap | None" = None) -> "RowMap":
        """The map of a version.

        before: that of an earlier version, whose rows need not be placed again.

        Raises:
            UsageError: the index has no map. VlmError: the file of its places is damaged.
        """
        record = snapshot.details.map
        if record is None:
            raise UsageError(f"{snapshot.folder} has no map; make one with vlm index map.")
        live = snapshot.rows
        written_rows, written_places = read_map(snapshot.folder, record)
        if np.array_equal(written_rows, live):
            return cls(record=record, rows=live, places=written_places, num_new=0, num_unplaced=0)
        is_live = np.isin(written_rows, live, assume_unique=True)
        rows = written_rows[is_live]
        places = written_places[is_live]
        new = np.setdiff1d(live, rows, assume_unique=True)
        if before is not None and before.record == record:
            is_placed = np.isin(before.rows, new, assume_unique=True)
            placed = before.rows[is_placed]
            new_places = before.places[is_placed]
        else:
            placed = np.zeros(0, np.int64)
            new_places = np.zeros((0, 2), np.float32)
        to_place = np.setdiff1d(new, placed, assume_unique=True)[:MOST_PLACED] if len(rows) else new[:0]
        if len(to_place):
            scores, neighbours = nearest(snapshot.views, snapshot.vectors(to_place), PLACING_NEIGHBOURS, rows)
            positions = np.searchsorted(rows, neighbours)
            placed = np.concatenate([placed, to_place])
            new_places = np.concatenate([new_places, place_among(places[positions], 2 - 2 * scores)])
        all_rows = np.concatenate([rows, placed])
        order = np.argsort(all_rows)
        return cls(
            record=record,
            rows=all_rows[order],
            places=np.concatenate([places, new_places])[order],
            num_new=len(placed),
            num_unplaced=len(live) - len(all_rows),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def positions_of(self, rows: Int64[Array, " M"]) -> Int64[Array, " K"]:
        """The positions of those of some rows that have a place, in their order."""
        if not len(self.rows):
            return np.zeros(0, np.int64)
        positions = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return positions[np.equal(self.rows[positions], rows)]

    def sample(
        self, box: Sequence[float] | None, top: int, allowed_rows: RowSelection | None = None
    ) -> tuple[Int64[Array, " K"], int]:
        """The positions of at most `top` rows of a region, and how many rows it has.

        Those that come first in an order of all rows that is random but always the same.

        box: left, bottom, right, top; None is the whole map. allowed_rows: only these count.
        """
        allowed = None if allowed_rows is None else row_set(allowed_rows)
        num_inside = 0
        positions = np.zeros(0, np.int64)
        ranks = np.zeros(0, np.uint64)
        for first in range(0, len(self.rows), _ROWS_AT_ONCE):
            block = slice(first, first + _ROWS_AT_ONCE)
            inside = first + np.flatnonzero(self._is_inside(block, box, allowed))
            num_inside += len(inside)
            positions = np.concatenate([positions, inside])
            # by row and not by position, which changes when a row before it is deleted; Fibonacci hashing mixes
            # neighbours, and no two rows have the same product
            ranks = np.concatenate([ranks, self.rows[inside].astype(np.uint64) * _GOLDEN])
            if len(ranks) > top:
                best = np.argpartition(ranks, top)[:top]
                positions = positions[best]
                ranks = ranks[best]
        return positions[np.argsort(ranks)], num_inside

    def _is_inside(self, block: slice, box: Sequence[float] | None, allowed: BitMap | None) -> Bool[Array, " N"]:
        """Which of some neighbouring positions a sample may have."""
        rows = self.rows[block]
        is_inside = np.ones(len(rows), bool) if allowed is None else contained(rows, allowed)
        if box is not None:
            low = np.array(box[:2], np.float32)
            high = np.array(box[2:], np.float32)
            places = self.places[block]
            is_inside &= np.all((places >= low) & (places <= high), axis=1)
        return is_inside
