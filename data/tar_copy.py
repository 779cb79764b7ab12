"""A tar copied member by member, with arrays put beside its samples."""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from vlm.data.storage.addresses import local_path, needs_cache
from vlm.data.storage.cache import ShardCache, default_cache
from vlm.data.storage.remote import identity_of
from vlm.data.tar_index import Member, open_index
from vlm.data.tar_scan import read_entries

Arrays = dict[str, np.ndarray]


def copy_with_arrays(address: str, out: BinaryIO, arrays: Iterator[Arrays], cache: ShardCache | None = None) -> None:
    """Write the tar at `address` anew, with `KEY.NAME.npy` after the last part of each sample.

    Names, contents and order of the regular files stay; times, owners, links and folders are left out, so the same
    arrays give the same bytes. A stored array that the sample had under the same name is replaced. Of a tar cut short,
    the file that is cut is left out.

    Args:
        arrays: those of each sample in the order of the index, by name; empty for a sample that gets none.
        cache: where remote and compressed tars are kept; the default one if not given.
    """
    index = open_index(address, cache)
    members = [index[number] for number in range(len(index))]
    sample_at = {offset: number for number, member in enumerate(members) for offset in _offsets(member)}
    number, added = -1, Arrays()
    with _open_plain(address, cache) as file, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        end = file.seek(0, os.SEEK_END)
        for entry in read_entries(file, address)[0]:
            if entry.offset_data + entry.size > end:
                break
            here = sample_at.get(entry.offset_data, -1)  # -1: no part of a sample, as the index sees it
            while number < here:
                number, added = number + 1, next(arrays)
            if here < 0 or not _is_replaced(entry, members[here], added):
                file.seek(entry.offset_data)
                tar.addfile(_entry(entry.name, entry.size), file)
            if here >= 0 and entry.offset_data == max(_offsets(members[here])):
                for name in sorted(added):
                    data = _array_file(added[name])
                    tar.addfile(_entry(f"{members[here].key}.{name}.npy", len(data)), io.BytesIO(data))
        for _ in arrays:  # of samples without any part that is known
            pass


def _offsets(member: Member) -> list[int]:
    spans = (member.image, member.text, member.json, *member.arrays.values())
    return [span.offset for span in spans if span is not None]


def _is_replaced(entry: tarfile.TarInfo, member: Member, added: Arrays) -> bool:
    return any(span.offset == entry.offset_data for name, span in member.arrays.items() if name in added)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def _array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _open_plain(address: str, cache: ShardCache | None) -> BinaryIO:
    if not needs_cache(address):
        return open(local_path(address), "rb")
    cache = cache or default_cache()
    while True:
        try:
            return cache.local_path(address, identity_of(address, cache.patience)).open("rb")
        except FileNotFoundError:  # made room for another in between
            continue
