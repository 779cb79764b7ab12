"""How a run goes, written down: a line of metrics.jsonl every few steps."""

import json
from pathlib import Path
from typing import Any

from vlm.files import append_line, read_lines, write_text

METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its step; nothing after a resumed step survives."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= resumed_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step."""
        append_line(self._path, json.dumps({"step": step, **values}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in read_lines(path)]
