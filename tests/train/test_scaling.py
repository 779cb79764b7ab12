"""A law of growth is found again in data drawn from it, its forecast is checked, and runs on subsets feed it.

How laws of two quantities are fitted is in test_scaling_law.py.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlm
from vlm.cli.main import main
from vlm.cli.scale import _show_budgets, _show_forecasts
from vlm.config import to_toml
from vlm.data.pack import PackConfig, pack
from vlm.data.sources.source import SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.errors import UsageError, VlmError
from vlm.train.history import read_run
from vlm.train.measured_run import MeasuredRun
from vlm.train.scaling import ScalingPoint, fit_scaling
from vlm.train.scaling_plots import draw_scaling


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory):
    """Five shards of eight scenes."""
    folder = tmp_path_factory.mktemp("small") / "shards"
    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=40, pixels=32)))
    pack(source, folder, PackConfig(samples_per_shard=8))
    return str(folder)


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def point(run, architecture, samples, seed, size, score):
    flops = None if size is None else size * 10 * samples
    return ScalingPoint(
        run=run,
        architecture=architecture,
        shards=1,
        samples=samples,
        seed=seed,
        steps=10,
        flops_per_sample=size,
        flops=flops,
        score=score,
    )


def points_of(law, sizes=(500, 1000, 2000, 4000, 8000), seeds=3, noise=0.003):
    rng = np.random.default_rng(5)
    points = []
    for size in sizes:
        for seed in range(seeds):
            score = float(law(size) + noise * rng.standard_normal())
            points.append(point(f"{size}-{seed}", "tiny", size, seed, None, score))
    return points


def test_a_power_law_with_a_floor_is_found_again_and_its_forecast_holds():
    def law(samples):
        return 1 - 0.4 - 0.1 * (samples / 8000) ** -0.5

    report: Any = fit_scaling(points_of(law), metric="recall@10")
    low, high = report.fit.samples.exponent_interval
    assert 0.35 < low < 0.5 < high < 0.65
    [check] = report.checks
    assert check.forecast.samples == 8000
    assert check.forecast.low < 0.5 < check.forecast.high
    assert check.inside == check.runs_checked == 3
    assert "held" in report.verdict()
    assert (report.sizes, report.fit.size, report.budgets) == ({}, None, ())
    twice, ten_times = report.beyond
    assert (twice.samples, ten_times.samples) == (16000, 80000)
    assert twice.score == pytest.approx(law(16000), abs=0.02)
    # farther away less is known
    assert ten_times.high - ten_times.low > twice.high - twice.low


def test_growth_that_stops_where_no_smaller_size_showed_it_is_told_as_missed():
    def breaks_off(samples):
        return min(1 - 0.6 * (samples / 2000) ** -0.5, 0.58)

    report = fit_scaling(points_of(breaks_off), metric="recall@10")
    [check] = report.checks
    assert check.forecast.low > check.measured
    assert "missed" in report.verdict()
    assert "0 of 3 runs inside" in report.verdict()


def test_scores_that_do_not_grow_are_a_flat_line():
    report = fit_scaling(points_of(lambda samples: 0.4), metric="recall@10")
    assert report.score(80000) == pytest.approx(0.4, abs=0.02)
    assert report.checks[0].forecast.low < 0.4 < report.checks[0].forecast.high


SIZES = {"small": 1e6, "medium": 4e6, "large": 1.6e7, "huge": 6.4e7}


def error_of_size(samples, size):
    return 1.5 + 0.6 * (samples / 8000) ** -0.5 + 0.4 * (size / 6.4e7) ** -0.4


def grid_of(law, sizes=SIZES, noise=0.01, subsets=(500, 1000, 2000, 4000, 8000)):
    """Runs of each size of model on each subset, two of each, whose losses are of a law."""
    rng = np.random.default_rng(12)
    points = []
    for samples in subsets:
        for name, size in sizes.items():
            for seed in range(2):
                loss = float(law(samples, size) + noise * rng.standard_normal())
                points.append(point(f"{name}-{samples}-{seed}", name, samples, seed, size, loss))
    return points


def test_a_law_of_data_and_size_forecasts_the_largest_and_divides_budgets():
    report: Any = fit_scaling(grid_of(error_of_size), metric="loss", hold="epochs", budgets=(6.4e7 * 80000, 1e13))
    assert report.sizes == SIZES
    for term, exponent in ((report.fit.samples, 0.5), (report.fit.size, 0.4)):
        low, high = term.exponent_interval
        assert low < exponent < high
    smaller, others = report.checks
    assert (smaller.known, others.known) == ("smaller", "others")
    for check in report.checks:
        assert check.forecast.low < 2.5 < check.forecast.high
        assert (check.runs_checked, check.forecast.flops_per_sample) == (2, 6.4e7)
        # one run in twenty lies outside
        assert check.inside >= 1
    # from farther away less is known
    assert others.forecast.high - others.forecast.low < smaller.forecast.high - smaller.forecast.low
    for forecast, truth in zip(report.beyond, [(16000, 6.4e7), (8000, 1.28e8), (80000, 6.4e8)], strict=True):
        assert (forecast.samples, forecast.flops_per_sample) == truth
        assert forecast.low < error_of_size(*truth) < forecast.high
    first, second = report.budgets
    # ten visits of each sample, as the runs had
    assert first.samples == round(first.flops / SIZES[first.architecture] / 10)
    by_truth: Any = {name: error_of_size(first.flops / size / 10, size) for name, size in SIZES.items()}
    assert first.architecture == min(by_truth, key=by_truth.get)
    assert second.best.size > first.best.size
    assert first.best.size * first.best.samples_seen == pytest.approx(first.flops)


def test_runs_that_do_not_tell_the_sizes_apart_name_no_best_one(tmp_path, capsys):
    report = fit_scaling(grid_of(lambda samples, size: error_of_size(samples, 6.4e7)), metric="loss", hold="epochs")
    assert report.fit.size
    assert not report.fit.size.is_told
    assert report.fit.samples.is_told
    for plan in report.budgets:
        assert (plan.best, plan.architecture, plan.samples, plan.score) == (None, None, None, None)
    data, *larger = report.beyond
    assert data.score is not None
    assert all((forecast.score, forecast.low, forecast.high) == (None, None, None) for forecast in larger)
    assert any("do not tell the sizes of model apart" in warning for warning in report.warnings())
    values = report.to_json()
    assert values["budgets"][0]["architecture"] is None
    assert values["warnings"] == list(report.warnings())
    draw_scaling(report, tmp_path / "scaling.png")
    _show_budgets(report)
    shown = capsys.readouterr().out
    assert "–" in shown
    assert not any(name in shown for name in SIZES)
    _show_forecasts(report)
    assert "–" in capsys.readouterr().out


def test_an_exponent_at_the_limit_and_a_far_division_are_told():
    steep = fit_scaling(grid_of(lambda samples, size: 1 + 0.1 * (samples / 8000) ** -4, noise=1e-3), metric="loss")
    assert steep.fit.samples.at_limit
    assert any("lies at a limit of those tried" in warning for warning in steep.warnings())
    report = fit_scaling(grid_of(error_of_size), metric="loss", hold="epochs", budgets=(1e12, 1e17))
    assert [plan.is_far for plan in report.budgets] == [False, True]
    [far] = report.warnings()
    assert far.startswith("The best division of 1e+17 FLOPs lies on more than 10 times the samples measured")


@pytest.mark.parametrize(("law", "end"), [(lambda samples: 0.4, 8000), (lambda samples: 1 - samples**-0.2, 80000)])
def test_a_law_is_drawn_beyond_the_runs_only_where_they_tell_it(law, end, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("vlm.train.scaling_plots._save", lambda figure, path: figures.append(figure))
    report = fit_scaling(points_of(law), metric="recall@10")
    assert report.fit.samples.is_told == (end > 8000)
    draw_scaling(report, tmp_path / "scaling.png")
    [axes] = figures[0].axes
    drawn = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert drawn["law of all sizes"].max() == pytest.approx(end)
    assert drawn["law of all sizes"].min() == pytest.approx(500)


def test_an_interval_wider_than_all_scores_means_nothing():
    report = fit_scaling(points_of(lambda samples: 0.4, seeds=1), metric="recall@10")
    [check] = report.checks
    assert "too wide to mean anything" in replace(check, spread=0.0).verdict("recall@10")
    assert "too wide" not in replace(check, spread=1.0).verdict("recall@10")


def test_three_sizes_forecast_the_largest_from_all_others_alone():
    three = dict(list(SIZES.items())[:3])
    report = fit_scaling(grid_of(error_of_size, three), metric="loss", hold="steps")
    [check] = report.checks
    assert check.known == "others"
    assert "from the other runs held" in report.verdict()
    # compute does not grow with data, and so is not divided
    assert report.budgets == ()


def test_a_largest_model_that_breaks_off_is_told_as_missed():
    def breaks_off(samples, size):
        return error_of_size(samples, min(size, 1.6e7)) + (0.3 if size > 2e7 and samples == 8000 else 0)

    report = fit_scaling(grid_of(breaks_off), metric="loss", hold="epochs")
    assert all(check.inside == 0 for check in report.checks)
    assert report.verdict().count("missed") == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (SIZES | {"equal": 1.02e6}, r"small and equal take 1e\+06 and 1\.02e\+06 FLOPs a sample, too near"),
        (SIZES | {"unknown": None}, "The FLOPs of unknown cannot be counted"),
    ],
)
def test_sizes_that_make_no_law_are_named(sizes, message):
    with pytest.raises(UsageError, match=message):
        fit_scaling(grid_of(lambda samples, size: 2.0, sizes), metric="loss")


NAMES = ("vit:16x1/8+bag@16", "vit:32x1/8+bag@16", "vit:64x1/8+bag@16")


@pytest.fixture
def pretended_runs(monkeypatch):
    """The configurations of the runs that were asked for, whose losses follow a law."""
    asked = []

    def measure(config, metric):
        asked.append(config)
        size = SIZES[list(SIZES)[NAMES.index(config.model.architecture)]]
        share = len(config.data.split("::"))
        return MeasuredRun(
            run=config.run,
            steps=config.steps,
            samples_seen=10 * 8 * share,
            flops_per_sample=size,
            score=error_of_size(8 * share, size),
        )

    monkeypatch.setattr("vlm.train.scaling.measure_run", measure)
    monkeypatch.setattr("vlm.train.scaling_law._RESAMPLES", 20)
    return asked


def test_each_architecture_is_trained_on_each_subset(configure, scene_shards, small_shards, pretended_runs, capsys):
    config = configure("sizes", data=small_shards, val=str(scene_shards / "val"), steps=10, batch_size=8)
    Path(config.run).mkdir()
    report = vlm.scale(
        config, shares=(0.2, 0.4, 0.6, 0.8, 1.0), architectures=NAMES, seeds=1, metric="loss", hold="epochs"
    )
    assert len(pretended_runs) == len({run.run for run in pretended_runs}) == 15
    # the smallest subset first with each, so that sizes too near are told at once
    assert [run.model.architecture for run in pretended_runs[:3]] == list(NAMES)
    assert [run.steps for run in pretended_runs[::3]] == [2, 4, 6, 8, 10]
    folders = [Path(run.run) for run in pretended_runs]
    assert all(folder.parent == Path(config.run) for folder in folders)
    assert [point.architecture for point in report.points[:3]] == list(NAMES)
    assert list(report.sizes) == list(NAMES)
    assert json.loads(Path(config.run, "scaling.json").read_text()) == report.to_json()
    assert Path(config.run, "scaling.png").stat().st_size > 1000
    # the verb has the same, and another architecture leaves the runs of these as they are
    Path(config.run, "config.toml").write_text(to_toml(config))
    words = [config.run, "--run", config.run, "--shares", "0.2", "0.4", "0.6", "0.8", "1.0", "--seeds", "1"]
    words += ["--metric", "loss", "--hold", "epochs", "--architectures", *NAMES]
    capsys.readouterr()
    assert main(["--quiet", "scale", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report.to_json()
    assert [Path(run.run) for run in pretended_runs[15:]] == folders
    assert main(["--quiet", "scale", *words, "--budgets", "1e12"]) == 0
    shown = capsys.readouterr().out
    assert "1e+12" in shown
    assert "FLOPs a sample / 1.6e+07" in shown
    for words_of_verdict in report.verdict().split():
        assert words_of_verdict in shown


@pytest.mark.slow
def test_runs_of_several_sizes_are_trained_once(configure, scene_shards, small_shards):
    config = configure("sizes", data=small_shards, val=str(scene_shards / "val"), steps=5, batch_size=8)
    settings: dict[str, Any] = {
        "shares": (0.2, 0.4, 0.6, 0.8, 1.0),
        "architectures": NAMES,
        "seeds": 1,
        "metric": "loss",
    }
    report = vlm.scale(config, **settings)
    sizes = list(report.sizes.values())
    assert sizes == sorted(sizes)
    losses = [point.score for point in report.points]
    assert all(0 < loss < 10 for loss in losses)
    assert len(set(losses)) == 15
    manifests = [Path(point.run, "manifest.json") for point in report.points]
    before = [manifest.stat().st_mtime_ns for manifest in manifests]
    assert vlm.scale(config, **settings) == report
    assert [manifest.stat().st_mtime_ns for manifest in manifests] == before
    # a recall is read from the same runs
    settings["metric"] = "recall@10"
    recalls = vlm.scale(config, **settings)
    assert [point.run for point in recalls.points] == [point.run for point in report.points]
    assert all(0 <= point.score <= 1 for point in recalls.points)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["tiny"]}, "--architectures tiny: a law of size needs 3 different ones"),
        ({"architectures": ["tiny", "small", "tiny"]}, "needs 3 different ones"),
        ({"architectures": NAMES, "start_from": "runs/first"}, "--start-from runs/first has an architecture"),
        ({"budgets": [1e15]}, "--budgets are divided between model and data"),
        ({"architectures": NAMES, "budgets": [1e15]}, "--hold epochs"),
        ({"architectures": NAMES, "hold": "epochs", "budgets": [-1.0]}, "--budgets -1 is no number of FLOPs"),
        ({"architectures": [NAMES[0], "nonsense", NAMES[1]]}, "Unknown architecture 'nonsense'"),
        ({"metric": "recall@7"}, "Unknown metric 'recall@7'"),
    ],
)
def test_sizes_and_budgets_that_do_not_fit_are_refused(configure, scene_shards, small_shards, settings, message):
    config = configure("scaling", data=small_shards, val=str(scene_shards / "val"), steps=1)
    with pytest.raises(UsageError, match=message):
        vlm.scale(config, shares=(0.2, 0.4, 0.6, 0.8, 1.0), **settings)
    assert not Path(config.run).exists()


def test_runs_on_nested_subsets_are_trained_once_and_read_again(configure, scene_shards, small_shards, capsys):
    config = configure("scaling", data=small_shards, val=str(scene_shards / "val"), steps=5, batch_size=8)
    settings: Any = {"shares": (0.2, 0.4, 0.6, 0.8, 1.0), "seeds": 1, "metric": "recall@10", "hold": "epochs"}
    # a run that was cut off while its features were computed has its configuration alone
    interrupted = Path(config.run, "shards-1-seed-0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.train.run.RunLogger", interrupt)
        with pytest.raises(KeyboardInterrupt):
            vlm.scale(config, **settings)
    assert [file.name for file in interrupted.iterdir()] == ["config.toml"]
    report = vlm.scale(config, **settings)
    assert [point.samples for point in report.points] == [8, 16, 24, 32, 40]
    assert [point.steps for point in report.points] == [1, 2, 3, 4, 5]
    folder = Path(config.run)
    seen = []
    for point in report.points:
        seen.append(set(read_run(Path(point.run)).configuration["data"].split("::")))
    assert all(smaller < larger for smaller, larger in pairwise(seen))
    assert json.loads((folder / "scaling.json").read_text()) == report.to_json()
    assert (folder / "scaling.png").stat().st_size > 1000
    last = read_run(Path(report.points[-1].run)).lines[-1]
    assert report.points[-1].score == (last["text_to_image_recall@10"] + last["image_to_text_recall@10"]) / 2
    # what is finished is not trained again
    manifest = Path(report.points[-1].run, "manifest.json")
    before = manifest.stat().st_mtime_ns
    assert vlm.scale(config, **settings) == report
    assert manifest.stat().st_mtime_ns == before
    # the verb reads them, too, and nothing is mixed with runs of other settings
    words = ["--data", small_shards, "--run", str(folder), "--steps", "5", "--seeds", "1", "--metric", "recall@10"]
    words += ["--hold", "epochs", "--shares", "0.2", "0.4", "0.6", "0.8", "1.0"]
    capsys.readouterr()
    assert main(["--quiet", "scale", report.points[-1].run, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report.to_json()
    assert main(["--quiet", "scale", report.points[-1].run, *words]) == 0
    assert report.verdict() in capsys.readouterr().out.replace("\n", " ")
    # what touches no score may change
    assert main(["--quiet", "scale", report.points[-1].run, *words, "--log-every", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report.to_json()
    assert main(["--quiet", "scale", report.points[-1].run, *words, "--learning-rate", "1e-4"]) == 2
    assert "other settings (optimizer.learning_rate: 0.003" in capsys.readouterr().err
    # a score that is no number is named, before the others are measured
    Path(report.points[0].run, "held_out_loss.json").write_text('{"loss": NaN}')
    with pytest.raises(VlmError, match=r"shards-1-seed-0 ends with loss nan, which no fit can use.*--learning-rate"):
        vlm.scale(config, **settings | {"metric": "loss"})


@pytest.mark.parametrize(
    ("shares", "seeds", "message"),
    [
        ((0.5, 1.0), 2, "2 different sizes"),
        ((0.2, 0.4, 0.6, 0.8, 1.5), 2, "1.5 is not a share"),
        ((0.2, 0.4, 0.6, 1.0), 2, "4 different sizes"),
        ((0.2, 0.4, 0.6, 0.8, 1.0), 0, "--seeds 0 gives no runs"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_trained(
    configure, scene_shards, small_shards, shares, seeds, message
):
    config = configure("scaling", data=small_shards, val=str(scene_shards / "val"), steps=1)
    with pytest.raises(UsageError, match=message):
        vlm.scale(config, shares=shares, seeds=seeds)
    with pytest.raises(UsageError, match="--val"):
        vlm.scale(replace(config, val=""), shares=shares)
    with pytest.raises(UsageError, match="--data is needed"):
        vlm.scale(replace(config, data=""), shares=shares)
    with pytest.raises(UsageError, match="--early-stop 2 ends runs"):
        vlm.scale(replace(config, safety=replace(config.safety, early_stop=2, keep_best="recall@10")), shares=shares)
    assert not Path(config.run).exists()
