"""Selections: how often each sample of some shards is seen in an epoch, applied while streaming."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.data.shard_cache import ShardCache
from vlm.data.tar import open_index
from vlm.errors import UsageError
from vlm.files import atomic_write, compute_fingerprint
from vlm.tensor_types import Array, Float, UInt16

FORMAT = "1"
SUFFIX = ".selection"
MAX_TIMES = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class SelectedShard:
    """A shard of a selection. fingerprint: of its content (`TarIndex.fingerprint`), so it may be moved."""

    name: str
    fingerprint: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How often each sample is seen in an epoch: `times[shard][number]`, 0 leaves it out.

    lineage: what was done to get here, one plain JSON object a step, in order.
    Two bytes a sample, memory-mapped when read from a file.
    """

    shards: tuple[SelectedShard, ...]
    times: tuple[UInt16[Array, " N"], ...]
    lineage: tuple[dict[str, Any], ...] = ()

    @property
    def visits(self) -> int:
        """Samples an epoch sees, repeats included."""
        return sum(int(times.sum(dtype=np.int64)) for times in self.times)

    @property
    def kept(self) -> int:
        """Distinct samples an epoch sees."""
        return sum(int(np.count_nonzero(times)) for times in self.times)

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity: the content of the shards and the times, whatever led to them."""
        names = [shard.fingerprint for shard in self.shards]
        # bytes in one order, so that the identity is the same on every machine
        return compute_fingerprint(*names, *(times.astype("<u2").tobytes() for times in self.times))

    def times_by_fingerprint(self) -> dict[str, UInt16[Array, " N"]]:
        """The times of each shard, by the fingerprint of its content."""
        return {shard.fingerprint: times for shard, times in zip(self.shards, self.times, strict=True)}

    def times_of(self, shards: Sequence[str], *, cache: ShardCache | None = None) -> list[UInt16[Array, " N"]]:
        """The times of the samples of each of these tars, found by content, so that tars may be moved or reordered.

        Raises:
            UsageError: a tar is not among those the selection was made for.
        """
        # by content: the tars may have been renamed, moved, or given in another order since
        by_content = self.times_by_fingerprint()
        times_of_shards: list[UInt16[Array, " N"]] = []
        for url in shards:
            index = open_index(url, cache)
            times = by_content.get(index.fingerprint)
            # a fingerprint covers keys and sizes, so a shard of another length is another shard or a damaged selection
            if times is None or len(times) != len(index):
                raise UsageError(
                    f"The selection does not know {url} (it was made for {len(self.shards):,} shards, the first "
                    f"is {self.shards[0].name}); the tar has changed since, or is another one: run vlm curate on it."
                )
            times_of_shards.append(times)
        return times_of_shards


def write_selection(path: Path, selection: Selection) -> None:
    """Write a selection as one Arrow file, atomically: a record batch a shard."""
    shards = [[shard.name, shard.fingerprint, shard.samples] for shard in selection.shards]
    schema = pa.schema(
        [("times", pa.uint16())],
        metadata={
            "vlm-selection": FORMAT,
            "shards": json.dumps(shards),
            "lineage": json.dumps(selection.lineage, ensure_ascii=False),
        },
    )
    with atomic_write(path) as file, pa.ipc.new_file(file, schema) as writer:
        # so that a reader gets the times of each shard as one array, without a copy
        for times in selection.times:
            writer.write_batch(pa.record_batch([pa.array(times, pa.uint16())], schema=schema))


def read_selection(path: Path) -> Selection:
    """Read a selection; its times stay on disk and are memory-mapped.

    Raises:
        UsageError: there is no such file, or it is not a selection of this format.
    """
    if not path.is_file():
        raise UsageError(f"There is no selection {str(path)!r}; vlm curate SHARDS OUT{SUFFIX} writes one.")
    try:
        return _read(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a selection, or is damaged ({error}); make it again with vlm curate."
        ) from error


def _read(path: Path) -> Selection:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = reader.schema.metadata or {}
    if metadata.get(b"vlm-selection") != FORMAT.encode() or reader.schema.types != [pa.uint16()]:
        raise ValueError(f"not of format {FORMAT}")
    shards: list[SelectedShard] = []
    for name, fingerprint, samples in json.loads(metadata[b"shards"]):
        shards.append(SelectedShard(name=str(name), fingerprint=str(fingerprint), samples=int(samples)))

    # validated, since a damaged file that is memory-mapped would fail, or worse not fail, in the middle of a run
    columns: list[pa.Array] = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        batch.validate(full=True)
        columns.append(batch.column(0))
    if list(map(len, columns)) != [shard.samples for shard in shards] or not shards:
        raise ValueError("it does not hold as many times as its shards have samples")
    lineage = json.loads(metadata[b"lineage"])
    if any(column.null_count for column in columns) or not isinstance(lineage, list):
        raise ValueError("values are missing")
    times = tuple(column.to_numpy() for column in columns)
    return Selection(shards=tuple(shards), times=times, lineage=tuple(lineage))


def intersect_selections(one: Selection, other: Selection) -> Selection:
    """And: the samples in both, their times multiplied."""
    return _combine("and", one, other, lambda times, other_times: times * other_times)


def subtract_selection(one: Selection, other: Selection) -> Selection:
    """Minus: the samples of `one` that are not in `other`."""
    return _combine("minus", one, other, lambda times, other_times: np.where(other_times == 0, times, 0))


def add(one: Selection, other: Selection) -> Selection:
    """Plus: each sample as often as in both together."""
    return _combine("plus", one, other, lambda times, other_times: times + other_times)


def _combine(
    step: str, one: Selection, other: Selection, operation: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Selection:
    """The shards of `one`, with what an operation makes of the times in both selections."""
    by_content = other.times_by_fingerprint()
    missing = [shard.name for shard in one.shards if shard.fingerprint not in by_content]
    if missing:
        raise UsageError(
            f"The selections are of different shards: {missing[0]} and {len(missing) - 1:,} more are missing in the "
            "second; curate both over the same shards."
        )
    combined: list[UInt16[Array, " N"]] = []
    for shard, times in zip(one.shards, one.times, strict=True):
        # in 64 bits, since the product of two uint16 would wrap around before it is clipped
        result = operation(times.astype(np.int64), by_content[shard.fingerprint].astype(np.int64))
        combined.append(_clip_times(result))
    record = {"step": step, "with": other.fingerprint, "lineage": list(other.lineage)}
    return Selection(shards=one.shards, times=tuple(combined), lineage=(*one.lineage, record))


def reweight(selection: Selection, weight: float, *, seed: int = 0) -> Selection:
    """Every sample `weight` times as often; the fraction beyond a whole number is drawn from the seed.

    Weight 1.5 sees each sample once and half of them, drawn, once more.
    """
    if not 0 <= weight <= MAX_TIMES or seed < 0:
        raise UsageError(f"A weight of {weight} is outside 0 to {MAX_TIMES:,}, or the seed {seed} below 0.")
    reweighted: list[UInt16[Array, " N"]] = []
    for number, times in enumerate(selection.times):
        # a generator a shard: what is drawn for one does not depend on the sizes of those before it
        rng = np.random.default_rng([seed, number])
        reweighted.append(stochastic_round(times * np.float64(weight), rng))
    step = {"step": "weight", "weight": weight, "seed": seed}
    return Selection(shards=selection.shards, times=tuple(reweighted), lineage=(*selection.lineage, step))


def stochastic_round(expected: Float[Array, " N"], rng: np.random.Generator) -> UInt16[Array, " N"]:
    """Whole times with the expected mean: the floor, and one more with the probability of the fraction."""
    whole = np.floor(expected)
    return _clip_times(whole + (rng.random(len(expected)) < expected - whole))


def _clip_times(times: np.ndarray) -> UInt16[Array, " N"]:
    # clipped first: the cast would wrap around
    return np.minimum(times, MAX_TIMES).astype(np.uint16)
