"""What lies in a folder of images now: names, sizes and times, without reading a single image."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from vlm.data.photo_formats import PHOTO_ENDINGS, ending, missing_extra
from vlm.data.sources.image_folder import JSON_SUFFIX, TEXT_SUFFIXES, files_beside
from vlm.data.sources.source import FolderFiles, readable_text

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
