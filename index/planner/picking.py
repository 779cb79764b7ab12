"""Which of the trials keep a promise, which of those is taken, and why."""

from collections.abc import Sequence

from vlm.errors import UsageError
from vlm.index.planner.promise import Promise, show_bytes
from vlm.index.planner.trial import Trial

# medians nearer to each other than this are equally quick: a machine's noise is of that size
_AS_QUICK = 1.1


def pick(trials: Sequence[Trial], promise: Promise, *, left_out: dict[str, str]) -> Trial:
    """Of those that keep the promise the least median latency; of those within 10% of it the least memory.

    Raises:
        UsageError: none keeps it; the message names the one that comes nearest and what it has.
    """
    keeping = [trial for trial in trials if not trial.misses]
    if keeping:
        quickest = min(trial.latency.p50_ms for trial in keeping)
        as_quick = [trial for trial in keeping if trial.latency.p50_ms <= quickest * _AS_QUICK]
        return min(as_quick, key=lambda trial: (trial.resident_bytes, trial.latency.p50_ms))
    reasons = "; ".join(f"{kind}: {why}" for kind, why in left_out.items())
    if not trials:
        raise UsageError(f"No kind of index can promise {promise.in_words()}. {reasons}.")
    nearest = min(trials, key=lambda trial: _shortfall(trial, promise))
    raise UsageError(
        f"No kind of index keeps {promise.in_words()}. The nearest is {nearest.label}, with recall@{promise.at} "
        f"{promised_recall(nearest, promise):.4f}, {nearest.latency.p95_ms:.3g} ms (p95) and "
        f"{show_bytes(nearest.resident_bytes)}: it misses {' and '.join(nearest.misses)}. Promise what it has, or less."
        + (f" Not tried: {reasons}." if reasons else "")
    )


def reason(best: Trial, trials: Sequence[Trial], promise: Promise) -> str:
    """Why it was taken, in one sentence."""
    keeping = [trial for trial in trials if not trial.misses]
    has = (
        f"recall@{promise.at} {promised_recall(best, promise):.4f} (≥ {best.bound:.4f} with 95% confidence), "
        f"{best.latency.p95_ms:.3g} ms (p95), {show_bytes(best.resident_bytes)}"
    )
    others = [trial for trial in keeping if trial is not best]
    if not others:
        return f"{best.label} is the only kind of {len(trials)} tried that keeps {promise.in_words()}: {has}."
    quickest = min(keeping, key=lambda trial: trial.latency.p50_ms)
    if quickest is best:
        ground = f"is the quickest of {len(keeping)} kinds that keep {promise.in_words()}"
    else:
        ground = f"needs the least memory of those as quick as {quickest.label} that keep {promise.in_words()}"
    return f"{best.label} {ground}: {has}."


def misses_of(trial: Trial, promise: Promise) -> tuple[str, ...]:
    """What the promise asks and the trial does not keep, in words."""
    found = []
    if promised_recall(trial, promise) < promise.recall:
        found.append(f"recall {promise.recall:g}")
    if promise.latency_ms is not None and trial.latency.p95_ms > promise.latency_ms:
        found.append(f"{promise.latency_ms:g} ms")
    if promise.memory_bytes is not None and trial.resident_bytes > promise.memory_bytes:
        found.append(show_bytes(promise.memory_bytes))
    return tuple(found)


def promised_recall(trial: Trial, promise: Promise) -> float:
    """Recall among as many answers as the promise counts, of the questions it is about."""
    return next(iter(trial.recall.values()))[promise.at]


def _shortfall(trial: Trial, promise: Promise) -> float:
    """How far from the promise: the greatest ratio of what it has to what was promised; of recall, the share missed."""
    missed = (1 - promised_recall(trial, promise)) / max(1 - promise.recall, 1e-3)
    latency = trial.latency.p95_ms / promise.latency_ms if promise.latency_ms else 0.0
    memory = trial.resident_bytes / promise.memory_bytes if promise.memory_bytes else 0.0
    return max(missed, latency, memory)
