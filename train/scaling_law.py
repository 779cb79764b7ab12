"""Laws of growth: an error is a floor and a power of the samples and, where it varies, of the size of the model.

error = floor + A · (samples / unit)^-β + B · (size / unit)^-α, as loss is in Hoffmann et al. 2022 (Training
Compute-Optimal Large Language Models, §3.3, eq. 2 and 10) and error in Rosenfeld et al. 2020. Size is here in FLOPs a
training sample, not in parameters: a table of words has many parameters that a sample does not touch. Fitted is the
error itself by least squares, not its logarithm by Huber's loss as there, since few runs have no outliers to bear.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm.tensor_types import Array, Bool, Float

_EXPONENTS = (0.05, 2.0)
# of each power, all combinations of which are tried
_NUM_COARSE = 30
_NUM_FINE = 60
_RESAMPLES = 1000
_ROWS_AT_ONCE = 250
_INTERVAL = (2.5, 97.5)
_LEAST_SIZES_LEFT = 3


@dataclass(frozen=True, kw_only=True)
class PowerTerm:
    """amplitude · (quantity / unit)^-exponent. exponent_interval: 95%, by resampled residuals; None where the amplitude
    is zero in all of them.

    at_limit: the exponent lies at a limit of those tried. is_told: the runs tell the term: its amplitude is above zero,
    and the interval of its exponent is not all that was tried.
    """

    amplitude: float
    exponent: float
    unit: float
    exponent_interval: tuple[float, float] | None = None
    at_limit: bool = False
    is_told: bool = True

    def at(self, quantity: float) -> float:
        """The error that this much leaves."""
        return self.amplitude * (quantity / self.unit) ** -self.exponent


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """error = floor + samples + size, each term at its quantity; without a size where all runs have the same."""

    floor: float
    samples: PowerTerm
    size: PowerTerm | None = None

    def error(self, samples: float, size: float | None = None) -> float:
        """The error with so many samples, by a model of so many FLOPs a sample."""
        return self.floor + self.samples.at(samples) + (self.size.at(size) if self.size and size else 0.0)


@dataclass(frozen=True, kw_only=True)
class ErrorForecast:
    """The error of one more run, and its 95% prediction interval."""

    error: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BestSize:
    """How a budget of FLOPs is best divided: the size, in FLOPs a sample, with its 95% interval; the samples seen."""

    size: float
    low: float
    high: float
    samples_seen: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Laws:
    """Laws of B rows of errors, over quantities in their units."""

    floors: Float[Array, " B"]
    amplitudes: Float[Array, "B K"]
    exponents: Float[Array, "B K"]

    def errors(self, quantities: Float[Array, " K"]) -> Float[Array, " B"]:
        return self.floors + (self.amplitudes * quantities**-self.exponents).sum(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LawFit:
    """A law fitted to errors, and what its forecasts' intervals are made of.

    residuals: of the fit, widened for the parameters that it took. without: the laws of the runs but those of one
    number of samples, or of one size.
    """

    units: Float[Array, " K"]
    best: _Laws
    resampled: _Laws
    residuals: Float[Array, " N"]
    without: tuple[_Laws, ...]

    @cached_property
    def law(self) -> ScalingLaw:
        """With the intervals of its exponents."""
        terms = [self._term(column) for column in range(len(self.units))]
        return ScalingLaw(floor=float(self.best.floors[0]), samples=terms[0], size=terms[1] if terms[1:] else None)

    def _term(self, column: int) -> PowerTerm:
        # without an amplitude an exponent is any
        drawn = self.resampled.exponents[self.resampled.amplitudes[:, column] > 0, column]
        interval: tuple[float, float] | None = None
        if len(drawn):
            low, high = np.percentile(drawn, _INTERVAL)
            interval = (float(low), float(high))
        amplitude = float(self.best.amplitudes[0, column])
        exponent = float(self.best.exponents[0, column])
        least, largest = _EXPONENTS
        is_bounded = interval is not None and (interval[0] > least or interval[1] < largest)
        return PowerTerm(
            amplitude=amplitude,
            exponent=exponent,
            unit=float(self.units[column]),
            exponent_interval=interval,
            at_limit=amplitude > 0 and not least < exponent < largest,
            is_told=amplitude > 0 and is_bounded,
        )

    def forecast(self, quantities: Sequence[float], rng: np.random.Generator) -> ErrorForecast:
        """The error of one more run at these samples (and size); rng: of the spread of runs."""
        scaled = np.array(quantities, np.float64) / self.units
        # the spread of one more run, too
        errors = self.resampled.errors(scaled) + rng.choice(self.residuals, _RESAMPLES)
        low, high = np.percentile(errors, _INTERVAL)
        # residuals tell the spread of seeds; that the law bends shows where a size is left out
        left_out = [float(laws.errors(scaled)[0]) for laws in self.without]
        return ErrorForecast(
            error=float(self.best.errors(scaled)[0]), low=min(float(low), *left_out), high=max(float(high), *left_out)
        )

    def best_size(self, flops: float, visits: float) -> BestSize | None:
        """The size and the samples of least error whose product, with so many visits of each sample, is the budget.

        None where the law has no such point: more samples, or a larger model, bring nothing in it.
        """
        # in units, size · samples is this
        product = flops / visits / float(self.units.prod())
        [size] = _balanced_sizes(self.best, product) or [np.nan]
        drawn = _balanced_sizes(self.resampled, product)
        if not np.isfinite(size) or not drawn:
            return None
        low, high = np.percentile(drawn, _INTERVAL) * self.units[1]
        size *= self.units[1]
        return BestSize(size=float(size), low=float(low), high=float(high), samples_seen=float(flops / size))


def _balanced_sizes(laws: _Laws, product: float) -> list[float]:
    """The size of least error of each law that has both terms, where size · samples is the product; all in units.

    Where the derivatives of both terms are equal: eq. 4 of Hoffmann et al.
    """
    sizes: list[float] = []
    for (a, b), (beta, alpha) in zip(laws.amplitudes, laws.exponents, strict=True):
        if a > 0 and b > 0:
            balance = (alpha * b / (beta * a)) ** (1 / (alpha + beta))
            sizes.append(float(balance * product ** (beta / (alpha + beta))))
    return sizes


def fit_law(quantities: Float[Array, "N K"], errors: Float[Array, " N"], rng: np.random.Generator) -> LawFit:
    """The law of the errors of N runs.

    quantities: the samples of each and, with K = 2, the size. rng: of the resampling.
    """
    units = quantities.max(axis=0)
    scaled = quantities / units
    best = _least_squares(scaled, errors[None])
    fitted = np.array([float(best.errors(row)[0]) for row in scaled])
    num_parameters = 1 + 2 * quantities.shape[1]
    # the fit lies nearer to its points than the truth does
    freedom = max(len(errors) - num_parameters, 1)
    residuals = (errors - fitted) * np.sqrt(len(errors) / freedom)
    resampled = _least_squares(scaled, fitted + rng.choice(residuals, (_RESAMPLES, len(errors))))
    without: list[_Laws] = []
    for is_kept in _leaving_one_out(quantities):
        without.append(_least_squares(scaled[is_kept], errors[None, is_kept]))
    return LawFit(units=units, best=best, resampled=resampled, residuals=residuals, without=tuple(without))


def _leaving_one_out(quantities: Float[Array, "N K"]) -> list[Bool[Array, " N"]]:
    """The runs but those of each number of samples, and of each size where enough of them are left for an exponent."""
    kept: list[Bool[Array, " N"]] = []
    for column, values in enumerate(quantities.T):
        different = np.unique(values)
        if column == 0 or len(different) > _LEAST_SIZES_LEFT:
            kept += [values != value for value in different]
    return kept


def _least_squares(quantities: Float[Array, "N K"], errors: Float[Array, "B N"]) -> _Laws:
    """The law of each row of errors, with no amplitude and no floor below zero.

    All exponents of a coarse grid are tried, so that no start is guessed and no optimum is local; then those of a finer
    one between the least and the largest that the rows found.
    """
    num_terms = quantities.shape[1]
    axis = np.geomspace(*_EXPONENTS, _NUM_COARSE)
    step = axis[1] / axis[0]
    search = _GridSearch(quantities, errors)
    search.run([axis] * num_terms)
    axes: list[Float[Array, " G"]] = []
    for column in range(num_terms):
        # without an amplitude an exponent is any
        found = search.exponents[search.coefficients[:, 1 + column] > 0, column]
        least, largest = (found.min() / step, found.max() * step) if len(found) else (1.0, 1.0)
        axes.append(np.geomspace(least, largest, _NUM_FINE))
    search.run(axes)
    coefficients = search.coefficients
    return _Laws(floors=coefficients[:, 0], amplitudes=coefficients[:, 1:], exponents=search.exponents)


class _GridSearch:
    """The best law of each row of errors among all exponents that were tried.

    For given exponents the rest is linear, and the best without negative parts is the best of those fits to some of the
    columns that have none. coefficients: the floor and the amplitudes.
    """

    def __init__(self, quantities: Float[Array, "N K"], errors: Float[Array, "B N"]) -> None:
        self._quantities = quantities
        self._errors = errors
        self._squares = np.full(len(errors), np.inf)
        self.coefficients = np.zeros((len(errors), 1 + quantities.shape[1]))
        self.exponents = np.zeros((len(errors), quantities.shape[1]))

    def run(self, axes: Sequence[Float[Array, " G"]]) -> None:
        """Try all combinations of these exponents, an axis for each quantity."""
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
        powers = self._quantities[None] ** -grid[:, None]
        columns = np.concatenate([np.ones((*powers.shape[:2], 1)), powers], axis=2)
        parts = range(columns.shape[2])
        for number in range(1, 1 + len(parts)):
            for support in itertools.combinations(parts, number):
                self._try(grid, columns, support)

    def _try(self, grid: Float[Array, "G K"], columns: Float[Array, "G N P"], support: tuple[int, ...]) -> None:
        some = columns[:, :, support]
        solver = np.linalg.pinv(some)
        for first in range(0, len(self._errors), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            place, solved, squares = _best_on_grid(some, solver, self._errors[rows])
            is_better = squares < self._squares[rows]
            self._squares[rows][is_better] = squares[is_better]
            found = np.zeros((len(squares), columns.shape[2]))
            found[:, support] = solved
            self.coefficients[rows][is_better] = found[is_better]
            self.exponents[rows][is_better] = grid[place[is_better]]


def _best_on_grid(
    columns: Float[Array, "G N S"], solver: Float[Array, "G S N"], errors: Float[Array, "B N"]
) -> tuple[Array, Float[Array, "B S"], Float[Array, " B"]]:
    """Of each row the place in the grid with the least squares, its coefficients and the squares; infinite where some
    coefficient is negative everywhere."""
    solved = solver @ errors.T
    explained = (solved * (columns.transpose(0, 2, 1) @ errors.T)).sum(axis=1)
    squares = (errors**2).sum(axis=1) - explained
    squares[(solved < 0).any(axis=1)] = np.inf
    place = squares.argmin(axis=0)
    rows = np.arange(len(errors))
    return place, solved[place, :, rows], squares[place, rows]
