"""Names of imported rows: as for embedded ones, what they are called, made longer only where two share it."""

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from vlm.index.exchange.source import SourcePart, read_names
from vlm.index.uids import name_shards, shared_keys


class RowNamer:
    """Gives each row its key and its uid, as `UidNamer` does for samples of shards, with a part in place of a shard.

    The key is what the uid column says, or the row's number in the whole source. num_shared: rows whose uid had to be
    longer than their key.

    Memory: one Arrow string column with the keys of all rows while it is made, then the shared keys only.

    Raises:
        UsageError: a row has no uid.
        VlmError: a table is damaged.
    """

    def __init__(self, parts: Sequence[SourcePart]) -> None:
        self._parts = name_shards([str(part.pair.path.with_suffix("")) for part in parts])
        named = [read_names(part) for part in parts]
        chunks = [chunk for names in named if names is not None for chunk in names.chunks]
        keyed = pa.table({"key": pa.chunked_array(chunks, pa.string())})
        is_shared = pc.field("key").isin(shared_keys(keyed))
        self._shared = Counter(
            (number, key)
            for number, names in enumerate(named)
            if names is not None
            for key in pa.table({"key": names}).filter(is_shared).column("key").to_pylist()
        )
        self.num_shared = sum(self._shared.values())

    def uid(self, part: int, number: int, key: str) -> str:
        """The uid of row `number` of a part."""
        times = self._shared[part, key]
        return key if not times else f"{key}@{self._parts[part]}" + (f":{number}" if times > 1 else "")
