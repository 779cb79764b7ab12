"""What the samples of some shards are to each other: equal captions, near-duplicate images, nearest neighbours.

`vlm relate` writes them once, and `vlm train --batches` arranges its batches by them (`vlm.data.batch_order`). A file
holds, shard by shard and memory-mapped, for each sample the numbers of the groups it is in (samples of one group must
not be negatives of each other) and the positions of its neighbours among all samples of the file.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm.data.curation.sample_table import RequiredColumn, SampleTable, scan
from vlm.data.dedup import DISTANCE, connected_components, near_duplicate_pairs
from vlm.data.shard_cache import ShardCache
from vlm.data.tar import open_index
from vlm.errors import UsageError
from vlm.files import atomic_write, compute_fingerprint
from vlm.results import Result
from vlm.tensor_types import Array, Int64

FORMAT = "1"
SUFFIX = ".relations"


@dataclass(frozen=True, kw_only=True)
class ShardRelations:
    """The relations of the samples of one shard, in the order of its samples.

    fingerprint: of its content (`TarIndex.fingerprint`), so it may be moved. first: position of its first sample.
    group_ends, neighbour_ends: where the entries of each sample end in `groups` and `neighbours`.
    """

    name: str
    fingerprint: str
    first: int
    group_ends: Int64[Array, " N"]
    groups: Int64[Array, " G"]
    neighbour_ends: Int64[Array, " N"]
    neighbours: Int64[Array, " K"]

    def groups_of(self, number: int) -> tuple[int, ...]:
        """The groups of a sample; none for most."""
        begin = int(self.group_ends[number - 1]) if number else 0
        return tuple(self.groups[begin : int(self.group_ends[number])].tolist())

    def neighbours_of(self, number: int) -> list[int]:
        """The positions of a sample's neighbours, the nearest first."""
        begin = int(self.neighbour_ends[number - 1]) if number else 0
        return self.neighbours[begin : int(self.neighbour_ends[number])].tolist()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.group_ends)


@dataclass(frozen=True, kw_only=True)
class SampleRelations:
    """The relations of all samples of some shards, of which the positions count through the shards in this order."""

    shards: tuple[ShardRelations, ...]

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def grouped_samples(self) -> int:
        """Samples in a group with another."""
        return sum(int((np.diff(shard.group_ends, prepend=0) > 0).sum()) for shard in self.shards)

    @property
    def num_neighbours(self) -> int:
        """Stored neighbours of all samples together."""
        return sum(len(shard.neighbours) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Identity: content of the shards, groups and neighbours."""
        parts: list[bytes | str] = []
        for shard in self.shards:
            parts.append(shard.fingerprint)
            # bytes in one order, so that the identity is the same on every machine
            for values in (shard.group_ends, shard.groups, shard.neighbour_ends, shard.neighbours):
                parts.append(values.astype("<i8").tobytes())
        return compute_fingerprint(*parts)

    def of_shards(self, urls: Sequence[str], cache: ShardCache | None = None) -> list[ShardRelations]:
        """The relations of each of these tars, found by content.

        Raises:
            UsageError: a tar is not among those that were related.
        """
        # by content: the tars may have been renamed, moved, or given in another order since
        by_content = {shard.fingerprint: shard for shard in self.shards}
        related: list[ShardRelations] = []
        for url in urls:
            index = open_index(url, cache)
            shard = by_content.get(index.fingerprint)
            if shard is None or shard.samples != len(index):
                raise UsageError(
                    f"The relations do not know {url} (they are of {len(self.shards):,} shards, the first is "
                    f"{self.shards[0].name}); the tar has changed since, or is another one: run vlm relate on it."
                )
            related.append(shard)
        return related

    def with_neighbours(
        self, contents: Sequence[str], numbers: Sequence[int], neighbours: Int64[Array, "N K"]
    ) -> "SampleRelations":
        """The same with neighbours from other rows, e.g. of an embeddings folder.

        contents, numbers: the shard (by the fingerprint of its content) and number of the sample of each row.
        neighbours: for each row the rows nearest to it, the nearest first; -1 for none.

        Raises:
            UsageError: a row is of a shard that is not among these.
        """
        firsts = {shard.fingerprint: shard.first for shard in self.shards}
        unknown = set(contents) - firsts.keys()
        if unknown:
            raise UsageError(
                f"{len(unknown)} of the shards that were embedded are not among those given; embed and relate the same."
            )
        # numbered through over all shards, as groups and neighbours are stored
        positions = np.array([firsts[content] for content in contents], np.int64) + np.asarray(numbers, np.int64)
        of_position: dict[int, Int64[Array, " K"]] = {}
        for position, rows in zip(positions.tolist(), neighbours, strict=True):
            others = positions[rows[rows >= 0]]
            # a caption's row may have other captions of its own image nearest
            of_position[position] = others[others != position]
        shards: list[ShardRelations] = []
        for shard in self.shards:
            lists: list[Int64[Array, " K"]] = []
            for number in range(shard.samples):
                lists.append(of_position.get(shard.first + number, _NONE))
            ends, values = _flatten(lists)
            shards.append(replace(shard, neighbour_ends=ends, neighbours=values))
        return SampleRelations(shards=tuple(shards))


_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class RelationsSummary(Result):
    """The file and its identity; samples, those with an equal caption or nearly the same image, stored neighbours."""

    relations: str
    fingerprint: str
    samples: int
    grouped_samples: int
    neighbours: int


def relate_samples(
    shards: Sequence[str], *, languages: Sequence[str] = (), images: bool = True, workers: int = 1
) -> SampleRelations:
    """Scan shards for samples with an equal caption or nearly the same image.

    languages: of the captions that are compared; empty takes the first language of each sample, as training does.
    images: look for near-duplicate images too, which decodes every image (`vlm.data.dedup`).

    Raises:
        VlmError: a shard is damaged or empty.
    """
    required = {RequiredColumn.CAPTIONS} | ({RequiredColumn.SIGNATURE} if images else set[RequiredColumn]())
    table = scan(shards, required, workers=workers)
    members, groups = _caption_groups(table, languages)
    if images:
        image_members, image_groups = _image_groups(table)
        # numbers of images after those of captions
        image_groups = image_groups + (groups.max() + 1 if len(groups) else 0)
        members = np.concatenate([members, image_members])
        groups = np.concatenate([groups, image_groups])
    # by sample, so that the groups of each, and of each shard, are one slice
    order = np.argsort(members, kind="stable")
    groups = groups[order]
    ends = np.cumsum(np.bincount(members, minlength=len(table)))
    related: list[ShardRelations] = []
    for number, shard in enumerate(table.shards):
        first, last = int(table.starts[number]), int(table.starts[number + 1])
        begin = int(ends[first - 1]) if first else 0
        related.append(
            ShardRelations(
                name=shard.url.rpartition("/")[2],
                fingerprint=shard.fingerprint,
                first=first,
                group_ends=ends[first:last] - begin,
                groups=groups[begin : int(ends[last - 1])],
                neighbour_ends=np.zeros(last - first, np.int64),
                neighbours=_NONE,
            )
        )
    return SampleRelations(shards=tuple(related))


def _caption_groups(table: SampleTable, languages: Sequence[str]) -> tuple[Int64[Array, " M"], Int64[Array, " M"]]:
    """Positions of samples, and the number of the caption each shares with another sample."""
    positions, language, text = table.captions(languages)
    if not languages and len(positions):
        # of each sample the captions in the language of its first
        names = np.array(language.to_pylist(), dtype=object)
        first = names[np.searchsorted(positions, positions)]
        is_first = names == first
        positions, text = positions[is_first], text.filter(pa.array(is_first))
    codes = text.combine_chunks().dictionary_encode() if len(text) else None
    if codes is None:
        return _NONE, _NONE
    indices = codes.combine_chunks().indices if isinstance(codes, pa.ChunkedArray) else codes.indices
    # a caption that a sample has twice is shared with no other
    pairs = np.unique(np.stack([indices.to_numpy().astype(np.int64), positions.astype(np.int64)], axis=1), axis=0)
    return _shared(pairs[:, 1], pairs[:, 0])


def _image_groups(table: SampleTable) -> tuple[Int64[Array, " M"], Int64[Array, " M"]]:
    usable = np.flatnonzero(table.is_usable)
    pairs = near_duplicate_pairs(table.numbers("hash")[usable], table.fixed("thumbnail")[usable], distance=DISTANCE)
    return _shared(usable, connected_components(pairs, len(usable)))


def _shared(members: Int64[Array, " M"], groups: Int64[Array, " M"]) -> tuple[Int64[Array, " S"], Int64[Array, " S"]]:
    """Members whose group has another member, with the groups numbered from 0."""
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    is_shared = sizes[numbers] > 1
    _, compact = np.unique(numbers[is_shared], return_inverse=True)
    return members[is_shared], compact.astype(np.int64)


def _flatten(lists: Iterable[Int64[Array, " K"]]) -> tuple[Int64[Array, " N"], Int64[Array, " K"]]:
    """Where each list ends, and all one after the other."""
    held = list(lists)
    # an empty one in front: there may be no list at all, and numpy joins none
    ends = np.cumsum([len(values) for values in held], dtype=np.int64)
    return ends, np.concatenate([_NONE, *held])


def write_relations(path: Path, relations: SampleRelations) -> None:
    """Write relations as one Arrow file, atomically: a record batch a shard."""
    lists = pa.large_list(pa.int64())
    shards = [[shard.name, shard.fingerprint, shard.samples] for shard in relations.shards]
    schema = pa.schema(
        [("groups", lists), ("neighbours", lists)],
        metadata={"vlm-relations": FORMAT, "shards": json.dumps(shards)},
    )
    with atomic_write(path) as file, pa.ipc.new_file(file, schema) as writer:
        for shard in relations.shards:
            columns: list[pa.Array] = []
            # plain offsets and values: whoever maps the file has both as arrays without a copy
            for ends, values in ((shard.group_ends, shard.groups), (shard.neighbour_ends, shard.neighbours)):
                offsets = np.concatenate([[0], ends])
                columns.append(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64())))
            writer.write_batch(pa.record_batch(columns, schema=schema))


def read_relations(path: Path) -> SampleRelations:
    """Read relations; they stay on disk and are memory-mapped.

    Raises:
        UsageError: there is no such file, or it is not one of this format.
    """
    if not path.is_file():
        raise UsageError(f"There is no file of relations {str(path)!r}; vlm relate SHARDS OUT{SUFFIX} writes one.")
    try:
        return _read(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a file of relations, or is damaged ({error}); make it again with vlm relate."
        ) from error


def _read(path: Path) -> SampleRelations:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = reader.schema.metadata or {}
    if metadata.get(b"vlm-relations") != FORMAT.encode():
        raise ValueError(f"not of format {FORMAT}")
    described = json.loads(metadata[b"shards"])
    if len(described) != reader.num_record_batches or not described:
        raise ValueError("it does not hold as many record batches as shards")
    shards: list[ShardRelations] = []
    first = 0
    for number, (name, fingerprint, samples) in enumerate(described):
        batch = reader.get_batch(number)
        # a damaged file that is memory-mapped would else fail in the middle of a run
        batch.validate(full=True)
        if batch.num_rows != samples:
            raise ValueError("it does not hold as many samples as its shards have")
        groups, neighbours = batch.column(0), batch.column(1)
        shards.append(
            ShardRelations(
                name=str(name),
                fingerprint=str(fingerprint),
                first=first,
                group_ends=groups.offsets.to_numpy()[1:],
                groups=groups.values.to_numpy(),
                neighbour_ends=neighbours.offsets.to_numpy()[1:],
                neighbours=neighbours.values.to_numpy(),
            )
        )
        first += samples
    total = first
    for shard in shards:
        # beyond the samples it would end the loader in the middle of a run
        if len(shard.neighbours) and not 0 <= shard.neighbours.min() <= shard.neighbours.max() < total:
            raise ValueError("a neighbour is outside its samples")
    return SampleRelations(shards=tuple(shards))
