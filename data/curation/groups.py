"""Groups of samples that show the same thing, and the one of each that stays."""

from collections.abc import Callable, Iterable

import numpy as np

from vlm.data.curation.rule import Situation, Verdict


def join_pairs(pairs: Iterable[tuple[np.ndarray, np.ndarray]], number: int) -> np.ndarray:
    """int64 [number]: the least member of the group each belongs to, when these pairs belong together."""
    parents: dict[int, int] = {}

    def root(place: int) -> int:
        while (parent := parents.setdefault(place, place)) != place:
            parents[place] = parents[parent]
            place = parents[place]
        return place

    for some, others in pairs:
        for one, other in zip(some.tolist(), others.tolist(), strict=True):
            first, second = sorted((root(one), root(other)))
            parents[second] = first
    groups = np.arange(number, dtype=np.int64)
    for place in parents:
        groups[place] = root(place)
    return groups


def keep_one_each(situation: Situation, places: np.ndarray, groups: np.ndarray, why: Callable[[str], str]) -> Verdict:
    """Of each group keep the largest picture, of equally large ones the first.

    places: the samples that are grouped; groups (int64, parallel): their groups.
    why: says of a dropped sample what it repeats, given the key of that.
    """
    facts = situation.facts
    order = np.lexsort((places, -facts.areas[places], groups))
    is_first = np.diff(groups[order], prepend=-1) != 0
    kept = places[order][np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    twins = np.full(len(facts), -1, dtype=np.int64)
    twins[places[order][~is_first]] = kept[~is_first]
    weights = (twins < 0).astype(np.float64)
    sizes = np.bincount(np.unique(groups, return_inverse=True)[1]) if len(groups) else np.zeros(0, np.int64)
    return Verdict(
        weights=weights,
        why=lambda place: why(facts.key(int(twins[place]))) if twins[place] >= 0 else "kept",
        twins=twins,
        record={"groups": int((sizes > 1).sum()), "largest_group": int(sizes.max(initial=0))},
    )
