"""The report of an autotuner's plan: tables of its trials, and the recall-latency plot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm.console import percent, show_table
from vlm.files import atomic_write
from vlm.index.autotune.autotuner import Plan
from vlm.index.autotune.trial import Latency, ReversedResult, Trial, format_bytes

PLOT = "plan.png"


def show_plan(plan: Plan) -> None:
    """Show the trials as tables on stdout, then which was taken and why."""
    # recall is measured at the same numbers of results in every direction
    counts = list(next(iter(plan.trials[0].recall.values())))
    headings: list[str] = []
    for direction in plan.judged_by:
        headings += _recall_headings(direction, counts)
    recall_rows: list[list[Any]] = []
    cost_rows: list[list[Any]] = []
    reversed_directions: set[str] = set()
    for trial in plan.trials:
        recall_rows.append(_recall_cells(trial, plan, counts))
        cost_rows.append(_cost_cells(trial))
        reversed_directions.update(trial.turned)

    show_table(["index type", "search parameters", *headings, ""], recall_rows, title=_heading(plan))
    columns = ["index type", "p50 ms", "p95 ms", "p99 ms", "queries/s", "memory", "mapped from disk", "build s"]
    show_table(columns, cost_rows, title="Single queries on one thread")
    for direction in sorted(reversed_directions):
        _show_reversed(plan, direction)
    for direction, why in plan.unturned.items():
        print(f"Not measured: {direction}: {why}.")
    for name, why in plan.left_out.items():
        print(f"Not tried: {name}: {why}.")
    print(f"Taken: {plan.why}")
    is_enough = plan.machine.is_enough
    print("One machine is enough:" if is_enough else "One machine is not enough (vlm index build --engine milvus):")
    for line in plan.machine.arithmetic:
        print(f"  {line}")
    if plan.is_optimistic:
        print(
            "Its recall is optimistic: the queries were rows, and texts need more effort. Give text queries by --texts."
        )


def _show_reversed(plan: Plan, direction: str) -> None:
    # a configuration that needs more rows than this direction has was not built for it
    results: dict[str, ReversedResult] = {}
    for trial in plan.trials:
        if direction in trial.turned:
            results[trial.label] = trial.turned[direction]
    first = next(iter(results.values()))
    columns = ["index type", *_recall_headings(direction, first.recall), "p50 ms", "p95 ms", "p99 ms"]
    rows = []
    for label, result in results.items():
        recalls = map(percent, result.recall.values())
        rows.append([label, *recalls, *_percentiles(result.latency)])
    query_modality, row_modality = direction.split("→")
    title = f"Reversed direction: {first.rows:,} {row_modality}s as rows, {query_modality}s as queries"
    show_table(columns, rows, title=title)


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw recall in the target's direction against median latency, as a PNG.

    A line is an index type with less effort and with more, a square its tuned search parameters, the star the winner.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not by pyplot, which keeps every figure alive and may look for a display
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, trial in enumerate(plan.trials):
        colour = f"C{number}"
        is_winner = trial is plan.winner
        axes.plot(*_curve(trial), marker="o", markersize=3.5, linewidth=1.2, color=colour)
        axes.plot(
            *_tuned_point(trial, plan),
            label=f"{trial.label}, {format_bytes(trial.resident_bytes)}",
            linestyle="none",
            marker="*" if is_winner else "s",
            markersize=15 if is_winner else 6,
            color=colour,
            zorder=3,  # above the lines of later trials too
        )
    axes.axhline(plan.promise.recall, color="0.4", linestyle=":", linewidth=1)
    _scale(axes, plan)
    _label(axes, plan)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _curve(trial: Trial) -> tuple[list[float], list[float]]:
    """Latencies and recalls of a trial's curve; both empty for a type without effort."""
    milliseconds: list[float] = []
    recalls: list[float] = []
    for point in trial.curve:
        milliseconds.append(point.ms)
        recalls.append(point.recall)
    return milliseconds, recalls


def _tuned_point(trial: Trial, plan: Plan) -> tuple[float, float]:
    return trial.measured.p50_ms, trial.recall[plan.direction][plan.promise.at]


def _scale(axes: Any, plan: Plan) -> None:
    """Leave room around the points, show no recall above 1, and write latencies as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    milliseconds: list[float] = []
    # the target's line is in view even where every trial is above it
    recalls = [plan.promise.recall]
    for trial in plan.trials:
        curve_milliseconds, curve_recalls = _curve(trial)
        tuned_milliseconds, tuned_recall = _tuned_point(trial, plan)
        milliseconds += [*curve_milliseconds, tuned_milliseconds]
        recalls += [*curve_recalls, tuned_recall]
    lowest = min(recalls)
    room = 0.05 * max(1 - lowest, 0.01)
    axes.set_ylim(lowest - room, 1 + room)
    # index types differ in latency by orders of magnitude
    axes.set_xscale("log")
    axes.set_xlim(min(milliseconds) / 2, max(milliseconds) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))


def _label(axes: Any, plan: Plan) -> None:
    axes.set_xlabel(f"median latency of a query on one thread, ms ({plan.sample_rows:,} rows)", fontsize=9)
    axes.set_ylabel(f"{plan.direction} recall@{plan.promise.at}", fontsize=9)
    axes.set_title(f"{plan.winner.label} taken (★); dotted: {plan.promise.describe()}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _heading(plan: Plan) -> str:
    evaluated = ", ".join(f"{count:,} {direction}" for direction, count in plan.judged_by.items())
    linked = f"; {plan.linked_with:,} more link the graph" if plan.linked_with else ""
    is_extrapolated = any(trial.latency != trial.measured for trial in plan.trials)
    return (
        f"{plan.promise.describe()}, for {plan.num_rows:,} rows: tried on {plan.sample_rows:,}"
        f"{', extrapolated to all rows' if is_extrapolated else ''}; tuned with {plan.tuned_with:,} queries, "
        f"evaluated on others: {evaluated}{linked}"
    )


def _short(direction: str) -> str:
    """Directions by their first letters.

    >>> _short("text→image")
    't→i'
    """
    return "→".join(word[0] for word in direction.split("→"))


def _recall_headings(direction: str, counts: Iterable[int]) -> list[str]:
    return [f"{_short(direction)} R@{count}" for count in counts]


def _recall_cells(trial: Trial, plan: Plan, counts: list[int]) -> list[Any]:
    search_params: list[str] = []
    for name in ("nprobe", "ef_search", "rerank"):
        if name in trial.wishes:
            search_params.append(f"{name} {trial.wishes[name]}")
    recalls: list[float] = []
    for direction in plan.judged_by:
        recalls += map(trial.recall[direction].__getitem__, counts)
    verdict = "taken" if trial is plan.winner else "meets it"
    return [
        trial.label,
        ", ".join(search_params),
        *map(percent, recalls),
        f"misses {' and '.join(trial.misses)}" if trial.misses else verdict,
    ]


def _cost_cells(trial: Trial) -> list[Any]:
    return [
        trial.label,
        *_percentiles(trial.latency),
        f"{trial.latency.per_second:,.0f}",
        format_bytes(trial.resident_bytes),
        format_bytes(trial.mapped_bytes) if trial.mapped_bytes else "–",
        f"{trial.build_seconds:.1f}",
    ]


def _percentiles(latency: Latency) -> list[str]:
    return [f"{ms:.3g}" for ms in (latency.p50_ms, latency.p95_ms, latency.p99_ms)]
