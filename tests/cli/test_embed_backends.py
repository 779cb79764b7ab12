"""`vlm embed` by a model's ONNX export and by torch: which of them is taken, and what their rows have in common."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.random_model import random_model, write_random_model
from vlm.cli.main import main
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import Embeddings
from vlm.manifest import mark_unfinished, recorded_configuration
from vlm.models.load import load_model, save_model_folder
from vlm.models.model import VisionLanguageModel
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.service.query import Backend, open_bulk_export, open_export
from vlm.service.search import SearchService

BOUND = 1e-6
"""The largest cosine distance of a sample's two vectors, as docs/formats.md has it."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, scene_tokenizer) -> Path:
    """A model with its export."""
    folder = write_random_model(tmp_path_factory.mktemp("exported") / "model", "tiny", scene_tokenizer)
    vlm.export(folder, to="onnx")
    return folder


@pytest.fixture(scope="module")
def shards(scene_shards) -> str:
    return str(scene_shards / "val")


def files_of(folder: Path) -> dict[str, str]:
    """The checksums of all files of both modalities."""
    checksums: dict[str, str] = {}
    for name in ("images", "texts"):
        manifest = Embeddings.open(folder / name, verify=True).manifest
        checksums |= {f"{name}/{file}": record.sha256 for file, record in manifest.files.items()}
    return checksums


def backend_in(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["configuration"]["backend"]


def test_the_export_is_taken_without_torch_and_gives_torch_s_vectors(exported, shards, tmp_path):
    words = ["embed", str(exported), shards, str(tmp_path / "onnx"), "--modality", "both", "--store", "float32"]
    code = f"import sys; from vlm.cli.main import main; main({words}); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "open_clip", "transformers", "pandas"} & set(done.stderr.split())
    assert "is run by its ONNX export (float32)" in done.stderr
    vlm.embed(exported, shards, tmp_path / "torch", modality="both", store="float32", backend="torch")
    for name in ("images", "texts"):
        onnx, torch = Embeddings.open(tmp_path / "onnx" / name), Embeddings.open(tmp_path / "torch" / name)
        assert onnx.space == torch.space
        assert list(onnx.origins()) == list(torch.origins())
        pairs = zip(onnx.blocks(), torch.blocks(), strict=True)
        cosines = np.concatenate([(mine.astype(float) * theirs).sum(axis=1) for mine, theirs in pairs])
        assert 1 - cosines.min() < BOUND
        assert (backend_in(onnx.folder), backend_in(torch.folder)) == ("onnx", "torch")


def test_files_by_the_export_are_the_same_with_any_threads_readers_and_processes(
    exported, shards, tmp_path, monkeypatch
):
    options: dict[str, Any] = {"modality": "both", "store": "float32"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    vlm.embed(exported, shards, tmp_path / "one", **options, workers=0)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    vlm.embed(exported, shards, tmp_path / "many", **options, workers=3)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    vlm.embed(exported, shards, tmp_path / "both", **options, processes=2)
    assert files_of(tmp_path / "both") == files_of(tmp_path / "one")
    vlm.embed(vlm.load(exported, backend="onnx"), shards, tmp_path / "loaded", **options)
    assert files_of(tmp_path / "loaded") == files_of(tmp_path / "one")


def test_a_vector_of_many_rows_does_not_depend_on_its_neighbours(exported):
    encoder = open_bulk_export(str(exported))
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    whole = encoder.embed_images(images)
    for size in (2, 17, 33):
        assert np.abs(whole[:size] - encoder.embed_images(images[:size])).max() < 1e-6
    assert np.abs(whole - open_export(str(exported)).embed_images(images)).max() < 1e-6
    texts = [f"{number} red stars" for number in range(50)]
    reference = load_model(str(exported), device="cpu").embed_texts(texts).numpy()
    assert np.abs(encoder.embed_texts(texts) - reference).max() < 1e-5


@pytest.mark.parametrize("begun_by", ["torch", "onnx"])
def test_a_folder_goes_on_by_the_backend_that_it_was_begun_with(
    exported, shards, tmp_path, monkeypatch, begun_by: Backend
):
    vlm.embed(exported, shards, tmp_path / "whole", backend=begun_by)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    (out / "parts" / "part-00000.npy").write_bytes(b"damaged")
    other: Backend = "onnx" if begun_by == "torch" else "torch"
    with pytest.raises(UsageError, match=f"begun with the backend {begun_by}, and holds rows of one only"):
        vlm.embed(exported, shards, out, backend=other)
    assert vlm.embed(exported, shards, out).summaries[0].new_rows > 0
    assert Embeddings.open(out).manifest.files == Embeddings.open(tmp_path / "whole").manifest.files
    monkeypatch.setenv("VLM_BACKEND", other)
    with pytest.raises(UsageError, match=f"leave out the backend {other} to go on with {begun_by}"):
        vlm.embed(exported, shards, out)


def test_an_unfinished_folder_is_not_gone_on_with_by_another_backend(exported, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vlm.index.embed._write_parts", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            vlm.embed(exported, shards, tmp_path / "out", backend="torch")
    with pytest.raises(UsageError, match="begun with the backend torch"):
        vlm.embed(exported, shards, tmp_path / "out", backend="onnx")
    vlm.embed(exported, shards, tmp_path / "out")
    assert backend_in(tmp_path / "out") == "torch"


def test_an_export_that_is_gone_is_asked_for_where_work_was_begun_with_it(exported, shards, tmp_path, capsys):
    model = shutil.copytree(exported, tmp_path / "model", copy_function=shutil.copyfile)
    words = ["embed", str(model), shards, str(tmp_path / "out")]
    assert main(words) == 0
    (tmp_path / "out" / "parts" / "part-00000.npy").write_bytes(b"damaged")
    shutil.rmtree(model / "onnx")
    capsys.readouterr()
    assert main(words) == 2
    assert f"vlm export {model} --to onnx" in capsys.readouterr().err
    # elsewhere torch is taken, and the export recommended
    assert main([*words[:3], str(tmp_path / "other")]) == 0
    assert f"vlm export {model} --to onnx" in capsys.readouterr().err
    assert backend_in(tmp_path / "other") == "torch"


@pytest.mark.parametrize("lost", ["export", "onnxruntime", "weights of the export"])
def test_complete_work_of_an_export_is_complete_without_it(exported, shards, tmp_path, monkeypatch, lost):
    model = shutil.copytree(exported, tmp_path / "model", copy_function=shutil.copyfile)
    options: dict[str, Any] = {"modality": "both", "quantize": ("int8",)}
    made = vlm.embed(model, shards, tmp_path / "out", **options)
    before = files_of(tmp_path / "out")
    if lost == "export":
        shutil.rmtree(model / "onnx")
    elif lost == "onnxruntime":
        find_spec = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == lost else find_spec(name))
    else:
        weights = max((model / "onnx").iterdir(), key=lambda path: path.stat().st_size)
        weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))
    for more in ({}, {"processes": 2}, {"backend": "onnx"}):
        found = vlm.embed(model, shards, tmp_path / "out", **options, **more)
        assert all(summary.was_complete and not summary.new_rows for summary in found.summaries)
        assert [summary.rows for summary in found.summaries] == [summary.rows for summary in made.summaries]
    assert files_of(tmp_path / "out") == before
    # what was asked for is compared all the same
    with pytest.raises(UsageError, match="complete, but was made with another codes"):
        vlm.embed(model, shards, tmp_path / "out", modality="both")
    with pytest.raises(UsageError, match="begun with the backend onnx, and holds rows of one only"):
        vlm.embed(model, shards, tmp_path / "out", **options, backend="torch")


def test_complete_work_of_an_export_is_not_that_of_another_model(exported, shards, tmp_path, scene_tokenizer):
    model = shutil.copytree(exported, tmp_path / "model", copy_function=shutil.copyfile)
    vlm.embed(model, shards, tmp_path / "out")
    shutil.rmtree(model)
    save_model_folder(model, random_model("tiny", open_tokenizer(str(scene_tokenizer), 24), seed=1), inputs={})
    with pytest.raises(UsageError, match="complete, but was made with another model"):
        vlm.embed(model, shards, tmp_path / "out")
    # of an export without its model nothing else tells
    shutil.move(shutil.copytree(exported / "onnx", tmp_path / "alone"), tmp_path / "moved")
    vlm.embed(tmp_path / "moved", shards, tmp_path / "other")
    (tmp_path / "moved" / "image.onnx").unlink()
    with pytest.raises(VlmError, match=r"image\.onnx is missing or damaged; export the model again"):
        vlm.embed(tmp_path / "moved", shards, tmp_path / "other")


def test_a_folder_from_before_backends_were_noted_is_torch_s(exported, shards, tmp_path):
    vlm.embed(exported, shards, tmp_path / "out", backend="torch")
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    del values["configuration"]["backend"]
    path.write_text(json.dumps(values))
    assert vlm.embed(exported, shards, tmp_path / "out").summaries[0].was_complete
    assert vlm.embed(exported, shards, tmp_path / "out", backend="torch").summaries[0].was_complete
    with pytest.raises(UsageError, match="begun with the backend torch"):
        vlm.embed(exported, shards, tmp_path / "out", backend="onnx")


@pytest.mark.parametrize("modality", ["image", "text"])
def test_an_earlier_version_s_unfinished_work_on_images_goes_on_by_torch_and_on_captions_is_explained(
    exported, shards, tmp_path, modality
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    vlm.embed(exported, shards, whole, backend="torch", modality=modality)
    shutil.copytree(whole, out)
    identity = json.loads((out / "manifest.json").read_text())["configuration"]
    del identity["backend"]
    mark_unfinished(out, kind="embeddings", configuration=identity)
    (out / "parts" / "part-00000.json").unlink()
    if modality == "text":
        with pytest.raises(UsageError, match="begun by an earlier version, which embedded captions in another order"):
            vlm.embed(exported, shards, out, modality="text")
        return
    assert vlm.embed(exported, shards, out).summaries[0].new_rows > 0
    assert Embeddings.open(out).manifest.files == Embeddings.open(whole).manifest.files


def test_folders_of_two_backends_are_both_named(exported, shards, tmp_path):
    vlm.embed(exported, shards, tmp_path / "images", backend="torch")
    vlm.embed(exported, shards, tmp_path / "texts", modality="text", backend="onnx")
    with pytest.raises(UsageError, match=r"images with torch and .*texts with onnx: embed one --modality at a time"):
        vlm.embed(exported, shards, tmp_path, modality="both")


def test_a_damaged_export_is_not_used_for_many_rows(exported, shards, tmp_path, caplog):
    model = shutil.copytree(exported, tmp_path / "model", copy_function=shutil.copyfile)
    weights = max((model / "onnx").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.write_bytes(content)
    cure = f"{weights} is missing or damaged; export the model again"
    with pytest.raises(VlmError, match=re.escape(cure)):
        vlm.embed(model, shards, tmp_path / "named", backend="onnx")
    vlm.embed(model, shards, tmp_path / "auto")
    assert backend_in(tmp_path / "auto") == "torch"
    assert any(cure in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_an_int8_export_is_taken_only_where_it_is_named_and_noted(exported, shards, tmp_path):
    model = shutil.copytree(exported, tmp_path / "model", copy_function=shutil.copyfile)
    manifest = model / "onnx" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "float32"', '"precision": "int8"'))
    vlm.embed(model, shards, tmp_path / "auto")
    assert backend_in(tmp_path / "auto") == "torch"
    vlm.embed(model, shards, tmp_path / "named", backend="onnx")
    assert backend_in(tmp_path / "named") == "onnx-int8"
    assert vlm.embed(model, shards, tmp_path / "named").summaries[0].was_complete


def test_what_an_export_cannot_do_is_left_to_torch_or_refused(exported, shards, tmp_path):
    vlm.embed(exported, shards, tmp_path / "bf16", precision="bf16")
    assert backend_in(tmp_path / "bf16") == "torch"
    with pytest.raises(UsageError, match="An ONNX export is not compiled: leave --compile out"):
        vlm.embed(exported, shards, tmp_path / "out", backend="onnx", compile=True)
    with pytest.raises(UsageError, match="computes in float32: leave --precision bf16 out"):
        vlm.embed(exported, shards, tmp_path / "out", backend="onnx", precision="bf16")
    with pytest.raises(UsageError, match="runs on the CPU: leave --device cuda out"):
        vlm.embed(exported, shards, tmp_path / "out", backend="onnx", device="cuda")
    with pytest.raises(UsageError, match="runs on the CPU: leave --device cuda out"):
        vlm.load(exported, backend="onnx", device="cuda")
    with pytest.raises(UsageError, match="computes in float32"):
        vlm.embed(exported, shards, tmp_path / "out", backend="onnx", precision="bf16", engine="ray")
    assert not (tmp_path / "out").exists()
    assert vlm.embed(f"{exported}#16", shards, tmp_path / "short", batch_size="auto").summaries[0].dimension == 16
    assert backend_in(tmp_path / "short") == "onnx"


@pytest.mark.parametrize(("modality", "earlier"), [("text", {}), ("image", {"backend": "onnx"}), ("image", {})])
def test_an_addition_is_not_blocked_by_what_another_one_left(
    exported, shards, scene_shards, tmp_path, monkeypatch, modality, earlier
):
    vlm.embed(exported, shards, tmp_path / "rows", modality=modality)
    vlm.build_index(tmp_path / "rows", tmp_path / "index")
    index = vlm.open_index(tmp_path / "index")
    more = shutil.copytree(scene_shards / "val", tmp_path / "more")
    with monkeypatch.context() as patch:
        patch.setattr("vlm.index.embed._write_parts", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            index.add(more)
    (work,) = (tmp_path / "index" / ".adding").iterdir()
    identity = json.loads((work / "progress.json").read_text())["configuration"]
    del identity["backend"]
    mark_unfinished(work, kind="embeddings", configuration=identity | earlier)
    # the same samples: embedded, then found known by their content
    assert index.add(more).known == len(index)
    assert not work.exists()


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def index(exported, shards, tmp_path) -> Path:
    vlm.embed(exported, shards, tmp_path / "rows", backend="torch")
    vlm.build_index(tmp_path / "rows", tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("verb", ["add", "update"])
def test_an_index_grows_by_the_export_without_torch(index, photos, scene_shards, tmp_path, verb):
    num_rows = len(vlm.open_index(index))
    more = shutil.copytree(scene_shards / "val", tmp_path / "more")
    calls = [["index", verb, str(index), str(source), "--uid-prefix", f"{source.name}/"] for source in (photos, more)]
    code = f"import sys; from vlm.cli.main import main; print(*[main(words) for words in {calls}], *sys.modules)"

    def modules_of(backend: str) -> set[str]:
        environment = os.environ | {"VLM_BACKEND": backend}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        *_, last = done.stdout.splitlines()
        assert last.startswith("0 0 ")
        assert done.stderr.count("is run by its ONNX export (float32)") == (0 if backend == "torch" else 2)
        return set(last.split())

    assert not {"torch", "open_clip", "transformers"} & modules_of("")
    grown = vlm.open_index(index, backend="torch")
    assert len(grown) == 2 * num_rows + 3
    # float16 rows of the export are torch's vectors, up to rounding
    for photo in photos.iterdir():
        hit = grown.search(image=photo, top=1)[0]
        assert hit.uid == f"photos/{photo.name}"
        assert hit.score > 1 - 1e-5
    # of the shards, which the same command then adds again
    grown.rollback()
    assert "torch" in modules_of("torch")


def test_files_that_another_backend_left_unfinished_do_not_block_an_addition(index, photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vlm.index.embeddings_folder.write_marker", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            vlm.open_index(index, backend="torch").add(photos)
    (work,) = (index / ".adding").iterdir()
    assert recorded_configuration(work)["backend"] == "torch"
    assert vlm.open_index(index).add(photos).added == 3
    assert not work.exists()


def test_rows_are_added_by_torch_where_the_export_is_rounded(exported, shards, tmp_path):
    model = shutil.copytree(exported, tmp_path / "model", copy_function=shutil.copyfile)
    vlm.embed(model, shards, tmp_path / "rows")
    vlm.build_index(tmp_path / "rows", tmp_path / "index")
    manifest = model / "onnx" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "float32"', '"precision": "int8"'))
    service = SearchService.open(tmp_path / "index")
    assert isinstance(service.model, OnnxEncoder)
    assert isinstance(service.row_encoder, VisionLanguageModel)
