"""Where a page of answers ended, as a word that a later question hands back.

A question to an index, in words and pictures, with what narrows and orders its answers.

Vectors that people bring themselves, as a question or a file of questions.

Questions from a file, one a line: a text, or a JSON object with the fields of a question.
"""

import base64
import binascii
import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import suggest
from vlm.errors import UsageError
from vlm.tensors import Array, Float32, Float64

_LAYOUT = struct.Struct(">IIIIfq")


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The last answer shown.

    generation, first: of the index, and answers asked for, when the first page was shown.
    question: digest of what was asked. seen: answers shown so far. score, row: of the last of them.
    """

    generation: int
    query_digest: int
    first: int
    seen: int
    score: float
    row: int

    def to_token(self) -> str:
        """As letters, digits, - and _.

        >>> cursor = Cursor(generation=1, query_digest=2, first=10, seen=10, score=0.5, row=7)
        >>> Cursor.from_token(cursor.to_token()) == cursor
        True
        """
        packed = _LAYOUT.pack(self.generation, self.query_digest, self.first, self.seen, self.score, self.row)
        return base64.urlsafe_b64encode(packed).decode()

    @classmethod
    def from_token(cls, token: str) -> "Cursor":
        """The inverse of `to_word`.

        Raises:
            UsageError: the word is none.
        """
        try:
            generation, query_digest, first, seen, score, row = _LAYOUT.unpack(
                base64.b64decode(token, b"-_", validate=True)
            )
        except (binascii.Error, struct.error, ValueError) as error:
            raise UsageError(f"{token!r} is no cursor; take it from the answer before, or leave it out.") from error
        return cls(generation=generation, query_digest=query_digest, first=first, seen=seen, score=score, row=row)


MAX_RERANK = 1000
"""More pictures than this are not read for one question."""


LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
"""Single precision adds up terms of these weights."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked for: the sum of all texts, pictures, stored items and vectors, less the `minus` texts.

    images: files, or encoded pictures as bytes. items: uids of rows of the index. vectors: .npy files of one vector, or
    its numbers; of the index's space, which cannot be checked. weights: one a term, in the order texts, images, items,
    vectors, minus; one below 0 takes its term away; empty counts every term once. top: how many answers.
    where: a filter (`vlm.index.filters`); empty lets every row answer. at_least: the lowest cosine of an answer.
    words: captions that hold these words are raised, by reciprocal rank fusion of the first of them with the first by
        cosine; all others follow by cosine.
    duplicates: answers whose cosine with a better one is at least this are counted, not shown; None shows all.
    diversity: from 0, the nearest first, to 1, the most unlike each other first (`reorder.diversify`).
    rerank_top: so many of the first answers are put in the order of likelihood (`reranking`); 0 leaves them.
    after: the `next` of an answer to this question, to go on from there.
    """

    texts: tuple[str, ...] = ()
    images: tuple[Path | bytes, ...] = ()
    items: tuple[str, ...] = ()
    vectors: tuple[Path | tuple[float, ...], ...] = ()
    minus: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    top: int = 10
    where: str = ""
    at_least: float | None = None
    words: str = ""
    duplicates: float | None = None
    diversity: float = 0.0
    rerank_top: int = 0
    after: str = ""

    def check(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: nothing to look for is given, or a value does not fit.
        """
        self.signed_weights()
        self._check_texts()
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
        self._check_rerank()

    def signed_weights(self) -> list[float]:
        """The factor of each term in the order texts, images, items, vectors, minus; minus terms are below 0.

        Raises:
            UsageError: nothing to look for is given, or the weights do not fit the terms.
        """
        num_terms = self.num_terms
        num_plus = num_terms - len(self.minus)
        if not num_plus:
            raise UsageError(
                "A question needs a text or a picture or an item or a vector to look for; minus alone is none."
            )
        if any(not text.strip() for text in (*self.texts, *self.minus)):
            raise UsageError("A text of the question is empty.")
        weights = self.weights or (1.0,) * num_terms
        is_usable = [np.isfinite(weight) and weight != 0 for weight in weights]
        if len(weights) != num_terms or not all(is_usable):
            raise UsageError(f"{num_terms} terms need as many weights that are not 0, given: {list(weights)}.")
        if not all(LEAST_WEIGHT <= abs(weight) <= MOST_WEIGHT for weight in weights):
            raise UsageError(
                f"Weights {list(weights)}: without its sign each must be from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}; "
                "only their ratios count."
            )
        if any(weight < 0 for weight in weights[num_plus:]) or all(weight < 0 for weight in weights[:num_plus]):
            raise UsageError(
                f"Weights {list(weights)}: those of minus terms must be above 0, and so must one of the others."
            )
        return [weight if number < num_plus else -weight for number, weight in enumerate(weights)]

    @property
    def num_terms(self) -> int:
        """Texts, pictures, items, vectors and minus texts together."""
        return sum(map(len, (self.texts, self.images, self.items, self.vectors, self.minus)))

    @property
    def is_plain(self) -> bool:
        """Whether the nearest rows in their order are the answer."""
        return not (self.words or self.diversity or self.duplicates is not None or self.rerank_top)

    def digest(self, *, reranker: str = "") -> int:
        """CRC-32 of all that decides the order of the answers; pictures count by their bytes or by their names.

        reranker: fingerprint of the model that re-ranks.
        """
        images = [zlib.crc32(image) if isinstance(image, bytes) else str(image) for image in self.images]
        vectors = [str(vector) if isinstance(vector, Path) else list(vector) for vector in self.vectors]
        asked = self.to_json() | {"images": images, "vectors": vectors, "reranker": reranker, "top": 0, "after": ""}
        return zlib.crc32(json.dumps(asked, sort_keys=True).encode())

    def describe(self) -> str:
        """The terms as a sum.

        >>> Query(texts=("a dog", "snow"), items=("a/7",), minus=("a cat",), weights=(1, -1, 1, 1)).describe()
        'a dog + a/7 − snow − a cat'
        """
        names = ["a picture" if isinstance(image, bytes) else image.name for image in self.images]
        vectors = [vector.name if isinstance(vector, Path) else "a vector" for vector in self.vectors]
        terms = list(zip([*self.texts, *names, *self.items, *vectors, *self.minus], self.signed_weights(), strict=True))
        plus = " + ".join(name for name, weight in terms if weight > 0)
        return plus + "".join(f" − {name}" for name, weight in terms if weight < 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a picture given as bytes, or a vector as numbers, is told by its size."""
        options = ("top", "where", "at_least", "words", "duplicates", "diversity", "rerank_top", "after")
        plain = {name: getattr(self, name) for name in options}
        terms = {
            "texts": list(self.texts),
            "images": [f"({len(image):,} bytes)" if isinstance(image, bytes) else str(image) for image in self.images],
            "items": list(self.items),
            "vectors": [
                str(vector) if isinstance(vector, Path) else f"({len(vector):,} numbers)" for vector in self.vectors
            ],
            "minus": list(self.minus),
        }
        return terms | {"weights": self.signed_weights()} | plain

    def _check_texts(self) -> None:
        for text in (*self.texts, *self.minus):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{text!r} is not Unicode text: its character {error.start + 1} is half of a pair, or a byte "
                    "that is not UTF-8; give the text as UTF-8."
                ) from error

    def _check_rerank(self) -> None:
        if not 0 <= self.rerank_top <= MAX_RERANK:
            raise UsageError(f"rerank_top = {self.rerank_top} does not fit: 0 to {MAX_RERANK:,} can be re-ranked.")
        if self.rerank_top and not self.texts:
            raise UsageError("Re-ranking asks how likely a text is, given a picture; this question has no text.")
        if self.rerank_top and self.diversity:
            raise UsageError("Re-ranking puts the likeliest first, diversity the unlike: ask for one of them.")


def load_query_vector(given: Path | Sequence[float], dimension: int) -> Float32[Array, " D"]:
    """The vector brought to unit length; of a file the only row.

    Raises:
        UsageError: the file is no vector, or the vector has another dimension, is zero or not finite.
    """
    if isinstance(given, Path):
        rows, name = read_vectors(given), str(given)
        if len(rows) != 1:
            raise UsageError(f"{given} holds {len(rows):,} vectors; a question takes one, --queries takes them all.")
        vector = rows[0]
    else:
        vector, name = np.asarray(given, np.float64), "The vector"
    if len(vector) != dimension:
        raise UsageError(f"{name} has {len(vector)} numbers; the rows of this index have {dimension}.")
    largest = float(np.abs(vector).max())
    if not (np.isfinite(largest) and largest > 0):
        raise UsageError(f"{name} has length {largest}: it must be finite and not zero.")
    scaled = vector / largest  # the square of a number such as 1e200 is not finite
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)


def read_vectors(path: Path) -> Float64[Array, "N D"]:
    """The rows of an .npy file, which is a matrix or one vector.

    Raises:
        UsageError: it cannot be read or holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as .npy: {error}.") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.ndim not in (1, 2):
        raise UsageError(f"{path} holds no vectors: a matrix of numbers or one row of them is needed.")
    return np.atleast_2d(found).astype(np.float64)


def queries_from_vectors(path: Path, defaults: Query) -> dict[str, Query]:
    """A question for each row of an .npy file, under the row's name; the rest is as in `defaults`.

    Raises: as `read_rows` does.
    """
    rows = enumerate(read_vectors(path).tolist())
    return {f"Row {number} (from 0) of {path}": replace(defaults, vectors=(tuple(row),)) for number, row in rows}


def read_queries(lines: Iterable[str], defaults: Query) -> dict[str, Query]:
    """A question for each line that is not empty, under the line's name; what it does not say is as in `defaults`.

    >>> read_queries(["a dog", "", '{"texts": ["a cat"], "top": 3}'], Query())["Line 3 of the questions"].top
    3

    Raises:
        UsageError: a line is no question; its number is named.
    """
    queries = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"Line {number} of the questions"
        try:
            query = _parse_query(line.strip(), defaults)
            query.check()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        queries[name] = query
    return queries


def _parse_query(line: str, defaults: Query) -> Query:
    if not line.startswith("{"):
        return replace(defaults, texts=(line,))
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it begins like a JSON object but is none ({error}).") from error
    values = {}
    for name, value in given.items():
        if name not in _FIELDS:
            raise UsageError(f"a question has no {name!r}; {suggest(name, list(_FIELDS))}")
        fits, meant, make = _FIELDS[name]
        if not fits(value):
            raise UsageError(f"{name} must be {meant}, given: {value!r}.")
        values[name] = make(value)
    return replace(defaults, **values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_TEXTS = (_list_of(_is_text), "a list of texts", tuple)
_TEXT = (_is_text, "a text", str)
_NUMBER = (_is_number, "a number", float)
_WHOLE = (lambda value: _is_number(value) and isinstance(value, int), "a whole number", int)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {
    "texts": _TEXTS,
    "images": (_list_of(_is_text), "a list of files", lambda names: tuple(map(Path, names))),
    "items": _TEXTS,
    "vectors": (
        _list_of(_list_of(_is_number)),
        "a list of lists of numbers",
        lambda vectors: tuple(tuple(map(float, vector)) for vector in vectors),
    ),
    "minus": _TEXTS,
    "weights": (_list_of(_is_number), "a list of numbers", lambda numbers: tuple(map(float, numbers))),
    "top": _WHOLE,
    "where": _TEXT,
    "at_least": _NUMBER,
    "words": _TEXT,
    "duplicates": _NUMBER,
    "diversity": _NUMBER,
    "rerank_top": _WHOLE,
    "after": _TEXT,
}
"""For each field of a question: whether a value of JSON fits, what is meant, and how it becomes the field's."""
