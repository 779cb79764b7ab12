"""Names of embeddings: a sample's key, made longer only where two samples share it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from vlm.data.tar import open_index
from vlm.errors import UsageError


class UidAssigner:
    """Gives each embedding of a list of shards its uid: the same whenever the same shards are embedded.

    A uid is the sample's key. Samples of several shards that share a key get `key@shard` (the shard by as much of the
    end of its path as tells it from the others); those inside one shard `key@shard:number`. Text embeddings add
    `#caption_number`. Nothing is merged: a key that begins like such a uid (`a@x`, where `a` is shared) gets one, too.

    Memory: one Arrow string column with the keys while it is made, then the shared keys only.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self._names = shorten_shard_names(shards)
        tables = [open_index(shard).table.select(["key"]).replace_schema_metadata() for shard in shards]
        is_shared = pc.field("key").isin(find_shared_keys(pa.concat_tables(tables)))
        self._shared = Counter(
            (shard, key)
            for shard, table in enumerate(tables)
            for key in table.filter(is_shared).column("key").to_pylist()
        )

    def name(self, shard: int, number: int, key: str, caption_number: int | None = None) -> str:
        """The uid of sample `number` of a shard, or of one of its captions."""
        times = self._shared[shard, key]
        uid = key
        if times:
            uid += f"@{self._names[shard]}" + (f":{number}" if times > 1 else "")
        return uid if caption_number is None else f"{uid}#{caption_number}"


def find_shared_keys(keyed: pa.Table) -> pa.Array:
    """What the column `key` has several times, and what begins like one of these with an @ behind it."""
    counted = keyed.group_by("key").aggregate([([], "count_all")])
    shared = counted.filter(pc.field("count_all") > 1).column("key").combine_chunks()
    known, alike = set(shared.to_pylist()), []
    others = counted.filter(pc.field("count_all") == 1).column("key") if known else pa.chunked_array([], pa.string())
    has_sign = pc.call_function("match_substring", [others], pc.MatchSubstringOptions("@"))
    for key in sorted(others.filter(has_sign).to_pylist(), key=len):
        if any(letter == "@" and key[:place] in known for place, letter in enumerate(key)):
            known.add(key)
            alike.append(key)
    return pa.concat_arrays([shared, pa.array(alike, shared.type)])


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
    parts = [PurePosixPath(shard.removesuffix(".tar")).parts for shard in shards]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [shard.removesuffix(".tar") for shard in shards]
