"""Patience with the network: what is worth another try, how long to wait for it, and when to give up."""

import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlm.errors import UsageError, VlmError

_PASSING = frozenset({408, 416, 425, 429})
_REFUSALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
        "DefaultCredentialsError",
        "RefreshError",
        "GatedRepoError",
    }
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When to give up.

    attempts: failures in a row without a new byte between them.
    seconds: time since the first of these.
    first_wait, longest_wait: seconds; the wait doubles from one to the other, times a chance factor in [0.5, 1.5).
    """

    attempts: int = 8
    seconds: float = 600.0
    first_wait: float = 0.5
    longest_wait: float = 30.0


class Stopped(Exception):
    """A fetch was called off; what it had is kept."""


class Retry:
    """The tries at one address: tells each failure whether, and after how long, another one follows.

    stop: set by whoever calls the work off; ends a wait at once.
    """

    def __init__(
        self, address: str, patience: Patience, *, rng: np.random.Generator, stop: threading.Event | None = None
    ) -> None:
        self.address, self._patience, self._rng = address, patience, rng
        self.stop = stop or threading.Event()
        self._failures, self._since = 0, 0.0

    def progressed(self) -> None:
        """A new byte came: count from nought again."""
        self._failures = 0

    def after(self, error: Exception) -> None:
        """Wait for the next try, or raise what ends them.

        Raises:
            UsageError: there is no such file.
            VlmError: access is refused, or patience is at its end.
            Stopped: the work was called off.
        """
        if isinstance(error, VlmError | Stopped):
            raise error
        verdict = judge(error)
        if verdict == "absent":
            raise UsageError(f"There is no shard {self.address!r}.") from error
        if verdict == "refused":
            raise VlmError(
                f"{self.address} may not be read: {describe(error)}. Not tried again; check the credentials "
                "in the environment of this command, and the rights to that address."
            ) from error
        now = time.monotonic()
        self._since = self._since if self._failures else now
        self._failures += 1
        if self._failures >= self._patience.attempts or now - self._since > self._patience.seconds:
            raise VlmError(
                f"{self.address} cannot be read: {describe(error)}. Given up after {self._failures} attempts in "
                f"{now - self._since:.0f} s without a new byte; check the network and the address, then run again: "
                "what was fetched is kept."
            ) from error
        wait = min(self._patience.longest_wait, self._patience.first_wait * 2.0 ** (self._failures - 1))
        if self.stop.wait(wait * (0.5 + self._rng.random())):
            raise Stopped


def judge(error: BaseException) -> Literal["absent", "refused", "again"]:
    """Whether the file is not there, may not be read, or is worth another try.

    fsspec's HTTP file system tells every failure to ask for a size as a missing file; its cause says what it was.
    """
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return judge(error.__cause__)
    status = _status(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError | IsADirectoryError)):
        return "absent"
    is_refusal = isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS
    if is_refusal or (status is not None and 400 <= status < 500 and status not in _PASSING):
        return "refused"
    return "again"


def describe(error: BaseException) -> str:
    """An error in one line, with its kind."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return describe(error.__cause__)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _status(error: Any) -> int | None:
    """The HTTP status an error of aiohttp, botocore, gcsfs, requests or httpx carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    else:
        found = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return found if isinstance(found, int) and 100 <= found < 600 else None
