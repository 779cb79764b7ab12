"""Measure each stage between the disk and the model alone, and name the one that holds a run back.

Without MODEL the stages up to the device are measured. Times are medians of a few repeats on this machine as it is now:
let nothing else run on it.
"""

import logging
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.console import bar, pluralize, show_fields, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    import torch

    from vlm.data.bottleneck import BottleneckReport
    from vlm.data.profiling import PipelineProfile, ProfileSetup, Stage
    from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm doctor`."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to train on."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = ""
    """Run folder, model folder, or NAME:WEIGHTS of open_clip; brings its size and its tokenizer."""

    workers: str = "0,1,2,4"
    """Numbers of worker processes to try, separated by commas."""

    samples: int = 512
    """Samples to measure with."""

    batch_size: int = 64
    """Samples in a batch."""

    size: int | None = None
    """Pixels of the view; that of MODEL if not given, else 224."""

    tokenizer: str = "clip"
    """Where MODEL brings none: clip, a SentencePiece .model file, or a tokenizer folder."""

    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Measure, judge, show."""
    from vlm.data.bottleneck import find_bottleneck

    profile = diagnose(arguments)
    report = find_bottleneck(profile)
    if arguments.json:
        show_json(asdict(profile) | {"verdict": asdict(report)})
    else:
        show_diagnosis(profile, report)


def diagnose(arguments: Arguments) -> "PipelineProfile":
    """Measure all stages.

    Raises:
        UsageError: a number is out of range, or there are no such shards, model or tokenizer.
        VlmError: no sample can be used.
    """
    import psutil

    from vlm.data.profiling import PipelineProfile, measure_loader, measure_preparation, measure_worker_transfer

    workers, device = worker_counts(arguments.workers), _device(arguments.device)
    model = _load(arguments) if arguments.model else None
    setup = _profile_setup(arguments, model)
    busy = psutil.cpu_percent(interval=_QUIET_SECONDS) / 100 * (psutil.cpu_count() or 1)
    num_samples = pluralize(setup.num_batches * setup.batch_size, "sample")
    logger.info(f"Measuring with {num_samples} of {pluralize(len(setup.shards), 'shard')} …")
    stages = _storage(setup)
    prepared = measure_preparation(setup)
    stages += [*prepared.stages, measure_worker_transfer(setup)]
    loader = measure_loader(setup, workers)
    stages += _computing(setup, model, device)
    return PipelineProfile(
        cores=_cores(),
        busy_cores=busy,
        device=_name(device),
        shares_cores=device.type == "cpu",
        precision=arguments.precision,
        samples=setup.num_batches * setup.batch_size,
        unusable=prepared.unusable,
        batch_size=setup.batch_size,
        size=setup.view.size,
        picture_format=prepared.picture_format,
        shrink=prepared.shrink,
        stages=tuple(stages),
        loader=tuple(loader),
    )


def worker_counts(text: str) -> tuple[int, ...]:
    """Numbers of workers from "0,1,2".

    Raises:
        UsageError: something in it is not a number from 0 on.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(f"--workers {text!r}: give numbers from 0 on, separated by commas, as 0,1,2.")
    return tuple(sorted({int(word) for word in words}))


def show_diagnosis(profile: "PipelineProfile", report: "BottleneckReport") -> None:
    """Tables for people: each stage with its time a sample as a bar, the loader by workers, and the verdict."""
    facts = {
        "samples": f"{profile.samples:,} in batches of {profile.batch_size:,}, seen at {profile.size} px",
        "pictures": f"mostly {profile.picture_format}, {profile.shrink:.1f} times as large as they are seen",
        "processor cores": f"{profile.cores}, of which other work took {profile.busy_cores:.1f}",
        "device": profile.device,
    }
    if profile.unusable:
        facts["cannot be used"] = f"{profile.unusable:,}, see vlm inspect"
    show_fields(facts)
    rows = [_row(stage, slowest=report.slowest, longest=_longest(profile)) for stage in profile.stages]
    show_table(["stage, alone", "samples/s", "of", "µs a sample", "", "note"], rows)
    fastest = max(tried.rate for tried in profile.loader)
    show_table(
        ["loader, workers", "samples/s", "first batch after", ""],
        [
            [tried.workers, round(tried.rate), f"{tried.first_batch_seconds:.2f} s", bar(tried.rate / fastest)]
            for tried in profile.loader
        ],
    )
    print("\n".join(report.sentences))


def _longest(profile: "PipelineProfile") -> float:
    return max(1 / stage.rate for stage in profile.stages)


def _row(stage: "Stage", *, slowest: str, longest: float) -> list[object]:
    micros = 1e6 / stage.rate
    moved = f"{stage.bytes_rate / 1e6:,.0f} MB/s" if stage.bytes_rate else ""
    note = "; ".join(part for part in (moved, stage.note) if part)
    name = f"→ {stage.name}" if stage.name == slowest else f"  {stage.name}"
    owner = "a process" if stage.each == "process" else f"{stage.cores} cores" if stage.cores > 1 else "the machine"
    shown = f"{micros:,.1f}" if micros < 100 else f"{micros:,.0f}"
    return [name, round(stage.rate), owner, shown.rjust(7), bar(1 / stage.rate / longest, width=24), note]


def _load(arguments: Arguments) -> "VisionLanguageModel":
    from vlm.models.load import load_model

    return load_model(arguments.model, device=arguments.device, precision=arguments.precision)


def _profile_setup(arguments: Arguments, model: "VisionLanguageModel | None") -> "ProfileSetup":
    from vlm.data.profiling import ProfileSetup
    from vlm.data.shards import expand_shards
    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import RandomResizedCrop

    own_size = model.view.size if model else 224
    size = own_size if arguments.size is None else arguments.size
    if model and size != model.view.size:
        raise UsageError(f"{arguments.model} sees {model.view.size} px; leave out --size {size}.")
    return ProfileSetup(
        shards=tuple(expand_shards(arguments.shards)),
        view=RandomResizedCrop(size=size),
        tokenizer=model.tokenizer if model else open_tokenizer(arguments.tokenizer),
        samples=arguments.samples,
        batch_size=arguments.batch_size,
    )


def _storage(setup: "ProfileSetup") -> list["Stage"]:
    from vlm.data.profiling import measure_disk, measure_index

    plan = setup.plan()
    places = [
        (sample_index.shard, sample_index.number)
        for number in range(setup.num_batches)
        for sample_index in plan[number]
    ]
    return [*measure_disk(setup.shards, places), *measure_index(setup.shards)]


def _computing(setup: "ProfileSetup", model: "VisionLanguageModel | None", device: "torch.device") -> list["Stage"]:
    from vlm.data.loader import ShardSet
    from vlm.models.throughput import measure_copy, measure_model

    plan = setup.plan()
    batch = setup.collate(plan)(plan[0], ShardSet(setup.shards))
    stages = measure_copy(batch.images, device)
    return stages if model is None else [*stages, *measure_model(model, batch.images, batch.tokens)]


def _device(name: str) -> "torch.device":
    from vlm.models.load import choose_device

    device = choose_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are measured.")
    return device


def _name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no accelerator"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
