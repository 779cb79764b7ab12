"""How a score grows with data: runs on nested subsets of shards, a power law with a floor, a forecast that is checked.

The error, one minus the score, is floor + amplitude · (samples / unit)^-exponent, as loss is in Hoffmann et al. 2022
(Training Compute-Optimal Large Language Models, §3.3) and error in Rosenfeld et al. 2020. Fitted to all sizes but the
largest, it forecasts the largest, which was measured too; fitted to all, it forecasts sizes beyond.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.config import from_toml
from vlm.data.shards import count_samples, expand_shards, join_shards
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.manifest import MANIFEST
from vlm.results import Result
from vlm.tensor_types import Array, Float
from vlm.train.averaging import parse_metric
from vlm.train.history import CONFIG, read_run
from vlm.train.plots import draw_scaling
from vlm.train.run import train
from vlm.train.run_config import FREE_OF_SCORES, TrainConfig, changed_settings, disallowed_changes
from vlm.train.run_setup import resolve_shard_cache

logger = logging.getLogger(__name__)

SCALING_FILE = "scaling.json"
_PARAMETERS = 3
_LEAST_SIZES = 5
_EXPONENTS = np.linspace(0.05, 2.0, 391)
_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """A run on a subset. flops: of forward and backward passes, with locked trunks; None where they were not counted.

    score: the metric at its end.
    """

    run: str
    shards: int
    samples: int
    seed: int
    steps: int
    flops: float | None
    score: float


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """error(samples) = floor + amplitude · (samples / unit)^-exponent; the score is one minus the error."""

    floor: float
    amplitude: float
    exponent: float
    unit: float

    def score(self, samples: float) -> float:
        """The score with so many samples."""
        return 1 - self.floor - self.amplitude * (samples / self.unit) ** -self.exponent


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The score of one more run with so many samples, and its 95% prediction interval.

    It holds the forecasts of the fits that leave out one size, too: how far the law depends on each of them.
    """

    samples: int
    score: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ScalingReport(Result):
    """What was measured, the fit to all of it, and the forecast of the largest size from the smaller ones.

    exponent_interval: 95%, by resampled residuals. check: the forecast of the largest size by the fit to the others;
    measured: the mean score there. inside: how many of the runs there lie in its interval, of `runs_checked`.
    beyond: forecasts of twice and of ten times the samples, by the fit to all.
    """

    metric: str
    hold: str
    points: tuple[ScalingPoint, ...]
    fit: PowerLaw
    exponent_interval: tuple[float, float]
    fit_of_smaller: PowerLaw
    check: Forecast
    measured: float
    inside: int
    runs_checked: int
    beyond: tuple[Forecast, ...]

    def verdict(self) -> str:
        """Whether the forecast held, in a sentence."""
        held = "held" if self.inside == self.runs_checked else "missed"
        return (
            f"The forecast for {self.check.samples:,} samples from the smaller sizes {held}: {self.check.score:.1%} "
            f"({self.check.low:.1%} to {self.check.high:.1%}), measured {self.measured:.1%}; {self.inside} of "
            f"{self.runs_checked} runs inside."
        )


def measure_scaling(
    config: TrainConfig,
    *,
    shares: Sequence[float] = (0.0625, 0.125, 0.25, 0.5, 1.0),
    seeds: int = 2,
    metric: str = "text_to_image_recall@10",
    hold: Literal["steps", "epochs"] = "steps",
) -> ScalingReport:
    """Train on nested subsets of the shards and fit how the metric grows; finished runs are read, not repeated.

    config: of the largest run; its `run` is the folder of all runs. shares: of the shards, in a random order that is
    the same for all sizes and seeds. hold: `steps` gives each size those of the largest, so that data alone differ;
    `epochs` gives each its own number, so that compute grows with the data.

    Raises:
        UsageError: too few sizes for a fit, or settings that do not go with it. VlmError: a run had to end.
    """
    parse_metric(metric)
    _check(config, shares, seeds)
    sizes = _nested_subsets(config, shares)
    folder = Path(config.run)
    points: list[ScalingPoint] = []
    loader = config.loader
    counts = count_samples(sizes[-1], allow_damage=loader.allow_damage, cache=resolve_shard_cache(loader))
    for shards in sizes:
        # the smaller sizes are the first shards of the largest
        samples = sum(counts[: len(shards)])
        for number in range(seeds):
            subset = _subset_config(config, shards, samples / sum(counts), seed=config.seed + number, hold=hold)
            points.append(_measure(subset, metric, shards=len(shards), samples=samples))
            logger.info(f"{samples:,} samples, seed {subset.seed}: {metric} {points[-1].score:.1%}")
    report = fit_scaling(points, metric=metric, hold=hold)
    write_text(folder / SCALING_FILE, json.dumps(report.to_json(), indent=2) + "\n")
    draw_scaling(report, folder / "scaling.png")
    return report


def _check(config: TrainConfig, shares: Sequence[float], seeds: int) -> None:
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
    if config.data.endswith(".toml"):
        raise UsageError(f"{config.data} is a mixture, whose subsets would need shares of each source; name shards.")
    for share in shares:
        if not 0 < share <= 1:
            raise UsageError(f"--shares {share:g} is not a share of the shards; give numbers above 0, up to 1.")


def _nested_subsets(config: TrainConfig, shares: Sequence[float]) -> list[list[str]]:
    """The shards of each size, the smallest first; each begins with those of the one before.

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
            "the data into more shards (vlm pack --shard-mb)."
        )
    return [order[:number] for number in numbers]


def _subset_config(
    config: TrainConfig, shards: Sequence[str], share: float, *, seed: int, hold: Literal["steps", "epochs"]
) -> TrainConfig:
    """The configuration of one run. share: of the samples of the largest size."""
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
    return replace(
        config,
        data=join_shards(list(shards)),
        run=str(folder / f"shards-{len(shards)}-seed-{seed}"),
        seed=seed,
        loader=loader,
        optimizer=optimizer,
        **changes,
    )


def _measure(config: TrainConfig, metric: str, *, shards: int, samples: int) -> ScalingPoint:
    """Train, or go on with, or read a run."""
    folder = Path(config.run)
    # the manifest is written last; a run that was cut off while it computed features has its configuration alone
    if not (folder / MANIFEST).is_file():
        # resuming refuses another configuration
        train(config, resume=(folder / CONFIG).is_file())
    record = read_run(folder)
    differences = changed_settings(asdict(from_toml(TrainConfig, folder / CONFIG)), asdict(config))
    changed = disallowed_changes(differences, (), free=FREE_OF_SCORES)
    if changed:
        raise UsageError(
            f"{folder} is a run with other settings ({'; '.join(changed)}), whose score would not belong to this fit; "
            "name another --run for these, or remove it."
        )
    recalls = parse_metric(metric)
    last = next((line for line in reversed(record.lines) if all(name in line for name in recalls)), None)
    if last is None:
        raise UsageError(f"{folder} has not measured {metric}; remove it, and it is trained again.")
    flops: float | None = None
    names = ("forward_flops_per_sample", "backward_flops_per_sample")
    if all(record.telemetry.get(name) for name in names):
        flops = sum(record.telemetry[name] for name in names) * record.planned_steps * config.batch_size
    return ScalingPoint(
        run=str(folder),
        shards=shards,
        samples=samples,
        seed=config.seed,
        steps=record.planned_steps,
        flops=flops,
        score=float(np.mean([last[name] for name in recalls])),
    )


def fit_scaling(points: Sequence[ScalingPoint], *, metric: str, hold: str = "steps", seed: int = 0) -> ScalingReport:
    """The report of what was measured: the fits, their intervals and the check. seed: of the resampling."""
    rng = np.random.default_rng(seed)
    largest = max(point.samples for point in points)
    smaller = [point for point in points if point.samples < largest]
    at_largest = np.array([point.score for point in points if point.samples == largest])
    (check,), fit_of_smaller, _ = _fit(smaller, [largest], rng)
    beyond, fit, exponents = _fit(points, [2 * largest, 10 * largest], rng)
    low, high = np.percentile(exponents, _INTERVAL)
    return ScalingReport(
        metric=metric,
        hold=hold,
        points=tuple(points),
        fit=fit,
        exponent_interval=(float(low), float(high)),
        fit_of_smaller=fit_of_smaller,
        check=check,
        measured=float(at_largest.mean()),
        inside=int(((check.low <= at_largest) & (at_largest <= check.high)).sum()),
        runs_checked=len(at_largest),
        beyond=tuple(beyond),
    )


def _fit(
    points: Sequence[ScalingPoint], targets: Sequence[int], rng: np.random.Generator
) -> tuple[list[Forecast], PowerLaw, Float[Array, " B"]]:
    """Forecasts for the targets, the law, and the exponents of its resamples."""
    samples = np.array([point.samples for point in points], np.float64)
    errors = 1 - np.array([point.score for point in points], np.float64)
    unit = float(samples.max())
    law = _law(samples, errors, unit)
    fitted = 1 - np.array([law.score(number) for number in samples])
    # a fit of three parameters lies nearer to its points than the truth does
    residuals = (errors - fitted) * np.sqrt(len(errors) / (len(errors) - _PARAMETERS))
    resampled = fitted + rng.choice(residuals, (_RESAMPLES, len(errors)))
    laws = _least_squares(samples / unit, resampled)
    laws_without: list[PowerLaw] = []
    for size in np.unique(samples):
        others = samples != size
        laws_without.append(_law(samples[others], errors[others], unit))
    forecasts: list[Forecast] = []
    for target in targets:
        drawn = laws["floor"] + laws["amplitude"] * (target / unit) ** -laws["exponent"]
        # the spread of one more run, too
        scores = 1 - drawn - rng.choice(residuals, _RESAMPLES)
        low, high = np.percentile(scores, _INTERVAL)
        # residuals tell the spread of seeds; that the law bends shows where a size is left out
        left_out = [other.score(target) for other in laws_without]
        forecasts.append(
            Forecast(
                samples=target,
                score=law.score(target),
                low=min(float(low), *left_out),
                high=max(float(high), *left_out),
            )
        )
    return forecasts, law, laws["exponent"]


def _law(samples: Float[Array, " N"], errors: Float[Array, " N"], unit: float) -> PowerLaw:
    best = _least_squares(samples / unit, errors[None])
    return PowerLaw(
        floor=float(best["floor"][0]),
        amplitude=float(best["amplitude"][0]),
        exponent=float(best["exponent"][0]),
        unit=unit,
    )


def _least_squares(sizes: Float[Array, " N"], errors: Float[Array, "B N"]) -> dict[str, Float[Array, " B"]]:
    """Floor, amplitude and exponent of each row, none below zero.

    For each exponent of a grid the other two are linear, so that no start has to be guessed and no optimum is local.
    """
    best = np.full(len(errors), np.inf)
    values = {name: np.zeros(len(errors)) for name in ("floor", "amplitude", "exponent")}
    for exponent in _EXPONENTS:
        basis = sizes**-exponent
        centred = basis - basis.mean()
        amplitude = errors @ centred / (centred @ centred)
        floor = errors.mean(axis=1) - amplitude * basis.mean()
        # at the bounds: through the origin, or no growth at all
        amplitude = np.where(floor < 0, errors @ basis / (basis @ basis), amplitude)
        floor = np.maximum(floor, 0)
        floor = np.where(amplitude < 0, errors.mean(axis=1), floor)
        amplitude = np.maximum(amplitude, 0)
        squares = ((errors - floor[:, None] - amplitude[:, None] * basis) ** 2).sum(axis=1)
        is_better = squares < best
        best = np.where(is_better, squares, best)
        for name, value in (("floor", floor), ("amplitude", amplitude), ("exponent", exponent)):
            values[name] = np.where(is_better, value, values[name])
    return values
