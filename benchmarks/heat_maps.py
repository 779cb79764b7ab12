#!/usr/bin/env python
"""Pointing game, insertion and deletion of every method of explaining, on drawn scenes of two shapes.

    benchmarks/run heat_maps MODEL [--scenes 200] [--contrast] [--json]

MODEL has been trained on the synthetic shapes, e.g. by `vlm quickstart` (quickstart-out/run). Each scene shows two
single shapes of unlike form and colour, side by side or one above the other; the text names one of them ("red star").
A map hits if its maximum lies on that shape, and within the margin if it lies at most 15/224 of the side beside it
(Zhang et al. 2018). "right shape" is the share of maps that are hotter on the named shape than on the other.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from vlm.cli.main import print_error
from vlm.console import percent, show_json, show_table, track
from vlm.data.synthetic.shapes import DrawnScenes, Scene, Split, all_scenes, draw_scenes, shape_colour_class
from vlm.errors import UsageError, VlmError
from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.heat_map_scores import insertion_deletion, pointing_hit
from vlm.models.heat_maps import METHODS, heat_maps
from vlm.models.load import load_model
from vlm.models.model import VisionLanguageModel, normalise

_PLACES = (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
_DRAWN_PIXELS = 96
_MARGIN = 15 / 224


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of heat maps."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model that knows the synthetic shapes."""

    scenes: int = 200
    """Scenes; each is explained for both of its shapes."""

    split: Split = "train"
    """Combinations of shape and colour: those of training, or those never seen."""

    contrast: bool = False
    """Explain each shape against the other one's name."""

    shifts: int = 0
    """Shifts of the image along each axis; 0 decides by the map."""

    seed: int = 0
    """Of the scenes."""

    json: bool = False
    """Print the figures as JSON."""


def two_shape_scenes(number: int, *, split: Split, seed: int) -> Iterator[tuple[tuple[Scene, Scene], DrawnScenes]]:
    """Scenes of two single shapes that differ in form and colour."""
    rng = np.random.default_rng(seed)
    singles = [scene for scene in all_scenes(split) if scene.count == 1]
    for places in itertools.islice(itertools.cycle(_PLACES), number):
        first = singles[int(rng.integers(len(singles)))]
        others = [
            scene
            for scene in singles
            if scene.shape != first.shape and scene.colour not in (first.colour, first.background)
        ]
        second = others[int(rng.integers(len(others)))]
        pair = (
            replace(first, position=places[0]),
            replace(second, position=places[1], background=first.background),
        )
        yield pair, draw_scenes(pair, pixels=_DRAWN_PIXELS, rng=rng)


def measure(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Figures by method; of one that the tower does not offer, why."""
    model = load_model(arguments.model)
    rows: dict[str, list[tuple[float, ...]]] = {}
    errors: dict[str, str] = {}
    scenes = list(two_shape_scenes(arguments.scenes, split=arguments.split, seed=arguments.seed))
    for pair, drawn in track(scenes, total=len(scenes), what="explaining", unit="scene"):
        for method in METHODS:
            if method == "auto" or method in errors:
                continue
            try:
                rows.setdefault(method, []).extend(_scores(model, pair, drawn, method, arguments))
            except UsageError as error:
                errors[method] = str(error)
    figures: dict[str, dict[str, Any]] = {method: {"error": error} for method, error in errors.items()}
    for method, values in rows.items():
        if values:
            figures[method] = _summary(np.array(values), arguments.scenes)
    return figures


def _scores(
    model: VisionLanguageModel, pair: tuple[Scene, Scene], drawn: DrawnScenes, method: Any, arguments: Arguments
) -> list[tuple[float, ...]]:
    view = model.view.of_image(drawn.image)
    masks = [_mask(coverage, model.view.size) for coverage in drawn.coverages]
    texts = model.embed_texts(list(map(shape_colour_class, pair)))
    directions = texts - texts.flip(0) if arguments.contrast else texts
    pixels = normalise(torch.from_numpy(view)[None], model.view)
    maps = heat_maps(model.network, pixels, directions, method, shifts=arguments.shifts).numpy()
    scores: list[tuple[float, ...]] = []
    for number, (heat, direction) in enumerate(zip(maps, directions, strict=True)):

        def score(images: np.ndarray, direction: torch.Tensor = direction) -> np.ndarray:
            return (model.embed_images(torch.from_numpy(images)) @ direction).numpy()

        carried = insertion_deletion(score, view, heat)
        scores.append(
            (
                pointing_hit(heat, masks[number]),
                pointing_hit(heat, masks[number], margin=_MARGIN * model.view.size),
                float(heat[masks[number]].mean() > heat[masks[1 - number]].mean()),
                carried.insertion,
                carried.deletion,
                float(masks[number].mean()),
            )
        )
    return scores


def _mask(coverage: np.ndarray, size: int) -> np.ndarray:
    resized = torch.nn.functional.interpolate(torch.from_numpy(coverage)[None, None], size=(size, size), mode="area")
    return resized[0, 0].numpy() > 0.5


def _summary(values: np.ndarray, num_scenes: int) -> dict[str, Any]:
    clusters = np.repeat(np.arange(num_scenes), 2)
    hits = mean_interval(values[:, 0], rng=np.random.default_rng(0), clusters=clusters, share=True)
    names = ("hit", "hit_within_margin", "right_shape", "insertion", "deletion", "area")
    return dict(zip(names, values.mean(axis=0).tolist(), strict=True)) | {"low": hits.low, "high": hits.high}


def show(figures: dict[str, dict[str, Any]]) -> None:
    """A row for each method."""
    columns = ["method", "hit", "95% interval", "within margin", "right shape", "insertion", "deletion", "difference"]
    rows: list[list[object]] = []
    for method, of_method in figures.items():
        if "error" in of_method:
            rows.append([method, of_method["error"], *[""] * 6])
            continue
        shares = [percent(of_method[name]) for name in ("hit_within_margin", "right_shape")]
        interval = f"{percent(of_method['low'])} to {percent(of_method['high'])}"
        areas = [of_method["insertion"], of_method["deletion"], of_method["insertion"] - of_method["deletion"]]
        rows.append([method, percent(of_method["hit"]), interval, *shares, *(f"{area:.3f}" for area in areas)])
    area = next((of_method["area"] for of_method in figures.values() if "area" in of_method), 0.0)
    show_table(columns, rows, title=f"the named shape covers {percent(area)} of the image: what chance hits")


def main() -> int:
    """Measure, show."""
    arguments = tyro.cli(Arguments, prog="benchmarks/run heat_maps", config=(tyro.conf.FlagCreatePairsOff,))
    try:
        figures = measure(arguments)
    except VlmError as error:
        return print_error(str(error), error.exit_code)
    if arguments.json:
        show_json(figures)
    else:
        show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
