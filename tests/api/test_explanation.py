"""`vlm.explain` and the verb: what they give, draw and write."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.random_model import write_random_model
from vlm.api.explanation import explainer
from vlm.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_tokenizer):
    return write_random_model(tmp_path_factory.mktemp("model") / "model", "tiny", scene_tokenizer)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_text_and_its_words_have_maps_from_0_to_1(folder, photo):
    model = vlm.load(folder, device="cpu")
    explanation = vlm.explain(model, photo, "a red star", words=True)
    assert explanation.method == "attention"
    assert explanation.view.shape == (32, 32, 3)
    assert [word.text for word in explanation.words] == ["a", "red", "star"]
    cosines = model.similarity(photo, ["a red star", "a", "red", "star"])[0]
    for heat_map, cosine in zip((explanation.whole, *explanation.words), cosines, strict=True):
        assert heat_map.similarity == pytest.approx(cosine, abs=1e-5)
        assert (heat_map.heat.min(), heat_map.heat.max()) == (0, 1)
        column, row = (int(place * 32) for place in heat_map.peak)
        assert heat_map.heat[row, column] == 1
    against = vlm.explain(model, photo, "a red star", against=["a blue star"])
    assert not np.allclose(against.whole.heat, explanation.whole.heat)
    # the view is the model's, and the figure holds it, the text and the words in rows of four
    assert np.array_equal(explanation.view, model.view(photo.read_bytes()).transpose(1, 2, 0))
    assert explanation.figure().size == (4 * 336, 2 * 362)
    assert explanation.overlay().size == (336, 336)


def test_the_overlay_is_light_where_the_heat_is_and_grey_below(folder, photo):
    explanation = vlm.explain(folder, photo, "a star", device="cpu", method="occlusion")
    overlay = np.asarray(explanation.overlay(), np.float32)
    column, row = (int(place * 336) for place in explanation.whole.peak)
    assert overlay[row, column].mean() > overlay.mean()


def test_the_command_writes_a_figure_or_the_numbers(folder, photo, tmp_path, capsys):
    command = ["explain", str(folder), str(photo), "a red star", "--device", "cpu"]
    assert main([*command, "--words", "--out", str(tmp_path / "why.png")]) == 0
    assert "hottest place" in capsys.readouterr().out
    with Image.open(tmp_path / "why.png") as figure:
        assert figure.format == "PNG"
    assert main([*command, "--out", str(tmp_path / "why.npy"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = vlm.explain(folder, photo, "a red star", device="cpu")
    assert shown.pop("out") == str(tmp_path / "why.npy")
    assert shown == expected.to_json()
    assert np.array_equal(np.load(tmp_path / "why.npy"), expected.whole.heat)


def test_a_report_shows_maps_beside_the_worst_mistakes(folder, scene_shards, tmp_path, capsys):
    [shard, *_] = sorted(map(str, (scene_shards / "val").glob("*.tar")))
    command = ["eval", str(folder), "--retrieval", shard, "--device", "cpu", "--workers", "0", "--captions-each", "1"]
    assert main([*command, "--heat-maps", "--out", str(tmp_path / "with")]) == 0
    page = (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    assert page.count(" matches: ") >= 10
    capsys.readouterr()
    assert main([*command, "--heat-maps"]) == 2
    assert "give --out FOLDER, too" in capsys.readouterr().err
    with pytest.raises(vlm.UsageError, match="give the folder for it"):
        vlm.evaluate(folder, retrieval=shard, heat_maps=True)


def test_a_model_without_maps_is_said_once(folder, caplog):
    class Blind:
        name = "blind"

    explain_mistake = explainer(lambda: vlm.Model(Blind()))
    image = Image.new("RGB", (32, 32))
    assert [explain_mistake(image, "a star", "") for _ in range(2)] == [None, None]
    assert [record.message for record in caplog.records] == [
        "The report has no heat maps: blind has no image tower to look into: heat maps need one that torch runs."
    ]
    drawn = Image.open(io.BytesIO(explainer(lambda: vlm.load(folder, device="cpu"))(image, "a star", "a circle")))
    assert (drawn.format, drawn.size) == ("JPEG", (240, 240))


def test_what_cannot_be_explained_is_refused(folder, photo, tmp_path, capsys):
    for words, message in (
        ([str(photo), "a star", "--out", "why.jpg"], "is written as .png (a figure) or .npy"),
        ([str(tmp_path / "none.png"), "a star"], "There is no image"),
        ([str(photo), " "], "The text is empty"),
        ([str(photo), "a star", "--shifts", "-1"], "shifts = -1 is out of range"),
    ):
        assert main(["explain", str(folder), *words, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(vlm.UsageError, match="2 images were given: explain one at a time"):
        vlm.explain(folder, [photo, photo], "a star", device="cpu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(vlm.UsageError, match=r"why\.txt: an explanation is written as"):
        vlm.explain(folder, photo, "a star", device="cpu").save(tmp_path / "why.txt")
