"""The kinds of FAISS index: each one function that prepares it, one `Kind` beside it, and one line in `KINDS`."""

from vlm.config import choose
from vlm.index.kinds.flat import FLAT
from vlm.index.kinds.hnsw import HNSW
from vlm.index.kinds.inverted import IVF, IVFPQ, IVFSQ, RABITQ
from vlm.index.kinds.kind import Copy, Kind, Prepared, Rows, Tuning, load_faiss
from vlm.index.kinds.scalar import SQ8

__all__ = ["AUTO", "KINDS", "Copy", "Kind", "Prepared", "Rows", "Tuning", "choose_kind", "load_faiss", "settings_of"]

AUTO = "auto"
# below it an exact scan of 512 dimensions takes about 5 ms on one core, so there is nothing to win
FLAT_BELOW_ROWS = 50_000

KINDS: dict[str, Kind] = {kind.name: kind for kind in (FLAT, IVF, IVFSQ, IVFPQ, RABITQ, SQ8, HNSW)}


def settings_of(kind: str, *, effort: int | None, rerank: int) -> dict[str, int]:
    """The parameters of a kind that may change after the build, by their names.

    >>> settings_of("ivfsq", effort=40, rerank=2), settings_of("flat", effort=None, rerank=0)
    ({'nprobe': 40, 'rerank': 2}, {})
    """
    name = KINDS[kind].effort
    found = {name: effort} if name is not None and effort is not None else {}
    return found | ({"rerank": rerank} if rerank else {})


def choose_kind(kind: str, num_rows: int) -> str:
    """The kind asked for; `auto` is flat below 50,000 rows and ivf from there on.

    >>> choose_kind("auto", 1000)
    'flat'

    Raises:
        UsageError: there is no such kind.
    """
    if kind == AUTO:
        return "flat" if num_rows < FLAT_BELOW_ROWS else "ivf"
    choose(KINDS, kind, "index kind")
    return kind
