"""Where a run is expected to be, as bands around curves, and where it leaves them.

Which recipe a run follows, and in what two or more configurations differ.

Bands measured with this code, as `python -m vlm.train.recipes` prints them.

Each recipe: its data, its commands, what is expected of it and where that figure is from.

The measured band of a recipe, from finished runs that differ in their seed alone, as an entry for `measured.py`.

Run as `python -m vlm.train.recipes RUN RUN RUN --source "3 seeds, commit …" [--metric loss …]`.

Write docs/recipes.md from the table. Run as `python -m vlm.train.recipes`.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal

from vlm.config import lookup
from vlm.errors import UsageError
from vlm.train.history import read_run
from vlm.train.presets import PRESETS
from vlm.train.run_config import FREE_ON_RESUME

Lines = Sequence[Mapping[str, Any]]

REPORT_FRACTIONS = tuple(number / 10 for number in range(1, 11))
_END_WIDTH = 0.01
_ROUNDING = 0.5
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t at 97.5% for 1 to 15 degrees of freedom; the last is also used beyond, a little too wide."""


@dataclass(frozen=True, kw_only=True)
class ReferenceCurve:
    """What one metric of a recipe is expected to be in the course of a run.

    points: (share of the run's steps, low, high), ascending. The value of a run at a share is the mean of what it
    measured in the `width` around it, a share of the run too; without a `width`, what it measured last before it.
    kind: measured with this code, or published by others, mostly as a figure at the end. source: the runs, the paper.
    """

    metric: str
    points: tuple[tuple[float, float, float], ...]
    kind: Literal["measured", "published"]
    source: str
    width: float = 0.0

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        return self.metric == "loss"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A place where a run is outside its band: share of the run, its value, the band there."""

    share: float
    value: float
    low: float
    high: float
    is_better: bool


@dataclass(frozen=True, kw_only=True)
class ReferenceComparison:
    """A run against one band: how many of its points could be compared, and those outside."""

    band: ReferenceCurve
    compared: int
    departures: tuple[Deviation, ...]

    def summary(self, steps: int) -> str:
        """In words; steps is the planned length of the run."""
        name = f"{self.band.metric} ({self.band.kind})"
        if not self.compared:
            return f"{name}: the run has measured nothing that could be compared yet."
        if not self.departures:
            places = "at its one point" if self.compared == 1 else f"at all {self.compared} points"
            return f"{name}: inside the band {places}."
        first = self.departures[0]
        side = "better" if first.is_better else "worse"
        return (
            f"{name}: leaves the band at step {round(first.share * steps):,} ({first.share:.0%} of the run): "
            f"{first.value:.4g}, expected {first.low:.4g} to {first.high:.4g}, so {side}; outside at "
            f"{len(self.departures)} of {self.compared} points."
        )


def value_at(lines: Lines, metric: str, *, share: float, steps: int, width: float) -> float | None:
    """What a run of so many planned steps measured at a share of it; None where it measured nothing or is not there."""
    low = (share - (width / 2 or _END_WIDTH)) * steps
    high = min(share + width / 2, 1.0) * steps + _ROUNDING
    if not lines or lines[-1]["step"] < high - 2 * _ROUNDING:
        return None
    found = [line[metric] for line in lines if metric in line and low < line["step"] <= high]
    if not found:
        return None
    return fmean(found) if width else found[-1]


def compare_with_reference(band: ReferenceCurve, lines: Lines, steps: int) -> ReferenceComparison:
    """Where a run of so many planned steps leaves a band."""
    departures: list[Deviation] = []
    compared = 0
    for share, low, high in band.points:
        value = value_at(lines, band.metric, share=share, steps=steps, width=band.width)
        if value is None:
            continue
        compared += 1
        if not low <= value <= high:
            is_better = (value < low) == band.lower_is_better
            departures.append(Deviation(share=share, value=value, low=low, high=high, is_better=is_better))
    return ReferenceComparison(band=band, compared=compared, departures=tuple(departures))


def reference_curve_of_runs(
    runs: Sequence[tuple[Lines, int]], metric: str, *, source: str, shares: Sequence[float] = REPORT_FRACTIONS
) -> ReferenceCurve:
    """The band that one more run of the same recipe stays in, at each of K points, with a probability of 95%.

    runs: lines and planned steps of n runs that differ in their seed alone. The band is the prediction interval of a
    normal variable, mean ± t · s · √(1 + 1/n). Since three runs say little about the spread at one point, s² is the
    mean over the points (for a loss relative to its mean there, which falls by much in a run), and t that of
    (n - 1) · K / 2 degrees of freedom, n - 1 at the least, for neighbouring points of a run are not independent. Shares
    at which a run measured nothing are left out.

    Raises:
        UsageError: fewer than two runs, or nothing of this metric in all of them.
    """
    if len(runs) < 2:
        raise UsageError(f"A band needs two runs or more that differ in their seed, got {len(runs)}.")
    width = shares[1] - shares[0] if len(shares) > 1 else _END_WIDTH
    at: dict[float, list[float]] = {}
    for share in shares:
        values = [value_at(lines, metric, share=share, steps=steps, width=width) for lines, steps in runs]
        known = [value for value in values if value is not None]
        if len(known) == len(runs):
            at[share] = known
    if not at:
        raise UsageError(
            f"There is no {metric!r} that all {len(runs)} runs measured at the same tenths of their steps."
        )
    is_relative = metric == "loss"
    spread = sqrt(fmean(variance(values) / (fmean(values) ** 2 if is_relative else 1.0) for values in at.values()))
    freedom = (len(runs) - 1) * max(len(at) // 2, 1)
    half = _STUDENT_T[min(freedom, len(_STUDENT_T)) - 1] * sqrt(1 + 1 / len(runs)) * spread
    points = [(share, fmean(values), half * (fmean(values) if is_relative else 1.0)) for share, values in at.items()]
    limits = [(share, middle - reach, middle + reach) for share, middle, reach in points]
    return ReferenceCurve(
        metric=metric, points=_clip_to_valid_range(limits, metric), kind="measured", source=source, width=width
    )


def _clip_to_valid_range(
    points: Sequence[tuple[float, float, float]], metric: str
) -> tuple[tuple[float, float, float], ...]:
    """Recall cannot leave [0, 1], and no loss falls below 0."""
    most = 1.0 if "recall" in metric or "top1" in metric else float("inf")
    return tuple((share, max(low, 0.0), min(high, most)) for share, low, high in points)


_USER_SPECIFIC_KEYS = frozenset(
    {"data", "val", "run", "seed", "model.tokenizer", "loader.selection", "micro_batch", "precision"}
)
"""What everybody sets for themselves, beside what has no influence on the weights."""


def matching_recipe(configuration: Mapping[str, Any]) -> str:
    """The preset a saved configuration was made from without a change that matters; empty if none."""
    saved = _flat(configuration)
    for name, (_, preset) in PRESETS.items():
        wanted = _flat(asdict(preset))
        keys = (wanted.keys() & saved.keys()) - _USER_SPECIFIC_KEYS - FREE_ON_RESUME
        if saved and "model.architecture" in keys and all(_same(saved[key], wanted[key]) for key in keys):
            return name
    return ""


def config_differences(configurations: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys in which configurations differ, each with the value in all of them; None where one has it not."""
    flat = [_flat(configuration) for configuration in configurations]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(not _same(value, values[0]) for value in values)}


def _flat(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal, lists of a TOML file and tuples alike."""
    return (list(one) if isinstance(one, tuple) else one) == (list(other) if isinstance(other, tuple) else other)


MEASURED_CURVES: dict[str, tuple[ReferenceCurve, ...]] = {
    "tiny": (
        ReferenceCurve(
            metric="loss",
            kind="measured",
            source="3 seeds, commit da1ab40, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 2.443, 3.206),
                (0.2, 1.977, 2.595),
                (0.3, 1.744, 2.289),
                (0.4, 1.555, 2.04),
                (0.5, 1.331, 1.747),
                (0.6, 1.299, 1.704),
                (0.7, 1.23, 1.614),
                (0.8, 1.152, 1.511),
                (0.9, 1.148, 1.507),
                (1.0, 1.041, 1.366),
            ),
        ),
        ReferenceCurve(
            metric="text_to_image_recall@1",
            kind="measured",
            source="3 seeds, commit da1ab40, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 0.03007, 0.3893),
                (0.2, 0.1324, 0.4916),
                (0.3, 0.2067, 0.5659),
                (0.4, 0.2744, 0.6336),
                (0.5, 0.3107, 0.6699),
                (0.6, 0.3717, 0.7309),
                (0.7, 0.4141, 0.7733),
                (0.8, 0.4771, 0.8363),
                (0.9, 0.5194, 0.8786),
                (1.0, 0.5191, 0.8783),
            ),
        ),
        ReferenceCurve(
            metric="image_to_text_recall@1",
            kind="measured",
            source="3 seeds, commit da1ab40, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 0.04864, 0.3927),
                (0.2, 0.166, 0.51),
                (0.3, 0.2243, 0.5684),
                (0.4, 0.2986, 0.6427),
                (0.5, 0.3583, 0.7024),
                (0.6, 0.4453, 0.7894),
                (0.7, 0.5258, 0.8699),
                (0.8, 0.5753, 0.9194),
                (0.9, 0.603, 0.947),
                (1.0, 0.6196, 0.9637),
            ),
        ),
    ),
    "fashion": (
        ReferenceCurve(
            metric="loss",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 2.795, 2.983),
                (0.2, 1.893, 2.02),
                (0.3, 1.554, 1.658),
                (0.4, 1.309, 1.398),
                (0.5, 1.108, 1.183),
                (0.6, 0.9335, 0.9963),
                (0.7, 0.726, 0.7748),
                (0.8, 0.6006, 0.641),
                (0.9, 0.4934, 0.5266),
                (1, 0.4656, 0.4969),
            ),
        ),
        ReferenceCurve(
            metric="text_to_image_recall@1",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.3806, 0.4868),),
        ),
        ReferenceCurve(
            metric="text_to_image_recall@10",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.7473, 0.9253),),
        ),
        ReferenceCurve(
            metric="image_to_text_recall@10",
            kind="measured",
            source="3 seeds, 7,383 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.691, 0.8156),),
        ),
    ),
    "tiny-coca": (
        ReferenceCurve(
            metric="loss",
            kind="measured",
            source="2 seeds, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 4.249, 5.1),
                (0.2, 3.564, 4.279),
                (0.3, 3.147, 3.777),
                (0.4, 2.82, 3.385),
                (0.5, 2.595, 3.115),
                (0.6, 2.414, 2.897),
                (0.7, 2.275, 2.73),
                (0.8, 2.191, 2.63),
                (0.9, 2.121, 2.546),
                (1, 2.104, 2.525),
            ),
        ),
        ReferenceCurve(
            metric="text_to_image_recall@10",
            kind="measured",
            source="2 seeds, 16,000 scenes, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.5, 0.223, 1),
                (0.9, 0.335, 1),
                (1, 0.332, 1),
            ),
        ),
    ),
    "emoji": (
        ReferenceCurve(
            metric="loss",
            kind="measured",
            source="2 seeds, 7,038 drawings, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 4.25, 4.626),
                (0.2, 3.425, 3.728),
                (0.3, 2.86, 3.113),
                (0.4, 2.456, 2.674),
                (0.5, 2.153, 2.344),
                (0.6, 1.916, 2.085),
                (0.7, 1.71, 1.862),
                (0.8, 1.57, 1.709),
                (0.9, 1.504, 1.637),
                (1, 1.479, 1.61),
            ),
        ),
        ReferenceCurve(
            metric="text_to_image_recall@10",
            kind="measured",
            source="2 seeds, 7,038 drawings, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.2, 0.4187, 0.4676),
                (0.5, 0.5414, 0.5903),
                (0.7, 0.5635, 0.6124),
                (0.9, 0.571, 0.6199),
                (1, 0.5691, 0.618),
            ),
        ),
    ),
    "flickr8k": (
        ReferenceCurve(
            metric="loss",
            kind="measured",
            source="2 seeds, 6,000 photos, one thread of a shared CPU",
            width=0.1,
            points=(
                (0.1, 5.297, 5.55),
                (0.2, 5.131, 5.376),
                (0.3, 5.019, 5.258),
                (0.4, 4.931, 5.166),
                (0.5, 4.801, 5.03),
                (0.6, 4.695, 4.919),
                (0.7, 4.599, 4.818),
                (0.8, 4.524, 4.739),
                (0.9, 4.475, 4.688),
                (1, 4.507, 4.722),
            ),
        ),
        ReferenceCurve(
            metric="text_to_image_recall@10",
            kind="measured",
            source="2 seeds, 6,000 photos, one thread of a shared CPU",
            width=0.1,
            points=((1, 0.06239, 0.08881),),
        ),
    ),
}
"""By the name of the recipe."""


ZERO_SHOT = "zero_shot_top1"
_IMAGENET = "vlm eval RUN --classes imagenet/val --out RUN/evaluation"
_TO_SHARDS = "--output_format webdataset --image_size 256 --resize_mode keep_ratio_largest"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A preset with everything around it.

    preset: its name in `PRESETS`. data: what it is trained on. prepare: commands that bring the data into shape, where
    it is ours to bring. train: the command. evaluate: the command whose figure is compared, where the run itself does
    not measure it. remarks: where we differ from what was published.
    """

    preset: str
    data: str
    prepare: tuple[str, ...]
    train: str
    evaluate: str = ""
    bands: tuple[ReferenceCurve, ...]
    remarks: str = ""


def published_curve(low: float, high: float, source: str) -> tuple[ReferenceCurve, ...]:
    """The band of a figure others published: zero-shot top-1 on ImageNet's validation pictures at the end."""
    return (ReferenceCurve(metric=ZERO_SHOT, kind="published", source=source, points=((1.0, low, high),)),)


def find_recipe(name: str) -> Recipe:
    """The recipe of a preset.

    Raises:
        UsageError: there is none of that name; the nearest is named.
    """
    return lookup(RECIPES, name, "recipe")


def _own_recipe(preset: str, *, data: str, prepare: tuple[str, ...], options: str, remarks: str = "") -> Recipe:
    return Recipe(
        preset=preset,
        data=data,
        prepare=prepare,
        train=f"vlm train {preset} {options} --run runs/{preset}",
        bands=MEASURED_CURVES.get(preset, ()),
        remarks=remarks,
    )


def _web_recipe(
    preset: str,
    *,
    data: str,
    shards: str,
    prepare: str = "",
    options: str = "",
    bands: tuple[ReferenceCurve, ...],
    remarks: str,
) -> Recipe:
    return Recipe(
        preset=preset,
        data=data,
        prepare=(prepare,) if prepare else (),
        train=f"accelerate launch -m vlm train {preset} --data '{shards}'{options} --run runs/{preset}",
        evaluate=_IMAGENET,
        bands=bands,
        remarks=remarks,
    )


_SCENE_SHARDS = (
    "vlm pack scenes shards/train --scenes.number 16000",
    "vlm pack scenes shards/val --scenes.split val --scenes.number 1000 --scenes.is-distinct",
    "vlm tokenizer train shards/train words.model --vocabulary 256 --languages en",
)
_SCENE_OPTIONS = "--data shards/train --val shards/val --tokenizer words.model"
_SPLIT_OPTIONS = "--data 'shards/train-*.tar' --val 'shards/val-*.tar' --tokenizer words.model"

RECIPES: dict[str, Recipe] = {
    recipe.preset: recipe
    for recipe in (
        _own_recipe("tiny", data="16,000 drawn scenes", prepare=_SCENE_SHARDS, options=_SCENE_OPTIONS),
        _own_recipe("tiny-coca", data="16,000 drawn scenes", prepare=_SCENE_SHARDS, options=_SCENE_OPTIONS),
        _own_recipe(
            "fashion",
            data="8,383 product photos with titles, 1,000 held out",
            prepare=(
                "vlm pack fashion.tar shards --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 2048",
            ),
            options=_SPLIT_OPTIONS,
        ),
        _own_recipe(
            "flickr8k",
            data="Flickr8k: 6,000 photos with five captions each, 1,000 held out",
            prepare=("vlm tokenizer train 'flickr8k/train-*.tar' words.model --vocabulary 4096 --languages en",),
            options="--data 'flickr8k/train-*.tar' --val 'flickr8k/val-*.tar' --tokenizer words.model",
        ),
        _own_recipe(
            "emoji",
            data="8,038 emoji drawings of three vendors, names in twelve languages, 1,000 held out",
            prepare=(
                "vlm pack emoji.tar shards --caption-column names --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 8000",
            ),
            options=_SPLIT_OPTIONS,
            remarks="A name stands for one drawing of each vendor; the pack holds out all of them together.",
        ),
        _web_recipe(
            "cc3m",
            data="Conceptual Captions: 3.3 million pairs, of which some links are dead",
            prepare=f"img2dataset --url_list cc3m.tsv --input_format tsv {_TO_SHARDS} --output_folder cc3m",
            shards="cc3m/{00000..00331}.tar",
            bands=published_curve(
                0.158, 0.185, "ViT-B/16: 17.1% SLIP's README, 15.8% LaCLIP's; RN50: 18.5% open_clip#448"
            ),
            remarks="Settings of SLIP's README and main.py (Mu et al. 2021), 2.9 million pairs an epoch. "
            "SLIP decays to 1e-5 and does not cut the gradient, we decay to zero and cut at 1.",
        ),
        _web_recipe(
            "cc12m",
            data="Conceptual 12M, of which about 10.7 million pairs are left",
            prepare=f"img2dataset --url_list cc12m.tsv --input_format tsv {_TO_SHARDS} --output_folder cc12m",
            shards="cc12m/{00000..01242}.tar",
            bands=published_curve(0.365, 0.402, "ViT-B/16: 36.5% SLIP's README, 40.2% LaCLIP's (other settings)"),
            remarks="Settings of SLIP's README and main.py (Mu et al. 2021), 10.7 million pairs an epoch. "
            "SLIP decays to 1e-5 and does not cut the gradient, we decay to zero and cut at 1.",
        ),
        _web_recipe(
            "datacomp-small",
            data="CommonPool small: 12.8 million pairs, or what a filter leaves of them",
            prepare="python download_upstream.py --scale small --data_dir datacomp-small  # mlfoundations/datacomp",
            shards="datacomp-small/shards/*.tar",
            bands=published_curve(0.025, 0.051, "2.5% unfiltered, 5.1% by CLIP score: openclip_results.csv"),
            remarks="Settings of DataComp's scale_configs.py (Gadre et al. 2023). The filter decides.",
        ),
        _web_recipe(
            "datacomp-medium",
            data="CommonPool medium: 128 million pairs, or what a filter leaves of them",
            prepare="python download_upstream.py --scale medium --data_dir datacomp-medium  # mlfoundations/datacomp",
            shards="datacomp-medium/shards/*.tar",
            bands=published_curve(0.176, 0.297, "17.6% unfiltered, 29.7% DataComp's filter: openclip_results.csv"),
            remarks="Settings of DataComp's scale_configs.py (Gadre et al. 2023). The filter decides.",
        ),
        _web_recipe(
            "laion",
            data="LAION-400M",
            shards="laion400m/{00000..41407}.tar",
            options=" --micro-batch 256",
            bands=published_curve(0.62, 0.63, "62.96% open_clip's PRETRAINED.md, 62.0% LaCLIP's README"),
            remarks="Batch and epochs of PRETRAINED.md, the rest as in the CLIP paper (so open_clip#100 says). "
            "Shards that are gone since 2021 shorten the epochs.",
        ),
        _web_recipe(
            "lit",
            data="CC12M; the published model saw CC12M and YFCC100M",
            shards="cc12m/{00000..01242}.tar",
            options=" --start-from MODEL",
            bands=published_curve(0.721, 0.757, "72.1% LiT-B16B, 75.7% LiT-L16L: model card (Zhai et al. 2022)"),
            remarks="Rate and batch of big_vision's lit_coco.py; decay and length are ours. Both towers start from "
            "MODEL, whose image tower stays as it is; the published ones started from ViT on ImageNet-21k and BERT. So "
            "the figure is a yardstick rather than a promise: it depends on MODEL.",
        ),
        _web_recipe(
            "coca",
            data="LAION-2B (English)",
            shards="laion2b/{000000..231349}.tar",
            options=" --micro-batch 256",
            bands=published_curve(
                0.628, 0.638, "63.3% ± 0.5 assumed, coca_ViT-B-32 laion2b_s13b_b90k: openclip_results.csv"
            ),
            remarks="Batch and samples seen are in the name of the published weights; rate, warm-up and beta2 are "
            "those of DataComp's xlarge scale, which has the same batch, since CoCa's were not published.",
        ),
    )
}
"""By the name of the preset."""


METRICS = ("loss", "text_to_image_recall@10", "image_to_text_recall@10")


def format_reference_curve(band: ReferenceCurve) -> str:
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
        band = reference_curve_of_runs(
            [(run.lines, run.planned_steps) for run in runs], metric, source=arguments.source
        )
        print(format_reference_curve(band))


if __name__ == "__main__":
    main()


_HEAD = """# Recipes

Written by `python -m vlm.train.recipes` from `train/recipes/table.py`.

A recipe is a preset (`train/presets.py`), the commands around it, and what is expected of it. Everything a preset sets
can be overridden: `vlm train cc3m --batch-size 2048 …`. `vlm runs compare RUN --to RECIPE --out compare.png` says
whether, where and in which direction a run leaves the band.

**measured** bands are of runs of this code: the interval in which one more run is expected at each point with a
probability of 95%. **published** ones are figures of others at the end of their runs, which have not been repeated
here; they are top-1 of zero-shot classification on ImageNet's 50,000 validation pictures, so that they can only be
compared after

```
vlm eval RUN --classes imagenet/val --out RUN/evaluation
```

where `imagenet/val` holds a folder for each class, called by its English name.

| recipe | what it trains | expected at the end | kind |
|---|---|---|---|
"""

_TAIL = """
## Measuring a band

Train a recipe with three seeds, then print its bands as entries for `train/recipes/measured.py`:

```
for seed in 0 1 2; do vlm train fashion … --seed $seed --run runs/fashion-$seed; done
python -m vlm.train.recipes runs/fashion-? --source "3 seeds, commit …, machine" \\
    --metric loss text_to_image_recall@10
```
"""


def page() -> str:
    """The whole page."""
    rows = [_row(recipe) for recipe in RECIPES.values()]
    return _HEAD + "\n".join(rows) + "\n" + "".join(_section(recipe) for recipe in RECIPES.values()) + _TAIL


def _row(recipe: Recipe) -> str:
    ends = "; ".join(_end(band) for band in recipe.bands) or "no band yet"
    kinds = ", ".join(dict.fromkeys(band.kind for band in recipe.bands)) or "–"
    return f"| [`{recipe.preset}`](#{recipe.preset}) | {PRESETS[recipe.preset][0]} | {ends} | {kinds} |"


def _section(recipe: Recipe) -> str:
    commands = [*recipe.prepare, recipe.train, *([recipe.evaluate] if recipe.evaluate else [])]
    summary = PRESETS[recipe.preset][0]
    lines = [f"\n## {recipe.preset}\n", f"{summary[0].upper()}{summary[1:]}. Data: {recipe.data}.\n", "```"]
    lines += [*commands, f"vlm runs compare runs/{recipe.preset} --to {recipe.preset} --out compare.png", "```\n"]
    lines += [f"- expected, {band.kind}: {_end(band)} ({band.source})" for band in recipe.bands]
    lines += [f"- {recipe.remarks}"] if recipe.remarks else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _end(band: ReferenceCurve) -> str:
    _, low, high = band.points[-1]
    name = band.metric.replace("_", " ")
    if band.metric == "loss":
        return f"{name} {low:.2f} to {high:.2f}"
    return f"{name} {low:.1%} to {high:.1%}"


if __name__ == "__main__":
    print(page(), end="")
