"""One checkout of the comparison of versions: processor seconds of training steps on one batch in memory.

Imports the library from PYTHONPATH. A request names the objective, the architecture, the batch and the micro-batch, the
shards, a folder, and how many steps; the first one for a setting builds the run and warms it up.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure_server import serve

from vlm.train.run_config import LoaderConfig, ModelConfig, ObjectiveConfig, TrainConfig
from vlm.train.step import train_step

try:
    from vlm.train.run_setup import open_session
except ImportError:
    # the name of the module in checkouts before 2026-11-29
    from vlm.train.session import open_session  # pyright: ignore[reportMissingImports]

_WARM_UP = 3
_ENDLESS = 1_000_000


class VersionSteps:
    """Answers requests; a run, once built, is reused."""

    def __init__(self) -> None:
        self._open: dict[str, Callable[[], object]] = {}

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the steps; returns their processor seconds, of all threads."""
        steps = request.pop("steps")
        name = json.dumps(request, sort_keys=True)
        if name not in self._open:
            self._open[name] = open_step(request)
            for _ in range(_WARM_UP):
                self._open[name]()
        began = time.process_time()
        for _ in range(steps):
            self._open[name]()
        return {"seconds": time.process_time() - began}


def open_step(request: dict[str, Any]) -> Callable[[], object]:
    """A step of the run on its first batch."""
    config = TrainConfig(
        data=request["shards"],
        run=str(Path(tempfile.mkdtemp(dir=request["folder"])) / "run"),
        batch_size=request["batch"],
        micro_batch=request["micro"],
        steps=_ENDLESS,
        model=ModelConfig(architecture=request["architecture"]),
        objective=ObjectiveConfig(objective=request["objective"]),
        loader=LoaderConfig(workers=0),
    )
    session = open_session(config, resume=False)
    batches = next(session.open_batches())
    return lambda: train_step(session, batches)


if __name__ == "__main__":
    serve(VersionSteps())
