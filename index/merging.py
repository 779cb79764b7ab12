"""Which segments are written anew, and what of the others is dead."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vlm.index.search_plan import Selected
from vlm.index.segments import OpenSegment
from vlm.tensors import Array, Float, Int64

_ROWS_AT_ONCE = 65_536


def absorbed(selected: Sequence[Selected], new_rows: int) -> int:
    """How many of the last segments are merged with new rows: the flat ones that are no larger than what has come
    together behind them.

    A row is so written about log2(N) times in all, and about log2(N) segments are ever open, as in a binary counter
    (O'Neil et al. 1996, the log-structured merge tree, with a factor of 2).
    """
    number, gathered = 0, new_rows
    for last in reversed(selected):
        if last.segment.described.kind != "flat" or last.count > gathered:
            break
        number, gathered = number + 1, gathered + last.count
    return number


def living_blocks(selected: Selected) -> Iterator[Float[Array, "_ D"]]:
    """The chosen rows of a segment as they are stored, float16."""
    for first in range(0, selected.count, _ROWS_AT_ONCE):
        yield selected.segment.vectors.stored[selected.positions[first : first + _ROWS_AT_ONCE]]


def settle(segments: Iterable[OpenSegment], dead: Int64[Array, " N"]) -> tuple[list[OpenSegment], Int64[Array, " M"]]:
    """The segments in which something lives, and those of the dead rows (sorted) that lie in them."""
    kept, remaining = [], [np.zeros(0, np.int64)]
    for segment in segments:
        positions = segment.positions_of(dead)
        if len(positions) < len(segment):
            kept.append(segment)
            remaining.append(segment.rows[positions])
    return kept, np.concatenate(remaining)
