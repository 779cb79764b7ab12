"""Planted trouble: what is skipped, where the run goes back to, that kills change nothing."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.train.checkpoint.small_state import small_state, step
from vlm.data.sample_ledger import Ledger
from vlm.errors import VlmError
from vlm.train.checkpoint.checkpoint_files import CheckpointInfo, list_checkpoints, state_tensors
from vlm.train.checkpoint.manager import CheckpointSchedule, CheckpointWriter, restore_newest
from vlm.train.recovery import (
    MAX_SKIPPED_STEPS_KEPT,
    SkippedStep,
    choose_rollback_target,
    record_skipped_step,
    roll_back,
    should_roll_back,
    skip_reason,
    skipped_sample_blocks,
)
from vlm.train.run_config import SafetyConfig

BATCH = 6
SAFETY = SafetyConfig(checkpoint_every=3, skip_limit=3, rewind_limit=2, keep_checkpoints=2)


class Killed(Exception):
    """Stands for SIGKILL: nothing is finished."""


@dataclass
class Run:
    """A run over positions: each batch is drawn from its first one; those in `bad` have a loss that is not finite."""

    folder: Path
    bad: frozenset[int]
    steps: int = 20
    safety: SafetyConfig = SAFETY

    def go(self, *, kill_after: int = 0, signal_at: frozenset[int] = frozenset()):
        state = small_state()
        state.step = state.position = 0
        schedule, work = CheckpointSchedule(every=self.safety.checkpoint_every), 0
        restore_newest(self.folder, state)
        writer = CheckpointWriter(self.folder, keep=self.safety.keep_checkpoints)
        while state.step < self.steps:
            self.step(state)
            work += 1
            if work == kill_after:
                writer.wait()
                raise Killed
            if should_roll_back(state, self.safety):
                skipped_range = roll_back(state, writer, self.folder)
                state.ledger.num_requested += sum(map(len, skipped_sample_blocks(skipped_range, list)))
                continue
            regular = schedule.is_scheduled(state.step) and not state.spike_guard.in_a_row
            if regular or state.step in signal_at:
                writer.save(state, ledger=state.ledger, is_scheduled=regular)
        writer.close()
        return state

    def step(self, state):
        first, loss = state.position, math.nan
        if first in self.bad:
            state.step, state.position = state.step + 1, first + BATCH
        else:
            draws = torch.Generator().manual_seed(first)
            loss = step(state, torch.randn(BATCH, 4, generator=draws))
        state.ledger.num_requested += BATCH
        reason = skip_reason({"clip": loss}, 1.0, state.spike_guard.losses)
        if reason:
            told = SkippedStep(
                step=state.step, position=first, reason=reason, first_key=f"k{first}", learning_rate=1e-2
            )
            record_skipped_step(state, told)
        else:
            state.spike_guard.accept(loss)


def outcome(state):
    tensors = {f"{file}:{name}": t for file, held in state_tensors(state).items() for name, t in held.items()}
    return {name: tensor.tolist() for name, tensor in tensors.items()}, state.to_values(), state.ledger.to_values()


def places(*batches):
    return frozenset(BATCH * number for number in batches)


def test_single_bad_batches_are_skipped_and_named(folder):
    state = Run(folder, places(4, 5, 11)).go()
    assert [(entry["step"], entry["position"], entry["first_key"]) for entry in state.skipped] == [
        (5, 24, "k24"),
        (6, 30, "k30"),
        (12, 66, "k66"),
    ]
    assert state.num_rollbacks == 0
    assert len(state.spike_guard.losses) == 17
    assert state.position == state.ledger.num_requested == 20 * BATCH


def test_lasting_trouble_goes_back_and_passes_over_its_samples(folder, caplog):
    state = Run(folder, places(7, 8, 9, 10)).go()
    (skipped_range, *rest) = state.skipped
    assert skipped_range == {"from_step": 10, "to_step": 6, "first": 36, "last": 60, "reason": "the loss clip is nan"}
    assert [entry["position"] for entry in rest] == [60]
    assert state.num_rollbacks == 1
    assert state.step == 20
    assert state.position == state.ledger.num_requested == (20 + 4) * BATCH
    said = caplog.text
    assert "Rolled back from step 10 to 6 (rollback 1): the loss clip is nan" in said
    assert "Passing over 24 samples, positions 36 to 59" in said


def test_trouble_that_comes_back_at_once_goes_back_one_checkpoint_further(folder):
    state = Run(folder, places(7, 8, 9, 10, 11, 12)).go()
    jumps = [(entry["to_step"], entry["first"], entry["last"]) for entry in state.skipped if "to_step" in entry]
    assert jumps == [(3, 18, 13 * BATCH)]
    assert state.num_rollbacks == 2
    assert state.position == state.ledger.num_requested


def test_after_the_last_rewind_the_run_ends_saying_everything(folder):
    with pytest.raises(VlmError) as caught:
        Run(folder, places(*range(7, 40))).go()
    told = str(caught.value)
    for part in ("3 steps in a row", "rolled back 2 times", "step 6: the loss clip is nan, from 'k90'", "was 0.01"):
        assert part in told
    assert "--learning-rate" in told
    assert "--resume" in told


def test_without_a_checkpoint_from_before_the_trouble_the_run_ends(folder):
    with pytest.raises(VlmError, match=r"no undamaged checkpoint in .* is older than that"):
        Run(folder, places(1, 2, 3)).go()


@pytest.mark.parametrize("bad", [(7, 8, 9, 10), (7, 8, 9, 10, 11, 12), (6, 7, 8), (4, 8, 9, 10, 15)])
def test_kills_and_signals_in_the_midst_of_trouble_change_nothing(bad, tmp_path, folder):
    want = outcome(Run(folder, places(*bad)).go())
    for number in range(1, 25, 2):
        run = Run(tmp_path / f"killed-{number}", places(*bad))
        run.folder.mkdir()
        killed = 0
        for kill_after in (number, 2, 3):
            try:
                run.go(kill_after=kill_after, signal_at=frozenset({8, 9}))
            except Killed:
                killed += 1
        got = outcome(run.go())
        assert killed
        assert got == want, number


def test_a_damaged_target_gives_way_to_the_one_before(folder, caplog):
    run = Run(folder, places(8, 9, 10, 11))
    with pytest.raises(Killed):
        run.go(kill_after=8)
    state = small_state()
    restore_newest(folder, state)
    while not should_roll_back(state, SAFETY):
        run.step(state)
    newest = list_checkpoints(folder)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"")
    skipped_range = roll_back(state, CheckpointWriter(folder, keep=2), folder)
    assert (newest.name, skipped_range.to_step) == ("step-00000006", 3)
    assert "step-00000006 is damaged" in caplog.text
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003"]


def test_a_rewind_prefers_what_was_due_by_its_step():
    found = [
        CheckpointInfo(step=step, is_scheduled=regular, is_good=good)
        for step, regular, good in ((10, True, True), (15, False, True), (20, True, False), (30, True, True))
    ]
    assert choose_rollback_target(found, instability_start=25, last_target=None) == found[0]
    assert choose_rollback_target(found[1:2], instability_start=25, last_target=None) == found[1]
    assert choose_rollback_target(found[1:2], instability_start=25, last_target=15) == found[1]
    assert choose_rollback_target(found, instability_start=9, last_target=None) is None


def test_the_list_of_skips_is_bounded_and_ranges_stay():
    state = small_state()
    state.skipped.append({"to_step": 1, "first": 0, "last": 6})
    for number in range(MAX_SKIPPED_STEPS_KEPT + 5):
        record_skipped_step(state, SkippedStep(step=number, position=0, reason="r", first_key="k", learning_rate=0.1))
    assert len(state.skipped) == MAX_SKIPPED_STEPS_KEPT + 1
    assert state.skipped[0]["to_step"] == 1
    assert state.skipped[1]["step"] == 5


def test_the_ledger_travels_with_the_main_process_alone(folder):
    state = small_state()
    with CheckpointWriter(folder, keep=2) as writer:
        writer.save(state, ledger=Ledger(num_requested=6), is_scheduled=True)
    restore_newest(folder, state, is_main=False)
    assert state.ledger == Ledger()
