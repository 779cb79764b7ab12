"""Errors whose message is for the user."""


class VlmError(Exception):
    """A command failed; the message names the value, the limit and the cure. Exit code 1."""

    exit_code = 1


class UsageError(VlmError):
    """The command line, a configuration or a folder is invalid. Exit code 2."""

    exit_code = 2


class BadSample(VlmError):
    """One sample cannot be used: `reason` is a short class of failure, the message the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
