"""From the measurements to a sentence: which stage holds a run back, and what helps. No clock, no files."""

from collections.abc import Callable
from dataclasses import dataclass

from vlm.data.profiling import PARTS, LoaderRate, PipelineProfile, StageName

_HEADROOM = 1.05
_TIE_FACTOR = 0.95
_MIN_SPEEDUP = 1.1
_MAX_USEFUL_SHRINK = 1.5
_MAX_BUSY_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class BottleneckReport:
    """Which stage is the slowest with the number of workers advised.

    slowest: of preparing, the part that takes the most time. rate: samples a second of the whole chain.
    sentences: why, what to do, and how many workers, for people.
    """

    slowest: StageName
    rate: float
    workers: int
    sentences: tuple[str, ...]


def find_bottleneck(profile: PipelineProfile) -> BottleneckReport:
    """Name the slowest stage of the chain and its remedy.

    The chain is the loader with the fewest workers that keep the model busy (or, if none do, or without a model, the
    fewest that come within 5% of the fastest), the copy to the device, and the model. Where the model runs on the
    workers' own cores, the two take turns: the slower of them is named, and the chain's rate is that of both.
    """
    model = _model(profile)
    best = _recommended_workers(profile, model[1] if model else None)
    limits: dict[StageName, float] = {_slowest_loader_stage(profile, best.workers): best.rate}
    if model:
        limits[model[0]] = model[1]
    if (copy := profile.rate("copy to device")) is not None:
        limits["copy to device"] = copy
    slowest = min(limits, key=lambda name: limits[name])
    rate = limits[slowest]
    if model and profile.shares_cores:
        rate = 1 / (1 / model[1] + 1 / best.rate)
    sentences = [_comparison(profile, best, slowest, model), _ADVICE[slowest](profile), _workers(profile, best)]
    if model and profile.shares_cores:
        sentences.append(
            f"There is no accelerator, so the model and the workers share the {_cores(profile)}: expect about "
            f"{_rate(rate)}."
        )
    if profile.busy_cores > _MAX_BUSY_SHARE * profile.cores:
        sentences.append(
            f"Other work kept {profile.busy_cores:.1f} of the {_cores(profile)} busy, so the figures are too low: "
            "repeat this when the machine is quiet."
        )
    return BottleneckReport(slowest=slowest, rate=rate, workers=best.workers, sentences=tuple(sentences))


def _model(profile: PipelineProfile) -> tuple[StageName, float] | None:
    names: tuple[StageName, ...] = ("model, forward and backward", "model, forward")
    return next(((name, rate) for name in names if (rate := profile.rate(name)) is not None), None)


def _recommended_workers(profile: PipelineProfile, wanted: float | None) -> LoaderRate:
    by_workers = sorted(profile.loader, key=lambda tried: tried.workers)
    if not profile.shares_cores and by_workers[-1].workers:
        by_workers = [tried for tried in by_workers if tried.workers]  # without one the accelerator would wait
    fastest = max(tried.rate for tried in by_workers)
    enough = min(wanted * _HEADROOM, fastest * _TIE_FACTOR) if wanted else fastest * _TIE_FACTOR
    return next(tried for tried in by_workers if tried.rate >= enough)


def _slowest_loader_stage(profile: PipelineProfile, workers: int) -> StageName:
    """What holds the loader back: the disk, or what takes a process most of its time."""
    processes = max(workers, 1)
    limits: dict[StageName, float] = {}
    if (at_random := profile.rate("disk, at random")) is not None:
        limits["disk, at random"] = at_random * processes
    if (in_order := profile.rate("disk, in order")) is not None:
        limits["disk, in order"] = in_order
    times = _times(profile, workers)
    longest = max(times, key=lambda name: times[name])
    limits[longest] = min(processes, profile.cores) / sum(times.values())
    return min(limits, key=lambda name: limits[name])


def _times(profile: PipelineProfile, workers: int) -> dict[StageName, float]:
    """Seconds a sample of what one process does in turn; without workers nothing is handed over."""
    names: tuple[StageName, ...] = (*PARTS, "hand-over") if workers else PARTS
    return {name: 1 / rate for name in names if (rate := profile.rate(name)) is not None}


def _comparison(
    profile: PipelineProfile, best: LoaderRate, slowest: StageName, model: tuple[StageName, float] | None
) -> str:
    loader = f"The loader gives {_rate(best.rate)} with {_count(best.workers, 'worker')}"
    if model is None:
        times = _times(profile, best.workers)
        share = f": {times[slowest] / sum(times.values()):.0%} of a process's time" if slowest in times else ""
        return f"{loader}; {slowest} holds it back{share}. Give MODEL to see whether that is enough for one."
    report = "the model is the limit" if slowest == model[0] else f"{slowest} is the limit"
    return f"{loader}, the model takes {_rate(model[1])} ({model[0].partition(', ')[2]}): {report}."


def _workers(profile: PipelineProfile, best: LoaderRate) -> str:
    by_workers = {tried.workers: tried.rate for tried in profile.loader}
    fastest = max(by_workers, key=lambda workers: by_workers[workers])
    advice = f"Take {_count(best.workers, 'worker')}"
    if best.workers > 1 and 1 in by_workers:
        advice += f", which give {best.rate / by_workers[1]:.1f}× one"
    if best.workers == fastest and fastest == max(by_workers) and 0 < fastest < profile.cores:
        return f"{advice}; you have {_cores(profile)}: try more."
    if by_workers[fastest] > best.rate * _MIN_SPEEDUP:
        return f"{advice}; {fastest} would give {_rate(by_workers[fastest])}, which nothing here can use."
    if best.workers < max(by_workers):
        return f"{advice}; more bring nothing (you have {_cores(profile)})."
    return f"{advice} (you have {_cores(profile)})."


def _decode(profile: PipelineProfile) -> str:
    decode, lossy = _of(profile, "decode"), profile.picture_format in ("JPEG", "MPO")
    if not lossy:
        return (
            f"{profile.picture_format} decodes at {decode} a core, and cannot be decoded at a reduced scale: store "
            "the pictures as JPEG (quality 90 or more) before packing."
        )
    if profile.shrink > _MAX_USEFUL_SHRINK:
        return (
            f"The pictures are {profile.shrink:.1f} times as large as the {profile.size} px that are used (decoded "
            f"at {decode} a core): shrink them to a shorter side of {round(profile.size * 1.15)} px before packing."
        )
    return f"Decoding gives {decode} a core, and the pictures are small already: take more cores, or a smaller size."


def _model_advice(profile: PipelineProfile) -> str:
    cures = ["--precision bf16"] if profile.precision == "fp32" else []
    cures += ["a smaller model", "smaller pictures"]
    cures += ["an accelerator"] if profile.shares_cores else []
    return f"Only the model can become faster: {', '.join(cures[:-1])} or {cures[-1]}."


_ADVICE: dict[StageName, Callable[[PipelineProfile], str]] = {
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
    "model, forward": _model_advice,
    "model, forward and backward": _model_advice,
}


def _of(profile: PipelineProfile, name: StageName) -> str:
    rate = profile.rate(name)
    return "an unknown rate" if rate is None else _rate(rate)


def _rate(rate: float) -> str:
    return f"{rate:,.0f} samples/s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cores(profile: PipelineProfile) -> str:
    return _count(profile.cores, "core")
