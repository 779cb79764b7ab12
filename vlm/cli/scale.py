"""`vlm scale`: what more data would bring, from runs on less of it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.options import JsonOption
from vlm.console import percent, show_json, show_table
from vlm.train.presets import PRESETS, open_preset
from vlm.train.run_config import TrainConfig

if TYPE_CHECKING:
    from vlm.train.scaling import ScalingReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Forecast what more data would bring: runs on nested subsets of the shards, a power law, a forecast checked.

    PRESET and the options are those of vlm train; --run is the folder of all the runs. The law, fitted to all sizes
    but the largest, forecasts the largest, which is measured as well; fitted to all, it forecasts twice and ten times
    the data. Repeat the command to go on after an interruption: finished runs are read.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Preset, TOML file, run folder, or open_clip architecture."""

    shares: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """Sizes as shares of the shards; five different ones or more."""

    seeds: int = 2
    """Runs of each size, with the seeds --seed, --seed + 1, …"""

    metric: str = "text_to_image_recall@10"
    """Score to forecast: recall@1, @5 or @10, the mean of both directions, or one: image_to_text_recall@1, …"""

    hold: Literal["steps", "epochs"] = "steps"
    """What all sizes have alike: the steps of the largest, so that data alone differ; or the epochs."""

    json: JsonOption = False

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    @classmethod
    def defaults(cls, words: list[str]) -> "Scale":
        """The configuration of the preset, as for `vlm train`."""
        if not words or words[0].startswith("-"):
            return cls(preset=tyro.MISSING, config=next(iter(PRESETS.values()))[1])
        return cls(preset=words[0], config=open_preset(words[0]))

    def run(self) -> None:
        """Train or read the runs, fit, draw, show."""
        from vlm.api.training import scale

        report = scale(self.config, shares=self.shares, seeds=self.seeds, metric=self.metric, hold=self.hold)
        if self.json:
            show_json(report)
            return
        _show(report)
        logger.info(f"Figure: {Path(self.config.run) / 'scaling.png'}")


def _show(report: "ScalingReport") -> None:
    rows: list[list[object]] = []
    for point in report.points:
        flops = "–" if point.flops is None else f"{point.flops:.3g}"
        law = percent(report.fit.score(point.samples))
        rows.append(
            [f"{point.samples:,}", point.shards, point.seed, f"{point.steps:,}", flops, percent(point.score), law]
        )
    show_table(["samples", "shards", "seed", "steps", "FLOPs", report.metric, "law"], rows)
    forecasts: list[list[object]] = []
    for forecast in (report.check, *report.beyond):
        measured = percent(report.measured) if forecast is report.check else "–"
        interval = f"{percent(forecast.low)} to {percent(forecast.high)}"
        forecasts.append([f"{forecast.samples:,}", percent(forecast.score), interval, measured])
    show_table(["forecast for", report.metric, "95%", "measured"], forecasts)
    low, high = report.exponent_interval
    print(
        f"error = {report.fit.floor:.3f} + {report.fit.amplitude:.3f} · (samples / {report.fit.unit:,.0f})^"
        f"-{report.fit.exponent:.2f} (exponent {low:.2f} to {high:.2f})"
    )
    print(report.verdict())
