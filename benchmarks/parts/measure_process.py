"""A process that measures on request, in any environment (`parts/measure_server.py` is the other end)."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent


class Side:
    """A measuring process. start_s: seconds until its imports were done.

    script: its file, by its name in this folder or its full path. threads: OMP_NUM_THREADS; 0 inherits it. checkout:
        the one whose library the script imports; None inherits PYTHONPATH.
    """

    def __init__(
        self, python: Path | str, script: Path | str, *, threads: int = 0, checkout: Path | None = None
    ) -> None:
        began = time.perf_counter()
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        if checkout is not None:
            environment["PYTHONPATH"] = str(checkout.resolve())
        self._process = subprocess.Popen(
            [str(python), str(BENCH / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answer("{}")
        self.start_s = time.perf_counter() - began

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request; returns the response."""
        assert self._process.stdin is not None
        asked = json.dumps(request)
        self._process.stdin.write(asked + "\n")
        self._process.stdin.flush()
        return self._answer(asked)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, asked: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            command = shlex.join(map(str, self._process.args))  # pyright: ignore[reportArgumentType]
            sys.exit(f"A side of the benchmark failed; for the error run: echo '{asked}' | {command}")
        return json.loads(line)
