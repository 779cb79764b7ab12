"""`benchmarks/run growth` tells linear from steeper growth, and what does not grow; its memory is a line."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = (1000, 2000, 5000, 10_000, 20_000)


@pytest.fixture(scope="module")
def fit_growth():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from growth import fit_growth
    finally:
        sys.path.remove(str(BENCHMARKS))
    return fit_growth


def costs_of(power: float, *, noise: float = 0.0, work: float = 1e-3, memory: float = 0.0):
    """Three runs of one sample and one of each size, of 4 s and `work` seconds for the first sample."""
    rng = np.random.default_rng(0)
    costs: dict[int, list[dict[str, float]]] = {}
    for size in (1, 1, 1, *SIZES):
        cpu_s = (4 + work * size**power) * np.exp(noise * rng.standard_normal())
        costs.setdefault(size, []).append({"cpu_s": cpu_s, "seconds": cpu_s, "peak_mb": 300 + memory * size})
    return costs


@pytest.mark.parametrize("power", [0.8, 1.0, 1.3])
def test_the_power_is_that_of_the_work_beyond_the_start(fit_growth, power):
    fit = fit_growth(costs_of(power))
    assert fit["power"] == pytest.approx(power, abs=1e-3)
    assert fit["start_s"] == pytest.approx(4, rel=1e-3)
    assert fit["sizes"] == list(SIZES)


def test_the_interval_holds_the_power_of_noisy_costs(fit_growth):
    low, high = fit_growth(costs_of(1.0, noise=0.05))["power_interval"]
    assert 0.7 < low < 1.0 < high < 1.3


def test_two_sizes_are_too_few_for_a_power(fit_growth):
    costs = costs_of(1.0)
    assert fit_growth({size: costs[size] for size in (1, 1000, 2000)}) == {"sizes": [1000, 2000], "power": None}


def test_what_hardly_grows_has_no_power(fit_growth):
    assert fit_growth(costs_of(1.0, work=1e-6))["power"] is None


def test_memory_grows_by_a_line_or_not_at_all(fit_growth):
    assert fit_growth(costs_of(1.0))["peak_mb"]["per_10000"] == pytest.approx(0, abs=1e-9)
    fit = fit_growth(costs_of(1.0, memory=1e-2))["peak_mb"]
    assert fit["per_10000"] == pytest.approx(100)
    assert fit["interval"] == pytest.approx([100, 100])
