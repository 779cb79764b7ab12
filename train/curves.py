"""The curves of a run as a picture."""

from pathlib import Path
from typing import Any

from vlm.files import replacing

_PANELS = (
    ("loss", ("loss", "contrastive", "caption")),
    ("recall on val", ("text_to_image_recall@1", "text_to_image_recall@10", "image_to_text_recall@10")),
    ("learning rate", ("learning_rate",)),
    ("samples a second", ("samples_per_second",)),
)


def draw_curves(metrics: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw loss, recall, learning rate and speed over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (heading, names) in enumerate(_PANELS, start=1):
        axes = figure.add_subplot(2, 2, number)
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if name in line]
            if points:
                marker = "o" if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1.4, label=name)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if axes.has_data():
            axes.legend(fontsize=8, frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
