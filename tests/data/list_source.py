"""A source for tests of packing."""

from collections.abc import Callable, Sequence
from typing import Any


class ListSource:
    """Pairs of a list; an exception in it is raised. `at` is called with the number before each is read."""

    captions_are_labels = False

    def __init__(self, pairs: Sequence[Any], at: Callable[[int], object] = lambda number: None) -> None:
        self.pairs, self.at = pairs, at

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, number: int) -> Any:
        self.at(number)
        if isinstance(self.pairs[number], Exception):
            raise self.pairs[number]
        return self.pairs[number]

    def fingerprint(self) -> str:
        return "the same"

    def describe(self) -> dict[str, Any]:
        return {"kind": "list"}
