"""How a score grows with data and with the model: runs on nested subsets of shards, a law, a forecast that is checked.

Each size of the data is trained with each architecture that is given, or with the preset's own alone. The law
(`vlm.train.scaling_law`), fitted without the largest runs, forecasts them, which were measured too; fitted to all, it
forecasts runs beyond, and says which size of model is best for a budget of FLOPs. Cherti et al. 2023 (Reproducible
scaling laws for contrastive language-image learning) give each architecture a law of its own instead.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.data.corpus import MIXTURE_SUFFIX
from vlm.data.shards import count_samples, expand_shards, join_shards
from vlm.errors import UsageError
from vlm.files import compute_fingerprint, write_text
from vlm.models.model import model_config
from vlm.results import Result
from vlm.train.measured_run import check_metric, error_of, format_score, measure_run
from vlm.train.run_config import TrainConfig
from vlm.train.run_setup import resolve_shard_cache
from vlm.train.scaling_law import BestSize, LawFit, ScalingLaw, fit_law
from vlm.train.scaling_plots import draw_scaling

logger = logging.getLogger(__name__)

SCALING_FILE = "scaling.json"
_LEAST_SIZES = 5
_LEAST_ARCHITECTURES = 3
# nearer sizes tell no exponent apart from the spread of runs
_LEAST_RATIO = 1.1
_LONGEST_NAME = 40
# a division of a budget on so many times the samples measured is far from them
_FAR = 10


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """A run on a subset. score: the metric at its end.

    flops_per_sample, flops: of forward and backward passes, with locked trunks, and of the whole run; None where they
    were not counted.
    """

    run: str
    architecture: str
    shards: int
    samples: int
    seed: int
    steps: int
    flops_per_sample: float | None
    flops: float | None
    score: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The score of one more run with so many samples, by a model of so many FLOPs a sample (None: the only size).

    low, high: 95% prediction interval. It holds the forecasts of the fits that leave out one number of samples or one
    size of model, too: how far the law depends on each of them.
    """

    samples: int
    flops_per_sample: float | None
    score: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ForecastBeyond:
    """As `Forecast`, of a run larger than all; None where the runs do not tell what that which grows in it brings."""

    samples: int
    flops_per_sample: float | None
    score: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class ForecastCheck:
    """The forecast of the largest runs by a law of other ones. measured: their mean score.

    known: the runs of the law: `smaller` ones in every respect, or all `others`, among which the largest model saw less
    data and the largest data a smaller model. inside: how many of the `runs_checked` lie in the interval. spread: the
    largest score of all runs less the smallest; a wider interval means nothing.
    """

    known: Literal["smaller", "others"]
    fit: ScalingLaw
    forecast: Forecast
    measured: float
    inside: int
    runs_checked: int
    spread: float

    def verdict(self, metric: str) -> str:
        """Whether the forecast held, in a sentence."""
        held = "held" if self.inside == self.runs_checked else "missed"
        if self.forecast.high - self.forecast.low > self.spread:
            held += ", but its interval is wider than the spread of all scores, too wide to mean anything"
        known = "smaller sizes" if self.known == "smaller" else "other runs"
        score, low, high, measured = (
            format_score(metric, value)
            for value in (self.forecast.score, self.forecast.low, self.forecast.high, self.measured)
        )
        return (
            f"The forecast for {self.forecast.samples:,} samples from the {known} {held}: {score} ({low} to {high}), "
            f"measured {measured}; {self.inside} of {self.runs_checked} runs inside."
        )


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """How the law divides a budget of training FLOPs between model and data.

    best: the best size of model of any; None where the law has none. architecture: the best of those that were trained,
    with the samples and the score that the law gives it; None where the runs do not tell them. is_far: it lies on more
    than ten times the samples measured.
    """

    flops: float
    best: BestSize | None
    architecture: str | None
    samples: int | None
    score: float | None
    is_far: bool


@dataclass(frozen=True, kw_only=True)
class ScalingReport(Result):
    """What was measured, the fit to all of it, and the forecast of the largest runs from others.

    sizes: FLOPs a sample of each architecture, smallest first; empty where there is one. checks: from smaller runs
    where they tell the law, and with several architectures from all other runs. beyond: forecasts by the fit to all:
    twice and ten times the samples; with several architectures twice the samples, twice the size, and both ten times.
    budgets: empty for one architecture, and where compute does not grow with the data.
    """

    metric: str
    hold: str
    points: tuple[ScalingPoint, ...]
    sizes: dict[str, float]
    fit: ScalingLaw
    checks: tuple[ForecastCheck, ...]
    beyond: tuple[ForecastBeyond, ...]
    budgets: tuple[BudgetPlan, ...]

    def score(self, samples: float, size: float | None = None, *, law: ScalingLaw | None = None) -> float:
        """The score that a law gives, that of all runs unless another is named."""
        return error_of(self.metric, (law or self.fit).error(samples, size))

    def verdict(self) -> str:
        """Whether the forecasts held, a sentence each."""
        return "\n".join(check.verdict(self.metric) for check in self.checks)

    def warnings(self) -> tuple[str, ...]:
        """What these runs do not tell, a sentence each."""
        told: list[str] = []
        if self.fit.size and not self.fit.size.is_told:
            told.append(
                "These runs do not tell the sizes of model apart: train longer, on sizes farther apart, or with more "
                "seeds."
            )
        if not self.fit.samples.is_told:
            told.append(
                "These runs do not tell what more samples bring: train longer, on numbers of samples farther apart, or "
                "with more seeds."
            )
        for quantity, term in (("samples", self.fit.samples), ("size", self.fit.size)):
            if term and term.at_limit:
                told.append(f"The exponent of {quantity}, {term.exponent:.2f}, lies at a limit of those tried.")
        for plan in self.budgets:
            if plan.is_far:
                told.append(
                    f"The best division of {plan.flops:.3g} FLOPs lies on more than {_FAR} times the samples measured, "
                    "far beyond what these runs tell."
                )
        return tuple(told)

    def to_json(self) -> dict[str, Any]:
        """What `vlm scale --json` prints and scaling.json holds: the fields, and the warnings."""
        return super().to_json() | {"warnings": list(self.warnings())}


def measure_scaling(
    config: TrainConfig,
    *,
    shares: Sequence[float] = (0.0625, 0.125, 0.25, 0.5, 1.0),
    architectures: Sequence[str] = (),
    seeds: int = 2,
    metric: str = "text_to_image_recall@10",
    hold: Literal["steps", "epochs"] = "steps",
    budgets: Sequence[float] = (),
) -> ScalingReport:
    """Train on nested subsets of the shards and fit how the metric grows; finished runs are read, not repeated.

    config: of the largest run; its `run` is the folder of all runs. shares: of the shards, in a random order that is
    the same for all sizes and seeds. architectures: models of different sizes, each trained on each subset; none takes
    the configuration's. hold: `steps` gives each size those of the largest, so that data alone differ; `epochs` gives
    each its own number, so that compute grows with the data. budgets: training FLOPs to divide between model and data;
    none takes those of the largest run, and ten times as many.

    Raises:
        UsageError: too few sizes for a fit, or settings that do not go with it. VlmError: a run had to end.
    """
    check_metric(metric)
    _check(config, shares, architectures, seeds)
    _check_budgets(budgets, architectures, hold)
    points = _measure_all(config, _nested_subsets(config, shares), architectures, seeds=seeds, metric=metric, hold=hold)
    folder = Path(config.run)
    report = fit_scaling(points, metric=metric, hold=hold, budgets=budgets)
    write_text(folder / SCALING_FILE, json.dumps(report.to_json(), indent=2) + "\n")
    draw_scaling(report, folder / "scaling.png")
    return report


def _check(config: TrainConfig, shares: Sequence[float], architectures: Sequence[str], seeds: int) -> None:
    """Refuse, before a shard is read, what no fit can be made of.

    Raises:
        UsageError: naming it.
    """
    config.check()
    if seeds < 1:
        raise UsageError(f"--seeds {seeds} gives no runs; give 1 or more, and 2 to see their spread.")
    if config.safety.early_stop:
        raise UsageError(
            f"--early-stop {config.safety.early_stop} ends runs at lengths of their own, which --hold is to keep "
            "alike; leave it out."
        )
    if not config.val:
        raise UsageError("A scaling fit is of a score on held-out data; name its shards (--val).")
    if config.data.endswith(MIXTURE_SUFFIX):
        raise UsageError(f"{config.data} is a mixture, whose subsets would need shares of each source; name shards.")
    for share in shares:
        if not 0 < share <= 1:
            raise UsageError(f"--shares {share:g} is not a share of the shards; give numbers above 0, up to 1.")
    if architectures and len(set(architectures)) < _LEAST_ARCHITECTURES:
        raise UsageError(
            f"--architectures {' '.join(architectures)}: a law of size needs {_LEAST_ARCHITECTURES} different ones, "
            "and 4 for a forecast from smaller models; give more, or none to vary the data alone."
        )
    for architecture in architectures:
        # a name that is not known must not show after the runs of the first one
        model_config(architecture)
    if architectures and config.model.start_from:
        raise UsageError(
            f"--start-from {config.model.start_from} has an architecture of its own; leave it or --architectures out."
        )


def _check_budgets(budgets: Sequence[float], architectures: Sequence[str], hold: str) -> None:
    if budgets and not (architectures and hold == "epochs"):
        raise UsageError(
            "--budgets are divided between model and data: give --architectures, and --hold epochs, with which compute "
            "grows with the data."
        )
    for budget in budgets:
        if not 0 < budget < np.inf:
            raise UsageError(f"--budgets {budget:g} is no number of FLOPs; give numbers above 0, e.g. 1e15.")


def _nested_subsets(config: TrainConfig, shares: Sequence[float]) -> list[list[str]]:
    """The shards of each subset, the smallest first; each begins with those of the one before.

    Raises:
        UsageError: too few of the shares differ in whole shards.
    """
    shards = expand_shards(config.data)
    # files may be sorted by what they hold, and a prefix of them would be another kind of data
    order = [shards[index] for index in np.random.default_rng(0).permutation(len(shards))]
    numbers = sorted({max(round(share * len(shards)), 1) for share in shares})
    if len(numbers) < _LEAST_SIZES:
        raise UsageError(
            f"The shares {', '.join(f'{share:g}' for share in shares)} of {len(shards)} shards are {len(numbers)} "
            f"different sizes; a fit that is checked on the largest needs {_LEAST_SIZES}. Give other --shares, or pack "
            "the data into more shards (vlm pack --samples-per-shard)."
        )
    return [order[:number] for number in numbers]


def _measure_all(
    config: TrainConfig,
    subsets: list[list[str]],
    architectures: Sequence[str],
    *,
    seeds: int,
    metric: str,
    hold: Literal["steps", "epochs"],
) -> list[ScalingPoint]:
    """A run of each architecture and seed on each subset, the smallest first.

    Raises:
        UsageError: sizes of model that are too near to each other, as soon as each was trained once.
    """
    points: list[ScalingPoint] = []
    loader = config.loader
    counts = count_samples(subsets[-1], allow_damage=loader.allow_damage, cache=resolve_shard_cache(loader))
    for shards in subsets:
        # the smaller subsets are the first shards of the largest
        samples = sum(counts[: len(shards)])
        for architecture in architectures or [""]:
            for seed in range(config.seed, config.seed + seeds):
                subset = _subset_config(config, shards, samples / sum(counts), architecture, seed=seed, hold=hold)
                points.append(_measure(subset, metric, shards=len(shards), samples=samples))
                name = f"{architecture}, " if architecture else ""
                logger.info(
                    f"{name}{samples:,} samples, seed {seed}: {metric} {format_score(metric, points[-1].score)}"
                )
        if architectures:
            _sizes(points)
    return points


def _subset_config(
    config: TrainConfig,
    shards: Sequence[str],
    share: float,
    architecture: str,
    *,
    seed: int,
    hold: Literal["steps", "epochs"],
) -> TrainConfig:
    """The configuration of one run. share: of the samples of the largest subset. architecture: empty as configured."""
    folder = Path(config.run)
    loader = config.loader
    if loader.cache_features and not loader.feature_folder:
        loader = replace(loader, feature_folder=str(folder / "features"))
    changes: dict[str, float] = {}
    if hold == "steps" and config.steps < 0:
        # an epoch of the subset is shorter by its share
        changes["epochs"] = config.epochs / share
    elif hold == "epochs" and config.steps >= 0:
        changes["steps"] = max(round(config.steps * share), 1)
    optimizer = config.optimizer
    if hold == "epochs":
        # else the shortest runs would end while warming up
        optimizer = replace(optimizer, warmup_steps=max(round(optimizer.warmup_steps * share), 1))
    model = config.model
    name = f"shards-{len(shards)}-seed-{seed}"
    if architecture:
        model = replace(model, architecture=architecture)
        name = f"{_folder_name(architecture)}-{name}"
    return replace(
        config,
        data=join_shards(list(shards)),
        run=str(folder / name),
        seed=seed,
        model=model,
        loader=loader,
        optimizer=optimizer,
        **changes,
    )


def _folder_name(architecture: str) -> str:
    """A name that can be a folder's; what had to be changed in it is told apart by a fingerprint."""
    name = re.sub(r"[^\w.]+", "-", architecture)[:_LONGEST_NAME]
    return name if name == architecture else f"{name}-{compute_fingerprint(architecture)[:6]}"


def _measure(config: TrainConfig, metric: str, *, shards: int, samples: int) -> ScalingPoint:
    measured = measure_run(config, metric)
    flops_per_sample = measured.flops_per_sample
    return ScalingPoint(
        run=measured.run,
        architecture=config.model.architecture,
        shards=shards,
        samples=samples,
        seed=config.seed,
        steps=measured.steps,
        flops_per_sample=flops_per_sample,
        flops=None if flops_per_sample is None else flops_per_sample * measured.samples_seen,
        score=measured.score,
    )


def _sizes(points: Sequence[ScalingPoint]) -> dict[str, float]:
    """The FLOPs a sample of each architecture, smallest first; empty where there is one architecture only.

    Raises:
        UsageError: they are not known, or two are too near to each other.
    """
    counted: dict[str, list[float]] = {}
    if len({point.architecture for point in points}) == 1:
        return {}
    for point in points:
        if not point.flops_per_sample:
            raise UsageError(
                f"The FLOPs of {point.architecture} cannot be counted, so that it has no size; leave it out."
            )
        counted.setdefault(point.architecture, []).append(point.flops_per_sample)
    # captions of other lengths take other FLOPs: the mean of the runs
    sizes = sorted((float(np.mean(values)), name) for name, values in counted.items())
    for (size, name), (larger, next_name) in pairwise(sizes):
        if larger < _LEAST_RATIO * size:
            raise UsageError(
                f"{name} and {next_name} take {size:.3g} and {larger:.3g} FLOPs a sample, too near for a law of size; "
                "leave one of them out."
            )
    return {name: size for size, name in sizes}


def fit_scaling(
    points: Sequence[ScalingPoint], *, metric: str, hold: str = "steps", budgets: Sequence[float] = (), seed: int = 0
) -> ScalingReport:
    """The report of what was measured: the fits, their intervals and the checks. seed: of the resampling.

    Raises:
        UsageError: the sizes of model make no law.
    """
    rng = np.random.default_rng(seed)
    sizes = _sizes(points)
    runs = _Runs(tuple(points), sizes, metric)
    checks: list[ForecastCheck] = []
    if len(sizes) != _LEAST_ARCHITECTURES:
        checks.append(runs.check("smaller", rng))
    if sizes:
        checks.append(runs.check("others", rng))
    fit = runs.fit(points, rng)
    largest = runs.largest
    factors = [(2, 1), (1, 2), (10, 10)] if sizes else [(2, 1), (10, 1)]
    beyond: list[ForecastBeyond] = []
    for more_samples, larger in factors:
        size = runs.size_of(largest)
        forecast = runs.forecast(fit, more_samples * largest.samples, size and larger * size, rng)
        beyond.append(_beyond(fit.law, forecast, largest, size))
    plans: list[BudgetPlan] = []
    if sizes and hold == "epochs" and largest.flops:
        for budget in budgets or (largest.flops, 10 * largest.flops):
            plans.append(_plan(runs, fit, budget))
    return ScalingReport(
        metric=metric,
        hold=hold,
        points=tuple(points),
        sizes=sizes,
        fit=fit.law,
        checks=tuple(checks),
        beyond=tuple(beyond),
        budgets=tuple(plans),
    )


@dataclass(frozen=True)
class _Runs:
    """The measured runs. sizes: FLOPs a sample of each architecture, smallest first; empty for one."""

    points: tuple[ScalingPoint, ...]
    sizes: dict[str, float]
    metric: str

    @property
    def largest(self) -> ScalingPoint:
        """A run of the largest model on the most samples."""
        return max(self.points, key=lambda point: (point.samples, self.size_of(point) or 0.0))

    def size_of(self, point: ScalingPoint) -> float | None:
        """FLOPs a sample; None where all runs have the same."""
        return self.sizes.get(point.architecture)

    def fit(self, points: Sequence[ScalingPoint], rng: np.random.Generator) -> LawFit:
        """The law of some of them."""
        quantities: list[list[float]] = []
        for point in points:
            size = self.size_of(point)
            quantities.append([float(point.samples)] if size is None else [float(point.samples), size])
        errors = [error_of(self.metric, point.score) for point in points]
        return fit_law(np.array(quantities), np.array(errors), rng)

    def forecast(self, fit: LawFit, samples: int, size: float | None, rng: np.random.Generator) -> Forecast:
        """The score that a law forecasts."""
        forecast = fit.forecast([samples] if size is None else [samples, size], rng)
        limits = sorted((error_of(self.metric, forecast.low), error_of(self.metric, forecast.high)))
        score = error_of(self.metric, forecast.error)
        return Forecast(samples=samples, flops_per_sample=size, score=score, low=limits[0], high=limits[1])

    def check(self, known: Literal["smaller", "others"], rng: np.random.Generator) -> ForecastCheck:
        """The forecast of the largest runs by the law of others."""
        largest = self.largest
        size = self.size_of(largest)
        at_largest: list[float] = []
        others: list[ScalingPoint] = []
        for point in self.points:
            # with one architecture the two ways are one
            is_large = (point.samples == largest.samples, size is None or self.size_of(point) == size)
            if all(is_large):
                at_largest.append(point.score)
            elif known == "others" or not (is_large[0] or (size is not None and is_large[1])):
                others.append(point)
        fit = self.fit(others, rng)
        forecast = self.forecast(fit, largest.samples, size, rng)
        return ForecastCheck(
            known=known,
            fit=fit.law,
            forecast=forecast,
            measured=float(np.mean(at_largest)),
            inside=sum(forecast.low <= score <= forecast.high for score in at_largest),
            runs_checked=len(at_largest),
            spread=float(np.ptp([point.score for point in self.points])),
        )


def _beyond(law: ScalingLaw, forecast: Forecast, largest: ScalingPoint, size: float | None) -> ForecastBeyond:
    """A forecast, without its figures where the law's term of what grows in it is not told. size: of the largest."""
    is_told = forecast.samples == largest.samples or law.samples.is_told
    if law.size and forecast.flops_per_sample != size:
        is_told = is_told and law.size.is_told
    return ForecastBeyond(
        samples=forecast.samples,
        flops_per_sample=forecast.flops_per_sample,
        score=forecast.score if is_told else None,
        low=forecast.low if is_told else None,
        high=forecast.high if is_told else None,
    )


def _plan(runs: _Runs, fit: LawFit, budget: float) -> BudgetPlan:
    law = fit.law
    if not (law.samples.is_told and law.size and law.size.is_told):
        # without a term of size the smallest model always wins, without one of samples the largest
        return BudgetPlan(flops=budget, best=None, architecture=None, samples=None, score=None, is_far=False)
    largest = runs.largest
    visits = (largest.flops or 0.0) / (largest.flops_per_sample or 1.0) / largest.samples
    by_error: list[tuple[float, str, int]] = []
    for name, size in runs.sizes.items():
        samples = max(round(budget / size / visits), 1)
        by_error.append((law.error(samples, size), name, samples))
    error, name, samples = min(by_error)
    best = fit.best_size(budget, visits)
    most = max(samples, best.samples_seen / visits if best else 0.0)
    return BudgetPlan(
        flops=budget,
        best=best,
        architecture=name,
        samples=samples,
        score=error_of(runs.metric, error),
        is_far=most > _FAR * largest.samples,
    )
