"""`vlm scale`: what more data and a larger model would bring, from runs on less of both."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from vlm.cli.options import JsonOption, PresetArgument, preset_defaults
from vlm.console import show_json, show_table
from vlm.train.run_config import TrainConfig

if TYPE_CHECKING:
    from vlm.train.scaling import Forecast, ForecastBeyond, ScalingReport
    from vlm.train.scaling_law import PowerTerm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Forecast what more data would bring, and a larger model: runs on nested subsets of the shards, a fitted law, a
    forecast checked.

    PRESET and the options are those of vlm train; --run is the folder of all the runs. The law, fitted to smaller
    sizes, forecasts the largest, which is measured as well; fitted to all, it forecasts beyond. With --architectures it
    says which size is best for a budget of FLOPs, too. Repeat the command to go on after an interruption: finished runs
    are read.
    """

    preset: PresetArgument

    shares: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """Sizes as shares of the shards; five different ones or more."""

    architectures: tuple[str, ...] = ()
    """Models of different sizes, three or more, each as --architecture names them; each is trained on all shares.
    Empty varies the data alone."""

    seeds: int = 2
    """Runs of each size, with the seeds --seed, --seed + 1, …"""

    metric: str = "text_to_image_recall@10"
    """Score to forecast: recall@1, @5 or @10, the mean of both directions, or one: image_to_text_recall@1, …; or loss:
    the contrastive loss of the held-out data."""

    hold: Literal["steps", "epochs"] = "steps"
    """What all sizes have alike: the steps of the largest, so that data alone differ; or the epochs."""

    budgets: tuple[float, ...] = ()
    """Training FLOPs to divide between model and data, e.g. 1e15; empty takes those of the largest run and ten times as
    many. Needs --architectures and --hold epochs."""

    json: JsonOption = False

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    @classmethod
    def defaults(cls, words: list[str]) -> "Scale":
        """The configuration of the preset, as for `vlm train`."""
        return cls(**preset_defaults(words))

    def run(self) -> None:
        """Train or read the runs, fit, draw, show."""
        from vlm.api.training import scale

        report = scale(
            self.config,
            shares=self.shares,
            architectures=self.architectures,
            seeds=self.seeds,
            metric=self.metric,
            hold=self.hold,
            budgets=self.budgets,
        )
        if self.json:
            show_json(report)
            return
        _show_runs(report)
        _show_forecasts(report)
        if report.budgets:
            _show_budgets(report)
        _show_law(report)
        print("\n".join((report.verdict(), *report.warnings())))
        logger.info(f"Figure: {Path(self.config.run) / 'scaling.png'}")


def _show_runs(report: "ScalingReport") -> None:
    rows: list[list[object]] = []
    for point in report.points:
        flops = "–" if point.flops is None else f"{point.flops:.3g}"
        law = _score(report, report.score(point.samples, report.sizes.get(point.architecture)))
        cells: list[object] = [f"{point.samples:,}", point.shards, point.seed, f"{point.steps:,}", flops]
        cells += [_score(report, point.score), law]
        rows.append([point.architecture, *cells] if report.sizes else cells)
    columns = ["samples", "shards", "seed", "steps", "FLOPs", report.metric, "law"]
    show_table(["architecture", *columns] if report.sizes else columns, rows)


def _show_forecasts(report: "ScalingReport") -> None:
    rows: list[list[object]] = []
    for check in report.checks:
        known = "smaller runs" if check.known == "smaller" else "other runs"
        rows.append([*_forecast(report, check.forecast), known, _score(report, check.measured)])
    for forecast in report.beyond:
        rows.append([*_forecast(report, forecast), "all runs", "–"])
    columns = ["forecast for", report.metric, "95%", "by", "measured"]
    if report.sizes:
        columns.insert(1, "FLOPs a sample")
    show_table(columns, rows)


def _forecast(report: "ScalingReport", forecast: "Forecast | ForecastBeyond") -> list[object]:
    interval = "–" if forecast.score is None else f"{_score(report, forecast.low)} to {_score(report, forecast.high)}"
    cells: list[object] = [f"{forecast.samples:,}", _score(report, forecast.score), interval]
    if forecast.flops_per_sample:
        cells.insert(1, f"{forecast.flops_per_sample:.3g}")
    return cells


def _show_budgets(report: "ScalingReport") -> None:
    rows: list[list[object]] = []
    for plan in report.budgets:
        best = "–"
        interval = "–"
        if plan.best:
            best = f"{plan.best.size:.3g}"
            interval = f"{plan.best.low:.3g} to {plan.best.high:.3g}"
        score = _score(report, plan.score)
        samples = "–" if plan.samples is None else f"{plan.samples:,}"
        rows.append([f"{plan.flops:.3g}", best, interval, plan.architecture or "–", samples, score])
    columns = ["budget, FLOPs", "best FLOPs a sample", "95%", "best of these", "on samples", report.metric]
    show_table(columns, rows)


def _show_law(report: "ScalingReport") -> None:
    law = report.fit
    name = "loss" if report.metric == "loss" else "error"
    terms = _term("samples", law.samples) + (_term("FLOPs a sample", law.size) if law.size else "")
    print(f"{name} = {law.floor:.3f}{terms}")


def _term(quantity: str, term: "PowerTerm") -> str:
    text = f" + {term.amplitude:.3f} · ({quantity} / {term.unit:,.6g})^-{term.exponent:.2f}"
    if term.exponent_interval:
        low, high = term.exponent_interval
        text += f" (exponent {low:.2f} to {high:.2f})"
    return text


def _score(report: "ScalingReport", score: float | None) -> str:
    from vlm.train.history import format_metric

    return "–" if score is None else format_metric(report.metric, score)
