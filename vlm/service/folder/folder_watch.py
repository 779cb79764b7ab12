"""Waiting for changes in a folder: told by the system (watchfiles, extra `watch`), or by looking again and again."""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HAS_WATCHFILES = importlib.util.find_spec("watchfiles") is not None

POLL_SECONDS = 10.0
"""Between two looks where the system does not tell."""

# a batch of changes ends with a second without any, or after ten: copying a card takes minutes
_QUIET_MILLISECONDS = 1_000
_BATCH_MILLISECONDS = 10_000
# looking costs a scan of all files, which must not become all that the machine does
_MAX_SHARE_OF_TIME = 0.1


class ChangeWaiter:
    """Waits for changes in a folder.

    poll_seconds: look so often instead of being told, as a network drive needs; None: be told where that is possible.
    """

    def __init__(self, root: Path, *, poll_seconds: float | None = None) -> None:
        self.root = root
        self.is_polling = poll_seconds is not None or not HAS_WATCHFILES
        self._poll_seconds = POLL_SECONDS if poll_seconds is None else poll_seconds
        self._scan_seconds = 0.0

    def waits(self) -> Iterator[None]:
        """Ends a wait whenever something may have changed, and the first one as soon as changes are noticed.

        It never stops by itself; an interrupt passes through.
        """
        if not self.is_polling:
            import watchfiles

            batches: Any = watchfiles.watch(
                self.root,
                watch_filter=lambda _, path: self._is_visible(path),
                debounce=_BATCH_MILLISECONDS,
                step=_QUIET_MILLISECONDS,
                # an empty batch after this time: the first one tells that the system has begun to watch
                yield_on_timeout=True,
                rust_timeout=_QUIET_MILLISECONDS,
                raise_interrupt=True,
            )
            is_first = True
            for batch in batches:
                if batch or is_first:
                    yield
                is_first = False
        while True:
            yield
            time.sleep(max(self._poll_seconds, self._scan_seconds / _MAX_SHARE_OF_TIME))

    def set_scan_seconds(self, seconds: float) -> None:
        """How long looking takes, so that a slow drive is looked at less often."""
        self._scan_seconds = seconds

    def _is_visible(self, path: str) -> bool:
        # as `scan_folder`, which leaves hidden files out: a change of theirs is no reason for a scan
        return not any(part.startswith(".") for part in Path(path).relative_to(self.root).parts)
