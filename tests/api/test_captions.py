"""Captions against references, from lists and from shards, by call and by command."""

import json

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.evaluation.test_evaluation_set import colour_shards
from tests.random_model import write_random_model
from vlm.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_tokenizer):
    return write_random_model(tmp_path_factory.mktemp("model") / "model", "tiny-coca", scene_tokenizer)


def test_lists_of_texts_are_compared_with_and_without_a_model(folder):
    captions = ["a red circle", "a blue star"]
    references = [["a red circle", "a circle"], "a star"]
    scores = vlm.caption_metrics(captions, references)
    assert scores.bleu[0].value > 0.5
    assert scores.clip_score is None
    images = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (0, 200)]
    model = vlm.load(folder, device="cpu")
    judged = vlm.caption_metrics(captions, references, images=images, model=model)
    assert judged.clip_score is not None
    cosines = np.diag(model.similarity(images, [f"A photo depicts {caption}" for caption in captions]))
    assert judged.per_image["clip_score"] == pytest.approx(2.5 * np.maximum(cosines, 0), abs=1e-5)
    assert judged.cider_d == scores.cider_d
    with pytest.raises(vlm.UsageError, match="give both, or neither"):
        vlm.caption_metrics(captions, references, images=images)
    with pytest.raises(vlm.UsageError, match="2 captions for 1 images"):
        vlm.caption_metrics(captions, references, images=images[:1], model=model)


def test_the_command_compares_captions_of_real_shards_and_writes_the_page(tmp_path, folder, capsys):
    shards = colour_shards(tmp_path / "shards", colours=("red", "green", "blue"))
    out = tmp_path / "out"
    command = ["eval", str(folder), "--captions", shards, "--workers", "0", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "CIDEr-D (COCO's CIDEr)" in shown
    assert "3 captions" in shown
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["captions"]["scores"]["num_images"] == 3
    assert [example["references"] for example in stored["captions"]["examples"]] == [["red"], ["green"], ["blue"]]
    assert stored["caption_truth"] is None
    page = (out / "report.html").read_text()
    assert "cider d" in page
    assert "Worst mistakes" in page
    evaluation = vlm.evaluate(folder, captions=shards, workers=0, device="cpu")
    assert evaluation.to_json()["captions"] == stored["captions"]
