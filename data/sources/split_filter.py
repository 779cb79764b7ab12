"""The splits that a data set names by itself, as Karpathy's annotations and many tables do, and a source of some."""

from collections.abc import Iterable, Sequence
from typing import Any

from vlm.config import suggest
from vlm.data.json_columns import WordedSource, Words
from vlm.data.samples import Pair
from vlm.data.sources.source import PairSource
from vlm.errors import BadSample, UsageError
from vlm.files import compute_fingerprint

SPLIT = "split"
# so many pairs tell which splits there are, wherever they lie
_PAIRS_SEEN = 500


def named_splits(source: PairSource) -> list[str]:
    """The splits that the metadata of pairs spread over the source name, sorted; empty if there are none."""
    step = max(1, len(source) // _PAIRS_SEEN)
    return sorted({split for split in _splits(source, range(0, len(source), step)) if split})


def _splits(source: PairSource, numbers: Iterable[int]) -> Iterable[str]:
    """The split of each pair; empty where it has none, or cannot be read."""
    if not isinstance(source, WordedSource):
        return
    for number in numbers:
        try:
            split = source.words(number).metadata.get(SPLIT)
        except BadSample:
            split = ""
        yield split if isinstance(split, str) else ""


class SplitFilter:
    """The pairs of some splits of a source, in its order. Pairs that cannot be read stay, to be rejected by reason."""

    def __init__(self, source: PairSource, splits: Sequence[str]) -> None:
        self._source = source
        self._splits = tuple(dict.fromkeys(splits))
        self.captions_are_labels = source.captions_are_labels
        split_of = list(_splits(source, range(len(source))))
        known = sorted({split for split in split_of if split})
        for split in self._splits:
            if split not in known:
                reason = suggest(split, known) if known else "it names no splits"
                raise UsageError(f"--split {split}: no pair of the source is of this split; {reason}")
        self._numbers = [number for number, split in enumerate(split_of) if split in (*self._splits, "")]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Pair:
        """Pair `number` of those chosen."""
        return self._source.read(self._numbers[number])

    def words(self, number: int) -> Words:
        """Its captions and metadata."""
        assert isinstance(self._source, WordedSource)
        return self._source.words(self._numbers[number])

    def file_of(self, number: int) -> str:
        """Its image as the source names it."""
        name: Any = getattr(self._source, "file_of", None)
        return name(self._numbers[number]) if name else f"pair {self._numbers[number]}"

    def used_files(self) -> set[str]:
        """The files of all splits: those of the others are left out by choice, not overlooked."""
        files: Any = getattr(self._source, "used_files", set)
        return files()

    def fingerprint(self) -> str:
        """The source and the splits."""
        return compute_fingerprint(self._source.fingerprint(), SPLIT, *self._splits)

    def describe(self) -> dict[str, Any]:
        """The source, and the splits."""
        return self._source.describe() | {"split": list(self._splits)}
