"""What became of the samples, shard by shard: nothing is lost without a word."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vlm.data.batches import TrainingBatch

MAX_EXAMPLES = 50


@dataclass
class Ledger:
    """Visits and unusable samples by shard number, summed over the batches given to `count`."""

    visits: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    bad: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    examples: list[dict[str, Any]] = field(default_factory=list)

    def count(self, batch: TrainingBatch) -> None:
        """Add one batch."""
        for address in batch.addresses:
            self.visits[address.shard] += 1
        for incident in batch.incidents:
            self.bad[incident.address.shard] += 1
            if len(self.examples) < MAX_EXAMPLES:
                place = {"shard": incident.address.shard, "number": incident.address.number}
                self.examples.append(place | {"reason": incident.reason, "detail": incident.detail})

    @property
    def num_visits(self) -> int:
        """Samples asked for."""
        return sum(self.visits.values())

    @property
    def num_bad(self) -> int:
        """Samples that could not be used."""
        return sum(self.bad.values())

    def merged(self, others: Iterable["Ledger"]) -> "Ledger":
        """The sum of this ledger and those of other processes."""
        total = Ledger.from_values(self.to_values())
        for other in others:
            for shard, number in other.visits.items():
                total.visits[shard] += number
            for shard, number in other.bad.items():
                total.bad[shard] += number
            total.examples = (total.examples + other.examples)[:MAX_EXAMPLES]
        return total

    def to_values(self) -> dict[str, Any]:
        """Plain values, read back by `from_values`."""
        return {
            "visits": {str(shard): number for shard, number in sorted(self.visits.items())},
            "bad": {str(shard): number for shard, number in sorted(self.bad.items())},
            "examples": list(self.examples),
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Ledger":
        """From the values of `to_values`."""
        ledger = cls(examples=list(values["examples"]))
        ledger.visits.update({int(shard): number for shard, number in values["visits"].items()})
        ledger.bad.update({int(shard): number for shard, number in values["bad"].items()})
        return ledger
