"""Figures of `vlm scale` and `vlm mixture`: scores over samples and over compute; weights of sources and their fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm.files import atomic_write
from vlm.tensor_types import Array, Float
from vlm.train.measured_run import LOSS
from vlm.train.scaling_law import ScalingLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlm.train.mixture_weights import MixtureReport
    from vlm.train.scaling import Forecast, ForecastBeyond, ScalingPoint, ScalingReport

_LONGEST_LABEL = 30


def draw_scaling(report: "ScalingReport", path: Path) -> None:
    """Scores over samples: runs, the law fitted to all, the forecast of the largest runs, and forecasts beyond.

    With several architectures each has a colour, and a second panel has the scores over the FLOPs of runs. A law whose
    term of the samples is not told ends at the most samples of a run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8) if report.sizes else (6.5, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if report.sizes else 1, squeeze=False, sharey=True)[0]
    if report.sizes:
        _draw_sizes(axes[0], report)
        _draw_compute(axes[1], report)
    else:
        _draw_single(axes[0], report)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("training samples")
    axes[0].set_ylabel(_label(report.metric))
    for panel in axes:
        panel.legend(fontsize=8, frameon=False)
    figure.suptitle(report.verdict(), fontsize=8, wrap=True)
    _save(figure, path)


def _draw_single(axes: "Axes", report: "ScalingReport") -> None:
    scale = _scale(report.metric)
    samples = [point.samples for point in report.points]
    axes.plot(samples, [scale * point.score for point in report.points], "o", color="C0", label="runs")
    [check] = report.checks
    for law, line, label in (
        (report.fit, "C0-", "law of all sizes"),
        (check.fit, "C1:", "law of all but the largest"),
    ):
        steps = _steps(samples, report.beyond[-1].samples, law)
        axes.plot(steps, [scale * report.score(number, law=law) for number in steps], line, label=label)
    _draw_forecasts(axes, [check.forecast], scale, colour="C1", label="its forecast")
    _draw_forecasts(axes, report.beyond, scale, colour="C0", label="beyond")


def _draw_sizes(axes: "Axes", report: "ScalingReport") -> None:
    scale = _scale(report.metric)
    samples = [point.samples for point in report.points]
    steps = _steps(samples, 2 * max(samples), report.fit)
    for number, (architecture, size) in enumerate(report.sizes.items()):
        own = _runs_of(report, architecture)
        colour = f"C{number}"
        axes.plot([point.samples for point in own], [scale * point.score for point in own], "o", ms=4, color=colour)
        label = f"{_shortened(architecture)}, {size:.2g} FLOPs a sample"
        axes.plot(steps, [scale * report.score(step, size) for step in steps], color=colour, label=label)
    for number, check in enumerate(report.checks):
        known = "smaller runs" if check.known == "smaller" else "all other runs"
        label = f"forecast of the largest from {known}"
        _draw_forecasts(axes, [check.forecast], scale, colour=("0.2", "0.6")[number], label=label)


def _draw_compute(axes: "Axes", report: "ScalingReport") -> None:
    scale = _scale(report.metric)
    for number, architecture in enumerate(report.sizes):
        own = [point for point in _runs_of(report, architecture) if point.flops]
        places = [point.flops or 0.0 for point in own]
        label = _shortened(architecture)
        axes.plot(places, [scale * point.score for point in own], "o", ms=4, color=f"C{number}", label=label)
        if report.hold == "epochs" and own:
            # compute grows with the samples alone
            flops_each = places[-1] / own[-1].samples
            steps = _steps([point.samples for point in own], 2 * own[-1].samples, report.fit)
            law = [scale * report.score(step, report.sizes[architecture]) for step in steps]
            axes.plot(steps * flops_each, law, color=f"C{number}")
    plans = [(plan.flops, scale * plan.score) for plan in report.budgets if plan.best and plan.score is not None]
    if plans:
        axes.plot(
            [flops for flops, _ in plans],
            [score for _, score in plans],
            "k*",
            ms=9,
            label="best of these, by the law of all runs",
        )
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs of the run")


def _draw_forecasts(
    axes: "Axes", forecasts: "Sequence[Forecast | ForecastBeyond]", scale: float, *, colour: str, label: str
) -> None:
    for forecast in forecasts:
        score, low, high = forecast.score, forecast.low, forecast.high
        if score is None or low is None or high is None:
            continue
        error = ([max(scale * (score - low), 0)], [max(scale * (high - score), 0)])
        axes.errorbar(
            [forecast.samples], [scale * score], yerr=error, fmt="s", mfc="none", color=colour, capsize=4, label=label
        )
        # once in the legend
        label = "_"


def _steps(samples: Sequence[int], beyond: int, law: ScalingLaw) -> Float[Array, " N"]:
    """Where a law is drawn: from the fewest samples of a run to so many beyond the most, which only a term that the
    runs tell reaches."""
    return np.geomspace(min(samples), beyond if law.samples.is_told else max(samples), 101)


def _runs_of(report: "ScalingReport", architecture: str) -> "list[ScalingPoint]":
    return [point for point in report.points if point.architecture == architecture]


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"{name[:_LONGEST_LABEL]}…"


def _scale(metric: str) -> float:
    """A loss as it is, a recall in percent."""
    return 1.0 if metric == LOSS else 100.0


def _label(metric: str) -> str:
    return "held-out loss" if metric == LOSS else f"{metric}, %"


def _save(figure: "Figure", path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_mixture(report: "MixtureReport", path: Path) -> None:
    """The recommended weight of each source with its interval, and the probes' scores over each source's weight."""
    from matplotlib.figure import Figure

    scale = _scale(report.metric)
    sources = report.fit.sources
    figure = Figure(figsize=(3 + 2.2 * len(sources), 3.8), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(sources), width_ratios=[1.6, *[1.0] * len(sources)])
    places = range(len(sources))
    below = [100 * max(source.weight - source.low, 0) for source in sources]
    above = [100 * max(source.high - source.weight, 0) for source in sources]
    first.bar(places, [100 * source.weight for source in sources], color="C0", alpha=0.7)
    first.errorbar(places, [100 * source.weight for source in sources], yerr=(below, above), fmt="none", color="0.2")
    first.axhline(100 / len(sources), color="0.5", linestyle=":", label="equal")
    first.set_xticks(places, [_shortened(source.name) for source in sources], rotation=45, ha="right", fontsize=8)
    first.set_ylabel("recommended weight, %")
    first.legend(fontsize=8, frameon=False)
    for panel, source in zip(others, sources, strict=True):
        panel.sharey(others[0])
        weights = [100 * probe.weights[source.name] for probe in report.probes]
        panel.plot(weights, [scale * probe.score for probe in report.probes], "o", ms=4, color="C0", label="probes")
        for probes, colour, label in ((report.recommended, "C2", "recommended"), (report.equal, "C1", "equal")):
            marks = [100 * probe.weights[source.name] for probe in probes]
            panel.plot(marks, [scale * probe.score for probe in probes], "D", ms=5, color=colour, label=label)
        panel.set_xlabel(f"{_shortened(source.name)}, %", fontsize=9)
        panel.tick_params(labelsize=8, labelleft=panel is others[0])
    others[0].set_ylabel(_label(report.metric))
    others[-1].legend(fontsize=7)
    figure.suptitle(report.verdict(), fontsize=8, wrap=True)
    _save(figure, path)
