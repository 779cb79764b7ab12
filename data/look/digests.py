"""Which values occur again, at 16 bytes a value: texts and pictures are kept as digests only."""

import hashlib
from array import array
from typing import NamedTuple

import numpy as np

DIGEST_BYTES = 16


def digest_of(data: bytes | str) -> bytes:
    """16 bytes that stand for the content (BLAKE2b)."""
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=DIGEST_BYTES).digest()


class Repeated(NamedTuple):
    """A value that occurs more than once: the place of its first occurrence, and how often it occurs."""

    place: int
    times: int


class Digests:
    """Digests in the order they came."""

    def __init__(self) -> None:
        self._words = array("Q")

    def __len__(self) -> int:
        return len(self._words) // 2

    def __getitem__(self, place: int) -> bytes:
        return self._words[2 * place : 2 * place + 2].tobytes()

    def add(self, digest: bytes) -> None:
        """Append one of `digest_of`."""
        self._words.frombytes(digest)

    def distinct(self, where: np.ndarray | None = None) -> int:
        """How many different ones there are, among all or those at the places `where` marks."""
        words = self._pairs() if where is None else self._pairs()[where]
        return len(_groups(words)[0])

    def most_repeated(self, number: int) -> list[Repeated]:
        """Those that occur most, more than once; of equals the one that came first."""
        first, times = _groups(self._pairs())
        order = np.lexsort((first, -times))[:number]
        return [Repeated(int(first[n]), int(times[n])) for n in order if times[n] > 1]

    def _pairs(self) -> np.ndarray:
        return np.frombuffer(self._words, dtype=np.uint64).reshape(-1, 2) if self._words else np.zeros((0, 2), "u8")


def _groups(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of the first, and number, of each group of equal rows."""
    if not len(words):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort((words[:, 1], words[:, 0]))
    ordered = words[order]
    is_new = np.concatenate([[True], np.any(ordered[1:] != ordered[:-1], axis=1)])
    starts = np.flatnonzero(is_new)
    return order[starts], np.diff(np.append(starts, len(words)))
