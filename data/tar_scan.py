"""Reading the headers of a plain tar that nobody vouches for: whole, damaged, or made to do harm."""

import os
import tarfile
from typing import BinaryIO, cast

from vlm.errors import UsageError, VlmError

_MAX_HEADER_BYTES = 1 << 20
_MAX_SIZE = 1 << 62


class _Guarded:
    """A file that refuses reads no honest header asks for: tarfile takes the size of an extended header at its word."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {size:,} bytes")
        return self._file.read(size)


def read_entries(file: BinaryIO, address: str) -> tuple[list[tarfile.TarInfo], str]:
    """The regular files of a plain tar, and why it ends early, or an empty string.

    Links, devices, folders and sparse files are left out. Names are only names: they may hold `..` or begin with `/`,
    and what is no UTF-8 in them is written out as `\\udcXX`. The last file may reach beyond the end of the tar.

    Raises:
        UsageError: it is compressed.
        VlmError: not even its first header can be read.
    """
    if file.read(2) == b"\x1f\x8b":
        raise UsageError(f"{address} is compressed; rename it to end in .tar.gz, or unpack it with gunzip.")
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    entries: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Guarded(file)), mode="r:") as tar:
            damage = _collect(tar, entries, end) or _missing_end(file, tar.offset)
    except Exception as error:  # on garbage tarfile raises whatever its parsing stumbles over
        why = " ".join(str(error).split()) or type(error).__name__
        if not entries:
            raise VlmError(f"{address} is not a tar, or is damaged from the start: {why}.") from error
        last = entries[-1]
        damage = f"{why} after byte {last.offset_data:,} ({last.name})"
    return entries, damage


def _collect(tar: tarfile.TarFile, entries: list[tarfile.TarInfo], end: int) -> str:
    """Append the regular files one by one; why it stops before the end, or empty."""
    before = -1
    for entry in tar:
        if entry.size < 0:  # would send tarfile backwards, for ever
            return f"a negative size at byte {entry.offset:,}"
        if entry.size > _MAX_SIZE:
            return f"an absurd size, {entry.size:,}, at byte {entry.offset:,}"
        if entry.offset_data <= before:
            return f"a header at byte {entry.offset:,} that leads back"
        before = entry.offset_data
        if not entry.isreg() or entry.issparse():
            continue
        entry.name = entry.name.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
        entries.append(entry)
        if entry.offset_data + entry.size > end:
            return f"cut short at byte {end:,}, inside {entry.name}"
    return ""


def _missing_end(file: BinaryIO, offset: int) -> str:
    """Why reading stopped at `offset`; empty at the block of zeros that closes a whole tar.

    tarfile itself takes a cut between two members, or an unreadable header, for the end.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return ""
    is_cut = len(block) < tarfile.BLOCKSIZE
    return f"cut short at byte {offset:,}, without its end mark" if is_cut else f"unreadable header at byte {offset:,}"
