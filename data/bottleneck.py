"""From the measurements to a sentence: which stage holds a run back, and what helps. No clock, no files."""

from collections.abc import Callable
from dataclasses import dataclass

from vlm.data.profiling import PARTS, Diagnosis, LoaderRate, StageName

_ENOUGH = 1.05
_AS_GOOD = 0.95
_GAIN = 1.1
_FINE_SHRINK = 1.5
_QUIET = 0.15


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which stage is the slowest with the number of workers advised.

    slowest: of preparing, the part that takes the most time. rate: samples a second of the whole chain.
    sentences: why, what to do, and how many workers, for people.
    """

    slowest: StageName
    rate: float
    workers: int
    sentences: tuple[str, ...]


def judge(diagnosis: Diagnosis) -> Verdict:
    """Name the slowest stage of the chain and its remedy.

    The chain is the loader with the fewest workers that keep the model busy (or, if none do, or without a model, the
    fewest that come within 5% of the fastest), the copy to the device, and the model. Where the model runs on the
    workers' own cores, the two take turns: the slower of them is named, and the chain's rate is that of both.
    """
    model = _model(diagnosis)
    best = _advised(diagnosis, model[1] if model else None)
    limits: dict[StageName, float] = {_slowest_supply(diagnosis, best.workers): best.rate}
    if model:
        limits[model[0]] = model[1]
    if (copy := diagnosis.rate("copy to device")) is not None:
        limits["copy to device"] = copy
    slowest = min(limits, key=lambda name: limits[name])
    rate = limits[slowest]
    if model and diagnosis.shares_cores:
        rate = 1 / (1 / model[1] + 1 / best.rate)
    sentences = [_comparison(diagnosis, best, slowest, model), _REMEDIES[slowest](diagnosis), _workers(diagnosis, best)]
    if model and diagnosis.shares_cores:
        sentences.append(
            f"There is no accelerator, so the model and the workers share the {_cores(diagnosis)}: expect about "
            f"{_rate(rate)}."
        )
    if diagnosis.busy_cores > _QUIET * diagnosis.cores:
        sentences.append(
            f"Other work kept {diagnosis.busy_cores:.1f} of the {_cores(diagnosis)} busy, so the figures are too low: "
            "repeat this when the machine is quiet."
        )
    return Verdict(slowest=slowest, rate=rate, workers=best.workers, sentences=tuple(sentences))


def _model(diagnosis: Diagnosis) -> tuple[StageName, float] | None:
    names: tuple[StageName, ...] = ("model, forward and backward", "model, forward")
    return next(((name, rate) for name in names if (rate := diagnosis.rate(name)) is not None), None)


def _advised(diagnosis: Diagnosis, wanted: float | None) -> LoaderRate:
    by_workers = sorted(diagnosis.loader, key=lambda tried: tried.workers)
    if not diagnosis.shares_cores and by_workers[-1].workers:
        by_workers = [tried for tried in by_workers if tried.workers]  # without one the accelerator would wait
    fastest = max(tried.rate for tried in by_workers)
    enough = min(wanted * _ENOUGH, fastest * _AS_GOOD) if wanted else fastest * _AS_GOOD
    return next(tried for tried in by_workers if tried.rate >= enough)


def _slowest_supply(diagnosis: Diagnosis, workers: int) -> StageName:
    """What holds the loader back: the disk, or what takes a process most of its time."""
    processes = max(workers, 1)
    limits: dict[StageName, float] = {}
    if (at_random := diagnosis.rate("disk, at random")) is not None:
        limits["disk, at random"] = at_random * processes
    if (in_order := diagnosis.rate("disk, in order")) is not None:
        limits["disk, in order"] = in_order
    times = _times(diagnosis, workers)
    longest = max(times, key=lambda name: times[name])
    limits[longest] = min(processes, diagnosis.cores) / sum(times.values())
    return min(limits, key=lambda name: limits[name])


def _times(diagnosis: Diagnosis, workers: int) -> dict[StageName, float]:
    """Seconds a sample of what one process does in turn; without workers nothing is handed over."""
    names: tuple[StageName, ...] = (*PARTS, "hand-over") if workers else PARTS
    return {name: 1 / rate for name in names if (rate := diagnosis.rate(name)) is not None}


def _comparison(
    diagnosis: Diagnosis, best: LoaderRate, slowest: StageName, model: tuple[StageName, float] | None
) -> str:
    loader = f"The loader gives {_rate(best.rate)} with {_count(best.workers, 'worker')}"
    if model is None:
        times = _times(diagnosis, best.workers)
        share = f": {times[slowest] / sum(times.values()):.0%} of a process's time" if slowest in times else ""
        return f"{loader}; {slowest} holds it back{share}. Give MODEL to see whether that is enough for one."
    verdict = "the model is the limit" if slowest == model[0] else f"{slowest} is the limit"
    return f"{loader}, the model takes {_rate(model[1])} ({model[0].partition(', ')[2]}): {verdict}."


def _workers(diagnosis: Diagnosis, best: LoaderRate) -> str:
    by_workers = {tried.workers: tried.rate for tried in diagnosis.loader}
    fastest = max(by_workers, key=lambda workers: by_workers[workers])
    advice = f"Take {_count(best.workers, 'worker')}"
    if best.workers > 1 and 1 in by_workers:
        advice += f", which give {best.rate / by_workers[1]:.1f}× one"
    if best.workers == fastest and fastest == max(by_workers) and 0 < fastest < diagnosis.cores:
        return f"{advice}; you have {_cores(diagnosis)}: try more."
    if by_workers[fastest] > best.rate * _GAIN:
        return f"{advice}; {fastest} would give {_rate(by_workers[fastest])}, which nothing here can use."
    if best.workers < max(by_workers):
        return f"{advice}; more bring nothing (you have {_cores(diagnosis)})."
    return f"{advice} (you have {_cores(diagnosis)})."


def _decode(diagnosis: Diagnosis) -> str:
    decode, lossy = _of(diagnosis, "decode"), diagnosis.picture_format in ("JPEG", "MPO")
    if not lossy:
        return (
            f"{diagnosis.picture_format} decodes at {decode} a core, and cannot be decoded at a reduced scale: store "
            "the pictures as JPEG (quality 90 or more) before packing."
        )
    if diagnosis.shrink > _FINE_SHRINK:
        return (
            f"The pictures are {diagnosis.shrink:.1f} times as large as the {diagnosis.size} px that are used (decoded "
            f"at {decode} a core): shrink them to a shorter side of {round(diagnosis.size * 1.15)} px before packing."
        )
    return f"Decoding gives {decode} a core, and the pictures are small already: take more cores, or a smaller size."


def _model_remedy(diagnosis: Diagnosis) -> str:
    cures = ["--precision bf16"] if diagnosis.precision == "fp32" else []
    cures += ["a smaller model", "smaller pictures"]
    cures += ["an accelerator"] if diagnosis.shares_cores else []
    return f"Only the model can become faster: {', '.join(cures[:-1])} or {cures[-1]}."


_REMEDIES: dict[StageName, Callable[[Diagnosis], str]] = {
    "disk, in order": lambda d: (
        f"The disk gives no more than {_of(d, 'disk, in order')}: copy the shards to a faster, local disk."
    ),
    "disk, at random": lambda d: (
        f"The disk gives each process {_of(d, 'disk, at random')} at random and {_of(d, 'disk, in order')} in order: "
        "copy the shards to a local disk, or take more workers, so that more reads are under way."
    ),
    "read": lambda d: (
        f"Reading from memory and parsing gives {_of(d, 'read')} a core: leave out metadata that nobody uses."
    ),
    "decode": _decode,
    "view": lambda d: (
        f"Cropping and resizing to {d.size} px give {_of(d, 'view')} a core: take a smaller size, or more cores."
    ),
    "tokenize": lambda d: (
        f"The tokenizer gives {_of(d, 'tokenize')} a core: take a SentencePiece model (vlm tokenizer train), or a "
        "shorter context."
    ),
    "stack": lambda d: (
        f"Stacking views into batches gives {_of(d, 'stack')} a core, the speed of fresh memory: take a smaller size."
    ),
    "hand-over": lambda d: (
        f"A worker hands over {_of(d, 'hand-over')}, the speed of fresh shared memory: take more workers, or a "
        "smaller size; /dev/shm must lie in memory."
    ),
    "copy to device": lambda d: (
        f"The way to the device carries {_of(d, 'copy to device')}: take a smaller size, or a wider bus."
    ),
    "model, forward": _model_remedy,
    "model, forward and backward": _model_remedy,
}


def _of(diagnosis: Diagnosis, name: StageName) -> str:
    rate = diagnosis.rate(name)
    return "an unknown rate" if rate is None else _rate(rate)


def _rate(rate: float) -> str:
    return f"{rate:,.0f} samples/s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cores(diagnosis: Diagnosis) -> str:
    return _count(diagnosis.cores, "core")
