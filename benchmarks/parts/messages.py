"""Progress of a benchmark for who watches it."""

import sys


def say(message: str) -> None:
    """One line on stderr, since results go to stdout."""
    print(message, file=sys.stderr, flush=True)
