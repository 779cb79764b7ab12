"""The map of an index as its readers see it: a place in two dimensions for each live row.

A file of places is part of the index and never changes. Rows that were added since lie among their nearest rows that
have a place; deleted rows are left out. What is shown of a region are the rows that come first in a fixed order that
has nothing to do with the places: a row that is shown stays while one zooms in, and others join it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.index.index_files import MapRecord
from vlm.index.map_layout import PLACING_NEIGHBOURS, place_among
from vlm.index.reader import IndexSnapshot
from vlm.index.segments import nearest, open_array
from vlm.manifest import FileRecord, record_file
from vlm.tensor_types import Array, Float32, Int64

MOST_PLACED = 5_000
"""Rows added since the map was made that a reader places in one version; a new map has a place for all."""

_PLACE = np.dtype([("row", "<i8"), ("x", "<f4"), ("y", "<f4")])
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
    """The rows (ascending) and their places, as they were written.

    Raises:
        VlmError: the file is damaged.
    """
    table = open_array(folder / record.file, _PLACE, (record.rows,))
    return table["row"].copy(), np.stack([table["x"], table["y"]], axis=1)


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
        is_live = np.isin(written_rows, live, assume_unique=True)
        rows, places = written_rows[is_live], written_places[is_live]
        new = np.setdiff1d(live, rows, assume_unique=True)
        if before is not None and before.record == record:
            is_placed = np.isin(before.rows, new, assume_unique=True)
            placed, new_places = before.rows[is_placed], before.places[is_placed]
        else:
            placed, new_places = np.zeros(0, np.int64), np.zeros((0, 2), np.float32)
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
        positions = np.minimum(np.searchsorted(self.rows, rows), max(len(self.rows) - 1, 0))
        if not len(self.rows):
            return positions[:0]
        return positions[np.equal(self.rows[positions], rows)]

    def sample(
        self, box: Sequence[float] | None, top: int, allowed_rows: Int64[Array, " A"] | None = None
    ) -> tuple[Int64[Array, " K"], int]:
        """The positions of at most `top` rows of a region, and how many rows it has.

        box: left, bottom, right, top; None is the whole map. allowed_rows: only these count, ascending.
        """
        is_inside: np.ndarray = np.ones(len(self.rows), bool)
        if box is not None:
            low, high = np.array(box[:2], np.float32), np.array(box[2:], np.float32)
            is_inside = np.all((self.places >= low) & (self.places <= high), axis=1)
        if allowed_rows is not None:
            is_inside &= np.isin(self.rows, allowed_rows, assume_unique=True)
        in_order = self._order[is_inside[self._order]]
        return in_order[:top], int(is_inside.sum())

    @cached_property
    def _order(self) -> Int64[Array, " N"]:
        """All positions, in an order that is random but always the same."""
        # by row and not by position, which changes when a row before it is deleted; Fibonacci hashing mixes neighbours
        return np.argsort(self.rows.astype(np.uint64) * _GOLDEN, kind="stable")
