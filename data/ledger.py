"""What became of the samples, by epoch and shard: nothing is lost without a word, nothing counted twice."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from vlm.data.collate import TrainingBatch
from vlm.data.sampler import SampleIndex

MAX_FAILURES = 1000


@dataclass
class ShardCount:
    """Visits of the samples of one shard.

    asked: visits the order asked for. seen: those that showed the sample asked for, of which `repeated` showed one that
    its epoch had shown already, as its selection wants. replaced: those whose sample cannot be used, so that another
    stood in. passed_over: those that training left out because the run went back from steps that could not be used;
    asked = seen + replaced + passed_over. corrupt: replaced by reason. stood_in: visits of this shard's samples in
    place of others; over all shards as many as `replaced`.
    """

    asked: int = 0
    seen: int = 0
    repeated: int = 0
    replaced: int = 0
    stood_in: int = 0
    passed_over: int = 0
    corrupt: Counter[str] = field(default_factory=Counter)

    def add(self, other: "ShardCount") -> None:
        """Add the visits of another count."""
        for name in ("asked", "seen", "repeated", "replaced", "stood_in", "passed_over"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.corrupt.update(other.corrupt)

    def to_values(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"corrupt": dict(sorted(self.corrupt.items()))}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "ShardCount":
        """From the values of `to_values`."""
        reasons: dict[str, int] = values["corrupt"]
        numbers: dict[str, Any] = {name: value for name, value in values.items() if name != "corrupt"}
        return cls(**numbers, corrupt=Counter(reasons))


Epoch = dict[int, ShardCount]
"""Counts by shard number."""


@dataclass
class Ledger:
    """Visits by epoch and shard, summed over the batches given to `count`; epochs that are over move into `closed`.

    failures: the samples that cannot be used, each once, by shard and number, no more than MAX_FAILURES of them.
    num_asked, num_replaced: over all shards and epochs.
    """

    epochs: dict[int, Epoch] = field(default_factory=dict)
    closed: Epoch = field(default_factory=dict)
    failures: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    num_requested: int = 0
    num_replaced: int = 0

    def count(self, batch: TrainingBatch) -> None:
        """Add one batch."""
        self.num_requested += len(batch.sample_indices)
        for asked, used in zip(batch.sample_indices, batch.used, strict=True):
            count = self._of(asked.epoch, asked.shard)
            count.asked += 1
            if asked == used:
                count.seen += 1
                count.repeated += asked.repeat > 0
            else:
                count.replaced += 1
                self.num_replaced += 1
                self._of(used.epoch, used.shard).stood_in += 1
        for incident in batch.incidents:
            place = incident.sample_index
            if not incident.is_replacement:
                self._of(place.epoch, place.shard).corrupt[incident.reason] += 1
            if len(self.failures) < MAX_FAILURES:
                failure = {"key": incident.key, "offset": incident.offset, "reason": incident.reason}
                self.failures.setdefault((place.shard, place.number), failure | {"detail": incident.detail})

    def add_skipped(self, visits: Iterable[SampleIndex]) -> None:
        """Add visits that training leaves out."""
        for visit in visits:
            count = self._of(visit.epoch, visit.shard)
            count.asked += 1
            count.passed_over += 1
            self.num_requested += 1

    def by_shard(self) -> Epoch:
        """All epochs together, by shard."""
        return _summed((self.closed, *self.epochs.values()))

    def close(self, epoch: int, shards: Collection[int]) -> Epoch:
        """End an epoch of some shards: its counts, which from now on are only kept in sum."""
        ended = {shard: count for shard, count in self.epochs.get(epoch, {}).items() if shard in shards}
        for shard, count in ended.items():
            self.closed.setdefault(shard, ShardCount()).add(count)
            del self.epochs[epoch][shard]
        if not self.epochs.get(epoch):
            self.epochs.pop(epoch, None)
        return ended

    def merged(self, others: Iterable["Ledger"]) -> "Ledger":
        """The sum of this ledger and those of other processes."""
        all_of_them = [self, *others]
        numbers = sorted({number for ledger in all_of_them for number in ledger.epochs})
        whole = Ledger(
            epochs={number: _summed(ledger.epochs.get(number, {}) for ledger in all_of_them) for number in numbers},
            closed=_summed(ledger.closed for ledger in all_of_them),
            num_requested=sum(ledger.num_requested for ledger in all_of_them),
            num_replaced=sum(ledger.num_replaced for ledger in all_of_them),
        )
        failures = {place: failure for ledger in all_of_them for place, failure in ledger.failures.items()}
        whole.failures = dict(sorted(failures.items())[:MAX_FAILURES])
        return whole

    def to_values(self) -> dict[str, Any]:
        """Plain values, read back by `from_values`."""
        return {
            "epochs": {str(number): _values(epoch) for number, epoch in sorted(self.epochs.items())},
            "closed": _values(self.closed),
            "num_asked": self.num_requested,
            "num_replaced": self.num_replaced,
            "failures": [[*place, failure] for place, failure in sorted(self.failures.items())],
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

    def _of(self, epoch: int, shard: int) -> ShardCount:
        return self.epochs.setdefault(epoch, {}).setdefault(shard, ShardCount())


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
