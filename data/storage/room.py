"""The bound of the cache folder: what lies in it, what is promised to fetches under way, and what has to go."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm.errors import UsageError
from vlm.files import write_text

_OURS = re.compile(r"([0-9a-f]{16})\.(tar|part|json)")
_NOTE_BYTES = 2048


@dataclass(kw_only=True)
class _Entry:
    """What lies in the folder under one key. used: time of last use in ns."""

    bytes: int = 0
    used: int = 0
    is_whole: bool = False


@dataclass(frozen=True)
class Room:
    """Space in a folder for files by key: KEY.tar whole, KEY.part on its way, KEY.json what they are.

    max_bytes: what they may come to together. Files of other names are neither counted nor touched. Whoever writes to a
    key holds its lock; who promises space holds that of the folder, so that the bound is kept across processes.
    """

    folder: Path
    max_bytes: int

    def path(self, key: str, kind: str) -> Path:
        """The file of a key: kind tar, part, json or lock."""
        return self.folder / f"{key}.{kind}"

    def lock(self, key: str) -> FileLock:
        """The lock of a key."""
        return FileLock(self.path(key, "lock"))

    def reserve(self, key: str, num_bytes: int, address: str) -> bool:
        """Promise `num_bytes` to a key whose lock is held, for what it has now included; unused files go.

        False if what is in use leaves too little; try again later.

        Raises:
            UsageError: it is more than the folder may ever hold.
        """
        wanted = num_bytes + self.max_bytes - self.largest(address)
        if wanted > self.max_bytes:
            raise UsageError(
                f"{address} has {num_bytes:,} bytes, but the cache at {self.folder} may hold {self.max_bytes:,}; "
                "allow more by VLM_CACHE_GB, or pack smaller shards."
            )
        with FileLock(self.folder / ".lock"):
            entries = self._entries()
            entries.pop(key, None)
            surplus = sum(entry.bytes for entry in entries.values()) + wanted - self.max_bytes
            for victim, entry in sorted(entries.items(), key=lambda item: item[1].used):
                if surplus <= 0:
                    break
                if self._remove_unused(victim):
                    surplus -= entry.bytes
            if surplus > 0:
                return False
            self.note(key, {"address": address, "reserved": wanted})
        return True

    def largest(self, address: str) -> int:
        """The size of the largest shard of that address for which there can be room, in bytes."""
        return self.max_bytes - _NOTE_BYTES - 2 * len(address)

    def note(self, key: str, facts: dict[str, Any]) -> None:
        """Write down what a key is."""
        write_text(self.path(key, "json"), json.dumps(facts))

    def facts(self, key: str) -> dict[str, Any]:
        """What was written down of a key; nothing if it has gone."""
        try:
            return json.loads(self.path(key, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def drop(self, key: str) -> None:
        """Remove the files of a key whose lock is held."""
        for kind in ("part", "tar", "json"):
            self.path(key, kind).unlink(missing_ok=True)

    def touch(self, key: str) -> bool:
        """Mark a whole file as used now; False if there is none."""
        path = self.path(key, "tar")
        try:
            os.utime(path)
        except PermissionError:  # another user's, which may be read all the same
            return path.exists()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _remove_unused(self, key: str) -> bool:
        lock = self.lock(key)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        try:
            self.drop(key)
            self.path(key, "lock").unlink(missing_ok=True)  # who waits for it finds out and takes a new one
        finally:
            lock.release()
        return True

    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for file in os.scandir(self.folder):
            match = _OURS.fullmatch(file.name)
            if match is None:
                continue
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            entry = entries.setdefault(match[1], _Entry())
            entry.bytes += status.st_size
            entry.is_whole |= match[2] == "tar"
            if match[2] != "json":
                entry.used = max(entry.used, status.st_mtime_ns)
        for key, entry in entries.items():
            if not entry.is_whole:
                entry.bytes = max(entry.bytes, self.facts(key).get("reserved", 0))
        return entries
