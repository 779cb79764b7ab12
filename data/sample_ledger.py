"""The sample ledger: what became of each requested sample, by epoch and shard, so that none is lost."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from vlm.data.collate import TrainingBatch
from vlm.data.samples import SampleIndex

MAX_FAILURES = 1000
"""Failures kept by name in a ledger, which goes into every checkpoint."""


_NAMES_ON_DISK = {
    "requested": "asked",
    "seen": "seen",
    "repeated": "repeated",
    "replaced": "replaced",
    "used_as_replacement": "stood_in",
    "skipped": "passed_over",
}
"""The counts of a shard and their names in checkpoints, which are older."""


@dataclass
class ShardCount:
    """Visits of the samples of one shard: requested = seen + replaced + skipped.

    requested: visits in the sampler's order. seen: those that showed the requested sample, of which `repeated` showed
    one that its epoch had shown already, as its selection wants. replaced: those whose sample cannot be used, so that
    another was shown. skipped: those left out by training because the run rolled back from bad steps. corrupt: replaced
    by reason. used_as_replacement: visits of this shard's samples in place of others; over all shards as many as
    `replaced`.
    """

    requested: int = 0
    seen: int = 0
    repeated: int = 0
    replaced: int = 0
    used_as_replacement: int = 0
    skipped: int = 0
    corrupt: Counter[str] = field(default_factory=Counter)

    def add(self, other: "ShardCount") -> None:
        """Add the visits of another count."""
        # the table of names is the one list of counters: a new one cannot be forgotten here
        for name in _NAMES_ON_DISK:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.corrupt.update(other.corrupt)

    def to_values(self) -> dict[str, Any]:
        """Plain values, read back by `from_values`."""
        # under their old names: checkpoints of earlier versions must stay readable
        values = {on_disk: getattr(self, name) for name, on_disk in _NAMES_ON_DISK.items()}
        return values | {"corrupt": dict(sorted(self.corrupt.items()))}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "ShardCount":
        """From the values of `to_values`."""
        numbers: dict[str, int] = {name: values[on_disk] for name, on_disk in _NAMES_ON_DISK.items()}
        reasons: dict[str, int] = values["corrupt"]
        return cls(corrupt=Counter(reasons), **numbers)


Epoch = dict[int, ShardCount]
"""Counts by shard number."""


@dataclass
class Ledger:
    """Visits by epoch and shard, summed over the batches given to `count`; epochs that are over move into `closed`.

    failures: the samples that cannot be used, each once, by shard and number, at most MAX_FAILURES of them.
    num_requested, num_replaced: over all shards and epochs.
    """

    epochs: dict[int, Epoch] = field(default_factory=dict)
    closed: Epoch = field(default_factory=dict)
    failures: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    num_requested: int = 0
    num_replaced: int = 0

    def count(self, batch: TrainingBatch) -> None:
        """Add one batch."""
        self.num_requested += len(batch.sample_indices)
        for requested, used in zip(batch.sample_indices, batch.used, strict=True):
            count = self._count_of(requested)
            count.requested += 1
            if requested == used:
                count.seen += 1
                count.repeated += requested.repeat > 0
            else:
                count.replaced += 1
                self.num_replaced += 1
                self._count_of(used).used_as_replacement += 1

        for failure in batch.failures:
            sample_index = failure.sample_index
            # a replacement that fails in turn was not requested, so it is not one more corrupt visit
            if not failure.is_replacement:
                self._count_of(sample_index).corrupt[failure.reason] += 1
            # the counts go on past the limit; only the names are bounded, or a bad source would fill the checkpoint
            if len(self.failures) < MAX_FAILURES:
                record = {
                    "key": failure.key,
                    "offset": failure.offset,
                    "reason": failure.reason,
                    "detail": failure.detail,
                }
                self.failures.setdefault((sample_index.shard, sample_index.number), record)

    def add_skipped(self, visits: Iterable[SampleIndex]) -> None:
        """Add visits that training leaves out."""
        for visit in visits:
            count = self._count_of(visit)
            count.requested += 1
            count.skipped += 1
            self.num_requested += 1

    def by_shard(self) -> Epoch:
        """All epochs together, by shard."""
        return _summed((self.closed, *self.epochs.values()))

    def close(self, epoch: int, shards: Collection[int]) -> Epoch:
        """End an epoch of some shards; its counts, of which from now on only the sum is kept."""
        counts = self.epochs.get(epoch, {})
        ended: Epoch = {}
        # the sources of a mixture end their epochs at different positions, so an epoch is closed source by source
        for shard in list(counts):
            if shard not in shards:
                continue
            ended[shard] = counts.pop(shard)
            # only sums from here on: memory must not grow with the epochs of a long run
            self.closed.setdefault(shard, ShardCount()).add(ended[shard])
        if not counts:
            self.epochs.pop(epoch, None)
        return ended

    def merged(self, others: Iterable["Ledger"]) -> "Ledger":
        """The sum of this ledger and those of other processes."""
        parts: dict[int, list[Epoch]] = {}
        closed: list[Epoch] = []
        failures: dict[tuple[int, int], dict[str, Any]] = {}
        merged = Ledger()
        for ledger in (self, *others):
            for number, epoch in ledger.epochs.items():
                parts.setdefault(number, []).append(epoch)
            closed.append(ledger.closed)
            failures.update(ledger.failures)
            merged.num_requested += ledger.num_requested
            merged.num_replaced += ledger.num_replaced
        # sorted, so that a checkpoint does not depend on which process saw an epoch first
        for number in sorted(parts):
            merged.epochs[number] = _summed(parts[number])
        merged.closed = _summed(closed)
        merged.failures = dict(sorted(failures.items())[:MAX_FAILURES])
        return merged

    def to_values(self) -> dict[str, Any]:
        """Plain values, read back by `from_values`."""
        # under the names of earlier versions, whose checkpoints must stay readable
        return {
            "epochs": {str(number): _values(epoch) for number, epoch in sorted(self.epochs.items())},
            "closed": _values(self.closed),
            "num_asked": self.num_requested,
            "num_replaced": self.num_replaced,
            "failures": [[*position, failure] for position, failure in sorted(self.failures.items())],
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Ledger":
        """From the values of `to_values`."""
        return cls(
            epochs={int(number): _counts(epoch) for number, epoch in values["epochs"].items()},
            closed=_counts(values["closed"]),
            num_requested=values["num_asked"],
            num_replaced=values["num_replaced"],
            failures={(shard, number): failure for shard, number, failure in values["failures"]},
        )

    def _count_of(self, sample_index: SampleIndex) -> ShardCount:
        return self.epochs.setdefault(sample_index.epoch, {}).setdefault(sample_index.shard, ShardCount())


def sum_counts(epoch: Epoch) -> ShardCount:
    """All shards together."""
    whole = ShardCount()
    for count in epoch.values():
        whole.add(count)
    return whole


def _summed(epochs: Iterable[Epoch]) -> Epoch:
    whole: Epoch = {}
    for epoch in epochs:
        for shard, count in epoch.items():
            whole.setdefault(shard, ShardCount()).add(count)
    return dict(sorted(whole.items()))


def _values(epoch: Epoch) -> dict[str, Any]:
    return {str(shard): count.to_values() for shard, count in sorted(epoch.items())}


def _counts(values: dict[str, Any]) -> Epoch:
    return {int(shard): ShardCount.from_values(count) for shard, count in values.items()}
