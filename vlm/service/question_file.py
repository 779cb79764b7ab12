"""Questions from a file, one a line: a text, or a JSON object with the fields of a question."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.config import nearest
from vlm.errors import UsageError
from vlm.service.question import Question


def read_questions(lines: Iterable[str], defaults: Question) -> dict[str, Question]:
    """A question for each line that is not empty, under the line's name; what it does not say is as in `defaults`.

    >>> read_questions(["a dog", "", '{"texts": ["a cat"], "top": 3}'], Question())["Line 3 of the questions"].top
    3

    Raises:
        UsageError: a line is no question; its number is named.
    """
    questions = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"Line {number} of the questions"
        try:
            question = _read_question(line.strip(), defaults)
            question.check()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        questions[name] = question
    return questions


def _read_question(line: str, defaults: Question) -> Question:
    if not line.startswith("{"):
        return replace(defaults, texts=(line,))
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it begins like a JSON object but is none ({error}).") from error
    values = {}
    for name, value in given.items():
        if name not in _FIELDS:
            raise UsageError(f"a question has no {name!r}; {nearest(name, list(_FIELDS))}")
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
