"""JSON that every reader takes: Python's own writer leaves NaN and Infinity in it, which JSON does not have."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Any


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The value as JSON; numbers that are not finite become null.

    >>> json_text({"width": 4, "scores": [0.5, float("nan")]})
    '{"width": 4, "scores": [0.5, null]}'
    """
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, default=default, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, indent=indent, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return value
