"""Errors whose message is for the user."""

import contextlib
import errno
from collections.abc import Iterator

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class VlmError(Exception):
    """A command failed; the message names the value, the limit and the cure. Exit code 1."""

    exit_code = 1


class UsageError(VlmError):
    """The command line, a configuration or a folder is invalid. Exit code 2."""

    exit_code = 2


class IndexBusy(UsageError):
    """Another writer changes the index now."""


class BadSample(VlmError):
    """One sample cannot be used: `reason` is a short class of failure, the message the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:
        # exceptions pickle their message alone
        return BadSample, (self.reason, self.detail)


@contextlib.contextmanager
def os_errors_explained() -> Iterator[None]:
    """Raise what the system refuses as a `VlmError`; a decorator of the calls of the Python API."""
    try:
        yield
    except OSError as error:
        raise VlmError(explain_os_error(error)) from error


def explain_os_error(error: OSError) -> str:
    """What the system says, with the file's name, and the cure where it is known."""
    where = f" ({error.filename})" if error.filename else ""
    # the errors of quota and of the largest file size have the same cure
    if error.errno in _DISK_FULL:
        return f"the disk is full{where}: free some space and rerun the command; no partial files were left."
    return f"{error.strerror or error}{where}"
