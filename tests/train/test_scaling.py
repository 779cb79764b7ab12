"""A law of growth is found again in data drawn from it, its forecast is checked, and runs on subsets feed it."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import vlm
from vlm.cli.main import main
from vlm.data.pack import PackConfig, pack
from vlm.data.sources.source import SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.errors import UsageError
from vlm.train.history import read_run
from vlm.train.scaling import ScalingPoint, fit_scaling


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory):
    """Five shards of eight scenes."""
    folder = tmp_path_factory.mktemp("small") / "shards"
    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=40, pixels=32)))
    pack(source, folder, PackConfig(samples_per_shard=8))
    return str(folder)


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def points_of(law, sizes=(500, 1000, 2000, 4000, 8000), seeds=3, noise=0.003):
    rng = np.random.default_rng(5)
    points = []
    for size in sizes:
        for seed in range(seeds):
            score = float(law(size) + noise * rng.standard_normal())
            points.append(
                ScalingPoint(run=f"{size}-{seed}", shards=1, samples=size, seed=seed, steps=10, flops=None, score=score)
            )
    return points


def test_a_power_law_with_a_floor_is_found_again_and_its_forecast_holds():
    def law(samples):
        return 1 - 0.4 - 0.1 * (samples / 8000) ** -0.5

    report = fit_scaling(points_of(law), metric="recall@10")
    low, high = report.exponent_interval
    assert 0.35 < low < 0.5 < high < 0.65
    assert report.check.samples == 8000
    assert report.check.low < 0.5 < report.check.high
    assert report.inside == report.runs_checked == 3
    assert "held" in report.verdict()
    twice, ten_times = report.beyond
    assert (twice.samples, ten_times.samples) == (16000, 80000)
    assert twice.score == pytest.approx(law(16000), abs=0.02)
    # farther away less is known
    assert ten_times.high - ten_times.low > twice.high - twice.low


def test_growth_that_stops_where_no_smaller_size_showed_it_is_told_as_missed():
    def breaks_off(samples):
        return min(1 - 0.6 * (samples / 2000) ** -0.5, 0.58)

    report = fit_scaling(points_of(breaks_off), metric="recall@10")
    assert report.check.low > report.measured
    assert "missed" in report.verdict()
    assert "0 of 3 runs inside" in report.verdict()


def test_scores_that_do_not_grow_are_a_flat_line():
    report = fit_scaling(points_of(lambda samples: 0.4), metric="recall@10")
    assert report.fit.score(80000) == pytest.approx(0.4, abs=0.02)
    assert report.check.low < 0.4 < report.check.high


def test_runs_on_nested_subsets_are_trained_once_and_read_again(configure, scene_shards, small_shards, capsys):
    config = configure("scaling", data=small_shards, val=str(scene_shards / "val"), steps=5, batch_size=8)
    settings = {"shares": (0.2, 0.4, 0.6, 0.8, 1.0), "seeds": 1, "metric": "recall@10", "hold": "epochs"}
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
