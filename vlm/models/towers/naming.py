"""Names of towers: PREFIX:NAME, with options after commas."""

import ast
import difflib
import re
from typing import Any

from vlm.errors import UsageError

_SHOWN = 5
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # but for those inside brackets


def split_tower(tower: str) -> tuple[str, str]:
    """Prefix and name of a tower; the name is empty for those that have none (bag, ngram)."""
    prefix, _, name = tower.partition(":")
    return prefix, name


def read_options(words: str) -> tuple[str, dict[str, Any]]:
    """The tower and its options: `timm:NAME,pooling=simpool,registers=4`.

    Raises:
        UsageError: an option has no value.
    """
    tower, *options = _COMMA.split(words)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"{option!r} in {words!r} is no option; write KEY=VALUE, e.g. pooling=simpool.")
        values[key] = _value(value)
    return tower, values


def nearest_of_many(name: str, known: list[str]) -> str:
    """A hint naming the few names nearest to `name`."""
    close = difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.5)
    return (
        f"did you mean {', '.join(close)}?"
        if close
        else f"it has {len(known)} names, e.g. {', '.join(known[:_SHOWN])}."
    )


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
