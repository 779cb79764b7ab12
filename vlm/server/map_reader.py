"""The map of a served index: what a region of it shows, coloured by a column, and where the hits of a search lie."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm.errors import VlmError
from vlm.index.catalog import Entry
from vlm.index.engine_base import row_numbers
from vlm.index.facets import ValueCount
from vlm.index.metadata import metadata_fields
from vlm.index.reader import IndexSnapshot, RowMap
from vlm.server.schemas import MapRequest
from vlm.server.served_index import ServedIndex, UnknownItem
from vlm.service.ranking import rows_matching
from vlm.tensor_types import Array, Float32

LEGEND_SIZE = 8
"""Values of a column that have a colour of their own."""

NO_VALUE = -1
"""The value of a point whose row has none of the legend's."""

_DECIMALS = 5


@dataclass(kw_only=True)
class MapReader:
    """Answers requests for the map of one index from threads; keeps the places of rows that were added since."""

    index: ServedIndex
    _map: RowMap | None = field(default=None, init=False)
    _snapshot: IndexSnapshot | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def answer(self, request: MapRequest) -> dict[str, Any]:
        """The points of a region, the legend of their colours, and the places of the uids asked for.

        Raises:
            UnknownItem: the index has no map. UsageError: the filter or the column is wrong.
            VlmError: the map is damaged.
        """
        self.index.refresh()
        snapshot, row_map = self._open()
        legend: list[ValueCount] = []
        if request.colour:
            # refused before the rows are read
            counts = self.index.facets([request.colour], where=request.where, top=LEGEND_SIZE)
            legend = counts[request.colour]
        matching = rows_matching(snapshot, request.where)
        allowed_rows = None if matching is None else row_numbers(matching)
        positions, num_inside = row_map.sample(request.box, request.top, allowed_rows)
        entries = snapshot.catalogue.entries(row_map.rows[positions].tolist())
        places = _rounded(row_map.places[positions])
        known = snapshot.catalogue.rows_by_uid(request.uids)
        return {
            "generation": snapshot.number,
            "rows": len(row_map),
            "new": row_map.num_new,
            "unplaced": row_map.num_unplaced,
            "inside": num_inside,
            "bounds": _bounds(row_map.places),
            "points": {
                "uids": [entry.uid for entry in entries],
                "x": [x for x, _ in places],
                "y": [y for _, y in places],
                "values": [_number_in_legend(entry, request.colour, legend) for entry in entries],
            },
            "legend": [{"value": count.value, "rows": count.rows} for count in legend],
            "places": _places_of(row_map, known),
        }

    def _open(self) -> tuple[IndexSnapshot, RowMap]:
        # one thread places new rows, the others wait for them
        with self._lock:
            snapshot = self.index.service.index.snapshot
            if snapshot.details.map is None:
                name = self.index.name
                raise UnknownItem(f"Index {name} has no map; make one with vlm index map, and reload the page.")
            if self._map is None or self._snapshot is not snapshot:
                try:
                    self._map = RowMap.open(snapshot, self._map)
                except (VlmError, OSError) as error:
                    message = f"The map of index {self.index.name} cannot be read; make it again with vlm index map."
                    raise VlmError(message) from error
                self._snapshot = snapshot
            return snapshot, self._map


def _bounds(places: Float32[Array, "N 2"]) -> list[float]:
    if not len(places):
        return [-1.0, -1.0, 1.0, 1.0]
    low, high = _rounded(np.stack([places.min(axis=0), places.max(axis=0)]))
    return [*low, *high]


def _places_of(row_map: RowMap, known: dict[str, int]) -> dict[str, list[float]]:
    places: dict[str, list[float]] = {}
    for uid, row in known.items():
        for place in _rounded(row_map.places[row_map.positions_of(np.array([row], np.int64))]):
            places[uid] = place
    return places


def _rounded(places: Float32[Array, "N 2"]) -> list[list[float]]:
    # in double precision, or the digits after the last one would come back
    return np.round(places.astype(np.float64), _DECIMALS).tolist()


def _number_in_legend(entry: Entry, column: str, legend: Sequence[ValueCount]) -> int:
    if not legend:
        return NO_VALUE
    values = {value for name, value in metadata_fields(entry) if name == column}
    return next((number for number, count in enumerate(legend) if count.value in values), NO_VALUE)
