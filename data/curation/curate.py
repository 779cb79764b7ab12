"""Rules in their order over shards, and the selection that comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.curation.columns import SIGNALS, Columns
from vlm.data.curation.facts import Facts, Need
from vlm.data.curation.rule import AskedRule, Situation, Verdict
from vlm.data.curation.scan import scan
from vlm.data.selection import MAX_TIMES, SelectedShard, Selection, round_times
from vlm.errors import UsageError
from vlm.files import fingerprint_of


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rule as it went.

    before, kept: distinct samples; visits: of an epoch; is_left_before (bool [N]), times (uint16 [N]): of each sample.
    """

    asked: AskedRule
    verdict: Verdict
    before: int
    kept: int
    visits: int
    is_left_before: np.ndarray
    times: np.ndarray

    @property
    def dropped(self) -> int:
        """Samples it dropped."""
        return self.before - self.kept

    def described(self) -> dict[str, Any]:
        """For the lineage, as plain JSON."""
        counts = {"before": self.before, "kept": self.kept, "visits": self.visits}
        if self.asked.rule.signal:
            counts["without_value"] = self.verdict.without_value
        return {"step": "rule", **self.asked.described(), **counts, **self.verdict.record}


@dataclass(frozen=True, kw_only=True)
class Curated:
    """A selection with how it came about. corrupt: samples that cannot be used, by reason."""

    selection: Selection
    steps: tuple[Step, ...]
    facts: Facts
    corrupt: dict[str, int]


def curate(
    shards: Sequence[str],
    rules: Sequence[AskedRule],
    *,
    columns: Columns | None = None,
    seed: int = 0,
    workers: int = 1,
    allow_damage: bool = False,
) -> Curated:
    """Apply the rules in their order, each on what the earlier ones left; the times a sample gets multiply.

    A sample found unusable, as far as the rules made the scan look, is left out before the first rule. A fractional
    expectation is drawn from (seed, place of the rule, its name), so the result depends on nothing else.

    Raises:
        UsageError: a rule asks for a stored column that is not given.
    """
    given = columns or Columns()
    for asked in rules:
        _refuse_missing(asked, given)

    def look(addresses: Sequence[str], needs: frozenset[Need]) -> Facts:
        return scan(addresses, needs, workers=workers, allow_damage=allow_damage)

    facts = look(shards, frozenset().union(*(asked.rule.needs for asked in rules)))
    times = facts.is_usable.astype(np.uint16)
    steps: list[Step] = []
    for number, asked in enumerate(rules):
        rng = np.random.default_rng(int(fingerprint_of(f"{seed}/{number}/{asked.name}"), 16))
        is_left = times > 0
        situation = Situation(facts=facts, is_left=is_left, columns=given, rng=rng, scan=look)
        verdict = asked.rule.weigh(situation, asked.parameters)
        drawn = round_times(verdict.weights, rng)
        times = np.minimum(times.astype(np.int64) * drawn, MAX_TIMES).astype(np.uint16)
        steps.append(_step(asked, verdict, is_left, times))
    corrupt = _corrupt(facts)
    begin = {"step": "curate", "seed": seed, "samples": len(facts), "corrupt": corrupt}
    lineage = (begin, *(step.described() for step in steps))
    return Curated(selection=_selection(facts, times, lineage), steps=tuple(steps), facts=facts, corrupt=corrupt)


def _step(asked: AskedRule, verdict: Verdict, is_left: np.ndarray, times: np.ndarray) -> Step:
    return Step(
        asked=asked,
        verdict=verdict,
        before=int(is_left.sum()),
        kept=int(np.count_nonzero(times)),
        visits=int(times.sum(dtype=np.int64)),
        is_left_before=is_left,
        times=times,
    )


def _refuse_missing(asked: AskedRule, columns: Columns) -> None:
    signal = asked.rule.signal
    if signal and signal not in columns:
        raise UsageError(
            f"--rule {asked.name} reads the stored column {signal!r} ({SIGNALS[signal][1]}), which no --columns FILE "
            "holds; make it by vlm signals EMBEDDINGS …"
        )


def _corrupt(facts: Facts) -> dict[str, int]:
    counted = facts.table.column("reason").value_counts().to_pylist()
    return {each["values"]: each["counts"] for each in counted if each["values"]}


def _selection(facts: Facts, times: np.ndarray, lineage: tuple[dict[str, Any], ...]) -> Selection:
    shards = tuple(
        SelectedShard(name=shard.address.rpartition("/")[2], fingerprint=shard.fingerprint, samples=shard.samples)
        for shard in facts.shards
    )
    return Selection(shards=shards, times=tuple(np.split(times, facts.starts[1:-1])), lineage=lineage)
