import numpy as np
import torch

from vlm.data.collate import Incident, TrainingBatch
from vlm.data.ledger import MAX_FAILURES, Ledger, total_of
from vlm.data.sampler import Address


def batch(pairs, incidents=()):
    """A batch from pairs of (asked, used) addresses."""
    return TrainingBatch(
        images=torch.zeros((len(pairs), 3, 1, 1), dtype=torch.uint8),
        tokens=torch.from_numpy(np.zeros((len(pairs), 1), np.int64)),
        keys=("k",) * len(pairs),
        drawn=(),
        addresses=tuple(asked for asked, _ in pairs),
        used=tuple(used for _, used in pairs),
        incidents=tuple(incidents),
    )


def incident(address, reason="cut short", **more):
    return Incident(address=address, key=f"k{address.number}", offset=512, reason=reason, detail="why", **more)


A, B, C = Address(0, 0, 1), Address(0, 0, 2), Address(0, 1, 0)


def test_seen_repeated_replaced_and_stood_in_are_told_apart():
    ledger = Ledger()
    again = Address(0, 0, 1, 1)
    failures = [incident(B), incident(Address(0, 0, 3), "no picture", is_stand_in=True)]
    ledger.count(batch([(A, A), (again, again), (B, C)], failures))
    first, second = ledger.epochs[0][0], ledger.epochs[0][1]
    assert (first.asked, first.seen, first.repeated, first.replaced, first.stood_in) == (3, 2, 1, 1, 0)
    assert dict(first.corrupt) == {"cut short": 1}
    assert (second.asked, second.seen, second.stood_in) == (0, 0, 1)
    assert ledger.failures[(0, 2)] == {"key": "k2", "offset": 512, "reason": "cut short", "detail": "why"}
    assert set(ledger.failures) == {(0, 2), (0, 3)}
    assert (ledger.num_asked, ledger.num_replaced) == (3, 1)


def test_ledgers_of_processes_add_up_and_survive_as_plain_values():
    one, other, whole = Ledger(), Ledger(), Ledger()
    for ledger, pairs in ((one, [(A, A), (B, C)]), (other, [(C, C), (Address(1, 0, 1), Address(1, 0, 1))])):
        ledger.count(batch(pairs, [incident(B)] if ledger is one else []))
    whole.count(batch([(A, A), (B, C), (C, C), (Address(1, 0, 1), Address(1, 0, 1))], [incident(B)]))
    merged = one.merged([other])
    assert merged.to_values() == whole.to_values()
    assert Ledger.from_values(merged.to_values()).to_values() == whole.to_values()


def test_a_closed_epoch_is_kept_in_sum():
    ledger = Ledger()
    later = Address(1, 0, 1)
    ledger.count(batch([(A, A), (C, C), (later, later)]))
    ended = ledger.close(0, range(1))
    assert {shard: count.seen for shard, count in ended.items()} == {0: 1}
    assert sorted(ledger.epochs) == [0, 1]
    assert total_of(ledger.by_shard()).seen == 3
    ledger.close(0, range(2))
    assert sorted(ledger.epochs) == [1]


def test_failures_are_named_once_and_no_more_than_so_many():
    ledger = Ledger()
    bad = [Address(0, 0, number) for number in range(MAX_FAILURES + 5)]
    for _ in range(2):
        ledger.count(batch([(address, A) for address in bad], [incident(address) for address in bad]))
    assert len(ledger.failures) == MAX_FAILURES
    assert ledger.epochs[0][0].corrupt["cut short"] == 2 * len(bad)
