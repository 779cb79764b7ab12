"""One writer at a time: a lock on a file of the index folder, which ends with the process that holds it."""

import fcntl
import os
from pathlib import Path

from vlm.errors import UsageError

LOCK = "writer.lock"


class WriterLock:
    """Held from its making until `release`.

    Raises:
        UsageError: another writer holds it; its process is named.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise UsageError(
                f"{folder} is being changed by another process ({holder or 'unknown'}); wait until it has finished, "
                "or end it: what it had not finished is then taken back."
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others write; the file stays."""
        os.close(self._descriptor)
