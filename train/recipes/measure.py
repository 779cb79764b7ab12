"""The measured band of a recipe, from finished runs that differ in their seed alone, as an entry for `measured.py`.

Run as `python -m vlm.train.recipes.measure RUN RUN RUN --source "3 seeds, commit …" [--metric loss …]`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm.train.recipes.bands import Band, band_of_runs
from vlm.train.telemetry.runs import read_run

METRICS = ("loss", "text_to_image_recall@10", "image_to_text_recall@10")


def entry_of(band: Band) -> str:
    """A band as Python source."""
    points = "\n".join(f"        ({share:.4g}, {low:.4g}, {high:.4g})," for share, low, high in band.points)
    return (
        f"Band(\n    metric={band.metric!r},\n    kind={band.kind!r},\n    source={band.source!r},\n"
        f"    width={band.width:.4g},\n    points=(\n{points}\n    ),\n),"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the bands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--source", required=True, help="what the runs were: seeds, commit, machine")
    parser.add_argument("--metric", nargs="+", default=METRICS)
    arguments = parser.parse_args(argv)
    runs = [read_run(folder) for folder in arguments.runs]
    for metric in arguments.metric:
        band = band_of_runs([(run.lines, run.planned_steps) for run in runs], metric, source=arguments.source)
        print(entry_of(band))


if __name__ == "__main__":
    main()
