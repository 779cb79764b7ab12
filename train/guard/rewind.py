"""Going back: when skipping does not help, to a checkpoint from before the trouble, and on past its samples.

The trouble is where the weights came to, so passing over only the batches that were skipped would lead there again;
as in PaLM (Chowdhery et al. 2022, §5.1) everything from the checkpoint to the end of the trouble is passed over.
All of it follows from the state and from the checkpoints that are due by step, so a run killed in the midst of trouble
goes the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlm.console import say
from vlm.errors import VlmError
from vlm.train.checkpoints.files import damage_of, facts_of, name_of
from vlm.train.checkpoints.mirror import Mirror
from vlm.train.checkpoints.restore import agreed_path, restore
from vlm.train.checkpoints.retention import Facts
from vlm.train.checkpoints.writer import CheckpointWriter
from vlm.train.config import SafetyConfig
from vlm.train.state import TrainState

MAX_SKIPS_KEPT = 1000
_BLOCK = 1 << 16

Visit = TypeVar("Visit")


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that left the weights as they were. position: of its first sample in the run."""

    step: int
    position: int
    reason: str
    first_key: str
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """The samples at positions [first, last), which the run passes over since it went back from one step to another."""

    from_step: int
    to_step: int
    first: int
    last: int
    reason: str


def note_skip(state: TrainState, skipped: SkippedStep) -> None:
    """Record a skipped step in the state, and say it."""
    state.guard.reject()
    state.skipped.append(asdict(skipped))
    steps = [number for number, entry in enumerate(state.skipped) if "to_step" not in entry]
    if len(steps) > MAX_SKIPS_KEPT:
        del state.skipped[steps[0]]
    say(f"\nstep {skipped.step:,} is skipped: {skipped.reason} (first sample {skipped.first_key!r}).")


def must_go_back(state: TrainState, safety: SafetyConfig) -> bool:
    """Whether skipping has gone on for too long.

    Raises:
        VlmError: and the run has gone back as often as it may.
    """
    if state.guard.in_a_row < safety.skip_limit:
        return False
    if state.rewinds >= safety.rewind_limit:
        raise VlmError(_hopeless(state, f"the run has gone back {state.rewinds} times, the limit"))
    return True


def go_back(
    state: TrainState, writer: CheckpointWriter, folder: Path, *, mirror: Mirror | None = None, is_main: bool = True
) -> PassedOver:
    """Restore the checkpoint to go back to, and put the position past the trouble; all processes call it.

    Afterwards the loader is to be opened again at `state.position` for the steps that are left, and the samples passed
    over are to be counted in the ledger of the main process, which carries on that of all.

    Raises:
        VlmError: there is no checkpoint from before the trouble.
    """
    writer.wait()
    path = agreed_path(lambda: _target(state, folder, mirror), is_main=is_main)
    if path is None:
        raise VlmError(_hopeless(state, f"no undamaged checkpoint in {folder} is older than that"))
    from_step, last = state.step, state.position
    reason, rewinds, seconds = state.skipped[-1]["reason"], state.rewinds, state.elapsed_seconds
    restore(path, state, is_main=is_main)
    passed = PassedOver(from_step=from_step, to_step=state.step, first=state.position, last=last, reason=reason)
    state.skipped.append(asdict(passed))
    state.position, state.rewinds, state.elapsed_seconds = last, rewinds + 1, seconds
    writer.go_back(state.step)
    if is_main:
        say(
            f"\nBack from step {from_step:,} to {state.step:,} (rewind {state.rewinds}): {reason}. Passing over "
            f"{last - passed.first:,} samples, positions {passed.first:,} to {last - 1:,}."
        )
    return passed


def visits_in(passed: PassedOver, locate: Callable[[Sequence[int]], Sequence[Visit]]) -> Iterator[Sequence[Visit]]:
    """The visits that were passed over, in blocks, as `Order.locate` finds them."""
    for start in range(passed.first, passed.last, _BLOCK):
        yield locate(range(start, min(start + _BLOCK, passed.last)))


def choose_target(found: Sequence[Facts], *, trouble_since: int, tried: int | None) -> Facts | None:
    """The checkpoint to go back to.

    It is the newest good one from before the trouble that was due by its step, or, where there is none, any good one.
    If the run went back to just that one the last time, it is the one before it.

    trouble_since: the last step before the trouble. tried: the step last gone back to.

    >>> found = [Facts(step=step, is_regular=True, is_good=True) for step in (10, 20, 30)]
    >>> [choose_target(found, trouble_since=25, tried=tried).step for tried in (None, 20, 10)]
    [20, 10, 20]
    """
    older = sorted((facts for facts in found if facts.is_good and facts.step <= trouble_since), key=lambda f: f.step)
    fitting = [facts for facts in older if facts.is_regular] or older
    if len(fitting) > 1 and fitting[-1].step == tried:
        return fitting[-2]
    return fitting[-1] if fitting else None


def _target(state: TrainState, folder: Path, mirror: Mirror | None) -> Path | None:
    """The folder of the checkpoint to go back to; damaged ones are left out, and one that is only a copy is fetched."""
    own = {name_of(facts.step): facts for facts in facts_of(folder)}
    copied = mirror.facts() if mirror else {}
    found = copied | own
    jumps = [entry["to_step"] for entry in state.skipped if "to_step" in entry]
    while found:
        chosen = choose_target(
            list(found.values()),
            trouble_since=state.step - state.guard.in_a_row,
            tried=jumps[-1] if jumps else None,
        )
        if chosen is None:
            return None
        name = name_of(chosen.step)
        damage = damage_of(folder / name) if name in own else "absent"
        if damage and mirror and name in copied:
            damage = mirror.fetch(name, folder)
        if not damage:
            return folder / name
        say(f"{folder / name} is damaged ({damage}); trying the one before it.")
        del found[name]
    return None


def _hopeless(state: TrainState, why: str) -> str:
    steps: list[dict[str, Any]] = [entry for entry in state.skipped if "to_step" not in entry]
    trouble = steps[-state.guard.in_a_row :]
    told = "; ".join(f"step {entry['step']:,}: {entry['reason']}, from {entry['first_key']!r}" for entry in trouble[:5])
    more = f" and {len(trouble) - 5} more" if len(trouble) > 5 else ""
    return (
        f"{state.guard.in_a_row} steps in a row could not be used ({told}{more}), and {why}. The learning rate was "
        f"{trouble[-1]['learning_rate']:.3g}; the weights are as before these steps. Try a lower --learning-rate, more "
        "--warmup-steps, --precision fp32, or look at these samples with vlm inspect; then go on from a checkpoint "
        "with --resume (and --allow for what you change)."
    )
