"""`vlm doctor`: which stage of the input pipeline is the bottleneck."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import DeviceOption, JsonOption, PrecisionOption, ShardsArgument, call_options, parse_numbers
from vlm.console import bar, show_fields, show_json, show_table

if TYPE_CHECKING:
    from vlm.data.bottleneck_report import BottleneckReport
    from vlm.data.profiling import PipelineProfile, Stage


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
    """Numbers of workers to try, four to a process, separated by commas."""

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
        from vlm.api.data import doctor

        diagnosis = doctor(**call_options(self, workers=parse_numbers(self.workers, "--workers")))
        if self.json:
            show_json(diagnosis)
        else:
            show_diagnosis(diagnosis.profile, diagnosis.report)


def show_diagnosis(profile: "PipelineProfile", report: "BottleneckReport") -> None:
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
