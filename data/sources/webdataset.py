"""Pairs out of shards that others wrote: img2dataset's output and any WebDataset tars."""

import logging
from bisect import bisect_right
from collections.abc import Iterable
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.samples import Captions, Pair, Words, split_lines, without_captions
from vlm.data.selection import Selection
from vlm.data.shard_cache import Inflater
from vlm.data.shards import count_samples, shards_fingerprint
from vlm.data.sources.source import is_image_name
from vlm.data.sources.table import unique_keys
from vlm.data.tar import ShardReader, open_index
from vlm.data.tar_entries import TarEntries
from vlm.errors import BadSample, VlmError
from vlm.files import compute_fingerprint
from vlm.storage import needs_cache

logger = logging.getLogger(__name__)

_GZIP_BEGINS = b"\x1f\x8b"
# of up to 1 MiB of plain bytes each, 64 KiB where they do not shrink
_PROBED_PIECES = 128
_PROBED_BYTES = _PROBED_PIECES * 65_536


class ShardSource:
    """The samples of existing shards, in their order; what img2dataset marks as failed is a bad sample.

    selection: only these samples, each as often as it says. caption_lines: each line of a caption is one of its own.
    captions_mode: `none` leaves captions out, `optional` takes samples without them as well. encoding: of captions and
    JSON, where they are not UTF-8. image_name: `KEY.NAME.jpg` is the image of a sample of several.
    """

    captions_are_labels = False

    def __init__(
        self,
        shards: list[str],
        *,
        allow_damage: bool = False,
        selection: Selection | None = None,
        caption_lines: bool = False,
        captions_mode: str = "",
        encoding: str = "",
        image_name: str = "",
    ) -> None:
        self._shards = shards
        self._image_name = image_name
        self._selection = selection
        self._caption_lines = caption_lines
        self._captions_mode = captions_mode
        self._encoding = encoding
        self._ends = list(accumulate(count_samples(shards, allow_damage=allow_damage)))
        self._reader = self._open_reader(shards[0])
        # a number among all samples of all shards; of a selection, as often as it says
        self._numbers = np.arange(self._ends[-1])
        keys: list[str] = []
        repeated: list[str] = []
        for shard in shards:
            index = open_index(shard)
            keys += index.sample_keys()
            repeated += [f"{shard}: {key}" for key in index.repeated_keys()]
        if selection is not None:
            self._numbers = np.repeat(self._numbers, np.concatenate(selection.times_of(shards)))
            keys = list(map(keys.__getitem__, self._numbers.tolist()))
        if repeated:
            logger.warning(
                f"In {len(repeated):,} samples a member name comes twice, the first in {repeated[0]}; the second is "
                "a sample of its own, whose key gets a number."
            )
        # shards of different origin repeat keys, and so does a selection that repeats samples
        self._keys = unique_keys(keys, [None] * len(keys))

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Pair:
        """The sample as it lies in its shard, without the captions among its metadata."""
        position = self._open_shard_of(number)
        sample = self._reader.read(position, arrays=tuple(self._reader.index[position].arrays))
        captions, metadata, _ = self._usable(sample.key, sample.captions, sample.metadata)
        return Pair(
            key=self._keys[number].as_py(),
            image=sample.image,
            captions=captions,
            metadata=metadata,
            arrays=sample.arrays,
        )

    def words(self, number: int) -> Words:
        """The captions, and the metadata without them."""
        position = self._open_shard_of(number)
        key, captions, metadata = self._reader.read_words(position)
        return self._usable(key, captions, metadata)

    def _open_shard_of(self, number: int) -> int:
        """Let the reader be at the shard of a sample; the position of the sample in it."""
        place_of_all = int(self._numbers[number])
        shard = bisect_right(self._ends, place_of_all)
        # packing reads in order, so that one open shard is enough
        if self._reader.url != self._shards[shard]:
            self._reader.close()
            self._reader = self._open_reader(self._shards[shard])
        return place_of_all - (self._ends[shard - 1] if shard else 0)

    def _open_reader(self, shard: str) -> ShardReader:
        return ShardReader(shard, encoding=self._encoding, image_name=self._image_name)

    def _usable(self, key: str, captions: Captions, metadata: dict[str, Any]) -> Words:
        """The words as the options want them; BadSample where there are none."""
        status = metadata.get("status") or "success"
        if status != "success":
            raise BadSample("not downloaded", f"status {status!r}: {metadata.get('error_message')}")
        if self._caption_lines:
            captions = split_lines(captions)
        if self._captions_mode == "none":
            captions = {}
        elif not captions and self._captions_mode != "optional":
            raise BadSample("no caption", f"key {key!r} has neither text nor captions")
        return Words(captions, without_captions(metadata))

    def file_of(self, number: int) -> str:
        """The key of the sample."""
        return self._keys[number].as_py()

    @property
    def is_fork_safe(self) -> bool:
        """Whether the shards are plain tars on this machine, read by position; the cache of others has connections."""
        return not any(map(needs_cache, self._shards))

    def fingerprint(self) -> str:
        """Keys and sizes, from the indexes of the shards, and what is selected of them."""
        content = shards_fingerprint(self._shards)
        # options at their defaults are left out: the fingerprint of plain shards is that of their content
        chosen = [self._selection.fingerprint] if self._selection is not None else []
        chosen += ["caption lines"] if self._caption_lines else []
        chosen += [self._captions_mode] if self._captions_mode else []
        chosen += [f"encoding {self._encoding}"] if self._encoding else []
        chosen += [f"image name {self._image_name}"] if self._image_name else []
        return compute_fingerprint(content, *chosen) if chosen else content

    def describe(self) -> dict[str, Any]:
        """The shards by address."""
        described: dict[str, Any] = {"kind": "shards", "shards": self._shards}
        if self._selection is not None:
            described["selection"] = list(self._selection.lineage)
        return described | ({"image_name": self._image_name} if self._image_name else {})


def contains_samples(tar: Path) -> bool:
    """Whether a tar, plain or compressed, whole or cut short, holds samples.

    Of a compressed one only the beginning is looked at: the rest takes as long as unpacking it.
    """
    try:
        with tar.open("rb") as file:
            is_compressed = file.read(len(_GZIP_BEGINS)) == _GZIP_BEGINS
            beginning = BytesIO(_inflated_beginning(tar)) if is_compressed else file
            return looks_like_shard(entry.name for entry in TarEntries(beginning, str(tar)))
    except VlmError:
        return False


def _inflated_beginning(tar: Path) -> bytes:
    with tar.open("rb") as file:
        pieces = Inflater(str(tar)).feed(file.read(_PROBED_BYTES))
        return b"".join(islice(pieces, _PROBED_PIECES))


def looks_like_shard(names: Iterable[str]) -> bool:
    """Whether files of a tar are samples: some image has a text, JSON or class of the same name."""
    # a shard is told by its first files, of which the images may come before or after what is said of them
    annotated_stems: set[str] = set()
    image_stems: set[str] = set()
    for name in names:
        stem = name.rpartition(".")[0]
        if name.lower().endswith((".txt", ".json", ".cls")):
            annotated_stems.add(stem)
        elif is_image_name(name):
            image_stems.add(stem)
        else:
            continue
        if stem in annotated_stems and stem in image_stems:
            return True
    return False
