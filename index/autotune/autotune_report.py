"""A plan for people: the table of what was tried, and the recall-latency plot."""

from pathlib import Path
from typing import Any

from vlm.console import show_table
from vlm.files import atomic_write
from vlm.index.autotune.autotuner import Plan
from vlm.index.autotune.trial import Trial, format_bytes

PLOT = "plan.png"


def show_plan(plan: Plan) -> None:
    """The trials as two tables on stdout, then what was taken and why."""
    counts = list(next(iter(plan.trials[0].recall.values())))
    columns = ["kind", "tuned to", *(f"{_short(way)} R@{count}" for way in plan.judged_by for count in counts), ""]
    show_table(columns, [_recall_cells(trial, plan, counts) for trial in plan.trials], title=_heading(plan))
    columns = ["kind", "p50 ms", "p95 ms", "p99 ms", "questions/s", "memory", "mapped from disk", "built in s"]
    show_table(columns, [_cost_cells(trial) for trial in plan.trials], title="One question at a time on one thread")
    for direction in sorted({direction for trial in plan.trials for direction in trial.turned}):
        _show_reversed(plan, direction)
    for direction, why in plan.unturned.items():
        print(f"Not measured: {direction}: {why}.")
    for name, why in plan.left_out.items():
        print(f"Not tried: {name}: {why}.")
    print(f"Taken: {plan.why}")
    if plan.is_optimistic:
        print("Its recall is optimistic: rows were asked with, and texts need more. Give --texts with text embeddings.")


def _show_reversed(plan: Plan, direction: str) -> None:
    turned = {trial.label: trial.turned[direction] for trial in plan.trials if direction in trial.turned}
    first = next(iter(turned.values()))
    columns = ["kind", *(f"{_short(direction)} R@{count}" for count in first.recall), "p50 ms", "p95 ms", "p99 ms"]
    rows = [
        [
            label,
            *(f"{recall:.3f}" for recall in found.recall.values()),
            *(f"{ms:.3g}" for ms in (found.latency.p50_ms, found.latency.p95_ms, found.latency.p99_ms)),
        ]
        for label, found in turned.items()
    ]
    asked, rows_of = direction.split("→")
    show_table(columns, rows, title=f"The other way round: {first.rows:,} {rows_of}s as rows, asked with {asked}s")


def draw_plan(plan: Plan, path: Path) -> None:
    """Recall of the promised direction against median latency, as a PNG.

    A line is a kind with less effort and with more, a square the setting that was tuned or a kind without effort.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, trial in enumerate(plan.trials):
        colour, is_taken = f"C{number}", trial is plan.winner
        curve = [(point.ms, point.recall) for point in trial.curve]
        axes.plot(*_columns(curve), marker="o", markersize=3.5, linewidth=1.2, color=colour)
        axes.plot(
            *_tuned_point(trial, plan),
            label=f"{trial.label}, {format_bytes(trial.resident_bytes)}",
            linestyle="none",
            marker="*" if is_taken else "s",
            markersize=15 if is_taken else 6,
            color=colour,
            zorder=3,
        )
    axes.axhline(plan.promise.recall, color="0.4", linestyle=":", linewidth=1)
    _scale(axes, plan)
    _label(axes, plan)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [ms for ms, _ in points], [recall for _, recall in points]


def _tuned_point(trial: Trial, plan: Plan) -> tuple[float, float]:
    return trial.measured.p50_ms, trial.recall[plan.direction][plan.promise.at]


def _scale(axes: Any, plan: Plan) -> None:
    """Room around what is shown, and no recall above 1; latencies in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    points = [_tuned_point(trial, plan) for trial in plan.trials]
    points += [(point.ms, point.recall) for trial in plan.trials for point in trial.curve]
    milliseconds, recalls = _columns(points)
    lowest = min(*recalls, plan.promise.recall)
    room = 0.05 * max(1 - lowest, 0.01)
    axes.set_ylim(lowest - room, 1 + room)
    axes.set_xscale("log")
    axes.set_xlim(min(milliseconds) / 2, max(milliseconds) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Any, plan: Plan) -> None:
    axes.set_xlabel(f"median of one question on one thread, ms ({plan.sample_rows:,} rows)", fontsize=9)
    axes.set_ylabel(f"{plan.direction} recall@{plan.promise.at}", fontsize=9)
    axes.set_title(f"{plan.winner.label} taken (★); dotted: {plan.promise.describe()}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _heading(plan: Plan) -> str:
    judged = ", ".join(f"{count:,} {direction}" for direction, count in plan.judged_by.items())
    scaled = "" if all(trial.latency == trial.measured for trial in plan.trials) else ", scaled to all rows"
    return (
        f"{plan.promise.describe()}, for {plan.num_rows:,} rows: tried on {plan.sample_rows:,}{scaled}; tuned with "
        f"{plan.tuned_with:,} questions, judged by others: {judged}"
    )


def _short(direction: str) -> str:
    """Directions by their first letters.

    >>> _short("text→image")
    't→i'
    """
    return "→".join(word[0] for word in direction.split("→"))


def _recall_cells(trial: Trial, plan: Plan, counts: list[int]) -> list[Any]:
    tuned = {name: trial.wishes[name] for name in ("nprobe", "ef_search", "rerank") if name in trial.wishes}
    keeps = "taken" if trial is plan.winner else "keeps it"
    return [
        trial.label,
        ", ".join(f"{name} {value}" for name, value in tuned.items()),
        *(f"{trial.recall[way][count]:.3f}" for way in plan.judged_by for count in counts),
        f"misses {' and '.join(trial.misses)}" if trial.misses else keeps,
    ]


def _cost_cells(trial: Trial) -> list[Any]:
    latency = trial.latency
    return [
        trial.label,
        *(f"{ms:.3g}" for ms in (latency.p50_ms, latency.p95_ms, latency.p99_ms)),
        f"{latency.per_second:,.0f}",
        format_bytes(trial.resident_bytes),
        format_bytes(trial.mapped_bytes) if trial.mapped_bytes else "–",
        f"{trial.build_seconds:.1f}",
    ]
