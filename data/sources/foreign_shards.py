"""Pairs out of shards that others wrote: img2dataset's output and any WebDataset tars."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

from vlm.data.samples import Pair
from vlm.data.shards import ShardReader, count_samples, shards_fingerprint
from vlm.data.sources.files import PICTURE_SUFFIXES
from vlm.data.sources.table import unique_keys
from vlm.data.tar_index import open_index
from vlm.errors import BadSample


class ShardSource:
    """The samples of existing shards, in their order; what img2dataset marks as failed is a bad sample."""

    captions_are_labels = False

    def __init__(self, shards: list[str], *, allow_damage: bool = False) -> None:
        self._shards = shards
        self._ends = list(accumulate(count_samples(shards, allow_damage=allow_damage)))
        self._reader = ShardReader(shards[0])
        keys = [key for shard in shards for key in open_index(shard).sample_keys()]
        self._keys = unique_keys([(key, None) for key in keys])

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, number: int) -> Pair:
        """The sample as it lies in its shard, without the captions among its metadata."""
        place = bisect_right(self._ends, number)
        if self._reader.address != self._shards[place]:
            self._reader.close()
            self._reader = ShardReader(self._shards[place])
        sample = self._reader.read(number - (self._ends[place - 1] if place else 0))
        status = sample.metadata.get("status", "success")
        if status != "success":
            raise BadSample("not downloaded", f"status {status!r}: {sample.metadata.get('error_message')}")
        if not sample.captions:
            raise BadSample("no caption", f"key {sample.key!r} has neither text nor captions")
        metadata = {
            name: value
            for name, value in sample.metadata.items()
            if name not in ("caption", "captions") and not name.startswith("captions_")
        }
        return Pair(key=self._keys[number], image=sample.image, captions=sample.captions, metadata=metadata)

    def fingerprint(self) -> str:
        """Keys and sizes, from the indexes of the shards."""
        return shards_fingerprint(self._shards)

    def describe(self) -> dict[str, Any]:
        """The shards by address."""
        return {"kind": "shards", "shards": self._shards}


def looks_like_shard(names: Sequence[str]) -> bool:
    """Whether files of a tar are samples: some picture has its text or JSON beside it, under the same name."""
    told = {name.rpartition(".")[0] for name in names if name.endswith((".txt", ".json"))}
    pictures = (name for name in names if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES)
    return any(name.rpartition(".")[0] in told for name in pictures)
