import numpy as np
import torch

from vlm.data.collate import TrainingBatch
from vlm.data.sample_ledger import MAX_FAILURES, Ledger, sum_counts
from vlm.data.samples import SampleIndex
from vlm.data.shards import SampleFailure


def batch(pairs, failures=()):
    """A batch from pairs of (asked, used) addresses."""
    return TrainingBatch(
        images=torch.zeros((len(pairs), 3, 1, 1), dtype=torch.uint8),
        tokens=torch.from_numpy(np.zeros((len(pairs), 1), np.int64)),
        keys=("k",) * len(pairs),
        drawn=(),
        sample_indices=tuple(asked for asked, _ in pairs),
        used=tuple(used for _, used in pairs),
        failures=tuple(failures),
    )


def incident(sample_index, reason="cut short", **more):
    return SampleFailure(
        sample_index=sample_index, key=f"k{sample_index.number}", offset=512, reason=reason, detail="why", **more
    )


A, B, C = SampleIndex(0, 0, 1), SampleIndex(0, 0, 2), SampleIndex(0, 1, 0)


def test_seen_repeated_replaced_and_stood_in_are_told_apart():
    ledger = Ledger()
    again = SampleIndex(0, 0, 1, 1)
    failures = [incident(B), incident(SampleIndex(0, 0, 3), "no image", is_replacement=True)]
    ledger.count(batch([(A, A), (again, again), (B, C)], failures))
    first, second = ledger.epochs[0][0], ledger.epochs[0][1]
    assert (first.requested, first.seen, first.repeated, first.replaced, first.used_as_replacement) == (3, 2, 1, 1, 0)
    assert dict(first.corrupt) == {"cut short": 1}
    assert (second.requested, second.seen, second.used_as_replacement) == (0, 0, 1)
    assert ledger.failures[(0, 2)] == {"key": "k2", "offset": 512, "reason": "cut short", "detail": "why"}
    assert set(ledger.failures) == {(0, 2), (0, 3)}
    assert (ledger.num_requested, ledger.num_replaced) == (3, 1)


def test_ledgers_of_processes_add_up_and_survive_as_plain_values():
    one, other, whole = Ledger(), Ledger(), Ledger()
    for ledger, pairs in ((one, [(A, A), (B, C)]), (other, [(C, C), (SampleIndex(1, 0, 1), SampleIndex(1, 0, 1))])):
        ledger.count(batch(pairs, [incident(B)] if ledger is one else []))
    whole.count(batch([(A, A), (B, C), (C, C), (SampleIndex(1, 0, 1), SampleIndex(1, 0, 1))], [incident(B)]))
    merged = one.merged([other])
    assert merged.to_values() == whole.to_values()
    assert Ledger.from_values(merged.to_values()).to_values() == whole.to_values()


def test_a_closed_epoch_is_kept_in_sum():
    ledger = Ledger()
    later = SampleIndex(1, 0, 1)
    ledger.count(batch([(A, A), (C, C), (later, later)]))
    ended = ledger.close(0, range(1))
    assert {shard: count.seen for shard, count in ended.items()} == {0: 1}
    assert sorted(ledger.epochs) == [0, 1]
    assert sum_counts(ledger.by_shard()).seen == 3
    ledger.close(0, range(2))
    assert sorted(ledger.epochs) == [1]


def test_failures_are_named_once_and_no_more_than_so_many():
    ledger = Ledger()
    bad = [SampleIndex(0, 0, number) for number in range(MAX_FAILURES + 5)]
    for _ in range(2):
        ledger.count(
            batch([(sample_index, A) for sample_index in bad], [incident(sample_index) for sample_index in bad])
        )
    assert len(ledger.failures) == MAX_FAILURES
    assert ledger.epochs[0][0].corrupt["cut short"] == 2 * len(bad)
