"""Robustness: what an evaluator's score loses when the same images are corrupted, covered, written on or redrawn.

Any evaluator with a row for each sample can be measured so: zero-shot classification, retrieval, neighbours. Each
sample is its own control: intervals of drops are of the differences on the same images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from PIL import Image

from vlm.config import suggest
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.bootstrap import mean_interval, paired_difference, statistic_interval
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.image_corruptions import (
    CORRUPTION_KINDS,
    EDITED_FACTS,
    PATCH_SHARES,
    SEVERITIES,
    Corruption,
    PatchCorruption,
    Pixels,
    SceneEdit,
    TypographicAttack,
    check_labels_survive,
    scenes_of,
    wrong_class_names,
)
from vlm.evaluation.measurement import Evaluator, Measurement, SampleStatistic, Value, ratio_of
from vlm.evaluation.wiring_checks import is_at_chance
from vlm.files import compute_fingerprint
from vlm.tensor_types import Array, Float64

EDIT_FAMILIES = ("corruptions", "patches", "typographic", "scenes")
# the side of ImageNet-C's images, for which the strengths of its corruptions were set
PIXELS = 224

PixelEdit = Callable[[Pixels, str], Pixels]


@dataclass(frozen=True, kw_only=True)
class EditedView:
    """An image cut and resized as a model does, but to a size of its own, then edited; the model sees it resized.

    edit: None leaves it, which is what edited images are compared with.
    """

    view: EvalTransform
    edit: PixelEdit | None

    def __call__(self, image: Image.Image, key: str) -> Image.Image:
        """The square image."""
        pixels = np.ascontiguousarray(self.view.of_image(image).transpose(1, 2, 0))
        return Image.fromarray(pixels if self.edit is None else self.edit(pixels, key))


@dataclass(frozen=True, kw_only=True)
class EditScore:
    """One edit at one level: the score under it, and the drop (clean less edited, same samples) with its p value."""

    group: str
    level: str
    value: float
    drop: float
    drop_low: float | None
    drop_high: float | None
    p: float


@dataclass(frozen=True, kw_only=True)
class RobustnessResult:
    """A score clean and under each edit. metric: the column of samples it is the mean of. pixels: of edited images.

    attack_success: of typographic attacks, share of images taken for the class written on them;
    attack_success_clean: share taken for it without the writing.
    """

    evaluator: str
    metric: str
    edits: str
    pixels: int
    num_images: int
    clean: float
    scores: tuple[EditScore, ...]
    attack_success: float | None = None
    attack_success_clean: float | None = None


@dataclass(frozen=True)
class _Variant:
    """A set whose images were edited. group: kind of edit, whose levels are averaged first."""

    group: str
    level: str
    data: EvaluationSet

    @property
    def column(self) -> str:
        """In the table of samples."""
        return f"{self.group}/{self.level}" if self.level else self.group


@dataclass(frozen=True)
class _Outcomes:
    """The outcomes of an evaluator's rows that have one. predictions: where it classifies, in the same order."""

    metric: str
    keys: list[str]
    values: Float64[Array, " R"]
    chance: float | None
    predictions: list[str] | None


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What edits of the images do to the score of another evaluator.

    of: that evaluator. metric: the column of its samples; empty takes the first of its values that has one.
    edits: corruptions (ImageNet-C's, by `kinds` and `severities`), patches (shares of them replaced by noise and by
        black), typographic (a wrong class's name on each image), or scenes (drawn scenes with another background, and
        with another size).
    pixels: side of the square in which pixels are edited before the model resizes it; 0 for the model's own size, which
        is faster where that is small, and where corruptions are then stronger than in the benchmark.
    max_images: evaluate on so many, evenly spread over the set; 0 for all.
    """

    of: Evaluator
    metric: str = ""
    edits: str = "corruptions"
    kinds: tuple[str, ...] = CORRUPTION_KINDS
    severities: tuple[int, ...] = SEVERITIES
    shares: tuple[float, ...] = PATCH_SHARES
    pixels: int = PIXELS
    max_images: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """As it stands in reports."""
        # without the metric where it is the usual one, so that two metrics of one evaluator do not share a name
        return "-".join(filter(None, (self.of.name, self.metric, self.edits)))

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: there is nothing to edit, the evaluator has no such metric or no samples, or the set lacks what
                an edit needs (labels, scenes).
        """
        # evenly spread, because sets are often sorted by class
        if 0 < self.max_images < len(data):
            data = data.select(np.linspace(0, len(data) - 1, self.max_images).round().astype(np.int64))
        written = self._wrong_names(data)
        clean_data, variants = self._variants(data, model.view, written)
        clean = self._outcomes(model, clean_data)
        edited: dict[str, _Outcomes] = {}
        for variant in variants:
            edited[variant.column] = self._outcomes(model, variant.data)
        result, values, columns = self._summarise(clean, variants, edited, written)
        warnings: list[str] = []
        if is_at_chance(values["clean"].low, clean.chance):
            warnings.append(
                "The score of the clean images is at chance already: what edits do to it says nothing of robustness."
            )
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(data),
            values=values,
            samples=pa.table({"key": clean.keys, **columns}),
            statistics=_statistics(columns),
            details=result,
            warnings=tuple(warnings),
        )

    def _wrong_names(self, data: EvaluationSet) -> Mapping[str, str]:
        if self.edits != "typographic":
            return {}
        labels = dict(zip(data.keys, data.true_labels, strict=True))
        return wrong_class_names(labels, tuple(data.candidates), seed=self.seed)

    def _variants(
        self, data: EvaluationSet, view: EvalTransform, written: Mapping[str, str]
    ) -> tuple[EvaluationSet, list[_Variant]]:
        """The set that edits are compared with, and the edited ones."""
        if self.edits == "scenes":
            return self._scene_variants(data)
        # edits are of whole squares; on a canvas they would fill what no image reaches
        mode = "shortest" if view.grid else view.resize_mode
        edit_view = replace(view, size=self.pixels or view.size, resize_mode=mode)

        def edited(edit: PixelEdit | None, *parts: str) -> EvaluationSet:
            # the name decides which cached features are used, so all that decides over the pixels is in it
            name = compute_fingerprint(edit_view.identity(), repr(edit), *parts)
            return data.altered(name, EditedView(view=edit_view, edit=edit))

        variants: list[_Variant] = []
        if self.edits == "corruptions":
            for kind in self.kinds:
                for severity in self.severities:
                    corruption = Corruption(kind=kind, severity=severity, seed=self.seed)
                    variants.append(_Variant(kind, str(severity), edited(corruption)))
        elif self.edits == "patches":
            for fill in ("noise", "black"):
                for share in self.shares:
                    patches = PatchCorruption(share=share, fill=fill, seed=self.seed)
                    variants.append(_Variant(f"{fill}_patches", f"{share:g}", edited(patches)))
        elif self.edits == "typographic":
            attack = TypographicAttack(texts=dict(written), seed=self.seed)
            variants.append(_Variant("typographic", "", edited(attack, *map("=".join, written.items()))))
        else:
            raise UsageError(f"There are no edits {self.edits!r}; {suggest(self.edits, list(EDIT_FAMILIES))}")
        if not variants:
            raise UsageError(f"No {self.edits} are asked for: name one or more.")
        # clean images go through the same two resizes, so that the drop is that of the edit alone
        return edited(None), variants

    def _scene_variants(self, data: EvaluationSet) -> tuple[EvaluationSet, list[_Variant]]:
        scenes = scenes_of(data)
        variants: list[_Variant] = []
        for fact in EDITED_FACTS:
            check_labels_survive(data, fact)
            edit = SceneEdit(scenes=scenes, fact=fact, seed=self.seed)
            variants.append(_Variant(fact, "", data.altered(repr(edit), edit)))
        # drawn again too, unedited, so that the two differ in nothing but the edited fact
        redrawn = SceneEdit(scenes=scenes, fact=None, seed=self.seed)
        return data.altered(repr(redrawn), redrawn), variants

    def _outcomes(self, model: EvaluatedModel, data: EvaluationSet) -> _Outcomes:
        measurement = self.of.run(model, data)
        samples = measurement.samples
        if samples is None:
            raise UsageError(f"The evaluator {self.of.name!r} gives no samples, so no drop can be paired.")
        columns = [name for name in measurement.values if name in samples.column_names]
        metric = self.metric or next(iter(columns), "")
        if metric not in columns:
            raise UsageError(f"{self.of.name!r} has no metric {metric!r} of samples; {suggest(metric, columns)}")
        is_classifier = {"truth", "prediction"} <= set(samples.column_names) and "direction" not in samples.column_names
        if self.edits == "scenes" and not is_classifier:
            raise UsageError(
                f"Scenes are edited for classification, which {self.of.name!r} is not: captions would no longer be "
                "true of the edited images."
            )
        # tables of several metrics have rows that are of no account for this one
        has_outcome = samples.column(metric).is_valid()
        rows = samples.filter(has_outcome)
        predictions = rows.column("prediction").to_pylist() if is_classifier else None
        return _Outcomes(
            metric=metric,
            keys=rows.column("key").to_pylist(),
            values=rows.column(metric).to_numpy().astype(np.float64),
            chance=measurement.values[metric].chance,
            predictions=predictions,
        )

    def _summarise(
        self,
        clean: _Outcomes,
        variants: Sequence[_Variant],
        edited: Mapping[str, _Outcomes],
        written: Mapping[str, str],
    ) -> tuple[RobustnessResult, dict[str, Value], dict[str, Float64[Array, " R"]]]:
        rng = np.random.default_rng(self.seed)
        scores = tuple(_score(variant, clean, edited[variant.column], rng) for variant in variants)
        columns = _columns(clean, variants, edited)
        values = _values(clean, columns, rng)
        result = RobustnessResult(
            evaluator=self.of.name,
            metric=clean.metric,
            edits=self.edits,
            pixels=0 if self.edits == "scenes" else self.pixels,
            num_images=len(set(clean.keys)),
            clean=float(clean.values.mean()),
            scores=scores,
        )
        attacked = edited.get("typographic")
        if attacked is not None and attacked.predictions is not None and clean.predictions is not None:
            columns["attack_success"] = _taken_for(attacked, written)
            success = mean_interval(columns["attack_success"], rng=rng, share=True)
            values["attack_success"] = Value(value=success.value, low=success.low, high=success.high)
            result = replace(
                result,
                attack_success=success.value,
                attack_success_clean=float(_taken_for(clean, written).mean()),
            )
        return result, values, columns


def _score(variant: _Variant, clean: _Outcomes, edited: _Outcomes, rng: np.random.Generator) -> EditScore:
    drop = paired_difference(edited.values, clean.values, rng=rng, clusters=clean.keys)
    return EditScore(
        group=variant.group,
        level=variant.level,
        value=float(edited.values.mean()),
        drop=drop.difference,
        drop_low=drop.low,
        drop_high=drop.high,
        p=drop.p,
    )


def _columns(
    clean: _Outcomes, variants: Sequence[_Variant], edited: Mapping[str, _Outcomes]
) -> dict[str, Float64[Array, " R"]]:
    """Of each row: the mean over all kinds of edits, clean, the drop, the mean over each kind's levels, each level."""
    levels: dict[str, Float64[Array, " R"]] = {}
    of_group: dict[str, list[Float64[Array, " R"]]] = {}
    for variant in variants:
        outcomes = edited[variant.column].values
        of_group.setdefault(variant.group, []).append(outcomes)
        levels[variant.column] = outcomes
    groups = {group: np.mean(outcomes, axis=0) for group, outcomes in of_group.items()}
    # kinds count equally, however many levels they have
    edited_mean = np.mean(list(groups.values()), axis=0)
    return {"edited": edited_mean, "clean": clean.values, "drop": clean.values - edited_mean} | groups | levels


def _values(
    clean: _Outcomes, columns: Mapping[str, Float64[Array, " R"]], rng: np.random.Generator
) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name in [name for name in columns if "/" not in name]:
        is_share = name != "drop"
        interval = mean_interval(columns[name], rng=rng, clusters=clean.keys, share=is_share)
        chance = clean.chance if is_share else None
        values[name] = Value(value=interval.value, low=interval.low, high=interval.high, chance=chance)
    edited = values["edited"]
    values["mean_error"] = Value(
        value=1 - edited.value,
        # the ends change places: the highest accuracy is the lowest error
        low=None if edited.high is None else 1 - edited.high,
        high=None if edited.low is None else 1 - edited.low,
        chance=None if edited.chance is None else 1 - edited.chance,
    )
    # a ratio of two means is no mean over samples, so it is resampled as a whole
    relative = _statistics(columns)["relative_drop"].of_counts
    interval = statistic_interval(relative, len(clean.keys), rng=rng, clusters=clean.keys)
    values["relative_drop"] = Value(value=interval.value, low=interval.low, high=interval.high)
    return values


def _statistics(columns: Mapping[str, Float64[Array, " R"]]) -> dict[str, SampleStatistic]:
    """The values that are no means of columns."""
    errors = 1 - columns["edited"]
    return {
        "mean_error": ratio_of(errors, np.ones_like(errors)),
        "relative_drop": ratio_of(columns["drop"], columns["clean"]),
    }


def _taken_for(outcomes: _Outcomes, written: Mapping[str, str]) -> Float64[Array, " R"]:
    """Which images were taken for the class whose name is (or would be) written on them."""
    taken: list[bool] = []
    for key, prediction in zip(outcomes.keys, outcomes.predictions or (), strict=True):
        taken.append(prediction == written[key])
    return np.array(taken, np.float64)
