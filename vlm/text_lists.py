"""Arguments of calls that are one text or several, or several numbers; whatever else comes is refused by its name."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

from vlm.errors import UsageError


def text_list(value: Any, name: str) -> list[str]:
    """One text or several as a list; a text is never taken for its letters.

    Raises:
        UsageError: it is neither, or holds something else.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise UsageError(f"{name} = {value!r} is not a text: give a text, or several in a list.")
    texts = list(value)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{name} holds {text!r}, which is not a text.")
    return texts


def number_list(value: Any, name: str) -> list[Any]:
    """Numbers as a list.

    Raises:
        UsageError: it is not one, or holds something else.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{name} = {value!r} is not a list of numbers.")
    numbers = list(value)
    for number in numbers:
        if not isinstance(number, Real):
            raise UsageError(f"{name} holds {number!r}, which is not a number.")
    return numbers
