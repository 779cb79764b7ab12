"""A source that helps is found by the Lasso among those that do not, and probes on real mixtures feed it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import vlm
from vlm.cli.main import main
from vlm.config import to_toml
from vlm.data.corpus import read_sources
from vlm.errors import UsageError, VlmError
from vlm.train.history import read_run
from vlm.train.measured_run import MeasuredRun
from vlm.train.mixture_weights import MixtureReport, Probe, SourceFit, WeightFit, _draw_weights, fit_weights

NAMES = ("photos", "drawings", "icons", "noise")


def probes_of(score, number=20, noise=0.01, names=NAMES):
    rng = np.random.default_rng(2)
    probes = []
    for weights in _draw_weights(len(names), number, 1.0, 4):
        named = dict(zip(names, weights, strict=True))
        probes.append(Probe(run="", weights=named, score=float(score(named) + noise * rng.standard_normal())))
    return probes


def two_help(weights):
    """√w is worth four times in photos what it is in icons, so that the best weights are 16 to 1."""
    return 5 - 0.8 * weights["photos"] ** 0.5 - 0.2 * weights["icons"] ** 0.5


def test_planted_sources_are_found_and_the_others_get_nothing():
    fit = fit_weights(probes_of(two_help))
    weights = fit.weights()
    assert weights["photos"] == pytest.approx(16 / 17, abs=0.03)
    assert weights["icons"] == pytest.approx(1 / 17, abs=0.03)
    assert weights["drawings"] == weights["noise"] == 0
    for source in fit.sources:
        assert source.low <= source.weight + 0.005
        assert source.weight - 0.005 <= source.high
    assert fit.left_out_error < 0.2 * fit.left_out_spread
    assert fit.is_useful


def test_weights_that_no_probe_had_are_told():
    probes = tuple(probes_of(two_help, number=8))
    report = MixtureReport(
        metric="loss", steps=60, probes=probes, fit=fit_weights(probes), mixture="", recommended=(), equal=()
    )
    largest = max(probe.weights["photos"] for probe in probes)
    assert f"Beyond what was tried: photos 94% (at most {largest:.0%} in a probe)" in report.verdict()
    tried = (*probes, Probe(run="", weights=report.fit.weights(), score=4.0))
    assert "Beyond" not in replace(report, probes=tried).verdict()


def test_a_score_that_is_no_number_names_its_probe():
    probes = probes_of(two_help)
    probes[3] = replace(probes[3], run="weights/probe-003", score=float("nan"))
    with pytest.raises(VlmError, match=r"Probe 3 \(weights/probe-003\) ends with loss nan.*--learning-rate"):
        fit_weights(probes)


def test_weights_that_are_the_equal_ones_are_one_mixture_trained_once(
    configure, mixture, scene_shards, monkeypatch, capsys
):
    trained = []

    def measure(config, metric):
        trained.append(config.run)
        return MeasuredRun(run=config.run, steps=3, samples_seen=24, flops_per_sample=None, score=4.0 + len(trained))

    halves = tuple(SourceFit(name=name, coefficient=0.1, weight=0.5, low=0, high=1) for name in ("all", "first"))
    fit = WeightFit(sources=halves, strength=0.1, left_out_error=1.0, left_out_spread=1.0)
    monkeypatch.setattr("vlm.train.mixture_weights.measure_run", measure)
    monkeypatch.setattr("vlm.train.mixture_weights.fit_weights", lambda probes, metric: fit)
    config = configure("weights", data=mixture, val=str(scene_shards / "val"), steps=3, batch_size=8)
    report = vlm.fit_mixture(config, probes=4, seeds=2)
    assert len(trained) == 6
    assert report.equal == report.recommended
    assert "The recommended weights are the equal ones, one mixture: loss 9, 10." in report.verdict()
    Path(config.run, "config.toml").write_text(to_toml(config))
    assert main(["--quiet", "mixture", config.run, "--run", config.run, "--probes", "4"]) == 0
    shown = capsys.readouterr().out
    assert "no more than chance gives" in shown
    assert "Train with them" not in shown


def test_of_a_recall_more_is_better():
    fit = fit_weights(probes_of(lambda weights: 0.1 + 0.3 * weights["drawings"] ** 0.5), metric="recall@10")
    assert fit.weights()["drawings"] == pytest.approx(1, abs=0.02)


def test_a_source_that_harms_gets_nothing_and_the_others_share():
    fit = fit_weights(probes_of(lambda weights: 3 + weights["noise"] ** 0.5, noise=1e-3))
    weights = fit.weights()
    assert weights["noise"] == 0
    assert sum(weights.values()) == pytest.approx(1)


def test_scores_that_have_nothing_to_do_with_the_weights_are_no_fit():
    fit = fit_weights(probes_of(lambda weights: 3.0, noise=0.1))
    assert not fit.is_useful
    # the error of a fit to nothing is about the spread
    assert 0.9 < fit.left_out_error / fit.left_out_spread < 1.6
    with pytest.raises(UsageError, match="All 20 probes end with the same loss"):
        fit_weights(probes_of(lambda weights: 3.0, noise=0))


def test_drawn_weights_are_hundredths_that_add_up_and_more_begin_with_the_same():
    few = _draw_weights(5, 6, 1.0, 3)
    assert _draw_weights(5, 12, 1.0, 3)[:6] == few
    assert _draw_weights(5, 6, 1.0, 4) != few
    for weights in few:
        hundredths = [100 * weight for weight in weights]
        assert hundredths == pytest.approx(np.round(hundredths))
        assert sum(hundredths) == pytest.approx(100)
    # below one few sources have a weight each
    sparse = np.array(_draw_weights(5, 50, 0.2, 3))
    even = np.array(_draw_weights(5, 50, 5.0, 3))
    assert (sparse == 0).mean() > 0.3 > (even == 0).mean()


@pytest.fixture
def mixture(scene_shards, tmp_path):
    """Two sources, one of them with a selection of its own options."""
    sources = [
        {"name": "all", "data": str(scene_shards / "train"), "weight": 3.0},
        {"name": "first", "data": str(scene_shards / "train" / "shard-00000.tar"), "weight": 1.0, "repeats": 2.0},
    ]
    path = tmp_path / "sources.toml"
    path.write_text(tomli_w.dumps({"source": sources}))
    return str(path)


def test_probes_are_trained_once_and_the_weights_written(configure, mixture, scene_shards, capsys):
    config = configure("weights", data=mixture, val=str(scene_shards / "val"), steps=3, batch_size=8)
    report = vlm.fit_mixture(config, probes=4, seeds=1)
    assert len(report.probes) == 4
    for probe in report.probes:
        run = read_run(Path(probe.run))
        seen = {source.name: source.weight for source in read_sources(run.configuration["data"])}
        assert seen == {name: weight for name, weight in probe.weights.items() if weight}
        assert (run.configuration["seed"], run.planned_steps) == (0, 3)
    # what a source has besides its weight is kept
    by_name = {
        source.name: source for source in read_sources(read_run(Path(report.equal[0].run)).configuration["data"])
    }
    assert (by_name["first"].repeats, by_name["first"].weight, by_name["all"].weight) == (2.0, 0.5, 0.5)
    written = {source.name: source.weight for source in read_sources(report.mixture)}
    assert written == {name: weight for name, weight in report.fit.weights().items() if weight}
    assert report.recommended[0].weights == report.fit.weights()
    assert [read_run(Path(probe.run)).configuration["seed"] for probe in (*report.recommended, *report.equal)] == [1, 1]
    folder = Path(config.run)
    assert json.loads((folder / "mixture.json").read_text()) == report.to_json()
    assert (folder / "mixture.png").stat().st_size > 1000
    # what is finished is not trained again, also where more probes are asked for
    manifests = [Path(probe.run, "manifest.json") for probe in report.probes]
    before = [manifest.stat().st_mtime_ns for manifest in manifests]
    assert vlm.fit_mixture(config, probes=4, seeds=1) == report
    more = vlm.fit_mixture(config, probes=5, seeds=0)
    assert more.probes[:4] == report.probes
    assert (more.recommended, more.equal) == ((), ())
    assert [manifest.stat().st_mtime_ns for manifest in manifests] == before
    # the verb reads them, and says what to do with the weights
    (folder / "config.toml").write_text(to_toml(config))
    words = [str(folder), "--run", str(folder), "--probes", "4", "--seeds", "1"]
    capsys.readouterr()
    assert main(["--quiet", "mixture", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report.to_json()
    assert main(["--quiet", "mixture", *words]) == 0
    shown = capsys.readouterr().out
    assert report.verdict().split("\n")[0] in shown
    # weights that chance gives are not recommended
    assert (f"vlm train {folder} --data {report.mixture} --run DIR" in shown) == report.fit.is_useful


def test_what_cannot_be_weighed_is_refused_before_anything_is_trained(configure, mixture, scene_shards, tmp_path):
    config = configure("weights", data=mixture, val=str(scene_shards / "val"), steps=3, batch_size=8)
    [alone, *_] = read_sources(mixture)
    single = tmp_path / "single.toml"
    single.write_text(tomli_w.dumps({"source": [{"data": alone.data}]}))
    absent = tmp_path / "absent.toml"
    absent.write_text(tomli_w.dumps({"source": [{"data": alone.data}, {"data": str(tmp_path / "none-*.tar")}]}))
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (replace(config, data=alone.data), {}, "is one source, which needs no weight; name a mixture file"),
        (replace(config, data=str(single)), {}, "single.toml has one source"),
        (replace(config, data=str(absent)), {}, "none-"),
        (replace(config, val=""), {}, "--val"),
        (replace(config, steps=-1), {}, "give their --steps"),
        (replace(config, steps=2), {}, "would end while warming up"),
        (replace(config, safety=replace(config.safety, early_stop=2, keep_best="recall@10")), {}, "--early-stop 2"),
        (config, {"probes": 3}, "--probes 3: a fit of 2 sources"),
        (config, {"seeds": -1}, "--seeds -1 is no number of runs"),
        (config, {"concentration": 0.0}, "--concentration 0 must be above 0"),
        (config, {"metric": "lost"}, "Unknown metric 'lost'"),
    ]
    for changed, settings, message in refused:
        with pytest.raises(UsageError, match=message):
            vlm.fit_mixture(changed, **settings)
    assert not Path(config.run).exists()


def test_without_scikit_learn_the_extra_is_named(configure, mixture, scene_shards, monkeypatch):
    monkeypatch.setattr("vlm.train.mixture_weights.find_spec", lambda name: None)
    config = configure("weights", data=mixture, val=str(scene_shards / "val"), steps=3)
    with pytest.raises(UsageError, match=r"pip install 'vlm-pipeline\[evaluation\]'"):
        vlm.fit_mixture(config)
