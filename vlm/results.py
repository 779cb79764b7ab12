"""What calls return: frozen dataclasses that give themselves as JSON, the same that `vlm VERB --json` prints."""

import json
from dataclasses import asdict
from typing import Any

from vlm.files import json_text


class Result:
    """Base of the frozen dataclasses that are results of a verb and of its Python call alike.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Recall(Result):
    ...     recall: dict[int, float]
    >>> Recall({1: 0.5, 10: float("nan")}).to_json()
    {'recall': {'1': 0.5, '10': None}}
    """

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them: lists for tuples, texts for keys and paths, None for numbers not finite."""
        return json_values(asdict(self))  # pyright: ignore[reportArgumentType]


def json_values(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json_text(value, default=str))
