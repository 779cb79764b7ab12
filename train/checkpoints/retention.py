"""Which checkpoints stay: the newest, the best, the one a rewind goes to, and any that is being read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best value of a metric so far, higher being better, and the step it was measured at."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint says of itself.

    is_regular: it was due by its step, so that a run which was interrupted has it too; a rewind goes to such a one.
    is_good: no step just before it was skipped.
    """

    step: int
    is_regular: bool
    is_good: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Facts":
        """From the content of `state.json`."""
        is_good = not values["guard"]["in_a_row"]
        return cls(step=values["step"], is_regular=values["is_regular"], is_good=is_good)


def steps_to_remove(
    found: Sequence[Facts], *, keep: int, best: int | None = None, in_use: Collection[int] = ()
) -> list[int]:
    """The steps whose checkpoints may go, oldest first.

    The newest `keep` stay, the newest `keep` that are good and regular, so that no signal or trouble pushes out what a
    rewind goes to, the newest good one, the best, and those in use.

    >>> found = [Facts(step=step, is_regular=True, is_good=step < 40) for step in (10, 20, 30, 40, 50)]
    >>> steps_to_remove(found, keep=1, best=10)
    [20, 40]
    """
    ordered = sorted(found, key=lambda facts: facts.step)
    good = [facts.step for facts in ordered if facts.is_good]
    regular = [facts.step for facts in ordered if facts.is_good and facts.is_regular]
    kept = {facts.step for facts in ordered[-keep:]} | {*good[-1:], *regular[-keep:], *in_use}
    return [facts.step for facts in ordered if facts.step not in kept and facts.step != best]


def improved(best: Best | None, metric: str, values: Mapping[str, Any], step: int) -> Best | None:
    """The new best where these values beat it, else None.

    Raises:
        UsageError: the metric is not measured.
    """
    if metric not in values:
        measured = ", ".join(name for name, value in values.items() if isinstance(value, float))
        raise UsageError(f"keep_best = {metric!r} is not measured on val; name one of {measured}.")
    value = float(values[metric])
    if best is not None and best.metric == metric and not value > best.value:
        return None
    return Best(metric=metric, value=value, step=step)
