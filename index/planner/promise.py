"""What an index shall promise."""

import re
from dataclasses import dataclass

from vlm.errors import UsageError

_UNITS = {"": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for base, name in ((1000, f"{letter}B"), (1024, f"{letter}IB"))
}


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Recall, and what it may cost; None is no limit.

    recall: share of the `at` nearest rows that a search finds, on average over questions.
    latency_ms: of one question alone on one thread, that 95 of 100 questions keep.
    memory_bytes: what the FAISS index of all rows may hold; the float16 rows mapped from disk are not counted.

    Raises:
        UsageError: a number that cannot be.
    """

    recall: float = 0.95
    at: int = 10
    latency_ms: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise UsageError(f"recall = {self.recall} does not fit: more than 0 and at most 1 can be promised.")
        if self.at < 1:
            raise UsageError(f"at = {self.at} does not fit: recall is counted among at least one answer.")
        for name, value in (("latency-ms", self.latency_ms), ("memory", self.memory_bytes)):
            if value is not None and value <= 0:
                raise UsageError(f"{name} = {value} does not fit: it must be more than 0.")

    def in_words(self) -> str:
        """The promise, as one says it.

        >>> Promise(recall=0.9, latency_ms=5, memory_bytes=2_000_000_000).in_words()
        'recall@10 of 0.9 within 5 ms and 2 GB'
        """
        limits = [] if self.latency_ms is None else [f"{self.latency_ms:g} ms"]
        limits += [] if self.memory_bytes is None else [show_bytes(self.memory_bytes)]
        return f"recall@{self.at} of {self.recall:g}" + (f" within {' and '.join(limits)}" if limits else "")


def parse_bytes(text: str) -> int:
    """A size with its unit: GB is 10^9 bytes, GiB is 2^30.

    >>> parse_bytes("1.5 GB"), parse_bytes("2GiB"), parse_bytes("4096")
    (1500000000, 2147483648, 4096)

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write it like 4GB, 512MiB or 1000000.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def show_bytes(count: float) -> str:
    """A size for people, in powers of ten.

    >>> show_bytes(1_234_567_890)
    '1.23 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
