import io
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import colour_shards, png, write_tar
from vlm.data.synthetic.shapes import render_scene, sample_scenes
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.few_shot import NearestNeighbours
from vlm.evaluation.image_corruptions import (
    CORRUPTION_KINDS,
    PATCH_SHARES,
    SEVERITIES,
    Corruption,
    PatchCorruption,
    SceneEdit,
    TypographicAttack,
    wrong_class_names,
)
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.retrieval import Retrieval
from vlm.evaluation.robustness import Robustness

# kinds whose distance in pixels need not grow from one severity to the next: several settings change at once
NOT_MONOTONE = ("glass_blur", "snow", "frost", "fog")


def photo_like(size=96):
    """Noise with the spectrum of photographs (amplitude 1/f), channels alike: on plain ground some corruptions do
    little."""
    rng = np.random.default_rng(1)
    frequencies = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequencies[0, 0] = np.inf
    waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, size, size))) / frequencies**1.2).real
    waves = waves / waves.std() + 1.7 * waves.mean(axis=0) / waves.std()
    return np.clip(110 + 40 * waves, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def distance(first, second):
    return np.abs(first.astype(np.float64) - second).mean()


@pytest.mark.parametrize("kind", CORRUPTION_KINDS)
def test_each_corruption_changes_the_image_more_with_severity_and_depends_on_seed_and_key_alone(kind):
    pixels = photo_like()
    state: Any = np.random.get_state()
    by_severity = [Corruption(kind=kind, severity=severity)(pixels, "key") for severity in SEVERITIES]
    # the process's own generator is where it was
    state_after: Any = np.random.get_state()
    assert np.array_equal(state_after[1], state[1])
    distances = [distance(image, pixels) for image in by_severity]
    assert min(distances) > 0.5
    assert distances[-1] > distances[0]
    if kind not in NOT_MONOTONE:
        assert distances == sorted(distances)
    for image in by_severity:
        assert (image.shape, image.dtype) == (pixels.shape, np.uint8)
    again = Corruption(kind=kind, severity=3)(pixels, "key")
    assert np.array_equal(again, by_severity[2])
    is_random = kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    for other in (
        Corruption(kind=kind, severity=3)(pixels, "another"),
        Corruption(kind=kind, severity=3, seed=1)(pixels, "key"),
    ):
        assert np.array_equal(other, again) != is_random
    assert np.array_equal(pixels, photo_like())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fogg", "severity": 1}, "There is no corruption 'fogg'; did you mean 'fog'"),
        ({"kind": "fog", "severity": 6}, "severity 6 does not exist"),
    ],
)
def test_only_the_benchmarks_corruptions_exist(options, message):
    with pytest.raises(UsageError, match=message):
        Corruption(**options)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UsageError, match=r"need imagecorruptions-imaug .*pip install 'vlm-pipeline\[evaluation\]'"):
        Corruption(kind="fog", severity=1)


def test_images_too_small_to_corrupt_are_refused():
    with pytest.raises(UsageError, match="32 pixels or more, and these have 16"):
        Corruption(kind="fog", severity=1)(photo_like(16), "key")


@pytest.mark.parametrize("size", [32, 100, 224])
def test_patches_are_replaced_by_share_and_those_of_larger_shares_contain_those_of_smaller_ones(size):
    pixels = np.full((size, size, 3), 100, np.uint8)
    replaced = {}
    for share in (0.0, *PATCH_SHARES, 1.0):
        black = PatchCorruption(share=share, fill="black")(pixels, "key")
        noise = PatchCorruption(share=share, fill="noise")(pixels, "key")
        mask = (black == 0).all(axis=2)
        assert mask.mean() == pytest.approx(share, abs=0.05)
        assert np.array_equal((noise == 100).all(axis=2) | mask, np.ones_like(mask))
        assert (black[~mask] == 100).all()
        replaced[share] = mask
    for smaller, larger in itertools.pairwise(PATCH_SHARES):
        assert (replaced[larger] >= replaced[smaller]).all()
    # 196 patches, of which a quarter is 49
    if size == 224:
        patches = replaced[0.25].reshape(14, 16, 14, 16).mean(axis=(1, 3))
        assert sorted(patches.ravel().tolist()) == [0.0] * 147 + [1.0] * 49
    other = PatchCorruption(share=0.5, fill="black")(pixels, "another")
    assert not np.array_equal((other == 0).all(axis=2), replaced[0.5])


@pytest.mark.parametrize(
    ("options", "message"), [({"share": 1.5}, "share of 1.5"), ({"share": 0.5, "grid": 0}, "grid of 0")]
)
def test_patches_need_a_share_and_a_grid(options, message):
    with pytest.raises(UsageError, match=message):
        PatchCorruption(**options)


@pytest.mark.parametrize("size", [64, 224])
def test_a_text_is_written_on_a_white_label_inside_the_image(size):
    # a colour that no grey of the letters' edges has
    pixels = np.full((size, size, 3), (100, 50, 200), np.uint8)
    attack = TypographicAttack(texts={"a": "ipod", "b": "Äpfel", "c": "a class with a very long name indeed"})
    for key in attack.texts:
        image = attack(pixels, key)
        assert np.array_equal(attack(pixels, key), image)
        is_label = (image != pixels).any(axis=2)
        rows, columns = np.flatnonzero(is_label.any(axis=1)), np.flatnonzero(is_label.any(axis=0))
        label = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # one rectangle, of white with black in it
        assert is_label[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (label == 255).all(axis=2).mean() > 0.4
        assert label.min() < 60
    short = (attack(pixels, "a") != pixels).any(axis=2)
    assert 0.15 * size <= short.any(axis=1).sum() <= 0.35 * size
    assert (pixels == (100, 50, 200)).all()


def test_names_that_the_font_cannot_write_are_refused():
    with pytest.raises(UsageError, match="has no '果', which is in '苹果'"):
        TypographicAttack(texts={"a": "苹果"})


def test_the_written_name_is_of_another_class_and_depends_on_seed_and_key():
    labels = {str(number): ("a", "b") if number % 2 else ("c",) for number in range(200)}
    wrong = wrong_class_names(labels, ("a", "b", "c", "d"))
    assert {wrong[key] for key in labels if int(key) % 2} == {"c", "d"}
    assert {wrong[key] for key in labels if not int(key) % 2} == {"a", "b", "d"}
    assert wrong_class_names({"7": labels["7"]}, ("a", "b", "c", "d")) == {"7": wrong["7"]}
    assert wrong_class_names(labels, ("a", "b", "c", "d"), seed=1) != wrong
    with pytest.raises(UsageError, match="7 is of all classes"):
        wrong_class_names({"7": ("a",)}, ("a",))


@dataclass(frozen=True, kw_only=True)
class RednessAtLeast:
    """An evaluator whose outcomes can be foretold: of each image, whether its mean red reaches a level; two rows of
    one image, and none for images whose file is x.png."""

    level: float
    name: str = "redness"
    has_prediction: bool = False

    def run(self, model, data):
        keys, outcomes = [], []
        for batch in data.iter_images(model.view):
            for row, image in zip(batch.rows, batch.images, strict=True):
                is_red = float(image[0].float().mean() >= self.level)
                keys += [data.keys[row]] * 2
                outcomes += [None, None] if data.keys[row].endswith("x.png") else [is_red, is_red]
        columns = {"key": keys, "redness": pa.array(outcomes, pa.float64())}
        if self.has_prediction:
            columns["truth"] = columns["prediction"] = ["red" if outcome else "other" for outcome in outcomes]
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(data),
            values={"total": Value(value=0.0), "redness": Value(value=0.0, chance=0.25)},
            samples=pa.table(columns),
        )


@pytest.fixture
def model():
    return EvaluatedModel(ColourEncoder())


@pytest.fixture
def colours(tmp_path):
    for name, colour in (("a", "red"), ("b", "red"), ("c", "red"), ("d", "blue"), ("x", "red")):
        folder = tmp_path / "colours" / colour
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(png(colour))
    return open_evaluation_set(str(tmp_path / "colours"), name="colours")


def test_drops_are_paired_and_kinds_count_equally(model, colours):
    # three of four images are red, until more than half of them is black; noise is half red, not enough for a blue one
    measured = Robustness(of=RednessAtLeast(level=120), edits="patches", shares=(0.25, 0.75), pixels=56).run(
        model, colours
    )
    assert (measured.evaluator, measured.num_images) == ("redness-patches", 5)
    assert {name: value.value for name, value in measured.values.items()} == pytest.approx(
        {
            "edited": (0.375 + 0.75) / 2,
            "clean": 0.75,
            "drop": 0.1875,
            "noise_patches": 0.75,
            "black_patches": 0.375,
            "mean_error": 1 - 0.5625,
            "relative_drop": 0.25,
        }
    )
    assert measured.values["clean"].chance == 0.25
    samples = measured.samples
    assert samples is not None
    assert len(samples) == 8
    assert {"key", "edited", "clean", "drop", "noise_patches/0.25", "black_patches/0.75"} <= set(samples.column_names)
    for name, value in measured.values.items():
        if name in samples.column_names:
            assert np.mean(samples.column(name).to_numpy()) == pytest.approx(value.value)
    scores = {(score.group, score.level): score for score in measured.details.scores}
    assert scores["black_patches", "0.75"].drop == 0.75
    assert scores["black_patches", "0.25"].drop == 0.0
    assert (measured.details.metric, measured.details.num_images, measured.details.clean) == ("redness", 4, 0.75)
    assert json.loads(json.dumps(measured.to_json()))["details"]["edits"] == "patches"


def test_an_edit_without_effect_drops_nothing(model, colours):
    measured = Robustness(of=RednessAtLeast(level=10), edits="patches", shares=(0.0,), pixels=0).run(model, colours)
    assert measured.values["drop"].value == 0.0
    assert measured.values["relative_drop"] == Value(value=0.0, low=0.0, high=0.0)


def test_a_clean_score_at_chance_says_nothing_of_robustness(model, colours):
    measured = Robustness(of=RednessAtLeast(level=256), edits="patches", shares=(0.5,)).run(model, colours)
    assert "at chance already" in measured.warnings[0]
    assert np.isnan(measured.values["relative_drop"].value)


def test_corruptions_work_for_any_evaluator_with_samples_and_are_not_kept_in_memory(model, colours):
    neighbours = NearestNeighbours(train=colours, neighbours=1)
    robustness = Robustness(of=neighbours, kinds=("contrast", "gaussian_noise"), severities=(1, 5), pixels=32)
    measured = robustness.run(model, colours)
    assert measured.evaluator == "nearest-neighbours-projected-corruptions"
    assert [score.group for score in measured.details.scores] == ["contrast"] * 2 + ["gaussian_noise"] * 2
    assert measured.values["clean"].value == 1.0
    num_images = model.encoder.num_images
    # the training images were embedded once; the clean and four corrupted sets of five each time
    assert num_images == 5 + 5 * 5
    assert robustness.run(model, colours).values == measured.values
    assert model.encoder.num_images == num_images + 5 * 5


def test_retrieval_is_measured_by_query_and_drawn_by_image(model, tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path / "shards"), name="colours")
    robustness = Robustness(
        of=Retrieval(languages=("all",)), metric="image_to_text_recall@1", edits="patches", shares=(1.0,), pixels=0
    )
    measured = robustness.run(model, data)
    assert (measured.evaluator, measured.details.metric) == (
        "retrieval-image_to_text_recall@1-patches",
        "image_to_text_recall@1",
    )
    assert measured.values["clean"].value == 1.0
    # black images are all alike, so that each caption is as near as the other two
    assert measured.values["black_patches"].value == pytest.approx(1 / 3, abs=0.2)
    assert measured.samples is not None
    assert set(measured.samples.column("key").to_pylist()) == set(data.keys)


def test_typographic_attacks_count_how_often_the_written_class_is_named(model, colours):
    measured = Robustness(of=RednessAtLeast(level=0, has_prediction=True), edits="typographic").run(
        model, colours.select([row for row, key in enumerate(colours.keys) if not key.endswith("x.png")])
    )
    assert set(measured.values) >= {"typographic", "attack_success"}
    # the evaluator says "red" of all: right of the three red ones, and the written class of the blue one
    assert measured.values["attack_success"].value == measured.details.attack_success == 0.25
    assert measured.details.attack_success_clean == 0.25


def test_images_are_a_spread_part_of_the_set(model, colours):
    measured = Robustness(of=RednessAtLeast(level=10), edits="patches", shares=(0.5,), max_images=2).run(model, colours)
    assert measured.num_images == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": "hats"}, "There are no edits 'hats'"),
        ({"edits": "corruptions", "kinds": ()}, "No corruptions are asked for"),
        ({"edits": "patches", "metric": "rednes"}, "'redness' has no metric 'rednes' of samples; did you mean"),
        ({"edits": "scenes"}, "has no drawn scene in its metadata"),
    ],
)
def test_what_cannot_be_measured_is_named(model, colours, options, message):
    with pytest.raises(UsageError, match=message):
        Robustness(of=RednessAtLeast(level=10), **options).run(model, colours)


@pytest.fixture
def scenes(tmp_path):
    members = []
    for key, scene in sample_scenes("val", 6, seed=0):
        file = io.BytesIO()
        render_scene(scene, pixels=64, rng=np.random.default_rng(1)).save(file, "PNG")
        words = {"scene": asdict(scene), "captions": ["a scene"]}
        members += [(f"{key}.png", file.getvalue()), (f"{key}.json", json.dumps(words).encode())]
    write_tar(tmp_path / "scenes" / "0.tar", members)
    return str(tmp_path / "scenes")


def test_a_scene_is_drawn_again_with_another_background_or_size_alone():
    for key, scene in sample_scenes("val", 20, seed=1):
        edits = {fact: SceneEdit(scenes={key: scene}, fact=fact) for fact in (None, "background", "size")}
        blank = Image.new("RGB", (64, 64))
        assert edits[None].edited(key) == scene
        for fact in ("background", "size"):
            edited = edits[fact].edited(key)
            changed = {name for name, value in asdict(edited).items() if value != asdict(scene)[name]}
            assert changed == {fact}
        plain, other = (np.array(edits[fact](blank, key)).astype(int) for fact in (None, "background"))
        # inside the shapes nothing has changed, and around them all has
        changed = np.abs(plain - other).max(axis=2) > 10
        assert 0.5 < changed.mean() < 0.99
        assert np.array_equal(plain, np.array(edits[None](blank, key)))


def test_edited_scenes_are_measured_against_the_same_scenes_redrawn(model, scenes):
    data = open_evaluation_set(scenes, label="scene.shape", name="scenes")
    measured = Robustness(of=RednessAtLeast(level=0, has_prediction=True), edits="scenes").run(model, data)
    assert {"background", "size", "clean", "edited"} <= set(measured.values)
    assert measured.values["drop"].value == 0.0
    with pytest.raises(UsageError, match=r"labels of scenes are those of the edited background.*scene.shape"):
        Robustness(of=RednessAtLeast(level=0), edits="scenes").run(
            model, open_evaluation_set(scenes, label="scene.background", name="scenes")
        )
    with pytest.raises(UsageError, match="captions would no longer be true"):
        Robustness(of=RednessAtLeast(level=0), edits="scenes").run(model, data)
