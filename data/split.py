"""A grouped train/validation split: samples with a common caption or the same image stay on one side."""

from dataclasses import dataclass

import numpy as np

from vlm.data.dedup import DisjointSets, reencoded_pairs
from vlm.data.samples import Captions
from vlm.errors import UsageError
from vlm.files import compute_fingerprint

_MAX_GROUP_SHARE = 0.1
"""Of the samples to hold out: a few large groups would make a validation set of near-copies."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSplit:
    """Which samples, by number, are held out, and what was grouped.

    merged_by_caption, merged_by_picture: samples that joined another's group, counted in this order.
    """

    numbers: frozenset[int]
    samples: int
    groups: int
    largest_group: int
    merged_by_caption: int
    merged_by_picture: int


class GroupedSplit:
    """Collects samples and groups them; about 1 KB of memory a sample, of which its thumbnail takes 768 bytes.

    by_caption: whether a common caption (but for case and spaces) makes a group; not for captions that are labels.
    """

    def __init__(self, *, by_caption: bool) -> None:
        self._by_caption = by_caption
        self._numbers: list[int] = []
        self._keys: list[str] = []
        self._thumbnails = bytearray()
        self._first_with: dict[str, int] = {}
        self._groups = DisjointSets()
        self._merged_by_caption = 0

    def add(self, number: int, key: str, captions: Captions, thumbnail: np.ndarray) -> None:
        """Take in one sample.

        number: how it will be named in the result; thumbnail: of `vlm.data.dedup.rgb_thumbnail`.
        """
        position = len(self._numbers)
        self._numbers.append(number)
        self._keys.append(key)
        self._thumbnails += thumbnail.tobytes()
        if not self._by_caption:
            return
        # a set: a caption that a sample has twice must not count as a merge
        normalized: set[str] = set()
        for texts in captions.values():
            for text in texts:
                normalized.add(" ".join(text.casefold().split()))
        for caption in normalized:
            # linked to the first sample with it: a union-find needs no more than that to join them all
            first = self._first_with.setdefault(caption, position)
            self._merged_by_caption += self._groups.union(first, position)

    def hold_out(self, at_least: int, *, seed: int) -> HeldOutSplit:
        """Whole groups, drawn by a hash of the seed and their first key, until `at_least` samples are held out.

        A group of more than a tenth of `at_least` is drawn only when no smaller one is left.

        Raises:
            UsageError: nothing would be left to train on.
        """
        merged_by_image = sum(self._groups.union(one, other) for one, other in self._image_pairs())
        groups: dict[int, list[int]] = {}
        for position in range(len(self._numbers)):
            groups.setdefault(self._groups.root(position), []).append(position)

        # a hash of the key rather than a shuffle: a few samples more or less in the source hardly change the split
        largest_share = max(at_least * _MAX_GROUP_SHARE, 1)
        draw_order = sorted(
            groups.values(),
            key=lambda group: (len(group) > largest_share, compute_fingerprint(f"{seed}/{self._keys[group[0]]}")),
        )
        held_out: list[int] = []
        while draw_order and len(held_out) < at_least:
            held_out += draw_order.pop(0)
        # all groups held out leaves nothing to train on, even where there are enough of them
        if not draw_order or len(held_out) < at_least:
            raise UsageError(
                f"{at_least:,} samples cannot be held out: {len(self._numbers):,} usable samples form {len(groups):,} "
                "groups of common captions or images, and some must be left to train on. Hold out fewer."
            )
        return HeldOutSplit(
            numbers=frozenset(self._numbers[position] for position in held_out),
            samples=len(self._numbers),
            groups=len(groups),
            largest_group=max(map(len, groups.values())),
            merged_by_caption=self._merged_by_caption,
            merged_by_picture=merged_by_image,
        )

    def _image_pairs(self) -> list[tuple[int, int]]:
        if not self._numbers:
            return []
        thumbnails = np.frombuffer(self._thumbnails, np.uint8).reshape(len(self._numbers), -1)
        return list(reencoded_pairs(thumbnails))
