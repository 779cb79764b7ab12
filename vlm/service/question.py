"""A question to an index, in words and pictures, with what narrows and orders its answers."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is looked for: the sum of all texts, pictures and stored items, less the `minus` texts.

    images: files, or encoded pictures as bytes. items: uids of rows of the index. weights: one a term, in the order
    texts, images, items, minus; empty counts every term once. top: how many answers.
    where: a filter (`vlm.index.where`); empty lets every row answer. at_least: the lowest cosine of an answer.
    words: captions that hold these words come first, by reciprocal rank fusion with the cosines.
    duplicates: answers whose cosine with a better one is at least this are counted, not shown; None shows all.
    diversity: from 0, the nearest first, to 1, the most unlike each other first (`reorder.diversify`).
    after: the `next` of an answer to this question, to go on from there.
    """

    texts: tuple[str, ...] = ()
    images: tuple[Path | bytes, ...] = ()
    items: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    top: int = 10
    where: str = ""
    at_least: float | None = None
    words: str = ""
    duplicates: float | None = None
    diversity: float = 0.0
    after: str = ""

    def check(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: nothing to look for is given, or a value does not fit.
        """
        self.signed_weights()
        if self.top < 1:
            raise UsageError(f"top = {self.top} does not fit: at least one answer must be asked for.")
        if self.words and not self.words.strip():
            raise UsageError("The words of the question are empty.")
        if not 0 <= self.diversity <= 1:
            raise UsageError(f"A diversity of {self.diversity} is outside 0 to 1.")
        if self.at_least is not None and not -1 <= self.at_least <= 1:
            raise UsageError(f"Answers of at least a cosine of {self.at_least}: it must be in -1 to 1.")
        if self.duplicates is not None and not 0 < self.duplicates <= 1:
            raise UsageError(f"Duplicates from a cosine of {self.duplicates}: it must be above 0 and at most 1.")

    def signed_weights(self) -> list[float]:
        """The factor of each term in the order texts, images, items, minus; those of minus terms are negative.

        Raises:
            UsageError: nothing to look for is given, or the weights do not fit the terms.
        """
        num_terms = self.num_terms
        num_plus = num_terms - len(self.minus)
        if not num_plus:
            raise UsageError("A question needs a text or a picture or an item to look for; minus alone is none.")
        if any(not text.strip() for text in (*self.texts, *self.minus)):
            raise UsageError("A text of the question is empty.")
        weights = self.weights or (1.0,) * num_terms
        if len(weights) != num_terms or not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise UsageError(f"{num_terms} terms need as many weights above 0, given: {list(weights)}.")
        return [weight if number < num_plus else -weight for number, weight in enumerate(weights)]

    @property
    def num_terms(self) -> int:
        """Texts, pictures, items and minus texts together."""
        return len(self.texts) + len(self.images) + len(self.items) + len(self.minus)

    @property
    def is_plain(self) -> bool:
        """Whether the nearest rows in their order are the answer."""
        return not (self.words or self.diversity or self.duplicates is not None)

    def digest(self) -> int:
        """CRC-32 of all that decides the order of the answers; pictures count by their bytes or by their names."""
        images = [zlib.crc32(image) if isinstance(image, bytes) else str(image) for image in self.images]
        asked = self.to_json() | {"images": images, "top": 0, "after": ""}
        return zlib.crc32(json.dumps(asked, sort_keys=True).encode())

    def to_json(self) -> dict[str, Any]:
        """Plain values; a picture given as bytes is told by its size."""
        names = [f"({len(image):,} bytes)" if isinstance(image, bytes) else str(image) for image in self.images]
        options = ("top", "where", "at_least", "words", "duplicates", "diversity", "after")
        plain = {name: getattr(self, name) for name in options}
        terms = {"texts": list(self.texts), "images": names, "items": list(self.items), "minus": list(self.minus)}
        return terms | {"weights": self.signed_weights()} | plain
