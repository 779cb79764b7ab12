"""A run of a preset on its own data is told whether it ended in the preset's band; any other run is not compared."""

from dataclasses import replace
from typing import Any

import pytest

from vlm.cli.train import show_summary
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.train.presets import PRESETS
from vlm.train.recipes import RECIPES, MeasuredData, compare_with_band, held_out_fingerprint, measured_data
from vlm.train.run import train

FLICKR = measured_data()["flickr8k"]
CONFIG = replace(PRESETS["flickr8k"][1], data="shards", val="others", run="run", seed=7)


def compared(recall: float, loss: float = 4.6, config: Any = CONFIG, **data: Any) -> Any:
    lines = [{"step": step, "loss": loss} for step in range(10, 290, 10)]
    lines.append({"step": 282, "loss": loss, "text_to_image_recall@10": recall})
    data = {"samples": FLICKR.samples, "held_out": FLICKR.held_out} | data
    return compare_with_band(config, lines, steps=282, **data)


def test_every_preset_with_measured_curves_says_what_they_are_of():
    measured = [name for name, recipe in RECIPES.items() if {"measured"} == {c.kind for c in recipe.reference_curves}]
    assert sorted(measured) == sorted(measured_data())


def test_a_run_in_the_band_is_told_so():
    report = compared(0.075)
    assert report.is_inside
    assert report.summary() == (
        "As preset flickr8k is expected to end on Flickr8k: loss 4.6 (band 4.507 to 4.722); "
        "text to image recall@10 7.5% (band 6.2% to 8.9%)."
    )


@pytest.mark.parametrize(("recall", "side"), [(0.03, "worse"), (0.2, "better")])
def test_a_run_outside_is_told_by_how_much_and_on_which_data(recall, side):
    summary = compared(recall).summary()
    assert f"recall@10 {recall:.1%} is {side} than the band 6.2% to 8.9%" in summary
    assert "on Flickr8k" in summary
    assert "vlm runs compare RUN --to flickr8k" in summary
    # a lower loss is better
    assert "loss 3 is better" in compared(0.075, loss=3.0).summary()


@pytest.mark.parametrize(
    "changes",
    [{"samples": 5999}, {"held_out": "another"}, {"config": replace(CONFIG, batch_size=128)}],
)
def test_other_data_or_settings_are_not_compared(changes):
    assert compared(0.03, **changes) is None


def test_the_fingerprint_is_of_the_captions_whatever_their_order():
    one, two = {"en": ("a dog", "a cat")}, {"de": ("ein Hund",)}
    assert held_out_fingerprint([one, two]) == held_out_fingerprint([two, {"en": ("a cat", "a dog")}])
    assert held_out_fingerprint([one, two]) != held_out_fingerprint([one])
    assert held_out_fingerprint([one]) != held_out_fingerprint([{"de": one["en"]}])


def test_flickr8k_is_the_flickr8k_of_the_band(real_data):
    data = open_evaluation_set(f"{real_data}/flickr8k/val-*.tar")
    assert held_out_fingerprint(data.captions) == FLICKR.held_out


def test_a_run_says_it_at_its_end(configure, scene_shards, monkeypatch, capsys, logged):
    val = str(scene_shards / "val")
    config = configure("run", steps=2, val=val)
    held_out = held_out_fingerprint(open_evaluation_set(val).captions)
    monkeypatch.setitem(PRESETS, "tiny", ("", config))
    monkeypatch.setitem(measured_data(), "tiny", MeasuredData(name="scenes", samples=96, held_out=held_out))
    summary = train(config)
    assert summary.band is not None
    assert summary.to_json()["band"]["preset"] == "tiny"
    show_summary(summary)
    assert "Outside what preset tiny is expected to end with on scenes" in logged.text
