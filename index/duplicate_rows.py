"""Rows that are equal in every bit: found when a segment is written, completed in the results of its searches.

Of rows with equal scores FAISS keeps any at the end of its results, a graph reaches only some of many equal rows, and
codes are cut off in the middle of a group. So equal rows are told apart from the search: all of a group are results, or
those with the lowest numbers, if one is.
"""

from collections.abc import Callable

import numpy as np

from vlm.tensor_types import Array, Bool, Float16, Float32, Int64, UInt64

# values of a row that are compared first; of other rows than copies, few agree in all of them
_FIRST_VALUES = 16
_HASHED_AT_ONCE = 8192
_NOT_REPEATED = -1


def find_duplicate_rows(rows: Float16[Array, "N D"]) -> Int64[Array, "M 2"]:
    """The position of each row that occurs more than once, ascending, and the position of the first row like it."""
    # all rows by their first values, then what is left by all values: most rows are read in part only
    candidates = _repeated(_hashes(rows[:, :_FIRST_VALUES]))
    if not len(candidates):
        return np.zeros((0, 2), np.int64)
    hashes = _hashes(rows, candidates)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    leaders = candidates[first[group]]
    # two rows of one hash are nearly always equal, but not always
    is_equal = np.ones(len(candidates), bool)
    for begin in range(0, len(candidates), _HASHED_AT_ONCE):
        block = slice(begin, begin + _HASHED_AT_ONCE)
        is_equal[block] = (_bits(rows[candidates[block]]) == _bits(rows[leaders[block]])).all(axis=1)
    candidates, leaders = candidates[is_equal], leaders[is_equal]
    is_repeated = np.bincount(leaders)[leaders] > 1
    return np.stack([candidates[is_repeated], leaders[is_repeated]], axis=1)


def _bits(rows: Float16[Array, "N D"]) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint16)


def _hashes(rows: Float16[Array, "N D"], positions: Int64[Array, " M"] | None = None) -> UInt64[Array, " M"]:
    """A hash of each row, or of those at the positions."""
    count = len(rows) if positions is None else len(positions)
    # odd numbers, so that no bit of a value is lost in the product
    factors = np.random.default_rng(0).integers(0, 2**63, rows.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = np.zeros(count, np.uint64)
    for begin in range(0, count, _HASHED_AT_ONCE):
        block = slice(begin, begin + _HASHED_AT_ONCE)
        values = _bits(rows[block] if positions is None else rows[positions[block]])
        hashes[block] = values.astype(np.uint64) @ factors
    return hashes


def _repeated(hashes: UInt64[Array, " N"]) -> Int64[Array, " M"]:
    """The positions of the hashes that occur more than once, ascending."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_same = ordered[1:] == ordered[:-1]
    is_repeated = np.zeros(len(hashes), bool)
    is_repeated[order[1:]] = is_same
    is_repeated[order[:-1]] |= is_same
    return np.flatnonzero(is_repeated)


Allows = Callable[[Int64[Array, " N"]], Bool[Array, " N"]]
"""Which of some positions may be results."""


class DuplicateRows:
    """The groups of equal rows of a segment, as `find_duplicate_rows` gives them."""

    def __init__(self, table: Int64[Array, "M 2"]) -> None:
        self._positions = np.ascontiguousarray(table[:, 0])
        self._leaders = np.ascontiguousarray(table[:, 1])
        # stable: the members of each group stay in ascending order
        order = np.argsort(self._leaders, kind="stable")
        self._members = self._positions[order]
        self._member_leaders = self._leaders[order]

    def leaders_of(self, positions: Int64[Array, "*shape"]) -> Int64[Array, "*shape"]:
        """The first row equal to each; -1 for rows that occur once."""
        places = np.minimum(np.searchsorted(self._positions, positions), len(self._positions) - 1)
        return np.where(self._positions[places] == positions, self._leaders[places], _NOT_REPEATED)

    def complete(
        self, scores: Float32[Array, "Q K"], positions: Int64[Array, "Q K"], allows: Allows
    ) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
        """Results with all equals of those that are there, best first, ties by position, cut to as many as there were.

        positions: -1 where nothing was found. allows: which positions may be results.
        """
        leaders = self.leaders_of(positions)
        has_duplicates = (leaders >= 0).any(axis=1)
        if not has_duplicates.any():
            return scores, positions
        scores, positions = scores.copy(), positions.copy()
        for query in np.flatnonzero(has_duplicates).tolist():
            scores[query], positions[query] = self._complete(scores[query], positions[query], leaders[query], allows)
        return scores, positions

    def _complete(
        self,
        scores: Float32[Array, " K"],
        positions: Int64[Array, " K"],
        leaders: Int64[Array, " K"],
        allows: Allows,
    ) -> tuple[Float32[Array, " K"], Int64[Array, " K"]]:
        is_single = leaders < 0
        all_scores = [scores[is_single]]
        all_positions = [positions[is_single]]
        # scores descend, so the first of a group is its best: a matrix product may round those of equal rows apart
        groups, first = np.unique(leaders, return_index=True)
        for leader, best in zip(groups.tolist(), first.tolist(), strict=True):
            if leader >= 0:
                begin, end = np.searchsorted(self._member_leaders, [leader, leader + 1])
                members = self._members[begin:end]
                members = members[allows(members)][: len(scores)]
                all_positions.append(members)
                all_scores.append(np.full(len(members), scores[best]))
        completed = np.concatenate(all_scores)
        places = np.concatenate(all_positions)
        order = np.lexsort((places, -completed))[: len(scores)]
        return completed[order], places[order]
