"""The evaluator: a model with a known perfect answer scores exactly 1, a constant one exactly chance."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.test_zero_shot import tar_of
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.zero_shot import ZeroShotClassification, open_labelled_set

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}
COLOURS |= {"cyan": (0, 255, 255)}
GERMAN = ["rot", "limette", "blau", "weiss", "schwarz", "türkis"]
NUMBERS = {name: number for names in (COLOURS, GERMAN) for number, name in enumerate(names)}


class Painter:
    """Embeds a colour and its name, in two languages, as the same vector."""

    name = "painter"
    fingerprint = "painter"
    view = EvalTransform(size=8)
    logit_scale = 50.0

    def embed_texts(self, texts):
        rows = torch.zeros(len(texts), 8)
        for row, text in zip(rows, texts, strict=True):
            row[next(number for word, number in NUMBERS.items() if word in text)] = 1
        return rows

    def embed_images(self, images):
        means = images.float().mean(dim=(2, 3)).round().int().tolist()
        colours = list(COLOURS.values())
        return torch.eye(8)[[colours.index(tuple(colour)) for colour in means]]


class Constant(Painter):
    """Sees and reads the same everywhere."""

    def embed_texts(self, texts):
        return torch.full((len(texts), 8), 8**-0.5)

    def embed_images(self, images):
        return torch.full((len(images), 8), 8**-0.5)


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir()
        for copy in range(number + 1):
            (root / name / f"{copy}.png").write_bytes(png(colour))
    return root


@pytest.fixture
def colours(folders):
    return open_labelled_set(str(folders), label="label")


def run(model, data, **options):
    return ZeroShotClassification(**options).run(EvaluatedModel(model), data)


def test_a_perfect_model_scores_exactly_1(colours):
    measurement = run(Painter(), colours)
    values = measurement.values
    assert next(iter(values)) == "top1"
    for name in ("top1", "top5", "mean_per_class"):
        assert (values[name].value, values[name].high) == (1.0, 1.0)
        # 21 images right say less than 1
        assert 0.8 < values[name].low < 0.9
    assert values["top5"].chance == pytest.approx(5 / 6)
    assert values["calibration_error"].value < 1e-6
    assert measurement.warnings == ()
    assert measurement.details.confusion == ()
    assert measurement.num_images == 21


def test_a_constant_model_scores_exactly_chance_and_is_told_why(colours):
    measurement = run(Constant(), colours)
    for name, chance in (("top1", 1 / 6), ("top5", 5 / 6), ("mean_per_class", 1 / 6)):
        value = measurement.values[name]
        assert value.value == pytest.approx(chance, abs=1e-12)
        assert value.chance == pytest.approx(chance, abs=1e-12)
        assert value.low - 1e-9 <= value.value <= value.high + 1e-9
    assert measurement.values["calibration_error"].value == pytest.approx(0, abs=1e-9)
    (warning,) = measurement.warnings
    assert "mean per class of 16.7% is no better than chance (16.7%): all 21 images have the same embedding" in warning
    assert "all 6 texts have the same embedding: look at another tokenizer" in warning


def test_values_are_means_of_the_columns_of_their_names(colours):
    measurement = run(Painter(), colours, class_names="lime,red,blue,white,black,cyan")
    samples = measurement.samples
    assert samples.column_names[:7] == ["key", "truth", "prediction", "probability", "similarity", "rank", "correct"]
    assert samples["key"].to_pylist() == list(colours.keys)
    assert samples["truth"].to_pylist() == samples["prediction"].to_pylist() == [names[0] for names in colours.labels]
    for name in ("top1", "top5"):
        assert np.mean(samples[name].to_pylist()) == measurement.values[name].value
    assert set(samples["rank"].to_pylist()) == {1.0}
    assert all(samples["correct"].to_pylist())


def test_names_in_another_order_than_the_labels_are_found_out(tmp_path):
    members = []
    for number in range(48):
        # labels count from 1, and the last class is 0
        label = (number + 1) % 6
        members += [
            (f"{number:02}.cls", str(label).encode()),
            (f"{number:02}.png", png(list(COLOURS.values())[number % 6])),
        ]
    tar_of(tmp_path / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("\n".join(COLOURS))
    measurement = run(Painter(), open_evaluation_set(str(tmp_path / "0.tar"), label="cls"))
    assert measurement.values["top1"].value == 0
    assert "labels are shifted by +1 against the class names (100% are right" in measurement.warnings[0]
    assert measurement.details.confusion[0].share == 1.0
    # the right list in their order
    names = tuple(["cyan", *list(COLOURS)[:5]])
    data = open_evaluation_set(str(tmp_path / "0.tar"), label="cls", class_names=names)
    assert run(Painter(), data).values["top1"].value == 1
    # names that are none of the set's own go by their number
    assert (
        run(Painter(), open_evaluation_set(str(tmp_path / "0.tar"), label="cls"), class_names=names)
        .values["top1"]
        .value
        == 0
    )


def test_languages_have_their_own_names_and_templates(colours, tmp_path):
    names, templates = tmp_path / "names.json", tmp_path / "templates.json"
    names.write_text(json.dumps({"en": list(COLOURS), "de": GERMAN}))
    templates.write_text(json.dumps({"de": ["ein Foto in {}"], "en": ["a photo in {}", "{}"]}))
    measurement = run(Painter(), colours, class_names=str(names), templates=(str(templates),))
    assert measurement.values["top1/de"].value == 1.0
    assert [(entry.language, entry.top1, entry.num_prompts) for entry in measurement.details.languages] == [
        ("en", 1.0, 12),
        ("de", 1.0, 6),
    ]
    assert "top5/de" in measurement.samples.column_names
    # translations of another order are wrong ones
    names.write_text(json.dumps({"en": list(COLOURS), "de": GERMAN[::-1]}))
    measurement = run(Painter(), colours, class_names=str(names))
    assert (measurement.values["top1"].value, measurement.values["top1/de"].value) == (1.0, 0.0)
    # labels may be in any of the languages
    names.write_text(json.dumps({"de": GERMAN, "en": list(COLOURS)}))
    assert run(Painter(), colours, class_names=str(names)).values["top1"].value == 1.0


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ({"en": ["red", "lime"], "de": ["rot"]}, None, "1 class names in 'de' and 2 in 'en'"),
        ({"en": list(COLOURS), "de": GERMAN}, {"en": ["{}"]}, "no templates in 'de', only in en"),
        ({"en": ["red", "lime"]}, None, r"4 classes of the images are not among the names: \['black'"),
        ({"en": ["", ""]}, None, "no class name"),
    ],
)
def test_what_does_not_fit_is_refused(colours, tmp_path, names, templates, message):
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "templates.json").write_text(json.dumps(templates))
    given = (str(tmp_path / "templates.json"),) if templates else ()
    with pytest.raises(UsageError, match=message):
        run(Painter(), colours, class_names=str(tmp_path / "names.json"), templates=given)


def test_descriptions_stand_alone_or_beside_templates(colours):
    descriptions = {name: ["like nothing else", f"the colour {name}"] for name in COLOURS}
    assert run(Painter(), colours, class_descriptions=descriptions).details.num_prompts == 12
    both = run(Painter(), colours, class_descriptions=descriptions, templates=("simple",))
    assert (both.details.num_prompts, both.values["top1"].value) == (54, 1.0)
    with pytest.raises(UsageError, match="5 of 6 classes have no description, as 'black'"):
        run(Painter(), colours, class_descriptions={"red": ["a colour"]})


@pytest.fixture
def label_sets(tmp_path):
    """Images that show two colours' names in their metadata, one, or none."""
    members = []
    names = list(COLOURS)
    for number in range(36):
        own = names[number % 6]
        labels = [[own], [own, names[(number + 1) % 6]], []][number % 3]
        members += [
            (f"{number:02}.json", json.dumps({"labels": labels}).encode()),
            (f"{number:02}.png", png(COLOURS[own])),
        ]
    tar_of(tmp_path / "0.tar", members)
    return open_evaluation_set(str(tmp_path / "0.tar"), label="labels")


def test_images_of_several_classes_or_none(label_sets):
    measurement = run(Painter(), label_sets)
    details = measurement.details
    assert (measurement.values["top1"].value, details.num_images, details.num_unlabelled) == (1.0, 24, 12)
    assert next(iter(measurement.values)) == "mean_average_precision"
    assert "mean_per_class" not in measurement.values
    assert measurement.samples["top1"].null_count == measurement.samples["correct"].null_count == 12
    assert measurement.samples["truth"].to_pylist()[:3] == ["red", "lime", None]
    assert measurement.samples["labels"].to_pylist()[:3] == [["red"], ["lime", "blue"], []]
    precision = measurement.values["mean_average_precision"]
    assert precision.low <= precision.value <= precision.high
    assert details.mean_average_precision == precision.value
    # one of six drawn for a set of one, of two
    assert measurement.values["top1"].chance == pytest.approx((1 / 6 + 2 / 6) / 2)


def test_a_constant_model_has_the_average_precision_of_chance(label_sets):
    precision = run(Constant(), label_sets).values["mean_average_precision"]
    assert precision.value == pytest.approx(precision.chance, abs=1e-12)


def test_a_set_in_which_no_image_has_a_class_is_refused(tmp_path):
    tar_of(tmp_path / "0.tar", [("0.json", b'{"labels": []}'), ("0.png", png((0, 0, 0)))])
    with pytest.raises(UsageError, match="no image with a class"):
        run(Painter(), open_evaluation_set(str(tmp_path / "0.tar"), label="labels"), class_names="red,lime")
