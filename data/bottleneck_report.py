"""The bottleneck report: from a profile to the stage that limits a run, and what helps. No clock, no files."""

from dataclasses import dataclass

from vlm.console import pluralize
from vlm.data.profiling import PARTS, LoaderRate, PipelineProfile, StageName

_HEADROOM = 1.05
"""Of the loader over the model, so that the model does not wait when the loader has a slow moment."""
_TIE_FACTOR = 0.95
"""Share of the fastest rate from which fewer workers are as good."""
_MIN_SPEEDUP = 1.1
_MAX_USEFUL_SHRINK = 1.5
_MAX_BUSY_SHARE = 0.15
"""Share of the cores that other work may use before the figures are called too low."""


@dataclass(frozen=True, kw_only=True)
class BottleneckReport:
    """Which stage is the slowest with the recommended number of workers.

    slowest: if the loader is the limit, the part of it that takes the most time. rate: samples a second of the whole
    chain. sentences: why, what to do, and how many workers, for people.
    """

    slowest: StageName
    rate: float
    workers: int
    sentences: tuple[str, ...]


def find_bottleneck(profile: PipelineProfile) -> BottleneckReport:
    """Name the slowest stage of the chain and its remedy.

    The chain is the loader with the fewest workers that keep the model busy (or, if none do, or without a model, the
    fewest that come within 5% of the fastest), the copy to the device, and the model. If the model runs on the
    workers' own cores, the two take turns: the slower of them is named, and the chain's rate is that of both.
    """
    # the slowest link of the chain
    model = _model_stage(profile)
    best = _recommended_workers(profile, model[1] if model else None)
    limits: dict[StageName, float] = {_slowest_loader_stage(profile, best.workers): best.rate}
    if model:
        limits[model[0]] = model[1]
    copy_rate = profile.rate("copy to device")
    if copy_rate is not None:
        limits["copy to device"] = copy_rate
    slowest = min(limits, key=lambda name: limits[name])
    rate = limits[slowest]
    if model and profile.shares_cores:
        rate = 1 / (1 / model[1] + 1 / best.rate)  # the seconds of both add up

    sentences = [_comparison(profile, best, slowest, model), _advice(profile, slowest), _worker_advice(profile, best)]
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


def _model_stage(profile: PipelineProfile) -> tuple[StageName, float] | None:
    """The measured stage of the model and its rate; training before inference."""
    names: tuple[StageName, ...] = ("model, forward and backward", "model, forward")
    for name in names:
        rate = profile.rate(name)
        if rate is not None:
            return name, rate
    return None


def _recommended_workers(profile: PipelineProfile, model_rate: float | None) -> LoaderRate:
    candidates = sorted(profile.loader, key=lambda loader: loader.workers)
    if not profile.shares_cores and candidates[-1].workers:
        # with 0 workers the accelerator would wait for this process
        candidates = [loader for loader in candidates if loader.workers]
    fastest = max(candidates, key=lambda loader: loader.rate)
    # never above the fastest: where no number keeps up with the model, the fewest that tie with it are recommended
    enough = fastest.rate * _TIE_FACTOR
    if model_rate:
        enough = min(model_rate * _HEADROOM, enough)
    for loader in candidates:
        if loader.rate >= enough:
            return loader
    return fastest


def _slowest_loader_stage(profile: PipelineProfile, workers: int) -> StageName:
    """What limits the loader: the disk, or what takes most of a process's time."""
    processes = max(workers, 1)
    limits: dict[StageName, float] = {}
    random_rate = profile.rate("disk, at random")
    if random_rate is not None:
        # each process waits for its own reads, so more of them keep more reads in flight
        limits["disk, at random"] = random_rate * processes
    sequential_rate = profile.rate("disk, in order")
    if sequential_rate is not None:
        limits["disk, in order"] = sequential_rate
    times = _seconds_per_sample(profile, workers)
    longest = max(times, key=lambda name: times[name])
    # what a process does in turn adds up; processes beyond the cores only take turns
    limits[longest] = min(processes, profile.cores) / sum(times.values())
    return min(limits, key=lambda name: limits[name])


def _seconds_per_sample(profile: PipelineProfile, workers: int) -> dict[StageName, float]:
    """Of what one process does in turn; without workers nothing is handed over."""
    names: tuple[StageName, ...] = (*PARTS, "hand-over") if workers else PARTS
    seconds: dict[StageName, float] = {}
    for name in names:
        rate = profile.rate(name)
        if rate is not None:
            seconds[name] = 1 / rate
    return seconds


def _comparison(
    profile: PipelineProfile, best: LoaderRate, slowest: StageName, model: tuple[StageName, float] | None
) -> str:
    loader = f"The loader gives {_rate(best.rate)} with {pluralize(best.workers, 'worker')}"
    if model is None:
        times = _seconds_per_sample(profile, best.workers)
        # the disk is no part of a process's time: it has no share of it
        share = f": {times[slowest] / sum(times.values()):.0%} of a process's time" if slowest in times else ""
        return f"{loader}; {slowest} limits it{share}. Give MODEL to see whether that is enough for one."
    report = "the model is the limit" if slowest == model[0] else f"{slowest} is the limit"
    return f"{loader}, the model takes {_rate(model[1])} ({model[0].partition(', ')[2]}): {report}."


def _worker_advice(profile: PipelineProfile, best: LoaderRate) -> str:
    by_workers = {loader.workers: loader.rate for loader in profile.loader}
    fastest = max(by_workers, key=lambda workers: by_workers[workers])
    advice = f"Use {pluralize(best.workers, 'worker')}"
    if best.workers > 1 and 1 in by_workers:
        advice += f", which give {best.rate / by_workers[1]:.1f}× one"
    if best.workers == fastest and fastest == max(by_workers) and 0 < fastest < profile.cores:
        return f"{advice}; you have {_cores(profile)}: try more."
    if by_workers[fastest] > best.rate * _MIN_SPEEDUP:
        return f"{advice}; {fastest} would give {_rate(by_workers[fastest])}, which the model cannot use."
    if best.workers < max(by_workers):
        return f"{advice}; more bring nothing (you have {_cores(profile)})."
    return f"{advice} (you have {_cores(profile)})."


def _decode_advice(profile: PipelineProfile) -> str:
    decode = _rate_of(profile, "decode")
    if profile.picture_format not in ("JPEG", "MPO"):
        return (
            f"{profile.picture_format} decodes at {decode} a core, and cannot be decoded at a reduced scale: store "
            "the images as JPEG (quality 90 or more) before packing."
        )
    if profile.shrink > _MAX_USEFUL_SHRINK:
        return (
            f"The images are {profile.shrink:.1f} times as large as the {profile.size} px that are used (decoded "
            f"at {decode} a core): shrink them to a shorter side of {round(profile.size * 1.15)} px before packing."
        )
    return f"Decoding gives {decode} a core, and the images are small already: use more cores, or a smaller size."


def _model_advice(profile: PipelineProfile) -> str:
    # the cheapest remedy first
    remedies = ["--precision bf16"] if profile.precision == "fp32" else []
    remedies += ["a smaller model", "smaller images"]
    if profile.shares_cores:
        remedies.append("an accelerator")
    return f"Only the model can become faster: {', '.join(remedies[:-1])} or {remedies[-1]}."


_ADVICE: dict[StageName, str] = {
    "disk, in order": "The disk gives at most {rate}: copy the shards to a faster, local disk.",
    "disk, at random": "The disk gives each process {rate} at random and {in_order} in order: copy the shards to a "
    "local disk, or use more workers, so that more reads are in flight.",
    "read": "Reading from memory and parsing gives {rate} a core: leave out metadata that is not used.",
    "view": "Cropping and resizing to {size} px give {rate} a core: use a smaller size, or more cores.",
    "tokenize": "The tokenizer gives {rate} a core: use a SentencePiece model (vlm tokenizer train), or a "
    "shorter context.",
    "stack": "Stacking views into batches gives {rate} a core, the speed of fresh memory: use a smaller size.",
    "hand-over": "A worker hands over {rate}, the speed of fresh shared memory: use more workers, or a smaller size; "
    "/dev/shm must be in memory.",
    "copy to device": "The copy to the device reaches {rate}: use a smaller size, or a wider bus.",
}


def _advice(profile: PipelineProfile, stage: StageName) -> str:
    """What helps against a stage that is the limit."""
    if stage == "decode":
        return _decode_advice(profile)
    if stage.startswith("model"):
        return _model_advice(profile)
    in_order = _rate_of(profile, "disk, in order")
    return _ADVICE[stage].format(rate=_rate_of(profile, stage), in_order=in_order, size=profile.size)


def _rate_of(profile: PipelineProfile, name: StageName) -> str:
    rate = profile.rate(name)
    return "an unknown rate" if rate is None else _rate(rate)


def _rate(rate: float) -> str:
    return f"{rate:,.0f} samples/s"


def _cores(profile: PipelineProfile) -> str:
    return pluralize(profile.cores, "core")
