"""Waiting in tests for what a process or a thread does, with an end to it."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(is_so: Callable[[], Any], *, process: Any = None, seconds: float = 60.0) -> Any:
    """Wait until `is_so` gives something true; what it gives.

    process: a Popen that must not end before.
    """
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not so after {seconds:g} seconds"
        time.sleep(0.01)
    return found
