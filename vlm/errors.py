"""What is said to a person when something cannot go on."""


class VlmError(Exception):
    """The work failed; the message names the value, the limit and the cure. Exit code 1."""

    exit_code = 1


class UsageError(VlmError):
    """The command, a configuration or a folder was given wrongly. Exit code 2."""

    exit_code = 2


class BadSample(VlmError):
    """One sample cannot be used: `reason` is a short class of failure, the message the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
