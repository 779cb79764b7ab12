"""Writing a shard: samples one by one, or those of another shard with arrays added."""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from vlm.data.shard_cache import ShardCache
from vlm.data.tar import Arrays, Member, open_index, open_tar
from vlm.data.tar_headers import TarEntries, TarEntry
from vlm.storage import file_identity, local_path


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


def _header(name: str, size: int) -> bytes:
    if name.isascii() and len(name) <= _MAX_NAME and size <= _MAX_SIZE:
        # tarfile takes 30 µs for a header: three of them cost a sample as much as decoding its image
        fields = name.encode().ljust(_MAX_NAME, b"\0"), b"%011o\0" % size
        checksum = _BLANK_CHECKSUM + sum(fields[0]) + sum(fields[1])
        return b"".join((fields[0], _BLANK[100:124], fields[1], _BLANK[136:148], b"%06o\0 " % checksum, _BLANK[156:]))
    return _tar_info(name, size).tobuf(tarfile.PAX_FORMAT)


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o444
    entry.uname = entry.gname = "bigdata"
    return entry


# of longer names and larger files the header has an extension
_MAX_NAME, _MAX_SIZE = tarfile.LENGTH_NAME, 8**11 - 1
_BLANK = _tar_info("", 0).tobuf(tarfile.PAX_FORMAT)
# without the digits of the size and the checksum, which itself counts as eight spaces
_BLANK_CHECKSUM = sum(_BLANK[:124]) + sum(_BLANK[136:148]) + sum(b" " * 8) + sum(_BLANK[156:])


def _padding(size: int, unit: int = tarfile.BLOCKSIZE) -> int:
    return -size % unit


def copy_with_arrays(url: str, out: BinaryIO, arrays: Iterator[Arrays], cache: ShardCache | None = None) -> None:
    """Copy the tar at `url`, with `KEY.NAME.npy` after the last part of each sample.

    Contents and order of the regular files stay, and so do names, but for endings, which become lower-case as other
    readers expect them; times, owners, links and folders are left out, so the same
    arrays give the same bytes. A stored array that the sample had under the same name is replaced. Of a tar cut short,
    the file that is cut is left out.

    Args:
        url: of a plain, compressed or remote tar.
        out: where the plain copy is written.
        arrays: those of each sample in the order of the index, by name; empty for a sample that gets none.
        cache: where remote and compressed tars are kept; the default one if not given.
    """
    index = open_index(url, cache)
    members: list[Member] = []
    sample_at: dict[int, int] = {}
    for number in range(len(index)):
        member = index[number]
        members.append(member)
        for span in member.spans:
            sample_at[span.offset] = number

    path = local_path(url)
    identity = file_identity(path, cache.retry_policy if cache else None)
    current = -1
    added = Arrays()
    with (
        open_tar(path, identity, cache) as file,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        end = file.seek(0, os.SEEK_END)
        for entry in TarEntries(file, url):
            if entry.offset_data + entry.size > end:
                break
            number = sample_at.get(entry.offset_data)
            if number is None:  # not part of a sample, as the index sees it
                _copy_entry(tar, entry, file)
                continue
            while current < number:
                current += 1
                added = next(arrays)
            member = members[number]
            if not _is_replaced(entry, member, added):
                _copy_entry(tar, entry, file)
            # after the last part, so that the run of members that makes the sample is not broken
            if entry.offset_data == max(span.offset for span in member.spans):
                for name in sorted(added):
                    data = npy_bytes(added[name])
                    tar.addfile(_tar_entry(f"{member.key}.{name}.npy", len(data)), io.BytesIO(data))
        for _ in arrays:  # run to the end, also past samples without any part that is known
            pass


def _is_replaced(entry: TarEntry, member: Member, added: Arrays) -> bool:
    return any(span.offset == entry.offset_data for name, span in member.arrays.items() if name in added)


def _copy_entry(tar: tarfile.TarFile, entry: TarEntry, file: BinaryIO) -> None:
    file.seek(entry.offset_data)
    folder, slash, name = entry.name.rpartition("/")
    stem, dot, ending = name.partition(".")
    tar.addfile(_tar_entry(f"{folder}{slash}{stem}{dot}{ending.lower()}", entry.size), file)


def _tar_entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as an .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
