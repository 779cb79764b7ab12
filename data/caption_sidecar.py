"""New captions of whole shards in a folder beside them, and mixing them in while streaming.

`vlm caption MODEL SHARDS` writes the folder (`vlm.index.recaption`): one Parquet table for each shard, a row for each
sample in the order of the tar. Shards are known by their content, so they may be moved or renamed, and a run may read
some of them only.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm.data.caption_sampler import SampledCaption
from vlm.data.samples import RandomSource, random_below
from vlm.data.shard_cache import ShardCache
from vlm.data.tar import open_index
from vlm.errors import UsageError, VlmError
from vlm.manifest import Manifest, damage_as_error, read_manifest

if TYPE_CHECKING:
    import pyarrow

KIND = "captions"
SIDECAR_LANGUAGE = "sidecar"
"""The language that a caption from a sidecar is reported under."""

# of the shards in the shuffling window; a table of 10,000 captions takes about a megabyte
_MAX_OPEN_TABLES = 64


class SidecarShard(NamedTuple):
    """A shard as the manifest names it. fingerprint: of its keys and sizes. path: of its table, in the folder."""

    shard: str
    fingerprint: str
    path: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class CaptionSidecar:
    """A finished folder of captions."""

    folder: Path
    manifest: Manifest
    shards: tuple[SidecarShard, ...]

    @classmethod
    def open(cls, folder: Path) -> "CaptionSidecar":
        """Open a folder that `vlm caption` finished.

        Raises:
            UsageError: there is none, it is unfinished, or holds something else.
            VlmError: its manifest is damaged.
        """
        if not folder.is_dir():
            raise UsageError(
                f"There are no captions at {str(folder)!r}; vlm caption MODEL SHARDS writes such a folder."
            )
        manifest = read_manifest(folder, KIND)
        with damage_as_error(folder):
            shards = tuple(SidecarShard(**values) for values in manifest.details["shards"])
        return cls(folder=folder, manifest=manifest, shards=shards)

    def tables_of(self, shards: Sequence[str], cache: ShardCache | None = None) -> list[Path]:
        """The table of each of these shards.

        Raises:
            UsageError: the captions are of other shards; the first one without captions is named.
            VlmError: a table is missing.
        """
        by_content = {shard.fingerprint: shard for shard in self.shards}
        tables: list[Path] = []
        for shard in shards:
            own = by_content.get(open_index(shard, cache).fingerprint)
            if own is None:
                raise UsageError(
                    f"{self.folder} holds captions of other shards: {shard} is none of the {len(self.shards):,} it was "
                    f"made from ({self.shards[0].shard}, …). Run vlm caption MODEL with these shards and another --out."
                )
            path = self.folder / own.path
            if not path.is_file():
                raise VlmError(f"{path} is missing; run the same vlm caption again, which writes it anew.")
            tables.append(path)
        return tables


class MixedShard(NamedTuple):
    """The captions for a shard, and with which probability one of them is shown."""

    table: Path
    probability: float


@dataclass(frozen=True, kw_only=True)
class CaptionMix:
    """Draws captions from sidecars in place of those in the shards.

    shards: by the number of the shard; None where the shard's own captions are all there is.
    """

    shards: tuple[MixedShard | None, ...]
    _tables: "OrderedDict[Path, pyarrow.Table]" = field(default_factory=OrderedDict, repr=False, compare=False)

    def draw(self, shard: int, number: int, key: str, rng: RandomSource) -> SampledCaption | None:
        """One of the new captions, drawn uniformly; None where the sample keeps its own.

        That is with the rest of the probability, and where the captioner could not use the image.

        Raises:
            VlmError: the table is damaged, or its row belongs to another sample.
        """
        mixed = self.shards[shard]
        if mixed is None or rng.random() >= mixed.probability:
            return None
        table = self._table(mixed.table)
        if number >= len(table) or table.column("key")[number].as_py() != key:
            raise VlmError(
                f"{mixed.table} has no captions of sample {number}, {key!r}: it is of other shards; run vlm caption "
                "again with another --out."
            )
        texts: list[str] = table.column("captions")[number].as_py()
        if not texts:
            return None
        return SampledCaption(texts[random_below(rng, len(texts))], SIDECAR_LANGUAGE, -1)

    def _table(self, path: Path) -> "pyarrow.Table":
        tables = self._tables
        if path not in tables:
            tables[path] = read_captions(path)
            if len(tables) > _MAX_OPEN_TABLES:
                tables.popitem(last=False)
        tables.move_to_end(path)
        return tables[path]

    def __getstate__(self) -> dict[str, Any]:
        # opened again in each process
        return {"shards": self.shards, "_tables": OrderedDict()}


def read_captions(path: Path) -> "pyarrow.Table":
    """The rows of a shard: key, captions and their log-likelihoods, in the order of the tar.

    Raises:
        VlmError: it cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # in one piece, so that a row is found at once
        return parquet.read_table(path).combine_chunks()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise VlmError(f"{path} cannot be read ({error}); run the same vlm caption again.") from error
