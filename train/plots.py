"""The curves of one run, or of several over one another, as a PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.files import atomic_write
from vlm.train.averaging import PathPoint
from vlm.train.recipes import ReferenceCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes, and the metrics drawn in it. is_smoothed: the mean of neighbours is drawn over the values.

    min_upper_limit: the axis reaches at least this far, so that a small fraction does not look large.
    """

    heading: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    is_smoothed: bool = True
    is_fraction: bool = False
    is_logarithmic: bool = False
    starts_at_zero: bool = False
    min_upper_limit: float = 0.0


_PANELS = (
    Panel(
        heading="recall on val",
        names=(
            "text_to_image_recall@10",
            "image_to_text_recall@10",
            "text_to_image_recall@1",
            "image_to_text_recall@1",
        ),
        labels=("text→image @10", "image→text @10", "text→image @1", "image→text @1"),
        is_smoothed=False,
        is_fraction=True,
        starts_at_zero=True,
    ),
    Panel(heading="gradient norm, before clipping", names=("gradient_norm",), is_logarithmic=True),
    Panel(heading="inverse temperature", names=("logit_scale",), is_smoothed=False),
    Panel(heading="learning rate", names=("learning_rate",), is_smoothed=False, starts_at_zero=True),
    Panel(heading="samples a second", names=("samples_per_second",), starts_at_zero=True),
    Panel(
        heading="time waiting for data",
        names=("data_wait",),
        is_fraction=True,
        starts_at_zero=True,
        min_upper_limit=0.1,
    ),
    Panel(heading="model FLOP utilisation", names=("mfu",), is_fraction=True, starts_at_zero=True, min_upper_limit=0.1),
)
_COMPARISON_METRICS = ("text_to_image_recall@10", "text_to_image_recall@1")
_COLUMNS = 3
_MARKED_POINTS = 30
_WHOLE_PERCENT_RANGE = 0.05
_MAX_SMOOTHING_RADIUS = 200


def draw_curves(metrics: Lines, path: Path, *, title: str) -> None:
    """Draw the metrics of a run over its steps into a PNG: loss and its terms, recall, gradient norm, temperature,
    learning rate, speed, data wait, MFU; what it did not measure is left out."""
    loss = Panel(heading="loss", names=("loss", *_loss_terms_in(metrics)))
    panels: list[Panel] = []
    for panel in (loss, *_PANELS):
        if any(_points(metrics, name) for name in panel.names):
            panels.append(panel)

    def draw(axes: "Axes", panel: Panel) -> None:
        for number, name in enumerate(panel.names):
            label = panel.labels[number] if panel.labels else name
            _draw_line(axes, _points(metrics, name), label=label, colour=f"C{number}", is_smoothed=panel.is_smoothed)
        if len(panel.names) > 1 and len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize=8, frameon=False)

    _draw_panels(panels, draw, path, title=title)


def draw_comparison(
    runs: Mapping[str, Lines], path: Path, *, title: str, references: Sequence[ReferenceCurve] = (), steps: int = 0
) -> None:
    """Draw the curves of several runs, by name, over one another into a PNG.

    references: reference curves of a run of so many planned steps; each is drawn behind its metric.
    """
    expected = {reference.metric: reference for reference in references}
    drawn: list[Panel] = []
    for name, reference in expected.items():
        heading = f"{name.replace('_', ' ')}, {reference.kind} reference"
        drawn.append(Panel(heading=heading, names=(name,), is_fraction=name != "loss"))
    for panel in _single_panels():
        name = panel.names[0]
        if name not in expected and any(_points(lines, name) for lines in runs.values()):
            drawn.append(panel)
    first = drawn[0] if drawn else None

    def draw(axes: "Axes", panel: Panel) -> None:
        name = panel.names[0]
        if name in expected:
            _draw_reference(axes, expected[name], steps=steps)
        for number, (run, lines) in enumerate(runs.items()):
            _draw_line(axes, _points(lines, name), label=run, colour=f"C{number}", is_smoothed=panel.is_smoothed)
        # one legend is enough: a colour is the same run in all panels
        if panel is first:
            axes.legend(fontsize=8, frameon=False)

    _draw_panels(drawn, draw, path, title=title)


def draw_path(points: Sequence[PathPoint], path: Path, *, metric: str, max_drift: float) -> None:
    """The line between two models by what it gives on both data sets, as figure 1 of WiSE-FT (Wortsman et al. 2022)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    measured: list[tuple[float, float, PathPoint]] = []
    for point in points:
        if point.other is not None and point.metric is not None:
            measured.append((100 * point.other, 100 * point.metric, point))
    if measured:
        axes.plot([other for other, _, _ in measured], [value for _, value, _ in measured], color="C0", marker="o")
    for other, value, point in measured:
        axes.annotate(f"α {point.alpha:g}", (other, value), xytext=(4, 4), textcoords="offset points")
        if point.alpha == 0:
            axes.axvline(other - 100 * max_drift, color="C3", linestyle="--", label=f"bound, {max_drift:.1%} below")
            axes.legend()
    axes.set_xlabel(f"{metric} on other data, %")
    axes.set_ylabel(f"{metric} on the data it was tuned for, %")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _single_panels() -> list[Panel]:
    """The panels with one metric each, for several runs."""
    singles = [Panel(heading="loss", names=("loss",))]
    for panel in _PANELS:
        for name, label in zip(panel.names, panel.labels or ("",), strict=True):
            if not label or name in _COMPARISON_METRICS:
                heading = f"{panel.heading}, {label}" if label else panel.heading
                singles.append(replace(panel, heading=heading, names=(name,)))
    return singles


def _draw_panels(panels: Sequence[Panel], draw: Any, path: Path, *, title: str) -> None:
    # imported late: the listing of runs needs neither matplotlib nor a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(len(panels), 1))
    rows = max(-(-len(panels) // columns), 1)
    width = 4.6 * columns
    height = 3.1 * rows + 0.5
    figure = Figure(figsize=(width, height))
    # in inches, by hand: a layout engine draws every label twice more, which took longer than the picture itself
    figure.subplots_adjust(
        left=0.65 / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - 0.75 / height,
        wspace=0.2,
        hspace=0.32,
    )
    # without pyplot, which keeps global state and chooses a backend by the environment
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        draw(axes, panel)
        axes.set_title(panel.heading, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _set_scales(axes, panel)
        if number > len(panels) - columns:
            axes.set_xlabel("step", fontsize=9)
    if not panels:
        figure.text(0.5, 0.5, "nothing was measured", ha="center")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _set_scales(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=True)
    if panel.starts_at_zero:
        # a loss of throughput by 1% should look like 1%
        axes.set_ylim(0, max(axes.get_ylim()[1], panel.min_upper_limit))
    if panel.is_fraction:
        is_wide = axes.get_ylim()[1] - axes.get_ylim()[0] > _WHOLE_PERCENT_RANGE
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if is_wide else None))


def _draw_line(axes: "Axes", points: list[tuple[int, float]], *, label: str, colour: str, is_smoothed: bool) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if len(points) <= _MARKED_POINTS or not is_smoothed:
        marker = "o" if len(points) <= _MARKED_POINTS else ""
        axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.4, label=label, color=colour)
        return
    axes.plot(steps, values, linewidth=0.6, alpha=0.3, color=colour)
    axes.plot(steps, _smooth(values), linewidth=1.4, label=label, color=colour)


def _draw_reference(axes: "Axes", reference: ReferenceCurve, *, steps: int) -> None:
    shares, low, high = zip(*reference.points, strict=True)
    positions = [share * steps for share in shares]
    # a published figure is one point at the end of a run, where a band would have no width
    if len(positions) == 1:
        middle = (low[0] + high[0]) / 2
        half = (high[0] - low[0]) / 2
        axes.errorbar(positions, [middle], yerr=[half], color="0.45", capsize=5, linewidth=2, label="expected")
    else:
        axes.fill_between(positions, low, high, color="0.6", alpha=0.3, linewidth=0, label="expected")


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value with its neighbours, over a fortieth of the curve to each side."""
    radius = min(max(len(values) // 40, 1), _MAX_SMOOTHING_RADIUS)
    smoothed: list[float] = []
    for position in range(len(values)):
        # symmetric up to the ends, so that a rising curve is not bent there
        near = min(radius, position, len(values) - 1 - position)
        window = values[position - near : position + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _points(lines: Lines, name: str) -> list[tuple[int, float]]:
    points: list[tuple[int, float]] = []
    for line in lines:
        # a line has what was measured at its step, and text beside numbers
        if isinstance(line.get(name), int | float):
            points.append((line["step"], line[name]))
    return points


def _loss_terms_in(lines: Lines) -> list[str]:
    """The loss terms whose values are on the lines; none if the loss is a single one."""
    from vlm.train.task import LOSS_TERMS

    names = [name for name in LOSS_TERMS if _points(lines, name)]
    return names if len(names) > 1 else []
