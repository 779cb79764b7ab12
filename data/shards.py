"""Where shards are: from what a person types to a list of tars, and reading samples out of one."""

import json
import os
from pathlib import Path
from typing import Any, cast

import fsspec
from braceexpand import braceexpand

from vlm.data.samples import Sample, captions_of
from vlm.data.tar_index import Span, TarIndex, open_index
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import fingerprint_of
from vlm.manifest import PROGRESS, is_complete


def expand_shards(address: str) -> list[str]:
    """The tars named by a folder, a brace or glob pattern, an fsspec address, or several joined with `::`.

    The order is that of the address, sorted inside folders and globs: it is part of a run's identity.

    Raises:
        UsageError: a part of the address names no tar.
    """
    shards: list[str] = []
    for part in address.split("::"):
        found = _expand_part(part)
        if not found:
            raise UsageError(f"No shards (*.tar) at {part!r}; give a folder, a tar, or a pattern as {{000..099}}.tar.")
        shards += found
    return shards


def _expand_part(part: str) -> list[str]:
    if is_remote(part):
        return sorted(_remote_glob(part)) if "*" in part else list(braceexpand(part))
    if Path(part).is_dir():
        if (Path(part) / PROGRESS).is_file() and not is_complete(Path(part)):
            raise UsageError(f"{part} is unfinished: run the command that makes it again.")
        return [str(path) for path in sorted(Path(part).glob("[!.]*.tar"))]
    paths: list[str] = []
    for pattern in braceexpand(part):
        path = Path(pattern)
        matches = sorted(path.parent.glob(path.name)) if any(sign in path.name for sign in "*?[") else [path]
        paths += [str(match) for match in matches if match.is_file()]
        if not matches or not matches[0].is_file():
            raise UsageError(f"There is no shard {pattern!r}.")
    return paths


def is_remote(address: str) -> bool:
    """Whether an address goes through fsspec rather than the local file system."""
    return "://" in address


def _remote_glob(pattern: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(pattern)
    return [system.unstrip_protocol(found) for found in system.glob(path)]


class ShardReader:
    """One open tar: its index, and samples by number in any order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.index: TarIndex = open_index(address)
        self._remote = cast(fsspec.core.OpenFile, fsspec.open(address, "rb")).open() if is_remote(address) else None
        self._descriptor = -1 if self._remote else os.open(address, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.index)

    def close(self) -> None:
        """Release the file."""
        if self._remote is not None:
            self._remote.close()
        elif self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, number: int) -> Sample:
        """Sample `number` of this tar.

        Raises:
            BadSample: it has no picture, is cut short, or its JSON cannot be read.
        """
        member = self.index[number]
        if member.image is None:
            raise BadSample("no picture", f"key {member.key!r} has no jpg, png or webp")
        text = self._bytes(member.text) if member.text else None
        metadata = _json_object(self._bytes(member.json)) if member.json else {}
        decoded = text.decode("utf-8", errors="replace") if text is not None else None
        return Sample(
            key=member.key,
            image=self._bytes(member.image),
            captions=captions_of(decoded, metadata),
            metadata=metadata,
        )

    def _bytes(self, span: Span) -> bytes:
        if self._remote is not None:
            self._remote.seek(span.offset)
            data = self._remote.read(span.size)
        else:
            data = os.pread(self._descriptor, span.size, span.offset)
        if len(data) != span.size:
            raise BadSample("cut short", f"{span.size} bytes at {span.offset} of {self.address}, {len(data)} there")
        return data


def count_samples(shards: list[str], *, allow_damage: bool = False) -> list[int]:
    """Number of samples of each shard, from its index.

    Raises:
        VlmError: a shard is cut short (unless allowed) or holds no sample.
    """
    counts: list[int] = []
    for shard in shards:
        index = open_index(shard)
        if index.damage and not allow_damage:
            raise VlmError(
                f"{shard} is damaged: {index.damage}; {len(index):,} samples before it are whole. "
                "Fetch or pack the shard again, or go on without the rest by --allow-damage."
            )
        if not len(index):
            raise VlmError(f"{shard} holds no samples (key.jpg|png|webp with key.txt or key.json); leave it out.")
        counts.append(len(index))
    return counts


def shards_fingerprint(shards: list[str]) -> str:
    """Identity of an ordered list of shards: the keys and the sizes of all parts, from the indexes alone.

    It stays the same when the files are moved or renamed; new bytes of just the same size go unnoticed.
    """
    return fingerprint_of(*(open_index(shard).fingerprint for shard in shards))


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BadSample("unreadable json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("unreadable json", f"an object was expected, found {type(value).__name__}")
    return value
