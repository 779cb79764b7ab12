import math
import random
import statistics

import pytest
import torch
from torch import nn

from vlm.train.recovery import (
    copy_running_stats,
    restore_running_stats,
    skip_reason,
    spike_threshold,
)
from vlm.train.state import LOSS_HISTORY_LENGTH, LossSpikeGuard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_and_named(bad):
    assert skip_reason({"clip": 1.0, "caption": bad}, 1.0, []) == f"the loss caption is {bad}"
    assert skip_reason({"clip": 1.0}, bad, []) == f"the gradient's norm is {bad}"
    assert skip_reason({"clip": 1.0, "caption": 1e9}, 1e9, [1.0] * 100) == ""


def test_a_spike_is_a_loss_above_median_and_deviations():
    chance = random.Random(0)
    losses = [chance.gauss(5, 0.1) for _ in range(LOSS_HISTORY_LENGTH)]
    middle = statistics.median(losses)
    deviation = 1.4826 * statistics.median([abs(loss - middle) for loss in losses])
    limit = middle + 6 * deviation
    assert spike_threshold(losses, 6.0)[0] == pytest.approx(limit)
    assert skip_reason({"clip": limit + 1e-9}, 1.0, losses, spike_factor=6.0).startswith("the loss ")
    assert skip_reason({"clip": limit}, 1.0, losses, spike_factor=6.0) == ""
    assert skip_reason({"clip": limit + 1}, 1.0, losses, spike_factor=0.0) == ""
    assert skip_reason({"clip": -limit}, 1.0, losses, spike_factor=6.0) == ""
    assert 0.08 < deviation < 0.12


def test_a_few_outliers_do_not_hide_a_spike():
    losses = [5 + 0.01 * (number % 7) for number in range(90)] + [500.0] * 10
    assert skip_reason({"clip": 6.0}, 1.0, losses, spike_factor=6.0)


def test_twenty_losses_are_needed_and_equal_ones_leave_some_room():
    assert skip_reason({"clip": 100.0}, 1.0, [1.0] * 19, spike_factor=6.0) == ""
    assert skip_reason({"clip": 100.0}, 1.0, [1.0] * 20, spike_factor=6.0)
    assert skip_reason({"clip": 1.005}, 1.0, [1.0] * 20, spike_factor=6.0) == ""


def test_the_guard_keeps_the_last_good_losses_and_counts_skips_in_a_row():
    spike_guard = LossSpikeGuard()
    for number in range(250):
        spike_guard.accept(float(number))
    assert spike_guard.losses == [float(number) for number in range(150, 250)]
    spike_guard.reject()
    spike_guard.reject()
    assert spike_guard.in_a_row == 2
    assert len(spike_guard.losses) == LOSS_HISTORY_LENGTH
    spike_guard.accept(1.0)
    assert spike_guard.in_a_row == 0


def test_running_statistics_are_put_back():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3).eval())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    kept = copy_running_stats(module)
    assert len(kept) == 3
    module(torch.full((4, 3), torch.nan))
    assert not torch.equal(module.state_dict()["0.num_batches_tracked"], before["0.num_batches_tracked"])
    restore_running_stats(kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
