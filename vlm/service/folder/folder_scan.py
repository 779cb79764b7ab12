"""What lies in a folder of images now, without reading a single image, and waiting until that changes."""

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.photo_formats import PHOTO_ENDINGS, ending, missing_extra
from vlm.data.sources.image_folder import JSON_SUFFIX, TEXT_SUFFIXES, files_beside
from vlm.data.sources.source import FolderFiles, readable_text

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


# the coarsest clock of a file system (FAT's); a file changed twice within a tick keeps its size and time
_TICK_NS = 2_000_000_000
UNSETTLED = -1
"""The time of a file that was changed just now, and may be again without a trace: no later scan finds it unchanged."""


class FileStamp(NamedTuple):
    """By what a file is known to be unchanged: size in bytes, time of the last change, and inode."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, kw_only=True)
class FolderScan:
    """The images of a folder by their names below it, sorted, and the files that belong to them.

    beside: for images with texts or JSON next to them, what changes whenever one of these does.
    unreadable: what cannot be taken in, with the reason. missing: number of files by the extra that would read them.
    """

    files: FolderFiles
    stamps: dict[str, FileStamp]
    beside: dict[str, str]
    unreadable: dict[str, str]
    missing: dict[str, int]

    @cached_property
    def names(self) -> frozenset[str]:
        """All files of the folder."""
        return frozenset(self.files.names())


def scan_folder(root: Path) -> FolderScan:
    """Look at every file of a folder once; hidden files and folders are left out."""
    now = time.time_ns()
    files = FolderFiles(root)
    names = files.names()
    stamps: dict[str, FileStamp] = {}
    unreadable: dict[str, str] = {}
    missing: Counter[str] = Counter()
    has_words = False
    for name in names:
        suffix = ending(name)
        has_words = has_words or suffix in TEXT_SUFFIXES or suffix == JSON_SUFFIX
        if suffix not in PHOTO_ENDINGS:
            if extra := missing_extra(name):
                missing[extra] += 1
            continue
        if not _is_unicode(name):
            unreadable[readable_text(name)] = "its name is not UTF-8; rename it"
            continue
        try:
            stamps[name] = _stamp(root, name, now)
        except OSError as error:
            unreadable[name] = error.strerror or str(error)
    for name, reason in files.skipped.items():
        unreadable[readable_text(name)] = reason
    scan = FolderScan(files=files, stamps=stamps, beside={}, unreadable=unreadable, missing=dict(missing))
    if has_words:
        _add_words_beside(root, scan, now)
    return scan


def _add_words_beside(root: Path, scan: FolderScan, now: int) -> None:
    for name in scan.stamps:
        parts: list[str] = []
        for file in files_beside(name, scan.names):
            try:
                stamp = _stamp(root, file, now)
            except OSError:  # it is gone already, or a dead link
                continue
            parts.append(f"{stamp.mtime_ns} {stamp.size} {file}")
        if parts:
            scan.beside[name] = "\n".join(parts)


def is_unsettled(beside: str) -> bool:
    """Whether a file next to an image was changed just before it was looked at."""
    return any(part.startswith(f"{UNSETTLED} ") for part in beside.split("\n"))


def _stamp(root: Path, name: str, now: int) -> FileStamp:
    status = os.stat(f"{root}/{name}")
    # on both sides: the clock of a network drive may be a little ahead of this one
    is_settled = abs(now - status.st_mtime_ns) > _TICK_NS
    return FileStamp(status.st_size, status.st_mtime_ns if is_settled else UNSETTLED, status.st_ino)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, as Python shows them
        return False
    return True
