"""`vlm doctor`: which stage of the input pipeline is the bottleneck."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import DeviceOption, JsonOption, PrecisionOption, ShardsArgument
from vlm.console import bar, show_fields, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    import torch

    from vlm.data.bottleneck_report import BottleneckReport
    from vlm.data.collate import TrainingBatch
    from vlm.data.profiling import PipelineProfile, ProfileSetup, Stage
    from vlm.models.model import VisionLanguageModel

_DEFAULT_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Benchmark each input-pipeline stage in isolation and report the bottleneck.

    Without MODEL, the stages up to the device are measured. Times are medians of a few repeats: run nothing else on the
    machine.
    """

    shards: ShardsArgument

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = ""
    """Run folder, model folder, or open_clip NAME:WEIGHTS; sets image size and tokenizer."""

    workers: str = "0,1,2,4"
    """Numbers of worker processes to try, separated by commas."""

    samples: int = 512
    """Number of samples to measure with."""

    batch_size: int = 64
    """Batch size."""

    size: int | None = None
    """Image size in pixels; None uses that of MODEL, or 224."""

    tokenizer: str = "clip"
    """Tokenizer if there is no MODEL: clip, a SentencePiece .model file, or a tokenizer folder."""

    device: DeviceOption = "auto"

    precision: PrecisionOption = "fp32"

    json: JsonOption = False

    def run(self) -> None:
        """Profile, find the bottleneck, show both."""
        from vlm.data.bottleneck_report import find_bottleneck
        from vlm.data.profiling import profile_pipeline
        from vlm.models.load import load_model
        from vlm.models.throughput import measure_copy, measure_model

        workers = _parse_workers(self.workers)
        device = self._device()
        model = None
        if self.model:
            model = load_model(self.model, device=self.device, precision=self.precision)

        def measure_compute(batch: "TrainingBatch") -> "list[Stage]":
            stages = measure_copy(batch.images, device)
            return stages if model is None else [*stages, *measure_model(model, batch.images, batch.tokens)]

        profile = profile_pipeline(
            self._setup(model),
            workers,
            device=_device_name(device),
            # on a CPU the model and the workers compete, so that their rates do not add up
            shares_cores=device.type == "cpu",
            precision=self.precision,
            measure_compute=measure_compute,
        )
        report = find_bottleneck(profile)
        # the key stays "verdict", which scripts read
        if self.json:
            show_json(asdict(profile) | {"verdict": asdict(report)})
        else:
            show_profile(profile, report)

    def _setup(self, model: "VisionLanguageModel | None") -> "ProfileSetup":
        from vlm.data.profiling import ProfileSetup
        from vlm.data.shards import expand_shards
        from vlm.data.tokenizers import open_tokenizer
        from vlm.data.transforms import RandomResizedCrop

        default_size = model.view.size if model else _DEFAULT_SIZE
        size = default_size if self.size is None else self.size
        # a model of fixed positions sees one size only
        if model and size != model.view.size:
            raise UsageError(f"{self.model} has an image size of {model.view.size} px; omit --size {size}.")
        return ProfileSetup(
            shards=tuple(expand_shards(self.shards)),
            view=RandomResizedCrop(size=size),
            tokenizer=model.tokenizer if model else open_tokenizer(self.tokenizer),
            samples=self.samples,
            batch_size=self.batch_size,
        )

    def _device(self) -> "torch.device":
        from vlm.models.load import choose_device

        device = choose_device(self.device)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {self.device}: only cpu and cuda are measured.")
        return device


def _parse_workers(text: str) -> tuple[int, ...]:
    """Numbers of workers from "0,1,2".

    Raises:
        UsageError: something in it is not a number from 0 on.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(map(str.isdecimal, words)):
        raise UsageError(f"--workers {text!r}: give numbers from 0 on, separated by commas, as 0,1,2.")
    return tuple(sorted(set(map(int, words))))


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no accelerator"


def show_profile(profile: "PipelineProfile", report: "BottleneckReport") -> None:
    """Tables of each stage with its time per sample as a bar and of the loader by workers, then the verdict."""
    fields = {
        "samples": f"{profile.samples:,} in batches of {profile.batch_size:,}, at {profile.size} px",
        "images": f"mostly {profile.picture_format}, {profile.shrink:.1f} times the size of the view",
        "CPU cores": f"{profile.cores}, of which other processes used {profile.busy_cores:.1f}",
        "device": profile.device,
    }
    if profile.unusable:
        fields["corrupt samples"] = f"{profile.unusable:,}, see vlm inspect"
    show_fields(fields)
    # bars are of time, not of rate: the longest bar is the bottleneck
    longest = max(1 / stage.rate for stage in profile.stages)
    rows = [_stage_row(stage, slowest=report.slowest, longest=longest) for stage in profile.stages]
    show_table(["stage, in isolation", "samples/s", "per", "µs per sample", "", "note"], rows)
    fastest = max(loader.rate for loader in profile.loader)
    rows = []
    for loader in profile.loader:
        first_batch = f"{loader.first_batch_seconds:.2f} s"
        rows.append([loader.workers, round(loader.rate), first_batch, bar(loader.rate / fastest)])
    show_table(["loader, workers", "samples/s", "first batch after", ""], rows)
    print("\n".join(report.sentences))


def _stage_row(stage: "Stage", *, slowest: str, longest: float) -> list[object]:
    bandwidth = f"{stage.bytes_rate / 1e6:,.0f} MB/s" if stage.bytes_rate else ""
    note = "; ".join(filter(None, (bandwidth, stage.note)))
    name = f"→ {stage.name}" if stage.name == slowest else f"  {stage.name}"
    machine = f"{stage.cores} cores" if stage.cores > 1 else "machine"
    owner = "process" if stage.each == "process" else machine
    microseconds = 1e6 / stage.rate
    shown = f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"
    return [name, round(stage.rate), owner, shown.rjust(7), bar(1 / stage.rate / longest, width=24), note]
