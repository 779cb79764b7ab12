"""Laws are found again in errors drawn from them, within intervals that hold the truth; budgets are divided by them."""

import numpy as np
import pytest

from vlm.train.scaling_law import PowerTerm, ScalingLaw, fit_law

SIZE_TERM = PowerTerm(amplitude=0.08, exponent=0.35, unit=3e7)
SAMPLES = (250.0, 500.0, 1000.0, 2000.0, 4000.0)
SIZES = (1e6, 3e6, 1e7, 3e7)
TRUTH = ScalingLaw(
    floor=0.4,
    samples=PowerTerm(amplitude=0.1, exponent=0.5, unit=4000),
    size=SIZE_TERM,
)


def size_term(law):
    assert law.size is not None
    return law.size


def runs(law, *, seeds=2, noise=0.003, sizes=SIZES):
    """Quantities [N, 2] and errors [N]."""
    quantities = np.array([(samples, size) for samples in SAMPLES for size in sizes for _ in range(seeds)])
    spread = noise * np.random.default_rng(3).standard_normal(len(quantities))
    return quantities, np.array([law.error(*row) for row in quantities]) + spread


@pytest.fixture(scope="module")
def fit():
    return fit_law(*runs(TRUTH), np.random.default_rng(0))


def test_a_law_of_samples_and_size_is_found_again_within_its_intervals(fit):
    for term, truth in ((fit.law.samples, TRUTH.samples), (size_term(fit.law), SIZE_TERM)):
        low, high = term.exponent_interval
        assert low < truth.exponent < high
        assert high - low < 0.3
        assert term.amplitude == pytest.approx(truth.amplitude, abs=0.03)
        assert term.unit == truth.unit
    assert fit.law.floor == pytest.approx(0.4, abs=0.04)
    # twice the data and the model, which no run had
    forecast = fit.forecast([8000, 6e7], np.random.default_rng(0))
    assert forecast.low < TRUTH.error(8000, 6e7) < forecast.high
    assert forecast.high - forecast.low < 0.04
    # between the runs less is unknown
    inside = fit.forecast([1500, 5e6], np.random.default_rng(0))
    assert inside.high - inside.low < forecast.high - forecast.low


@pytest.fixture
def few_resamples(monkeypatch):
    """Where no interval is looked at."""
    monkeypatch.setattr("vlm.train.scaling_law._RESAMPLES", 20)


@pytest.mark.usefixtures("few_resamples")
def test_without_spread_the_law_is_exact():
    fit = fit_law(*runs(TRUTH, noise=0), np.random.default_rng(0))
    assert fit.law.error(4000, 3e7) == pytest.approx(TRUTH.error(4000, 3e7), abs=1e-3)
    assert fit.law.samples.exponent == pytest.approx(0.5, rel=0.02)
    assert size_term(fit.law).exponent == pytest.approx(0.35, rel=0.02)


@pytest.mark.usefixtures("few_resamples")
def test_a_size_that_changes_nothing_has_no_part_in_the_law():
    flat = ScalingLaw(floor=0.4, samples=TRUTH.samples)
    quantities, errors = runs(flat, noise=1e-4)
    fit = fit_law(quantities, errors, np.random.default_rng(0))
    assert size_term(fit.law).at(1e7) == pytest.approx(size_term(fit.law).at(3e7), abs=1e-3)
    assert fit.law.samples.exponent == pytest.approx(0.5, abs=0.06)
    exact = fit_law(quantities, np.full(len(errors), 0.5), np.random.default_rng(0))
    assert exact.law.error(1e9, 1e9) == pytest.approx(0.5, abs=1e-6)
    assert exact.best_size(1e12, 10) is None


def test_a_budget_is_divided_where_no_other_size_does_better(fit):
    visits, budget = 10.0, 4 * 10.0 * 4000 * 3e7
    best = fit.best_size(budget, visits)
    assert best.low < best.size < best.high
    assert best.size * best.samples_seen == pytest.approx(budget)

    def error_at(size, law):
        return law.error(budget / size / visits, size)

    for factor in (0.8, 1.25):
        assert error_at(best.size, fit.law) < error_at(factor * best.size, fit.law)
    sizes = np.geomspace(1e6, 1e9, 3000)
    truly_best = sizes[np.argmin([error_at(size, TRUTH) for size in sizes])]
    assert best.low < truly_best < best.high


@pytest.mark.usefixtures("few_resamples")
def test_a_floor_and_amplitudes_are_never_below_zero():
    rng = np.random.default_rng(1)
    quantities, _ = runs(TRUTH)
    # an error that grows with data, and one that would end below nothing
    for errors in (0.1 + 1e-5 * quantities[:, 0], 30 * quantities[:, 0] ** -1.0):
        fit = fit_law(quantities, errors + 1e-4 * rng.standard_normal(len(errors)), rng)
        assert min(fit.law.floor, fit.law.samples.amplitude, size_term(fit.law).amplitude) >= 0
