"""A loader worker that was killed, told so that one knows which, why, and how to go on."""

import re
from pathlib import Path

import psutil

from vlm.errors import VlmError
from vlm.train.checkpoints.files import list_checkpoints

_TOLD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\)(?P<how>[^\n.)]*)")


def lost_worker(error: BaseException) -> re.Match[str] | None:
    """Which worker an error, or best what first caused it, says was lost; None if it says no such thing."""
    found: re.Match[str] | None = None
    cause: BaseException | None = error
    while cause is not None:
        found = _TOLD.search(str(cause)) or found
        cause = cause.__cause__
    return found


def explain_lost_worker(found: re.Match[str], *, run: Path, checkpoints: Path, workers: int) -> VlmError:
    """The message, once the writer has finished: pid and end of the worker, memory now, newest checkpoint, command."""
    free = psutil.virtual_memory().available
    whole = list_checkpoints(checkpoints)
    saved = (
        f"All until step {int(whole[-1].name.rpartition('-')[2]):,} is saved ({whole[-1]})."
        if whole
        else "No checkpoint was due yet."
    )
    return VlmError(
        f"Loader worker with pid {found['pid'].strip()} of {workers} was lost: {found['how'].strip()}. Most often the "
        f"system ends one for want of memory ({free / 2**30:.1f} GiB are free now; see dmesg): take fewer --workers, a "
        f"smaller --batch-size or --shuffle-window. {saved} Go on with: vlm train {run} --resume"
    )
