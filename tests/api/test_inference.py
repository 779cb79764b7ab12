"""`vlm.load` and `vlm.Model`: images in any form, texts, classes and captions, one or many."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests.random_model import write_random_model
from vlm.api.image_batches import name_images, read_batches
from vlm.api.inference import read_prompts
from vlm.cli.main import main
from vlm.data.transforms import EvalTransform
from vlm.evaluation.rejection import RejectRule, write_reject_rule

TEXTS = ["a red circle", "a blue star", "two green squares"]
NUM_PHOTOS = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_tokenizer) -> Path:
    """A folder of a captioner with random weights."""
    return write_random_model(tmp_path_factory.mktemp("model") / "model", "tiny-coca", scene_tokenizer)


@pytest.fixture(scope="module")
def model(folder) -> vlm.Model:
    return vlm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("photos")
    paths = [root / f"{number:02}.png" for number in range(NUM_PHOTOS)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def directly(model: vlm.Model, paths: list[Path]) -> np.ndarray:
    """The embeddings as the stages of this project compute them."""
    views = np.stack([model.view(path.read_bytes()) for path in paths])
    return model.encoder.embed_images(torch.from_numpy(views)).numpy()


def test_many_images_are_embedded_in_batches_as_all_at_once(model, photos):
    rows = model.embed_images(photos, batch_size=4)
    assert rows.dtype == np.float32
    assert np.allclose(rows, directly(model, photos), atol=1e-6)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_one_image_in_any_form_has_the_same_row(model, photos):
    path = photos[5]
    opened = Image.open(path)
    pixels = np.asarray(opened)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = directly(model, [path])
    for form in (path, str(path), path.read_bytes(), opened, pixels, pixels / 255, tensor, tensor.float() / 255):
        assert np.array_equal(model.embed_images(form), expected)
    mixed = model.embed_images([path, opened, pixels])
    assert np.allclose(mixed, np.repeat(expected, 3, axis=0), atol=1e-6)


def test_one_opened_file_given_many_times_is_read_once(model, photos):
    opened = Image.open(photos[5])
    rows = model.embed_images([opened] * 40, batch_size=40)
    assert np.allclose(rows, directly(model, [photos[5]]), atol=1e-6)


def test_pixels_have_the_limits_of_files(model):
    with pytest.raises(vlm.UsageError, match=r"images\[0\] cannot be used: too narrow"):
        model.embed_images(np.zeros((1, 5000, 3), np.uint8))


def test_a_turned_photo_is_the_same_by_its_path_and_by_its_image(model, tmp_path):
    """As phones store them: the pixels lie, EXIF says how to turn them."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = tmp_path / "turned.png"
    assert np.array_equal(model.embed_images(Image.open(turned)), model.embed_images(turned))
    assert not np.allclose(model.embed_images(turned), model.embed_images(pixels), atol=1e-3)


def test_a_folder_stands_for_its_images(model, photos):
    (photos[0].parent / "notes.txt").write_text("no image")
    assert len(model.embed_images(photos[0].parent)) == NUM_PHOTOS


def test_an_array_with_a_fourth_axis_is_many_images(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert model.embed_images(pixels).shape == (3, model.embedding_size)


def test_a_text_is_one_text_and_never_its_letters(model):
    assert model.embed_texts("cat").shape == (1, model.embedding_size)
    assert np.array_equal(model.embed_texts(TEXTS), model.encoder.embed_texts(TEXTS).numpy())
    assert np.allclose(model.embed_texts(text for text in TEXTS), model.embed_texts(TEXTS))
    assert model.similarity(np.zeros((32, 32, 3), np.uint8), "a red circle").shape == (1, 1)


def test_nothing_gives_no_rows(model):
    assert model.embed_texts([]).shape == (0, model.embedding_size)
    assert model.embed_images([]).shape == (0, model.embedding_size)
    assert len(model.classify([], ["a", "b"])) == 0


def test_similarity_is_the_cosines(model, photos):
    expected = directly(model, photos) @ model.encoder.embed_texts(TEXTS).numpy().T
    assert np.allclose(model.similarity(photos, TEXTS, batch_size=5), expected, atol=1e-6)


def test_classes_by_names_and_by_prompts(model, photos):
    by_names = model.classify(photos, ["red circle", "blue star"], templates="a {} here")
    by_prompts = model.classify(
        photos, {"red circle": "a red circle here", "blue star": ["a blue star here"]}, batch_size=2
    )
    for one, other in zip(by_names, by_prompts, strict=True):
        assert one.best == other.best
        assert one.classes[0].probability == pytest.approx(other.classes[0].probability, abs=1e-5)
        assert sum(entry.probability for entry in one.classes) == pytest.approx(1, abs=1e-5)
    assert by_names[0].image == str(photos[0])
    assert [result.image for result in by_names[1:3]] == [str(path) for path in photos[1:3]]


def test_classes_by_descriptions_are_classes_by_those_prompts(model, photos, tmp_path):
    descriptions = {"Red_Circle": ["a round red thing, no red circle without it"], "blue star": ["five points", "blue"]}
    prompts = {
        "red circle": ["a round red thing, no red circle without it"],
        "blue star": ["blue star, which has five points", "blue star, which has blue"],
    }
    (tmp_path / "descriptions.json").write_text(json.dumps(descriptions))
    by_prompts = model.classify(photos, prompts)
    for described in (descriptions, tmp_path / "descriptions.json"):
        assert model.classify(photos, list(prompts), class_descriptions=described) == by_prompts
    beside = model.classify(photos, list(prompts), templates="a {}", class_descriptions=descriptions)
    more = {name: [f"a {name}", *of_class] for name, of_class in prompts.items()}
    assert beside == model.classify(photos, more)


def test_probabilities_are_the_softmax_of_scaled_cosines(model, photos):
    names = ["red circle", "blue star", "square"]
    rows = model.embed_texts([f"a {name}" for name in names])
    logits = model.logit_scale * (model.embed_images(photos[0]) @ rows.T)[0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = model.classify(photos[0], names, templates=("a {}",), top=3)[0]
    assert {entry.name: pytest.approx(entry.probability, abs=1e-5) for entry in found.classes} == dict(
        zip(names, expected.tolist(), strict=True)
    )


def test_several_prompts_of_a_class_are_averaged(model, photos):
    prompts = {"circle": TEXTS[:2], "square": TEXTS[2:]}
    rows = model.embed_texts(TEXTS)
    circle = rows[:2].mean(axis=0)
    classifier = np.stack([circle / np.linalg.norm(circle), rows[2]])
    logits = model.logit_scale * (model.embed_images(photos[0]) @ classifier.T)[0]
    found = {entry.name: entry.probability for entry in model.classify(photos[0], prompts)[0].classes}
    assert found["circle"] - found["square"] == pytest.approx(np.tanh((logits[0] - logits[1]) / 2), abs=1e-5)


def test_classes_from_a_file(tmp_path):
    (tmp_path / "classes.txt").write_text("red circle\nblue star\n")
    assert list(read_prompts(tmp_path / "classes.txt")) == ["red circle", "blue star"]
    assert list(read_prompts("red circle,blue star")) == ["red circle", "blue star"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["one"], "names 1 class"),
        ({"a": "x", "b": []}, "'b' has no prompt"),
        ({"a": "x", "b": [3]}, "the prompts of 'b' holds 3"),
        (["a", 3], "classes holds 3"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(classes, message):
    with pytest.raises(vlm.UsageError, match=message):
        read_prompts(classes)


def test_what_cannot_be_read_is_named_or_skipped_and_reported(model, photos, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    images = [photos[0], tmp_path / "broken.jpg", tmp_path / "missing.jpg", b"bytes", photos[1]]
    with pytest.raises(vlm.UsageError, match=r"broken\.jpg cannot be used"):
        model.embed_images(images)
    with pytest.raises(vlm.UsageError, match=r"There is no image .*missing\.jpg"):
        model.caption([photos[0], tmp_path / "missing.jpg"])
    with pytest.raises(vlm.UsageError, match=r"images\[1\] cannot be used"):
        model.embed_images([photos[0], b"bytes"])
    with caplog.at_level(logging.WARNING, logger="vlm"):
        rows = model.embed_images(images, on_error="skip", batch_size=2)
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, True, True, False]
    assert np.allclose(rows[[0, 4]], directly(model, photos[:2]), atol=1e-6)
    assert len(caplog.records) == 3
    assert "broken.jpg" in caplog.text
    classified = model.classify(images, TEXTS, on_error="skip")
    captioned = model.caption(images, on_error="skip", batch_size=2)
    assert [bool(result.error) for result in classified] == [False, True, True, True, False]
    assert [result.image for result in captioned.skipped] == [
        str(tmp_path / "broken.jpg"),
        str(tmp_path / "missing.jpg"),
        "images[3]",
    ]
    assert captioned.to_json()[1]["error"]
    assert "error" not in captioned.to_json()[0]


def test_captions_are_the_encoders_own(model, photos):
    views = torch.from_numpy(np.stack([model.view(path.read_bytes()) for path in photos]))
    expected = model.encoder.caption_images(views, "a")
    assert [result.caption for result in model.caption(photos, prompt="a", batch_size=4)] == expected


def test_several_captions_come_with_likelihoods_embedding_and_attention(model, photos):
    decoding = vlm.DecodingOptions(beams=4, captions=3, max_length=8)
    results = model.caption(photos, prompt="a", decoding=decoding, embeddings=True, attention=True, batch_size=5)
    for result, row in zip(results, directly(model, photos), strict=True):
        assert np.allclose(result.embedding, row, atol=1e-6)
        assert result.caption == result.captions[0].caption
        assert len({caption.caption for caption in result.captions}) >= 2
        for caption in result.captions:
            assert [word.word for word in caption.words] == caption.caption.split()
            # of each word that was written; the prompt's was not
            sums = [sum(word.weights) for word in caption.words[1:]]
            assert sums == pytest.approx([1] * len(sums), abs=1e-4)
            # the decoder sees all outputs of the pooler but the first, which is the embedding
            assert {len(word.weights) for word in caption.words} == {15}
    values = results.to_json()[0]
    assert len(values["captions"]) == 3
    assert values["captions"][0]["words"][0]["word"].startswith("a")


def test_sampled_captions_depend_on_the_image_and_seed_alone(model, photos):
    decoding = vlm.DecodingOptions(sample=True, captions=2, top_p=0.9, seed=3)
    results = model.caption(photos, decoding=decoding, batch_size=8)
    backwards = model.caption(photos[::-1], decoding=decoding, batch_size=3)
    assert [result.to_json()["captions"][1]["caption"] for result in results] == [
        result.to_json()["captions"][1]["caption"] for result in backwards[::-1]
    ]
    other = model.caption(photos, decoding=vlm.DecodingOptions(sample=True, captions=2, top_p=0.9, seed=4))
    assert [result.caption for result in results] != [result.caption for result in other]


def test_images_below_the_threshold_are_none_of_the_classes(model, photos, tmp_path, caplog):
    names = ["red circle", "blue star"]
    plain = model.classify(photos, names)
    assert "best" not in plain.to_json()[0]
    cosines = model.similarity(photos, [f"a {name}" for name in names]).max(axis=1)
    # between two images: one on the threshold would be on either side of it, by rounding
    threshold = float(np.sort(cosines)[9:11].mean())
    results = model.classify(photos, names, templates="a {}", reject=threshold, batch_size=3)
    assert [result.is_rejected for result in results] == (cosines < threshold).tolist()
    assert [result.reject_score for result in results] == pytest.approx(cosines.tolist(), abs=1e-5)
    rejected = next(result for result in results if result.is_rejected)
    assert rejected.best == rejected.to_json()["best"] == "none of these"
    assert rejected.classes  # what it is most like is still said
    assert {result.best for result in results} > {"none of these"}
    # by the file of an evaluation: of this model, and these classes
    path = tmp_path / "reject.safetensors"
    write_reject_rule(RejectRule(threshold=threshold, fingerprint=model.fingerprint, classes=tuple(names)), path)
    again = model.classify(photos, names, templates="a {}", reject=str(path))
    assert [result.best for result in again] == [result.best for result in results]
    assert not caplog.records
    model.classify(photos[0], ["a", "b"], reject=str(path))
    assert "measured with 2 other classes" in caplog.text
    write_reject_rule(RejectRule(threshold=threshold, fingerprint="of another"), path)
    with pytest.raises(vlm.UsageError, match="was measured on the model of another"):
        model.classify(photos, names, reject=str(path))


def test_only_two_batches_are_held(photos):
    """Two hundred photos in memory at once were the way before."""
    read: list[int] = []

    class Counting(EvalTransform):
        def __call__(self, data: bytes) -> np.ndarray:
            read.append(len(data))
            return super().__call__(data)

    batches = read_batches(name_images(photos), Counting(size=8), batch_size=2, on_error="raise")
    assert next(batches).pixels.shape == (2, 3, 8, 8)
    assert len(read) <= 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.embed_images("nowhere.jpg"), "There is no image 'nowhere.jpg'"),
        (lambda model: model.embed_images([], on_error="ignore"), "give raise or skip"),
        (lambda model: model.embed_images([], batch_size=0), "batch_size = 0"),
        (lambda model: model.embed_texts([1]), "texts holds 1"),
        (lambda model: model.embed_texts(3), "texts = 3 is not a text"),
        (lambda model: model.classify([], ["a", "b"], top=0), "top = 0"),
        (lambda model: model.classify([], ["a", "b"], reject=3), "from -1 to 1"),
        (lambda model: model.classify([], ["a", "b"], templates="no place"), "has no {}"),
        (lambda model: model.classify([], ["a", "b"], class_descriptions={"a": ["x"]}), "have no description, as 'b'"),
        (lambda model: model.classify([], {"a": "x", "b": "y"}, class_descriptions={"a": ["x"]}), "hold their prompts"),
        (lambda model: vlm.load("nowhere"), "There is no model"),
        (lambda model: vlm.load("nowhere", precision="fp64"), "precision = 'fp64'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_misuse_is_said(model, call, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(vlm.UsageError, match=message):
        call(model)


def test_an_empty_folder_is_named(model, tmp_path):
    with pytest.raises(vlm.UsageError, match="no image in the folder"):
        model.embed_images(tmp_path)


def test_the_stages_take_a_loaded_model(model, scene_shards, tmp_path):
    val = scene_shards / "val"
    assert vlm.evaluate(model, retrieval=val, workers=0).fingerprint == model.fingerprint
    assert vlm.embed(model, val, tmp_path / "embeddings", workers=0).image


def run(capsys, *words):
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("verb", ["classify", "caption"])
def test_the_verb_prints_what_the_call_returns(model, folder, photos, capsys, verb):
    root = photos[0].parent
    flags = ["--classes", "red circle,blue star", "--top", "1"]
    if verb == "caption":
        flags = ["--prompt", "a", "--beams", "3", "--captions", "2", "--max-length", "9"]
    code, out, err = run(capsys, verb, folder, root, *flags, "--batch-size", "8", "--device", "cpu", "--json")
    assert code == 0
    assert "Loading the model" in err
    if verb == "classify":
        results = model.classify(root, "red circle,blue star", top=1, batch_size=8)
    else:
        decoding = vlm.DecodingOptions(beams=3, captions=2, max_length=9)
        results = model.caption(root, prompt="a", decoding=decoding, batch_size=8)
    assert json.loads(out) == results.to_json()
    assert len(results) == NUM_PHOTOS


def test_the_verb_shows_progress_for_many_images_only(folder, photos, capsys):
    common = ["--classes", "red circle,blue star", "--device", "cpu", "--batch-size", "8"]
    assert "embedding images" in run(capsys, "classify", folder, photos[0].parent, *common)[2]
    assert "embedding images" not in run(capsys, "classify", folder, photos[0], *common)[2]


def test_the_verb_skips_and_reports(folder, photos, capsys, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    words = [folder, photos[0], tmp_path / "broken.jpg", "--classes", "a,b", "--device", "cpu"]
    assert run(capsys, "classify", *words)[0] == 2
    code, out, err = run(capsys, "classify", *words, "--on-error", "skip", "--json")
    assert code == 0
    assert "Skipped" in err
    assert json.loads(out)[1]["error"]
    assert run(capsys, "caption", folder)[0] == 2


def test_the_image_of_a_result_is_json(model):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    [result] = model.classify(file.getvalue(), ["a", "b"])
    assert json.loads(json.dumps(result.to_json()))["image"] == "images[0]"
