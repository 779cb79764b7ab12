"""The loops of `vlm.evaluation.rank_counts` in machine code, whose time hardly depends on how many scores lie above or
near those of the positives.

numpy compares whole blocks and writes a flag for every score; here a piece of a row is compared with all thresholds of
its query while it lies in the processor's first cache. Compiled by numba (of the extra `evaluation`) when first called,
which takes some three seconds. No function holds Python's lock while it runs.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from vlm.tensor_types import Array, Float32, Float64, Int64

# a piece of a row with a score near a threshold is looked at again, and the same a sixteenth of it
_PIECE = 128
_SMALL_PIECE = 16
# thresholds and counts of so many columns stay in the first cache, and so do rows that are looked at again
_COLUMNS = 256
_ROWS = 64


def _compiled(function: Callable[..., Any]) -> Any:
    # the function itself, not one that checks its arguments first
    return numba.njit(nogil=True)(inspect.unwrap(function))


def _compiled_in_any_order(function: Callable[..., Any]) -> Any:
    # sums in whatever order the processor's vectors have it; what they decide allows for that
    return numba.njit(nogil=True, fastmath={"reassoc", "nsz", "contract"})(inspect.unwrap(function))


@_compiled
def _count_piece(piece: Float32[Array, " C"], high: Any, low: Any) -> tuple[Any, Any]:
    """How many scores lie above both thresholds, and how many above or between them."""
    num_above = np.int32(0)
    num_reached = np.int32(0)
    # without a conversion back numba would count in 64 bits, half as many at once
    for column in range(len(piece)):
        num_above = np.int32(num_above + np.int32(piece[column] > high))
        num_reached = np.int32(num_reached + np.int32(piece[column] >= low))
    return num_above, num_reached


def count_rows(
    scores: Float32[Array, "B N"],
    groups: Int64[Array, "B 2"],
    high: Float32[Array, " G"],
    low: Float32[Array, " G"],
    best: Float32[Array, " B"],
    near: Int64[Array, "M 3"],
) -> tuple[Int64[Array, " G"], int]:
    """For each group of a row how many of the row's scores lie above its threshold, and how many scores are near.

    groups: the first of each row, and the one after its last; their thresholds fall. high, low: what is between them
    is near. best: the highest score of each row. near: is filled with group, row and column of the scores that are
    near; where it has no room they are counted all the same.
    """
    above = np.zeros(len(high), np.int64)
    return above, _count_rows(scores, groups, high, low, best, above, near, 0)


def count_columns(
    scores: Float32[Array, "B N"],
    groups: Int64[Array, "N 2"],
    high: Float32[Array, " G"],
    low: Float32[Array, " G"],
    best: Float32[Array, " N"],
    near: Int64[Array, "M 3"],
) -> tuple[Int64[Array, " G"], int]:
    """As `count_rows`, with groups of columns."""
    above = np.zeros(len(high), np.int64)
    if not len(above):
        return above, 0
    sizes = groups[:, 1] - groups[:, 0]
    first_group = np.minimum(groups[:, 0], len(above) - 1)
    # the thresholds of the last group are the lowest
    is_reached = (sizes > 0) & (best >= low[groups[:, 1] - 1])
    single = is_reached & (sizes == 1)
    infinity = np.float32(np.inf)
    single_high = np.where(single, high[first_group], infinity)
    single_low = np.where(single, low[first_group], infinity)
    counted = np.zeros(len(sizes), np.int64)
    num_near = _count_columns(scores, single_high, single_low, counted, near)
    above[groups[single, 0]] = counted[single]
    held = near[:num_near]
    held[:, 0] = groups[held[:, 2], 0]
    several = np.flatnonzero(is_reached & (sizes > 1))
    if len(several):
        turned = np.ascontiguousarray(scores[:, several].T)
        num_before = num_near
        num_near = _count_rows(turned, groups[several], high, low, best[several], above, near, num_before)
        held = near[num_before:num_near]
        columns = several[held[:, 1]]
        held[:, 1] = held[:, 2]
        held[:, 2] = columns
    return above, num_near


@_compiled
def _count_rows(
    scores: Float32[Array, "B N"],
    groups: Int64[Array, "B 2"],
    high: Float32[Array, " G"],
    low: Float32[Array, " G"],
    best: Float32[Array, " B"],
    above: Int64[Array, " G"],
    near: Int64[Array, "M 3"],
    num_near: int,
) -> int:
    """Add to `above`, and to `near` behind those that it has; the new number is returned."""
    for row in range(scores.shape[0]):
        line = scores[row]
        for group in range(groups[row, 0], groups[row, 1]):
            if best[row] < low[group]:
                continue
            for start in range(0, len(line), _PIECE):
                piece = line[start : start + _PIECE]
                num_above, num_reached = _count_piece(piece, high[group], low[group])
                above[group] += num_above
                if num_reached == num_above:
                    continue
                for small in range(0, len(piece), _SMALL_PIECE):
                    part = piece[small : small + _SMALL_PIECE]
                    num_above, num_reached = _count_piece(part, high[group], low[group])
                    if num_reached == num_above:
                        continue
                    for column in range(len(part)):
                        if low[group] <= part[column] <= high[group]:
                            if num_near < len(near):
                                near[num_near, 0] = group
                                near[num_near, 1] = row
                                near[num_near, 2] = start + small + column
                            num_near += 1
    return num_near


@_compiled
def _count_columns(
    scores: Float32[Array, "B N"],
    high: Float32[Array, " N"],
    low: Float32[Array, " N"],
    above: Int64[Array, " N"],
    near: Int64[Array, "M 3"],
) -> int:
    """The same for columns with one pair of thresholds each, which are infinite where nothing is counted."""
    num_near = 0
    # arrays of its own: of others the compiler has to expect that they overlap
    num_above = np.empty(_COLUMNS, np.int32)
    num_reached = np.empty(_COLUMNS, np.int32)
    for start in range(0, scores.shape[1], _COLUMNS):
        highs = high[start : start + _COLUMNS]
        lows = low[start : start + _COLUMNS]
        lowest = np.float32(np.inf)
        for column in range(len(lows)):
            lowest = min(lowest, lows[column])
        if lowest == np.inf:
            continue
        for top in range(0, scores.shape[0], _ROWS):
            bottom = min(top + _ROWS, scores.shape[0])
            num_above[:] = 0
            num_reached[:] = 0
            for row in range(top, bottom):
                # a slice of a slice would not be known to be contiguous
                line = scores[row, start : start + _COLUMNS]
                for column in range(len(highs)):
                    num_above[column] = np.int32(num_above[column] + np.int32(line[column] > highs[column]))
                    num_reached[column] = np.int32(num_reached[column] + np.int32(line[column] >= lows[column]))
            for column in range(len(highs)):
                above[start + column] += num_above[column]
                if num_reached[column] == num_above[column]:
                    continue
                for row in range(top, bottom):
                    if lows[column] <= scores[row, start + column] <= highs[column]:
                        if num_near < len(near):
                            near[num_near, 1] = row
                            near[num_near, 2] = start + column
                        num_near += 1
    return num_near


@_compiled_in_any_order
def _product(first: Float32[Array, " D"], second: Float32[Array, " D"]) -> Any:
    total = 0.0
    for position in range(len(first)):
        total += np.float64(first[position]) * np.float64(second[position])
    return total


@_compiled
def decide(
    rows: Float32[Array, "B D"],
    columns: Float32[Array, "N D"],
    near: Int64[Array, "M 3"],
    score: Float64[Array, " G"],
    margin: Float64[Array, " G"],
    above: Int64[Array, " G"],
) -> int:
    """Count those of the near pairs whose product in float64 is higher than the score of their group by more than the
    margin. The pairs that are closer than that are moved to the front; their number is returned."""
    num_open = 0
    for pair in range(len(near)):
        group = near[pair, 0]
        difference = _product(rows[near[pair, 1]], columns[near[pair, 2]]) - score[group]
        if difference > margin[group]:
            above[group] += 1
        elif difference >= -margin[group]:
            for part in range(3):
                near[num_open, part] = near[pair, part]
            num_open += 1
    return num_open
