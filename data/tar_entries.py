"""A tar from front to back: its headers read once, and samples written into a new one.

What is read comes from a source nobody vouches for: whole, damaged, or made to do harm.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, cast

import numpy as np

from vlm.errors import UsageError, VlmError

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1 << 20
_MAX_SIZE = 1 << 62

# A regular file as every tar program writes it: name, four numbers in octal, checksum, type 0; then no prefix to its
# name. tarfile reads such a header in 30 µs, and this pattern in 3; whatever else there is, tarfile is asked.
_OCTAL = rb"(?:[0-7]{7}\0|[0-7]{6} \0)"
_PLAIN_HEADER = re.compile(
    rb"([^\0]{1,100})\0*(?<=\A.{100})%b{3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})(?:\0 | \0)0"
    rb".{100}ustar(?:\x0000|  \0).{64}(?:%b|\0{8}){2}\0" % (_OCTAL, _OCTAL),
    re.DOTALL,
)
_CHECKSUM = slice(148, 156)
_SPACES = 8 * ord(" ")


class TarEntry(NamedTuple):
    """A regular file of a tar: its name, where its content begins, and its size in bytes."""

    name: str
    offset_data: int
    size: int


class TarEntries:
    """The regular files of a plain tar, in order, one by one; none is held.

    Links, devices, folders and sparse files are left out. Names are only names: they may hold `..` or begin with `/`,
    and what is not UTF-8 in them is written out as `\\udcXX`. The last file may reach beyond the end of the tar.
    damage: once the last one was read, why the tar ends early, or an empty string.

    Raises:
        UsageError: it is compressed.
        VlmError: not even its first header can be read.
    """

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file = file
        self._url = url
        file.seek(0)
        if file.read(2) == b"\x1f\x8b":
            raise UsageError(
                f"{url} is compressed; rename it to end in .tar.gz, or unpack it with gunzip < IT > NEW.tar."
            )
        self._end = file.seek(0, os.SEEK_END)
        self._last: TarEntry | None = None
        self.damage = ""

    def __iter__(self) -> Iterator[TarEntry]:
        try:
            yield from self._plain()
            # from the first header on that is not plain: of a sound tar this is the block of zeros at its end
            self._file.seek(_after(self._last) if self._last else 0)
            with tarfile.open(fileobj=cast(BinaryIO, _GuardedFile(self._file)), mode="r:") as tar:
                yield from self._rest(tar)
                self.damage = self.damage or _missing_end(self._file, tar.offset)
        except Exception as error:  # on garbage tarfile raises whatever its parsing stumbles over
            reason = " ".join(str(error).split()) or type(error).__name__
            if self._last is None:
                raise VlmError(f"{self._url} is not a tar, or is damaged from the start: {reason}.") from error
            self.damage = f"{reason} after byte {self._last.offset_data:,} ({self._last.name})"

    def _plain(self) -> Iterator[TarEntry]:
        """The first entries, as long as each has a plain header and is whole."""
        offset = 0
        while True:
            # sought each time: whoever takes the entries may read their content in between
            self._file.seek(offset)
            header = self._file.read(_BLOCK)
            fields = _PLAIN_HEADER.match(header)
            if fields is None or sum(header) - sum(header[_CHECKSUM]) + _SPACES != int(fields[3], 8):
                return
            name = fields[1].decode(tarfile.ENCODING, "surrogateescape")
            entry = TarEntry(_readable(name), offset + _BLOCK, int(fields[2], 8))
            offset = _after(entry)
            if offset > self._end:
                return
            self._last = entry
            yield entry

    def _rest(self, tar: tarfile.TarFile) -> Iterator[TarEntry]:
        """The entries that tarfile reads; they end where it goes wrong, which `damage` tells."""
        previous_offset = -1
        for entry in tar:
            # tarfile keeps all it has read, a kilobyte each
            tar.members.clear()
            if entry.size < 0:  # would send tarfile backwards, for ever
                self.damage = f"a negative size at byte {entry.offset:,}"
            elif entry.size > _MAX_SIZE:
                self.damage = f"an absurd size, {entry.size:,}, at byte {entry.offset:,}"
            elif entry.offset_data <= previous_offset:
                self.damage = f"a header at byte {entry.offset:,} that leads back"
            if self.damage:
                return
            previous_offset = entry.offset_data
            if not entry.isreg() or entry.issparse():
                continue
            self._last = TarEntry(_readable(entry.name), entry.offset_data, entry.size)
            if entry.offset_data + entry.size > self._end:
                self.damage = f"cut short at byte {self._end:,}, inside {self._last.name}"
            yield self._last
            if self.damage:
                return


class _GuardedFile:
    """A file that refuses reads no honest header asks for: tarfile takes the size of an extended header at its word."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {size:,} bytes")
        return self._file.read(size)


def _after(entry: TarEntry) -> int:
    """Where the header behind an entry begins."""
    return entry.offset_data + -(-entry.size // _BLOCK) * _BLOCK


def _readable(name: str) -> str:
    # Arrow strings must be UTF-8, and a zero byte would end a name where C reads it
    return name.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


def _missing_end(file: BinaryIO, offset: int) -> str:
    """Why reading stopped at `offset`; empty at the block of zeros that closes a whole tar.

    tarfile itself takes a cut between two members, or an unreadable header, for the end.
    """
    file.seek(offset)
    block = file.read(_BLOCK)
    if block == bytes(_BLOCK):
        return ""
    is_cut = len(block) < _BLOCK
    return f"cut short at byte {offset:,}, without its end mark" if is_cut else f"unreadable header at byte {offset:,}"


class SampleWriter:
    """Writes the bytes that webdataset's `TarWriter(file, encoder=False, mtime=0)` does, without loading torch.

    webdataset loads torch with whatever is imported of it, which takes a quarter of the time of packing 8,000 pairs.
    The same samples give the same bytes: no time of writing is recorded.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # two blocks of zeros, then more up to a whole record
        end = self._num_bytes + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(_padding(end, tarfile.RECORDSIZE) + 2 * tarfile.BLOCKSIZE))

    def write(self, sample: Mapping[str, Any]) -> None:
        """Write a sample as `sample_members` makes it."""
        self.write_members(sample_members(sample))

    def write_members(self, members: bytes) -> None:
        """Write the members of samples."""
        self._file.write(members)
        self._num_bytes += len(members)


def sample_members(sample: Mapping[str, Any]) -> bytes:
    """A sample, `__key__` and bytes by ending, as it stands in a tar: files `key.ending`, by ending."""
    parts: list[bytes] = []
    for ending in sorted(sample.keys() - {"__key__"}):
        data: bytes = sample[ending]
        parts += (_header(f"{sample['__key__']}.{ending}", len(data)), data, bytes(_padding(len(data))))
    return b"".join(parts)


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o444
    entry.uname = entry.gname = "bigdata"
    return entry


# of longer names and larger files the header has an extension
_MAX_NAME = tarfile.LENGTH_NAME
_MAX_PLAIN_SIZE = 8**11 - 1
_BLANK = _tar_info("", 0).tobuf(tarfile.PAX_FORMAT)
# without the digits of the size and the checksum, which itself counts as eight spaces
_BLANK_CHECKSUM = sum(_BLANK[:124]) + sum(_BLANK[136:148]) + sum(b" " * 8) + sum(_BLANK[156:])


def _header(name: str, size: int) -> bytes:
    if name.isascii() and len(name) <= _MAX_NAME and size <= _MAX_PLAIN_SIZE:
        # tarfile takes 30 µs for a header: three of them cost a sample as much as decoding its image
        name_field = name.encode().ljust(_MAX_NAME, b"\0")
        size_field = b"%011o\0" % size
        checksum_field = b"%06o\0 " % (_BLANK_CHECKSUM + sum(name_field) + sum(size_field))
        return b"".join((name_field, _BLANK[100:124], size_field, _BLANK[136:148], checksum_field, _BLANK[156:]))
    return _tar_info(name, size).tobuf(tarfile.PAX_FORMAT)


def _padding(size: int, unit: int = tarfile.BLOCKSIZE) -> int:
    return -size % unit


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as an .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
