"""Uids: of embeddings a sample's key, made longer only where two samples share it; of an index also a column."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm.config import suggest
from vlm.data.tar import open_index
from vlm.errors import UsageError
from vlm.files import content_digest
from vlm.index.embeddings_folder import Origin
from vlm.tensor_types import Array, Bool

UID_COLUMN = "uid_column"
"""In the configuration of an index's manifest: the metadata column of its uids; without one, those of embeddings."""

FILE_COLUMN = "file"
"""The metadata of images that were packed from a folder: their names in it."""


class UidAssigner:
    """Gives each embedding of several sources its uid: the same whenever the same sources are embedded.

    A uid is the sample's key. Samples of several shards that share a key get `key@shard` (the shard by as much of the
    end of its path as tells it from the others); those inside one shard `key@shard:number`. Text embeddings add
    `#caption_number`. No uid is given twice: a key that looks like such a uid (`a@x`, where `a` is shared) is made
    longer too.

    names: addresses of the shards, or of other sources of rows. keys: of their samples in order; None: they have none.
    num_renamed: samples whose uid had to be longer than their key.

    Memory: one Arrow string column with all keys while it is made, then the shared keys only.
    """

    def __init__(self, names: Sequence[str], keys: Sequence[pa.ChunkedArray | None]) -> None:
        self._names = shorten_shard_names(names)
        columns = {number: column for number, column in enumerate(keys) if column is not None}
        chunks = [chunk for column in columns.values() for chunk in column.chunks]
        shared_keys = pc.SetLookupOptions(find_shared_keys(pa.chunked_array(chunks, pa.string())))
        self._shared: Counter[tuple[int, str]] = Counter()
        for number, column in columns.items():
            is_shared = pc.call_function("is_in", [column], shared_keys)
            for key in column.filter(is_shared).to_pylist():
                self._shared[number, key] += 1
        self.num_renamed = self._shared.total()

    @classmethod
    def for_shards(cls, shards: Sequence[str]) -> "UidAssigner":
        """For the samples of shards."""
        return cls(shards, [open_index(shard).table.column("key") for shard in shards])

    def name(self, source: int, number: int, key: str, caption_number: int | None = None) -> str:
        """The uid of sample `number` of a source, or of one of its captions."""
        times = self._shared[source, key]
        uid = key
        if times:
            uid += f"@{self._names[source]}"
        # within one shard its name tells nothing apart
        if times > 1:
            uid += f":{number}"
        return uid if caption_number is None else f"{uid}#{caption_number}"


def find_shared_keys(keys: pa.ChunkedArray) -> pa.Array:
    """The keys that occur several times, and those that begin like one of these and an @."""
    # by arrays alone: a table's groups and filters, and scalars, import pandas where it is installed, for half a second
    counted = pc.call_function("value_counts", [keys])
    is_shared = np.from_dlpack(counted.field("counts")) > 1
    shared = counted.field("values").filter(_mask(is_shared))
    known = set(shared.to_pylist())
    if not known:
        return shared
    unique_keys = counted.field("values").filter(_mask(~is_shared))
    has_sign = pc.call_function("match_substring", [unique_keys], pc.MatchSubstringOptions("@"))
    similar = []
    # the shortest first, so that a key that begins like a similar one is found as well
    for key in sorted(unique_keys.filter(has_sign).to_pylist(), key=len):
        prefixes = [key[:position] for position, letter in enumerate(key) if letter == "@"]
        if known.intersection(prefixes):
            known.add(key)
            similar.append(key)
    return pa.concat_arrays([shared, pa.array(similar, shared.type)])


def _mask(values: Bool[Array, " N"]) -> pa.Array:
    bits = pa.py_buffer(np.packbits(values, bitorder="little"))
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, bits])


def shorten_shard_names(shards: Sequence[str]) -> list[str]:
    """The shortest ends of the addresses, without `.tar`, that tell them apart.

    >>> shorten_shard_names(["/a/00000.tar", "/a/00001.tar"])
    ['00000', '00001']
    >>> shorten_shard_names(["/a/00000.tar", "/b/00000.tar"])
    ['a/00000', 'b/00000']

    Raises:
        UsageError: a shard is given twice.
    """
    for shard, times in Counter(shards).items():
        if times > 1:
            raise UsageError(f"{shard} is given {times} times; each shard may be embedded once.")
    addresses = [shard.removesuffix(".tar") for shard in shards]
    parts = [PurePosixPath(address).parts for address in addresses]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return addresses


def choose_uid_column(origins: Callable[[], Iterable[Origin]], requested: str | None) -> str:
    """The metadata column that gives the rows of a new index their uids; empty for those of the embeddings.

    requested: a column, `key` for the keys of the samples, or None for `file` where each row has one of its own: the
        name of an image in its folder does not depend on how other images are called.

    Raises:
        UsageError: a row has no value in the requested column, or two rows have the same.
    """
    if requested == "":
        return ""
    column = FILE_COLUMN if requested is None else requested
    seen: set[bytes] = set()
    for origin in origins():
        uid = uid_in_column(origin, column)
        if not uid:
            if requested is None:
                return ""
            hint = suggest(column, ["key", *origin.metadata])
            raise UsageError(f"The row {origin.uid!r} has no {column!r} to be its uid; {hint}")
        digest = content_digest(uid.encode(errors="surrogatepass"))
        if digest in seen:
            if requested is None:
                return ""
            raise UsageError(f"Two rows have the {column} {uid!r}, and a uid names one row; choose another column.")
        seen.add(digest)
    return column


def uid_in_column(origin: Origin, column: str) -> str:
    """The uid that a column gives a row, of a text embedding with the number of its caption; empty without a value."""
    value = origin.key if column == "key" else origin.metadata.get(column)
    if not isinstance(value, str | int | float) or value == "":
        return ""
    return str(value) if origin.caption_number is None else f"{value}#{origin.caption_number}"


def with_uid_of(origin: Origin, column: str) -> Origin:
    """The origin with the uid of a column; unchanged without a column, or if it has no value there."""
    uid = uid_in_column(origin, column) if column else ""
    return replace(origin, uid=uid) if uid else origin
