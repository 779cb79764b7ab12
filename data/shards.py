"""Where shards are: from what a person types to a list of tars, and reading samples out of one."""

import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from braceexpand import braceexpand

from vlm.console import track
from vlm.data.samples import Sample, captions_of
from vlm.data.storage.addresses import (
    SHARD_SUFFIXES,
    base_name,
    is_remote,
    is_shard,
    local_path,
    needs_cache,
    split_addresses,
)
from vlm.data.storage.cache import ShardCache, default_cache
from vlm.data.storage.remote import identity_of, list_files
from vlm.data.tar_index import Span, TarIndex, open_index
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import fingerprint_of
from vlm.manifest import MANIFEST, PROGRESS

__all__ = ["ShardReader", "count_samples", "expand_shards", "is_remote", "shards_fingerprint"]

_NOTHING = Span(0, 0)
_GAP_BYTES = 16_384
_THREADS = 8
_MANY_REMOTE = 4
_TRIES = 100


def expand_shards(address: str) -> list[str]:
    """The tars named by a folder, a brace or glob pattern, an fsspec address, or several joined with `::`.

    Tars end in .tar, .tar.gz or .tgz. The order is that of the address, sorted inside folders and globs: it is part of
    a run's identity.

    Raises:
        UsageError: a part of the address names no tar, or asks for a protocol that is not allowed.
        VlmError: a remote folder cannot be reached.
    """
    shards: list[str] = []
    for part in split_addresses(address):
        found = _expand_remote(part) if is_remote(part) else _expand_local(local_path(part))
        if not found:
            raise UsageError(f"No shards (*.tar) at {part!r}; give a folder, a tar, or a pattern as {{000..099}}.tar.")
        shards += found
    return shards


def _expand_local(part: str) -> list[str]:
    if Path(part).is_dir():
        return _shards_among([str(path) for path in Path(part).iterdir()], part)
    paths: list[str] = []
    for pattern in braceexpand(part):
        path = Path(pattern)
        matches = sorted(path.parent.glob(path.name)) if any(sign in path.name for sign in "*?[") else [path]
        found = [str(match) for match in matches if match.is_file() and _is_meant(match, path)]
        if not found:
            raise UsageError(f"There is no shard {pattern!r}.")
        paths += found
    return paths


def _is_meant(match: Path, pattern: Path) -> bool:
    """Whether a file is not hidden, or named by its dot: other systems leave `._NAME` beside files."""
    return not match.name.startswith(".") or pattern.name.startswith(".")


def _expand_remote(part: str) -> list[str]:
    shards: list[str] = []
    for address in braceexpand(part):
        if is_shard(address) and "*" not in address:
            shards.append(address)
        else:
            shards += _shards_among(list_files(address), address)
    return shards


def _shards_among(files: Sequence[str], folder: str) -> list[str]:
    """The tars among the files of a folder, sorted; hidden ones are left out."""
    names = {base_name(file): file for file in files}
    if PROGRESS in names and MANIFEST not in names:
        raise UsageError(f"{folder} is unfinished: run the command that makes it again.")
    shards = sorted(file for name, file in names.items() if is_shard(name) and not name.startswith("."))
    stems = [_stem(shard) for shard in shards]
    twice = next((shard for shard, stem in zip(shards, stems, strict=True) if stems.count(stem) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{folder} holds {base_name(twice)} in more than one form; keep one, or name the ones to read."
        )
    return shards


def _stem(shard: str) -> str:
    name = base_name(shard)
    return next(name[: -len(suffix)] for suffix in SHARD_SUFFIXES[::-1] if name.lower().endswith(suffix))


class ShardReader:
    """One tar: its index, and samples by number in any order.

    cache: where a remote or compressed tar is kept; the default one if not given.
    """

    def __init__(self, address: str, cache: ShardCache | None = None) -> None:
        self.address = address
        self.index: TarIndex = open_index(address, cache)
        path = local_path(address)
        is_cached = needs_cache(path)
        self._bytes: _Bytes = _CachedBytes(path, cache or default_cache()) if is_cached else _LocalBytes(path)

    def __len__(self) -> int:
        return len(self.index)

    def close(self) -> None:
        """Release the file."""
        self._bytes.close()

    def place(self, number: int) -> tuple[str, int]:
        """Key of a sample and where its first part begins, in bytes from the start of the plain tar."""
        member = self.index[number]
        spans = [span for span in (member.image, member.text, member.json, *member.arrays.values()) if span]
        return member.key, min((span.offset for span in spans), default=0)

    def read(self, number: int, *, arrays: tuple[str, ...] = ()) -> Sample:
        """Sample `number` of this tar, with its arrays (`key.NAME.npy`) of these names.

        Raises:
            BadSample: it has no picture, lacks an array, is cut short, or its JSON or an array cannot be read.
            VlmError: a shard that made room in the cache cannot be fetched again.
        """
        member = self.index[number]
        if member.image is None:
            raise BadSample("no picture", f"key {member.key!r} has no jpg, png or webp")
        for name in arrays:
            if name not in member.arrays:
                raise BadSample("no array", f"key {member.key!r} has no {name}.npy")
        spans = [member.image, member.text or _NOTHING, member.json or _NOTHING]
        image, text, content, *stored = self._bytes.read(spans + [member.arrays[name] for name in arrays])
        metadata = _json_object(content) if member.json else {}
        return Sample(
            key=member.key,
            image=image,
            captions=captions_of(text.decode("utf-8", errors="replace"), metadata),
            metadata=metadata,
            arrays={name: _array(data, f"{member.key}.{name}.npy") for name, data in zip(arrays, stored, strict=True)},
        )


@runtime_checkable
class _Bytes(Protocol):
    """The content of a tar by position."""

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span; raises BadSample where the tar is too short."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class _LocalBytes:
    """A tar that is read where it lies, and kept open."""

    def __init__(self, path: str) -> None:
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        self._end = os.fstat(self._descriptor).st_size

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        return _read_spans(self._descriptor, spans, self._path, end=self._end)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _CachedBytes:
    """A tar in the cache: opened for each sample, so that it takes no space once it made room for another."""

    def __init__(self, address: str, cache: ShardCache) -> None:
        self._address, self._cache, self._identity = address, cache, identity_of(address, cache.patience)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        for _ in range(_TRIES):
            try:
                descriptor = os.open(self._cache.local_path(self._address, self._identity), os.O_RDONLY)
            except FileNotFoundError:  # made room for another just now
                continue
            try:
                return _read_spans(descriptor, spans, self._address, end=os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        raise VlmError(
            f"{self._address} left the cache at {self._cache.folder} {_TRIES} times before it could be read: too many "
            f"shards are read at once for its {self._cache.max_bytes:,} bytes; allow more by VLM_CACHE_GB."
        )

    def close(self) -> None:
        """Nothing is held."""


def _read_spans(descriptor: int, spans: Sequence[Span], address: str, *, end: int) -> list[bytes]:
    first, last, wanted = end, 0, 0
    for offset, size in spans:
        if not size:
            continue
        stop = offset + size
        if offset < 0 or size < 0 or stop > end:  # asked first: a header may promise more than there is memory
            raise BadSample("cut short", f"{size:,} bytes at {offset:,} of {address}, which ends at {end:,}")
        first, last, wanted = offset if offset < first else first, stop if stop > last else last, wanted + size
    if last - first - wanted > _GAP_BYTES:
        return [_read_span(descriptor, span, address) for span in spans]
    together = _read_span(descriptor, Span(first, max(last - first, 0)), address)
    return [together[offset - first : offset - first + size] for offset, size in spans]


def _read_span(descriptor: int, span: Span, address: str) -> bytes:
    data = os.pread(descriptor, span.size, span.offset)
    if len(data) != span.size:
        raise BadSample("cut short", f"{span.size:,} bytes at {span.offset:,} of {address}, {len(data):,} are there")
    return data


def count_samples(shards: list[str], *, allow_damage: bool = False, cache: ShardCache | None = None) -> list[int]:
    """Number of samples of each shard, from its index; remote shards are asked several at a time.

    Raises:
        VlmError: a shard is cut short (unless allowed) or holds no sample.
    """
    num_cached = sum(needs_cache(shard) for shard in shards)
    if num_cached < _MANY_REMOTE:
        return [_count(shard, open_index(shard, cache), allow_damage=allow_damage) for shard in shards]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="vlm-count") as pool:
        indexes = pool.map(lambda shard: open_index(shard, cache), shards)
        shown = track(zip(shards, indexes, strict=True), total=len(shards), what="indexing shards", unit="shard")
        try:
            return [_count(shard, index, allow_damage=allow_damage) for shard, index in shown]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _count(shard: str, index: TarIndex, *, allow_damage: bool) -> int:
    if index.damage and not allow_damage:
        raise VlmError(
            f"{shard} is damaged: {index.damage}; {len(index):,} samples before it are whole. "
            "Fetch or pack the shard again, or go on without the rest by --allow-damage."
        )
    if not len(index):
        raise VlmError(f"{shard} holds no samples (key.jpg|png|webp with key.txt or key.json); leave it out.")
    return len(index)


def shards_fingerprint(shards: Sequence[str], cache: ShardCache | None = None) -> str:
    """Identity of an ordered list of shards: the keys and the sizes of all parts, from the indexes alone.

    It stays the same when the files are moved or renamed; new bytes of just the same size go unnoticed.
    """
    return fingerprint_of(*(open_index(shard, cache).fingerprint for shard in shards))


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
        if b"\\u" in data:  # half a surrogate pair is JSON, but no text
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("unreadable json", f"an object was expected, found {type(value).__name__}")
    return value


def _array(data: bytes, name: str) -> np.ndarray:
    """An array from the bytes of an .npy file; its header is checked before any memory is taken."""
    try:
        file = io.BytesIO(data)
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, is_fortran, dtype = read_header(file)
        rest = memoryview(data)[file.tell() :]
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(rest):
            raise ValueError(f"{dtype} of shape {shape} in {len(rest):,} bytes")
        return np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C").copy()
    except Exception as error:  # numpy evaluates the header, and raises whatever that stumbles over
        raise BadSample("unreadable array", f"{name}: {error}") from error


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
