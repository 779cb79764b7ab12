"""The text of a filter as words, each with its place."""

import re
from dataclasses import dataclass
from typing import Literal, NoReturn

from vlm.errors import UsageError
from vlm.index.facts import Value, as_number, clean

LONGEST_FILTER = 10_000
_KEYWORDS = frozenset({"and", "or", "not", "in", "has", "like", "is", "missing", "true", "false"})
_TRUTHS: dict[str, Value] = {"true": 1, "false": 0}
_WORD = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*")
    | (?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?(?![\w.]))
    | (?P<name>[^\W\d][\w.]*)
    | (?P<sign><=|>=|!=|[=<>(),])
    | (?P<end>\Z)
    )""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Word:
    """kind: what it is; keywords, signs and the end of the filter are `sign`. text: as it was written, keywords in
    small letters. place: where it begins, from 1. value: of a name, a text or a number."""

    kind: Literal["name", "text", "number", "sign"]
    text: str
    place: int
    value: Value = ""


def split_words(filter_text: str) -> list[Word]:
    """The words of a filter; the last is the end, an empty sign.

    Raises:
        UsageError: it is too long, or something in it is no word; the place is named.
    """
    if len(filter_text) > LONGEST_FILTER:
        raise UsageError(f"A filter of {len(filter_text):,} characters; at most {LONGEST_FILTER:,} are read.")
    words, position = [], 0
    while not words or words[-1].text:
        found = _WORD.match(filter_text, position)
        if not found:
            begin = position + len(filter_text[position:]) - len(filter_text[position:].lstrip())
            _refuse(filter_text, begin)
        kind = found.lastgroup or ""
        words.append(_word(kind, found[kind], found.start(kind) + 1))
        position = found.end()
    return words


def _word(kind: str, text: str, place: int) -> Word:
    if clean(text) != text:
        raise UsageError(f"The filter holds a character at place {place} or soon after it that no text can hold.")
    match kind:
        case "text" | "quoted":
            quote = text[0]
            return Word(
                kind="text" if kind == "text" else "name",
                text=text,
                place=place,
                value=text[1:-1].replace(quote * 2, quote),
            )
        case "number":
            return Word(kind="number", text=text, place=place, value=_number(text))
        case "name" if text.lower() in _KEYWORDS:
            keyword = text.lower()
            return Word(
                kind="number" if keyword in _TRUTHS else "sign",
                text=keyword,
                place=place,
                value=_TRUTHS.get(keyword, ""),
            )
        case "name":
            return Word(kind="name", text=text, place=place, value=text)
    return Word(kind="sign", text=text, place=place)


def _number(text: str) -> Value:
    # int() refuses thousands of digits; a float of them is what SQLite could hold anyway
    return as_number(int(text)) if len(text) < 100 and text.lstrip("+-").isdigit() else float(text)


def _refuse(text: str, begin: int) -> NoReturn:
    first = text[begin]
    cures = {
        "'": "a text lacks its closing quote; a quote inside a text is written twice",
        '"': "a name lacks its closing quote",
    }
    cure = cures.get(first, "names that hold more than letters, digits, _ and dots stand in double quotes")
    raise UsageError(f"The filter cannot be read at place {begin + 1}, {text[begin : begin + 20]!r}: {cure}.")
