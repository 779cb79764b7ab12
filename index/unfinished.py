"""The unfinished embeddings folder: begun, shared by processes, killed at any moment, and tidy once it is whole."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.files import write_text
from vlm.index.parts import PARTS
from vlm.manifest import PROGRESS, begin_folder, is_complete

_LOCK, _BATCH_SIZE = ".lock", ".batch-size"
# so long another process may take to begin; what is older was left by a killed one
_PATIENCE_SECONDS = 5.0


def begin(folder: Path, identity: dict[str, Any]) -> None:
    """Open a folder for embeddings, new or unfinished, while others may be doing the same or were killed at it.

    Raises:
        UsageError: it is finished, holds something else, or was begun with another identity; nothing is touched.
    """
    while True:
        was_begun = _is_begun(folder)
        try:
            begin_folder(folder, kind="embeddings", configuration=identity)
            break
        except UsageError:
            # in this order: between the two looks a beginner may have ended its marker
            if was_begun or not (_left_by_a_beginner(folder) or _is_begun(folder)):
                raise
        for path in _left_by_a_beginner(folder):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _PATIENCE_SECONDS:
                    path.unlink()
        time.sleep(0.02)
    (folder / PARTS).mkdir(exist_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process of this folder is in such a block meanwhile, where the file system has locks."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def agreed_batch_size(folder: Path) -> int | None:
    """What was chosen when the work was begun; None if nothing was."""
    try:
        return int((folder / _BATCH_SIZE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def agree_on_batch_size(folder: Path, batch_size: int) -> None:
    """Keep the choice for whoever goes on with the work."""
    write_text(folder / _BATCH_SIZE, f"{batch_size}\n")


def tidy(folder: Path) -> None:
    """Remove from a whole folder what served to make it, and what killed processes left."""
    half_written = [*folder.glob(".*.part"), *(folder / PARTS).glob(".*.part")]
    for path in (folder / PROGRESS, folder / _LOCK, folder / _BATCH_SIZE, *half_written):
        path.unlink(missing_ok=True)


def _is_begun(folder: Path) -> bool:
    return (folder / PROGRESS).is_file() or is_complete(folder)


def _left_by_a_beginner(folder: Path) -> list[Path]:
    """The half-written marker, if the folder holds nothing else."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    is_marker = [path.name.startswith(f".{PROGRESS}.") and path.name.endswith(".part") for path in found]
    return found if all(is_marker) else []
