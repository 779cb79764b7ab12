"""Flat: every question is compared with every row, exactly."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlm.index.kinds.kind import Copy, Kind, Rows, Tuning, load_faiss

if TYPE_CHECKING:
    import faiss

_FLOAT_BYTES = 4


def _parameters(rows: int, tuning: Tuning) -> dict[str, int]:
    return {}


def _prepare(rows: Rows, parameters: dict[str, int], gpu: Copy | None) -> "faiss.Index":
    return load_faiss().IndexFlatIP(rows.dimension)


def _resident_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    return rows * dimension * _FLOAT_BYTES


def _work(rows: int, parameters: Mapping[str, int]) -> float:
    return rows


FLAT = Kind(name="flat", parameters=_parameters, prepare=_prepare, resident_bytes=_resident_bytes, work=_work)
