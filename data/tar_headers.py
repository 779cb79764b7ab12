"""The headers of a tar, read once: from a source nobody vouches for, whole, damaged, or made to do harm."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

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
