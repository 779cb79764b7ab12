"""Weights of the sources of a mixture, from small runs on mixtures with drawn weights and a Lasso over the sources.

Each probe is a short run on weights from a Dirichlet distribution (RegMix, Liu et al. 2024, §3.1). A Lasso explains the
probes' scores by the square roots of the weights: the first samples of a source bring more than the later ones, and a
law linear in the weights would give all to one source. Sources whose coefficient the Lasso leaves at zero, or finds
below it, get nothing, as in Wang et al. 2023 (Improved Active Multi-Task Representation Learning via Lasso), where it
regresses on runs of single sources. The fit is judged by leaving out one probe at a time, and the weights by runs
against equal ones.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.corpus import MIXTURE_SUFFIX, Source, read_sources
from vlm.data.shards import expand_shards
from vlm.errors import UsageError
from vlm.files import compute_fingerprint, write_text
from vlm.results import Result
from vlm.tensor_types import Array, Float
from vlm.train.measured_run import LOSS, check_metric, check_score, error_of, format_score, measure_run
from vlm.train.run_config import TrainConfig
from vlm.train.scaling_plots import draw_mixture

logger = logging.getLogger(__name__)

MIXTURE_FILE = "mixture.toml"
REPORT_FILE = "mixture.json"
_LEAST_SOURCES = 2
# weights are written with two decimals: exact proportions in blocks of at most a hundred samples
_DECIMALS = 2
_STRENGTHS = 30
_FOLDS = 10
_WEAKEST = 1e-3
_RESAMPLES = 300
_MAX_ITERATIONS = 100_000
_INTERVAL = (2.5, 97.5)
# of 60 fits to 16 probes whose scores were noise 57 lay at 1.00 or above (docs/log.md)
_LARGEST_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A run on a mixture: the share of each source in what it saw, and its score."""

    run: str
    weights: dict[str, float]
    score: float


@dataclass(frozen=True, kw_only=True)
class SourceFit:
    """What the Lasso says of a source. coefficient: of the square root of its weight, in standard deviations of the
    probes' scores, better upwards. weight: recommended; low, high: 95%, by resampled probes."""

    name: str
    coefficient: float
    weight: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class WeightFit:
    """Weights of the sources by the probes, and how good the fit is.

    left_out_error: root mean square of the error for a probe that the fit has not seen, its strength chosen without the
    probe, too; left_out_spread: the same of a fit that says the mean of the others. strength: λ of the Lasso.
    """

    sources: tuple[SourceFit, ...]
    strength: float
    left_out_error: float
    left_out_spread: float

    @property
    def is_useful(self) -> bool:
        """Whether it forecasts a probe better than the mean of the others does, by more than chance."""
        return self.left_out_error < _LARGEST_SHARE * self.left_out_spread

    def weights(self) -> dict[str, float]:
        """The recommended weights, by source."""
        return {source.name: source.weight for source in self.sources}


@dataclass(frozen=True, kw_only=True)
class MixtureReport(Result):
    """What was measured, the fit, and the recommended weights in runs of their own against equal ones.

    mixture: the file with the recommended weights, for `vlm train --data`. recommended, equal: one run for each seed.
    """

    metric: str
    steps: int
    probes: tuple[Probe, ...]
    fit: WeightFit
    mixture: str
    recommended: tuple[Probe, ...]
    equal: tuple[Probe, ...]

    @property
    def is_equal(self) -> bool:
        """Whether the recommended weights are the equal ones, to the decimals that weights have."""
        return _is_equal(self.fit)

    def verdict(self) -> str:
        """How good the fit is, and what the check gave, in sentences."""
        fit = self.fit
        share = fit.left_out_error / fit.left_out_spread
        judged = (
            f"Probes that the fit has not seen: {self.metric} is off by {_plain(self.metric, fit.left_out_error)}, "
            f"{share:.0%} of their spread ({_plain(self.metric, fit.left_out_spread)})"
        )
        judged += "." if fit.is_useful else ": no more than chance gives. More probes, or longer ones, may tell."
        judged += self._beyond_probes()
        if not self.recommended:
            return judged
        if self.is_equal:
            told = ", ".join(format_score(self.metric, probe.score) for probe in self.equal)
            return f"{judged}\nThe recommended weights are the equal ones, one mixture: {self.metric} {told}."
        scores = [[probe.score for probe in probes] for probes in (self.recommended, self.equal)]
        errors = [error_of(self.metric, float(np.mean(of_runs))) for of_runs in scores]
        better = "better" if errors[0] < errors[1] else "not better"
        told = [", ".join(format_score(self.metric, score) for score in of_runs) for of_runs in scores]
        return (
            f"{judged}\nIn runs of {self.steps:,} steps the recommended weights are {better} than equal ones: "
            f"{self.metric} {told[0]} against {told[1]}."
        )

    def _beyond_probes(self) -> str:
        """A sentence on the weights that are larger than any probe had, empty where there are none."""
        beyond: list[str] = []
        for source in self.fit.sources:
            largest = max(probe.weights[source.name] for probe in self.probes)
            if source.weight > largest:
                beyond.append(f"{source.name} {source.weight:.0%} (at most {largest:.0%} in a probe)")
        return f" Beyond what was tried: {', '.join(beyond)}." if beyond else ""


def _is_equal(fit: WeightFit) -> bool:
    weights = fit.weights().values()
    # in hundredths three equal weights are 0.34, 0.33 and 0.33
    return max(weights) - min(weights) < 1.5 / 10**_DECIMALS


def _plain(metric: str, difference: float) -> str:
    """A difference of scores."""
    return f"{difference:.3f}" if metric == LOSS else f"{100 * difference:.1f} points"


def measure_mixture(
    config: TrainConfig,
    *,
    probes: int = 16,
    seeds: int = 2,
    metric: str = "loss",
    concentration: float = 1.0,
) -> MixtureReport:
    """Train probes, fit the weights, write them, and check them; finished runs are read, not repeated.

    config: of a probe; its `run` is the folder of all runs, its `data` a mixture file, whose weights are not used.
    seeds: runs of the recommended weights, and of equal ones; 0 checks nothing. concentration: of the Dirichlet
    distribution; below 1 probes have few sources each, above it most of all.

    Raises:
        UsageError: there is one source, or too few probes, or settings that do not go with it. VlmError: a run had to
            end.
    """
    check_metric(metric)
    sources = _check(config, probes, seeds, concentration)
    folder = Path(config.run)
    names = [source.name for source in sources]
    drawn = _draw_weights(len(sources), probes, concentration, config.seed)
    measured: list[Probe] = []
    for number, weights in enumerate(drawn):
        # of one seed, so that the weights alone differ
        run = _MixtureRun(f"probe-{number:03}", dict(zip(names, weights, strict=True)), config.seed)
        measured.append(_measure(config, sources, run, metric))
    fit = fit_weights(measured, metric=metric)
    write_text(folder / MIXTURE_FILE, _mixture_text(sources, fit.weights()))
    recommended, equal = _check_runs(config, sources, fit, metric, seeds)
    report = MixtureReport(
        metric=metric,
        steps=config.steps,
        probes=tuple(measured),
        fit=fit,
        mixture=str(folder / MIXTURE_FILE),
        recommended=tuple(recommended),
        equal=tuple(equal),
    )
    write_text(folder / REPORT_FILE, json.dumps(report.to_json(), indent=2) + "\n")
    draw_mixture(report, folder / "mixture.png")
    return report


def _check(config: TrainConfig, probes: int, seeds: int, concentration: float) -> tuple[Source, ...]:
    """The sources, once nothing else is wrong.

    Raises:
        UsageError: naming what is.
    """
    _check_config(config)
    sources = read_sources(config.data)
    if len(sources) < _LEAST_SOURCES:
        raise UsageError(f"{config.data} has one source, which needs no weight; name {_LEAST_SOURCES} or more.")
    if probes < len(sources) + 2:
        raise UsageError(
            f"--probes {probes}: a fit of {len(sources)} sources that is checked on a probe left out needs "
            f"{len(sources) + 2} or more; four for each source are better."
        )
    if seeds < 0:
        raise UsageError(f"--seeds {seeds} is no number of runs; give 1 or more, or 0 to check nothing.")
    if not 0 < concentration < np.inf:
        raise UsageError(f"--concentration {concentration:g} must be above 0, and finite.")
    for source in sources:
        # a source that is not there must not show after an hour of probes
        expand_shards(source.data)
    return sources


def _check_config(config: TrainConfig) -> None:
    """Refuse a configuration that cannot be a probe's.

    Raises:
        UsageError: naming what cannot.
    """
    config.check()
    if find_spec("sklearn") is None:
        raise UsageError("The Lasso needs scikit-learn: pip install 'vlm-pipeline[evaluation]'.")
    if not config.data.endswith(MIXTURE_SUFFIX):
        raise UsageError(
            f"--data {config.data} is one source, which needs no weight; name a mixture file (.toml) with a [[source]] "
            "table for each (docs/formats.md)."
        )
    if not config.val:
        raise UsageError("Weights are chosen by a score on held-out data; name its shards (--val).")
    if config.safety.early_stop:
        raise UsageError(f"--early-stop {config.safety.early_stop} ends probes at lengths of their own; leave it out.")
    if config.steps < 1:
        raise UsageError("Probes are to be equally long whatever their sources hold; give their --steps.")
    if config.optimizer.warmup_steps >= config.steps:
        raise UsageError(
            f"Probes of {config.steps} steps would end while warming up ({config.optimizer.warmup_steps} steps); give "
            "more --steps, or fewer --warmup-steps."
        )


def _draw_weights(num_sources: int, num_probes: int, concentration: float, seed: int) -> list[list[float]]:
    """Weights of each probe, with two decimals; more probes begin with the same ones."""
    rng = np.random.default_rng(seed)
    drawn = rng.dirichlet([concentration] * num_sources, size=num_probes)
    return [_rounded(weights) for weights in drawn]


def _rounded(weights: Float[Array, " S"]) -> list[float]:
    """The weights in hundredths that add up to one, by largest remainders."""
    units = 10**_DECIMALS
    wholes = np.floor(weights * units)
    remainders = weights * units - wholes
    missing = int(units - wholes.sum())
    wholes[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return [float(whole) / units for whole in wholes]


def _check_runs(
    config: TrainConfig, sources: Sequence[Source], fit: WeightFit, metric: str, seeds: int
) -> tuple[list[Probe], list[Probe]]:
    """Runs of the recommended weights, and of equal ones, with the same seeds, which no probe had."""
    equal_weights = {source.name: 1 / len(sources) for source in sources}
    recommended: list[Probe] = []
    equal: list[Probe] = []
    for seed in range(config.seed + 1, config.seed + 1 + seeds):
        recommended.append(_measure(config, sources, _MixtureRun("recommended", fit.weights(), seed), metric))
        # where they are one mixture it is trained once
        other = None if _is_equal(fit) else _MixtureRun("equal", equal_weights, seed)
        equal.append(_measure(config, sources, other, metric) if other else recommended[-1])
    return recommended, equal


@dataclass(frozen=True)
class _MixtureRun:
    name: str
    weights: dict[str, float]
    seed: int


def _measure(config: TrainConfig, sources: Sequence[Source], run: _MixtureRun, metric: str) -> Probe:
    folder = Path(config.run)
    text = _mixture_text(sources, run.weights)
    # named by what it holds: with other sources, or other weights, it is another run
    identity = compute_fingerprint(text)[:8]
    file = folder / "mixtures" / f"{run.name}-{identity}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    name = f"{run.name}-{identity}-seed-{run.seed}"
    measured = measure_run(replace(config, data=str(file), run=str(folder / name), seed=run.seed), metric)
    told = ", ".join(f"{source} {weight:.2f}" for source, weight in run.weights.items() if weight)
    logger.info(f"{run.name} ({told}): {metric} {format_score(metric, measured.score)}")
    return Probe(run=measured.run, weights=run.weights, score=measured.score)


def _mixture_text(sources: Sequence[Source], weights: Mapping[str, float]) -> str:
    """A mixture file of the sources that have a weight."""
    import tomli_w

    defaults = {field.name: field.default for field in fields(Source)}
    tables: list[dict[str, Any]] = []
    for source in sources:
        weight = round(weights[source.name], 2 + _DECIMALS)
        if weight:
            values = asdict(replace(source, weight=weight))
            tables.append({key: value for key, value in values.items() if value != defaults[key]})
    return tomli_w.dumps({"source": tables})


def fit_weights(probes: Sequence[Probe], *, metric: str = "loss", seed: int = 0) -> WeightFit:
    """The weights that a Lasso of the scores recommends. seed: of the resampled probes.

    With coefficients a of the square roots, Σ a · √w is largest where the weights are in the proportions of a², those
    of sources below zero apart, which get nothing; with none above zero it is where the sources at zero share all.

    Raises:
        UsageError: the probes' scores are all the same. VlmError: a score is no finite number.
    """
    for number, probe in enumerate(probes):
        check_score(metric, probe.score, f"Probe {number} ({probe.run})")
    names = list(probes[0].weights)
    roots = np.sqrt([[probe.weights[name] for name in names] for probe in probes])
    benefits = -np.array([error_of(metric, probe.score) for probe in probes])
    spread = float(benefits.std())
    if spread == 0:
        raise UsageError(
            f"All {len(probes)} probes end with the same {metric}, {format_score(metric, probes[0].score)}: they tell "
            "nothing of their sources. Give more --steps, or another --metric."
        )
    scaled = (benefits - benefits.mean()) / spread
    fitted = _fit_lasso(roots, scaled)
    weights = _rounded(_best_weights(fitted.coef_))
    intervals = _weight_intervals(roots, scaled, fitted.alpha_, np.random.default_rng(seed))
    sources: list[SourceFit] = []
    for name, coefficient, weight, (low, high) in zip(names, fitted.coef_.tolist(), weights, intervals, strict=True):
        sources.append(SourceFit(name=name, coefficient=coefficient, weight=weight, low=low, high=high))
    # the mean of the others is off by this much more than the mean of all
    without_fit = spread * len(probes) / (len(probes) - 1)
    return WeightFit(
        sources=tuple(sources),
        strength=float(fitted.alpha_),
        left_out_error=spread * _left_out_error(roots, scaled),
        left_out_spread=without_fit,
    )


def _best_weights(coefficients: Float[Array, " S"]) -> Float[Array, " S"]:
    squares = np.maximum(coefficients, 0.0) ** 2
    if not squares.any():
        # what harms least
        squares = (coefficients == coefficients.max()).astype(np.float64)
    return squares / squares.sum()


def _weight_intervals(
    roots: Float[Array, "N S"], scaled: Float[Array, " N"], strength: float, rng: np.random.Generator
) -> list[list[float]]:
    """Of each source the lowest and highest weight, 95%, by fits of this strength to resampled probes."""
    from sklearn.linear_model import Lasso

    drawn: list[Float[Array, " S"]] = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, len(scaled), len(scaled))
        lasso: Any = Lasso(alpha=strength, max_iter=_MAX_ITERATIONS).fit(roots[rows], scaled[rows])
        drawn.append(_best_weights(lasso.coef_))
    return np.percentile(drawn, _INTERVAL, axis=0).T.tolist()


def _fit_lasso(roots: Float[Array, "N S"], scaled: Float[Array, " N"]) -> Any:
    """The Lasso of the strength with the least error for tenths of the probes left out: alpha_, coef_, predict."""
    from sklearn.linear_model import LassoCV

    # from the strength that leaves nothing: the largest slope of any source alone
    strongest = float(np.abs((roots - roots.mean(axis=0)).T @ (scaled - scaled.mean())).max() / len(scaled))
    strengths: Any = np.geomspace(max(strongest, 1e-12), max(strongest, 1e-12) * _WEAKEST, _STRENGTHS)
    return LassoCV(alphas=strengths, cv=min(len(scaled), _FOLDS), max_iter=_MAX_ITERATIONS).fit(roots, scaled)


def _left_out_error(roots: Float[Array, "N S"], scaled: Float[Array, " N"]) -> float:
    """Root mean square of the error for each probe by a fit to the others, which chooses its strength among them."""
    errors: list[float] = []
    for left_out in range(len(scaled)):
        others = np.arange(len(scaled)) != left_out
        fitted = _fit_lasso(roots[others], scaled[others])
        errors.append(float(fitted.predict(roots[left_out : left_out + 1])[0] - scaled[left_out]))
    return float(np.sqrt(np.mean(np.square(errors))))
