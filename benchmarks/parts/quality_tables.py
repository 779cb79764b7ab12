"""The results of the quality benchmark, aggregated over seeds, as tables and a plot."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from parts.quality_intervals import half_width, ratio_interval
from parts.quality_runs import Result
from parts.quality_settings import LINEAR

from vlm.console import show_table

HEADLINE = "text_to_image_recall@10"
GOAL = 1.25
_RECALLS = tuple(f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10))
_COLUMNS = ("t→i R@1", "R@5", "R@10", "i→t R@1", "R@5", "R@10")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one side on one data set, one result per seed."""

    data: str
    name: str
    results: tuple[Result, ...]

    def values(self, metric: str) -> list[float]:
        """The metric of each run; also `zero_shot`, omitting runs without it."""
        if metric == "zero_shot":
            return [result.zero_shot for result in self.results if result.zero_shot is not None]
        return [result.metrics[metric] for result in self.results]

    def interval(self, metric: str) -> tuple[float, float]:
        """95% t-interval over the seeds; for the headline metric of a single run, over its queries."""
        values = self.values(metric)
        half = half_width(values)
        if half is None:
            return self.results[0].query_interval if metric == HEADLINE else (mean(values), mean(values))
        return mean(values) - half, mean(values) + half

    def values_for_machines(self) -> dict[str, Any]:
        """Its runs, and mean and half of the 95% t-interval of each metric (None for a single run)."""
        names = [*self.results[0].metrics, *(["zero_shot"] if self.values("zero_shot") else [])]
        summary = {
            name: {"mean": mean(self.values(name)), "half_width": half_width(self.values(name))} for name in names
        }
        return {"data": self.data, "name": self.name, "summary": summary, "runs": [asdict(one) for one in self.results]}


def all_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours ÷ open_clip on each data set that has both."""
    by_side = {(row.data, row.name): row for row in rows}
    both = [(row, by_side[row.data, "open_clip"]) for row in rows if (row.data, "open_clip") in by_side]
    return [one for ours, theirs in both if ours.name == "ours" for one in _ratios(ours, theirs)]


def _ratios(ours: Row, theirs: Row) -> list[dict[str, Any]]:
    """Ratios of recall@10 in both directions and of zero-shot, with 95% intervals if there are several seeds."""
    found = []
    for metric in (HEADLINE, "image_to_text_recall@10", "zero_shot"):
        one, two = ours.values(metric), theirs.values(metric)
        if one and two and mean(two) > 0:
            ratio = {"ratio": mean(one) / mean(two), "interval": ratio_interval(one, two)}
            found.append({"data": ours.data, "metric": metric} | ratio)
    return found


def show_sides(rows: Sequence[Row], found: Sequence[dict[str, Any]]) -> None:
    """Tables of quality, cost and ratios of both sides on each data set."""
    for data in dict.fromkeys(row.data for row in rows):
        cells = [
            [row.name, *(_figure(row.values(metric)) for metric in (*_RECALLS, "zero_shot"))]
            for row in rows
            if row.data == data
        ]
        cells += [_linear_cells(name, figures) for name, figures in LINEAR.get(data, {}).items()]
        title = f"{data}, val, % (± half of a 95% t-interval over the seeds)"
        show_table(["side", *_COLUMNS, "zero-shot"], cells, title=title)
    columns = ["data", "side", "seeds", "steps", "samples seen", "minutes", "parameters"]
    show_table(columns, [_cost_cells(row) for row in rows], title="Cost of a run (minutes: mean over the seeds)")
    if found:
        show_table(
            ["data", "metric", "ours ÷ open_clip", "95%"],
            [[one["data"], one["metric"], f"{one['ratio']:.3f}", _range(one["interval"])] for one in found],
            title=f"Ratios of means (goal: text_to_image_recall@10 ≥ {GOAL} ×)",
        )


def show_queries(rows: Sequence[Row]) -> None:
    """The headline metric of each run, with its interval over the queries."""
    cells = [
        [row.data, row.name, result.seed, f"{100 * result.metrics[HEADLINE]:.1f}", _percent(result.query_interval)]
        for row in rows
        for result in row.results
    ]
    columns = ["data", "side", "seed", "t→i R@10", "95% over queries (bootstrap)"]
    show_table(columns, cells, title="Each run")


def show_ablations(full: Row, ablated: Sequence[Row]) -> None:
    """The loss when a default is reverted; full: our recipe with the same seeds."""
    everything = [_figure(full.values(metric)) for metric in _ablation_metrics(full)]
    cells = [["nothing", *everything, "", _percent(full.interval(HEADLINE))]]
    for row in ablated:
        figures = [_figure(row.values(metric)) for metric in _ablation_metrics(full)]
        lost = mean(full.values(HEADLINE)) - mean(row.values(HEADLINE))
        brings = f"{100 * lost:+.1f}" if row.results[0].trainer == "ours" else ""
        cells.append([row.name, *figures, brings, _percent(row.interval(HEADLINE))])
    of = "over the seeds" if len(full.results) > 1 else "over the queries of the one run, not over seeds"
    names = {HEADLINE: "t→i R@10", "image_to_text_recall@10": "i→t R@10", "zero_shot": "zero-shot"}
    columns = [
        "reverted, one at a time",
        *(names[metric] for metric in _ablation_metrics(full)),
        "gain",
        "95% of t→i R@10",
    ]
    show_table(columns, cells, title=f"{full.data}: gain of each default, %")
    print(f"Seeds {_seeds(full)}; intervals are {of}.")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bar plot of the headline metric of both sides on each data set, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, data = list(dict.fromkeys(row.name for row in rows)), list(dict.fromkeys(row.data for row in rows))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        side = [row for row in rows if row.name == name]
        places = [data.index(row.data) + (number - (len(names) - 1) / 2) * width for row in side]
        means = [mean(row.values(HEADLINE)) for row in side]
        ends = [row.interval(HEADLINE) for row in side]
        reach = [
            [max(middle - low, 0.0) for middle, (low, _) in zip(means, ends, strict=True)],
            [max(high - middle, 0.0) for middle, (_, high) in zip(means, ends, strict=True)],
        ]
        axes.bar(places, means, width, yerr=reach, capsize=4, label=name, color=f"C{number}")
    axes.set_xticks(range(len(data)), data)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("text→image recall@10")
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _ablation_metrics(full: Row) -> tuple[str, ...]:
    two = (HEADLINE, "image_to_text_recall@10")
    return (*two, "zero_shot") if full.values("zero_shot") else two


def _cost_cells(row: Row) -> list[Any]:
    first, minutes = row.results[0], mean(result.minutes for result in row.results)
    return [row.data, row.name, _seeds(row), first.steps, first.samples, f"{minutes:.1f}", first.parameters]


def _linear_cells(name: str, figures: tuple[float, float, float, float | None]) -> list[str]:
    shown = ["–" if value is None else f"{100 * value:.1f}" for value in figures]
    return [name, *shown[:3], "–", "–", "–", shown[3]]


def _figure(values: list[float]) -> str:
    if not values:
        return "–"
    half = half_width(values)
    return f"{100 * mean(values):.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _seeds(row: Row) -> str:
    return " ".join(str(result.seed) for result in row.results)


def _percent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"
