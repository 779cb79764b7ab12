"""Samples out of one tar, by number."""

import io
import json
import math
import os
from codecs import BOM_UTF8
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm.data.samples import Sample, captions_of
from vlm.data.storage.addresses import local_path, needs_cache
from vlm.data.storage.cache import ShardCache, default_cache
from vlm.data.storage.remote import identity_of
from vlm.data.tar_index import Span, TarIndex, open_index
from vlm.errors import BadSample, VlmError

_NOTHING = Span(0, 0)
_GAP_BYTES = 16_384
_TRIES = 100


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
            raise BadSample("no picture", f"key {member.key!r} has no jpg, jpeg, png, webp, avif or gif")
        for name in arrays:
            if name not in member.arrays:
                raise BadSample("no array", f"key {member.key!r} has no {name}.npy")
        spans = [member.image, member.text or _NOTHING, member.json or _NOTHING]
        image, text, content, *stored = self._bytes.read(spans + [member.arrays[name] for name in arrays])
        metadata = _json_object(content) if member.json else {}
        return Sample(
            key=member.key,
            image=image,
            captions=captions_of(text.removeprefix(BOM_UTF8).decode("utf-8", errors="replace"), metadata),
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
