"""A plan for people: the table of what was tried, and the recall-latency plot."""

from pathlib import Path
from typing import Any

from vlm.console import show_table
from vlm.files import replacing
from vlm.index.planner.choice import Plan
from vlm.index.planner.promise import show_bytes
from vlm.index.planner.trial import Trial

PLOT = "plan.png"


def show_plan(plan: Plan) -> None:
    """The trials as two tables on stdout, then what was taken and why."""
    counts = list(next(iter(plan.trials[0].recall.values())))
    columns = ["kind", "tuned to", *(f"{_short(way)} R@{count}" for way in plan.judged_by for count in counts), ""]
    show_table(columns, [_recall_cells(trial, plan, counts) for trial in plan.trials], title=_heading(plan))
    columns = ["kind", "p50 ms", "p95 ms", "p99 ms", "questions/s", "memory", "mapped from disk", "built in s"]
    show_table(columns, [_cost_cells(trial) for trial in plan.trials], title="One question at a time on one thread")
    for name, why in plan.left_out.items():
        print(f"Not tried: {name}: {why}.")
    print(f"Taken: {plan.why}")
    if plan.is_optimistic:
        print("Its recall is optimistic: rows were asked with, and texts need more. Give --texts with text embeddings.")


def draw_plan(plan: Plan, path: Path) -> None:
    """Recall of the promised direction against median latency, a line a kind, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, trial in enumerate(plan.trials):
        colour, label = f"C{number}", f"{trial.label}, {show_bytes(trial.resident_bytes)}"
        axes.plot(
            [point.ms for point in trial.curve],
            [point.recall for point in trial.curve],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            color=colour,
            label=label if trial.curve else "",
        )
        is_taken = trial is plan.winner
        at = (trial.measured.p50_ms, trial.recall[plan.direction][plan.promise.at])
        axes.plot(
            *at,
            label="" if trial.curve else label,
            linestyle="none",
            marker="*" if is_taken else "s",
            markersize=15 if is_taken else 6,
            color=colour,
            zorder=3,
        )
    axes.axhline(plan.promise.recall, color="0.4", linestyle=":", linewidth=1)
    _label(axes, plan)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _label(axes: Any, plan: Plan) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(f"median of one question on one thread, ms ({plan.sample_rows:,} rows)", fontsize=9)
    axes.set_ylabel(f"{plan.direction} recall@{plan.promise.at}", fontsize=9)
    axes.set_title(f"{plan.winner.label} taken (★); dotted: {plan.promise.in_words()}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _heading(plan: Plan) -> str:
    judged = ", ".join(f"{count:,} {direction}" for direction, count in plan.judged_by.items())
    scaled = "" if all(trial.latency == trial.measured for trial in plan.trials) else ", scaled to all rows"
    return (
        f"{plan.promise.in_words()}, for {plan.num_rows:,} rows: tried on {plan.sample_rows:,}{scaled}; tuned with "
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
        show_bytes(trial.resident_bytes),
        show_bytes(trial.mapped_bytes) if trial.mapped_bytes else "–",
        f"{trial.build_seconds:.1f}",
    ]
