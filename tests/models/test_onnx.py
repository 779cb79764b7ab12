"""ONNX exports: the same embeddings as torch's, used without torch as long as the model is unchanged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vlm
from tests.random_model import random_model
from vlm.api.model_export import export
from vlm.cli.main import main
from vlm.data.tokenizers import SentencePieceTokenizer
from vlm.errors import UsageError, VlmError
from vlm.evaluation.onnx_int8 import quantize_export
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter
from vlm.models.load import load_model, save_model_folder
from vlm.models.model import VisionLanguageModel
from vlm.models.onnx_encoder import OnnxEncoder, read_onnx_folder
from vlm.service.query import load_query_encoder, open_export
from vlm.service.search import SearchService

HEAVY = {"torch", "open_clip", "transformers", "pyarrow", "pydantic", "matplotlib", "PIL"}
TEXTS = ["a red star", "two large blue circles on a white background " * 4, "", "Ein Hund", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_tokenizer) -> Path:
    """A tiny model folder with its export."""
    path = tmp_path_factory.mktemp("exported") / "model"
    model = random_model("tiny", SentencePieceTokenizer(scene_tokenizer.read_bytes(), 16))
    save_model_folder(path, model, inputs={})
    export(path, to="onnx")
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model", copy_function=shutil.copyfile))


def pixels(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("number", [1, 2, 33])
def test_embeddings_are_torch_s_in_batches_of_any_size(folder, number):
    encoder, model = open_export(str(folder)), load_model(str(folder), device="cpu")
    assert encoder.fingerprint == model.fingerprint
    assert encoder.logit_scale == pytest.approx(model.logit_scale)
    images = model.embed_images(torch.from_numpy(pixels(number))).numpy()
    assert np.abs(encoder.embed_images(pixels(number)) - images).max() < 1e-5
    texts = [TEXTS[row % len(TEXTS)] for row in range(number)]
    assert np.abs(encoder.embed_texts(texts) - model.embed_texts(texts).numpy()).max() < 1e-5
    assert encoder.embed_texts([]).shape == (0, encoder.embedding_size)


def test_some_dimensions_are_those_of_the_truncated_model(folder):
    encoder, model = open_export(f"{folder}#64"), load_model(f"{folder}#64", device="cpu")
    assert (encoder.fingerprint, encoder.embedding_size) == (model.fingerprint, 64)
    assert np.abs(encoder.embed_texts(TEXTS) - model.embed_texts(TEXTS).numpy()).max() < 1e-5
    with pytest.raises(UsageError, match="have 128 dimensions"):
        open_export(f"{folder}#129")
    # a space of its own each, with a fingerprint that an export does not give
    for variant in ("16#mirror", "16#8", "mirror#16#8"):
        with pytest.raises(UsageError, match=f"An ONNX export serves {folder}, .*#{variant} is embedded by torch"):
            open_export(f"{folder}#{variant}")


def test_an_image_with_its_mirror_image_is_embedded_as_by_the_mirrored_model(folder):
    for variant in ("mirror", "mirror#64"):
        encoder, model = open_export(f"{folder}#{variant}"), load_model(f"{folder}#{variant}", device="cpu")
        assert encoder.fingerprint == model.fingerprint
        images = model.embed_images(torch.from_numpy(pixels(33))).numpy()
        assert np.abs(encoder.embed_images(pixels(33)) - images).max() < 1e-5
        assert np.abs(encoder.embed_texts(TEXTS) - model.embed_texts(TEXTS).numpy()).max() < 1e-5


def test_a_copied_folder_is_used_and_its_times_are_recorded(copy):
    assert isinstance(load_query_encoder(str(copy)), OnnxEncoder)
    recorded = json.loads((copy / "onnx" / "manifest.json").read_text())["details"]["source_files"]
    weights = copy / "open_clip_model.safetensors"
    assert recorded[weights.name]["mtime_ns"] == weights.stat().st_mtime_ns


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json", "tokenizer.model"])
def test_an_export_of_a_model_that_has_changed_is_not_used(copy, name, logged):
    if name == "open_clip_model.safetensors":
        # a model of the same size and shape, as after another epoch
        model = load_model(str(copy), device="cpu")
        with torch.no_grad():
            model.network.get_parameter("logit_scale").add_(0.5)
        again = VisionLanguageModel(
            name="again", network=model.network, config=model.config, view=model.view, tokenizer=model.tokenizer
        )
        save_model_folder(copy, again, inputs={})
    else:
        with (copy / name).open("ab") as file:
            file.write(b" ")
    with pytest.raises(UsageError, match=f"{name} has changed since it was made. Make it again: vlm export"):
        load_query_encoder(str(copy), backend="onnx")
    if name == "open_clip_model.safetensors":
        assert isinstance(load_query_encoder(str(copy)), VisionLanguageModel)
        assert "has changed since it was made" in logged.text


def test_an_export_that_is_damaged_is_named(copy):
    (copy / "onnx" / "text.onnx").write_bytes(b"no")
    with pytest.raises(VlmError, match=r"text.onnx is missing or damaged; export the model again"):
        load_query_encoder(str(copy), backend="onnx")
    assert isinstance(load_query_encoder(str(copy)), VisionLanguageModel)


def test_without_an_export_torch_is_taken_and_the_command_is_named(copy, logged, monkeypatch):
    shutil.rmtree(copy / "onnx")
    assert isinstance(load_query_encoder(str(copy)), VisionLanguageModel)
    assert f"vlm export {copy} --to onnx" in logged.text
    monkeypatch.setenv("VLM_BACKEND", "onnx")
    with pytest.raises(UsageError, match="has no ONNX export"):
        load_query_encoder(str(copy))
    monkeypatch.setenv("VLM_BACKEND", "tensorrt")
    with pytest.raises(UsageError, match="no backend 'tensorrt'"):
        load_query_encoder(str(copy))


def test_the_environment_may_ask_for_torch(folder, monkeypatch):
    monkeypatch.setenv("VLM_BACKEND", "torch")
    assert isinstance(load_query_encoder(str(folder)), VisionLanguageModel)


def test_the_export_alone_is_a_model_for_queries(folder, tmp_path):
    alone = shutil.copytree(folder / "onnx", tmp_path / "alone")
    vectors = open_export(str(alone)).embed_texts(TEXTS)
    assert (vectors == open_export(str(folder)).embed_texts(TEXTS)).all()


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory) -> Path:
    """An index of 200 noise images by the model."""
    from tests.index.origin_fixture import make_origin

    out = tmp_path_factory.mktemp("noise")
    model = load_model(str(folder), device="cpu")
    space = EmbeddingSpace(
        model=str(folder), fingerprint=model.fingerprint, dimension=model.embedding_size, modality="image"
    )
    writer = EmbeddingsWriter(out / "embeddings", space=space, identity={})
    vectors = model.embed_images(torch.from_numpy(pixels(200, seed=1))).numpy()
    writer.add("/nowhere/0.tar", vectors, [make_origin(f"u{number}", {}, {}) for number in range(200)])
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    build_index(out / "embeddings", out / "index", kind="flat")
    return out / "index"


def test_a_search_by_words_loads_no_torch_and_has_torch_s_hits(index, capsys):
    words = ["search", str(index), "a red star", "--minus", "snow", "--top", "20", "--json"]
    code = f"import sys; from vlm.cli.main import main; main({words}); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())
    assert main([*words, "--backend", "torch"]) == 0
    ours, theirs = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert [hit["uid"] for hit in ours["hits"]] == [hit["uid"] for hit in theirs["hits"]]
    scores = [[hit["score"] for hit in answer["hits"]] for answer in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_torch_s_model_is_loaded_once_for_what_an_export_cannot(index):
    service = SearchService.open(index)
    assert isinstance(service.model, OnnxEncoder)
    assert service.text_encoder is service.text_encoder
    service.close()


def test_int8_is_measured_and_its_rows_do_not_depend_on_their_batch(folder, scene_shards, tmp_path):
    result = export(
        folder, tmp_path / "int8", to="onnx", precision="int8", evaluate=str(scene_shards / "val"), max_recall_loss=1
    )
    assert 0.98 < result.quality["text_cosine"]["smallest"] < 1 - 1e-7
    assert result.quality["images"] == 40
    encoder = OnnxEncoder(name="int8", export=read_onnx_folder(tmp_path / "int8"))
    # one loud neighbour: with one scale for the batch the grey image would become coarser
    quiet = np.full((1, 3, 32, 32), 127, np.uint8)
    loud = np.where(pixels(4) > 127, 255, 0).astype(np.uint8)
    together = encoder.embed_images(np.concatenate([quiet, loud]))
    assert np.abs(together[0] - encoder.embed_images(quiet)[0]).max() < 1e-6
    texts = encoder.embed_texts(TEXTS)
    for row, text in enumerate(TEXTS):
        assert np.abs(texts[row] - encoder.embed_texts([text])[0]).max() < 1e-6


def test_int8_that_costs_more_recall_than_allowed_is_refused(folder, scene_shards, tmp_path):
    exact = read_onnx_folder(folder / "onnx")
    with pytest.raises(VlmError, match=r"recall falls by .* more than the bound"):
        quantize_export(exact, tmp_path / "int8", str(scene_shards / "val"), max_recall_loss=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx", "precision": "int8"}, "int8 needs shards"),
        ({"to": "onnx", "evaluate": "shards"}, "float32 none"),
        ({"to": "open-clip"}, "needs OUT"),
        ({"to": "onnx", "precision": "int8", "evaluate": "x", "max_recall_loss": 2}, "a fraction from 0 to 1"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(folder, options, message):
    with pytest.raises(UsageError, match=message):
        export(folder, **options)


def test_an_embedding_that_differs_is_not_kept(copy, monkeypatch):
    monkeypatch.setattr("vlm.models.onnx_export.TOLERANCE", -1.0)
    before = (copy / "onnx" / "manifest.json").read_bytes()
    with pytest.raises(VlmError, match="differs from torch"):
        export(copy, to="onnx")
    assert (copy / "onnx" / "manifest.json").read_bytes() == before
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_classifying_loads_no_torch_and_has_torch_s_probabilities(folder, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(pixels(1)[0].transpose(1, 2, 0)).save(tmp_path / "noise.png")
    words = ["classify", str(folder), str(tmp_path / "noise.png"), "--classes", "red star,blue heart,dog", "--json"]
    code = f"import sys; from vlm.cli.main import main; main({words}); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "open_clip", "transformers", "pydantic", "matplotlib"} & set(done.stderr.split())
    assert main([*words, "--backend", "torch"]) == 0
    ours, theirs = json.loads(done.stdout)[0]["classes"], json.loads(capsys.readouterr().out)[0]["classes"]
    assert [entry["name"] for entry in ours] == [entry["name"] for entry in theirs]
    assert [entry["probability"] for entry in ours] == pytest.approx([e["probability"] for e in theirs], abs=1e-4)


def test_a_loaded_export_embeds_and_says_what_it_cannot(folder):
    import vlm

    model = vlm.load(folder, backend="onnx")
    reference = vlm.load(folder, device="cpu")
    assert np.abs(model.embed_texts(TEXTS) - reference.embed_texts(TEXTS)).max() < 1e-5
    image = pixels(1)[0].transpose(1, 2, 0)
    assert np.abs(model.embed_images(image) - reference.embed_images(image)).max() < 1e-5
    assert "onnxruntime" in repr(model)
    with pytest.raises(UsageError, match="load it with backend='torch'"):
        model.caption(image)


@pytest.fixture
def suite(tmp_path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[data.scenes]\npath = "val"\nlabel = "scene.shape"\n[[evaluate]]\nevaluator = "zero-shot"\ndata = "scenes"\n'
        '[[evaluate]]\nevaluator = "retrieval"\ndata = "scenes"\nlanguages = ["en"]\n'
    )
    return file


def test_a_suite_measures_an_export_as_the_model_it_is_of(folder, suite, scene_shards, tmp_path):
    options = {"suite": suite, "data_root": scene_shards, "workers": 0, "features": tmp_path / "features"}
    exported = vlm.evaluate(vlm.load(folder, backend="onnx"), **options).comparison.models[0]
    torch_model = vlm.evaluate(folder, **options, backend="torch").comparison.models[0]
    # one space of embeddings, but features of their own
    assert exported.fingerprint == torch_model.fingerprint
    assert len(list((tmp_path / "features").glob("images-*.npy"))) == 2
    values = exported.measurements[0].values["top1"], torch_model.measurements[0].values["top1"]
    assert values[0].value == pytest.approx(values[1].value, abs=1 / 40)


def test_an_evaluation_by_an_export_loads_no_torch(folder, suite, scene_shards, tmp_path):
    words = ["eval", str(folder), "--suite", str(suite), "--data-root", str(scene_shards), "--json"]
    words += ["--out", str(tmp_path / "out")]
    code = f"import sys; from vlm.cli.main import main; main({words}); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "open_clip", "transformers", "matplotlib"} & set(done.stderr.split())
    assert "is run by its ONNX export (float32)" in done.stderr
    loaded = vlm.evaluate(vlm.load(folder, backend="onnx"), suite=suite, data_root=scene_shards)
    assert json.loads(done.stdout)["models"][0]["measurements"] == [
        measurement.to_json() for measurement in loaded.comparison.models[0].measurements
    ]
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_an_export_does_not_give_is_measured_by_torch(folder, suite, scene_shards):
    text = suite.read_text()
    suite.write_text(f'{text}[[evaluate]]\nevaluator = "nearest-class-mean"\ndata = "scenes"\ntrain = "scenes"\n')
    options = {"suite": suite, "data_root": scene_shards, "workers": 0}
    assert not vlm.evaluate(folder, **options, backend="onnx").failed
    suite.write_text(f'{suite.read_text()}layer = "pooled"\n')
    assert not vlm.evaluate(folder, **options).failed
    (failed,) = vlm.evaluate(folder, **options, backend="onnx").failed
    assert "gives no features before their projection" in failed.error


def test_an_int8_export_is_evaluated_only_where_it_is_named(copy, suite, scene_shards, logged):
    manifest = copy / "onnx" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "float32"', '"precision": "int8"'))
    options = {"suite": suite, "data_root": scene_shards, "workers": 0}
    vlm.evaluate(copy, **options)
    assert "is run by its ONNX export" not in logged.text
    vlm.evaluate(copy / "onnx", **options)
    vlm.evaluate(copy, **options, backend="onnx")
    assert logged.text.count("is run by its ONNX export (int8)") == 2
