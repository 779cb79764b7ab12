"""JSON that every reader takes: Python's own writer leaves NaN and Infinity in it, which JSON does not have."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Any


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The value as JSON; numbers that are not finite become null.

    Where a text holds what UTF-8 cannot (half of a surrogate pair), all is written in ASCII.

    >>> json_text({"width": 4, "scores": [0.5, float("nan")]})
    '{"width": 4, "scores": [0.5, null]}'
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, default=default, allow_nan=False)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, indent=indent, default=default, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=default, allow_nan=False)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return value
