"""Which models load without a network: runs, folders, and what the caches hold."""

import json
import shutil
from dataclasses import asdict

import open_clip
import pytest

import vlm
from vlm.cli.main import main
from vlm.models.load import load_model, save_model
from vlm.models.model import build_network, fit_to_tokenizer, model_config


@pytest.fixture
def model_folder(tmp_path):
    """A model folder in open_clip's format, with weights as they are drawn."""
    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform

    tokenizer = open_tokenizer("clip", 24)
    config = fit_to_tokenizer(model_config("micro"), tokenizer)
    weights = build_network(config).state_dict()
    folder = tmp_path / "made" / "mine"
    save_model(folder, weights=weights, config=config, view=EvalTransform(size=32), tokenizer=tokenizer)
    return folder


def cached(hub, repository, files):
    """A repository in a cache of the Hugging Face Hub, with copies of files (by name)."""
    base = hub / f"models--{repository.replace('/', '--')}"
    snapshot = base / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "blobs").mkdir()
    (base / "refs" / "main").write_text(snapshot.name)
    for name, source in files.items():
        shutil.copy(source, snapshot / name)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No cache of any library."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "hub"


def names(found):
    return [(entry.model, entry.source) for entry in found.models]


def test_runs_and_model_folders_are_listed_once_each(tmp_path, model_folder, empty_cache):
    for place in ("a/model", "a/checkpoints/step-0003", "group/b/checkpoints/step-0007"):
        shutil.copytree(model_folder, tmp_path / "runs" / place)
    for run in ("a", "group/b"):
        (tmp_path / "runs" / run / "config.toml").write_text("")
    shutil.copytree(model_folder, tmp_path / "runs" / "exported")
    found = vlm.list_models(tmp_path / "runs", cache=empty_cache)
    runs = tmp_path / "runs"
    assert names(found) == [
        (str(runs / "a"), "run"),
        (str(runs / "exported"), "folder"),
        (str(runs / "group/b"), "run"),
    ]
    assert all(entry.bytes > 10_000 and not entry.missing for entry in found.models)


def test_what_the_cache_of_the_hub_holds_is_listed_by_both_its_names(tmp_path, model_folder, empty_cache, monkeypatch):
    files = {path.name: path for path in model_folder.iterdir()}
    cached(empty_cache, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", files)
    # another model, whose files have the usual names
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    weights = files["open_clip_model.safetensors"]
    cached(empty_cache, "some/bert", {"config.json": tmp_path / "config.json", "model.safetensors": weights})
    (tmp_path / "runs").mkdir()
    found = vlm.list_models(tmp_path / "runs", cache=empty_cache)
    assert names(found) == [
        ("ViT-B-32:laion2b_s34b_b79k", "open_clip"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hub"),
    ]
    # and it loads
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(empty_cache))
    assert load_model("laion/CLIP-ViT-B-32-laion2B-s34B-b79K").embedding_size == 16


def test_weights_whose_tokenizer_is_not_here_say_so(tmp_path, model_folder, empty_cache):
    name, tag = "ViT-B-16-SigLIP", "webli"
    repository = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")
    cached(empty_cache, repository, {"open_clip_model.safetensors": model_folder / "open_clip_model.safetensors"})
    (tmp_path / "runs").mkdir()
    [entry] = vlm.list_models(tmp_path / "runs", cache=empty_cache).models
    assert entry.model == f"{name}:{tag}"
    assert entry.missing.startswith("tokenizer ")


def test_models_that_packages_bring_are_listed(tmp_path, model_folder, empty_cache, monkeypatch):
    site = tmp_path / "site"
    shutil.copytree(model_folder, site / "some_clip" / "weights")
    (site / "some_clip-1.0.dist-info").mkdir()
    (site / "some_clip-1.0.dist-info" / "METADATA").write_text("Name: some-clip\nVersion: 1.0\n")
    record = "some_clip/__init__.py,,\nsome_clip/weights/open_clip_config.json,sha256=0,9\nsome_clip/config.json,,\n"
    (site / "some_clip-1.0.dist-info" / "RECORD").write_text(record)
    monkeypatch.syspath_prepend(site)
    (tmp_path / "runs").mkdir()
    [entry] = vlm.list_models(tmp_path / "runs", cache=empty_cache).models
    assert (entry.model, entry.source) == (str(site / "some_clip" / "weights"), "package")


def test_what_open_clip_could_fetch_is_listed_on_request(tmp_path, empty_cache):
    (tmp_path / "runs").mkdir()
    assert vlm.list_models(tmp_path / "runs", cache=empty_cache).models == ()
    known = vlm.list_models(tmp_path / "runs", cache=empty_cache, known=True).models
    assert len(known) == len(open_clip.list_pretrained())
    assert {entry.missing for entry in known} == {"weights"}


def test_the_verb_lists_and_says_how_to_fetch(tmp_path, model_folder, empty_cache, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(empty_cache))
    assert main(["models", str(tmp_path / "made"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == vlm.list_models(tmp_path / "made").to_json()
    assert printed["models"] == [asdict(entry) for entry in vlm.list_models(tmp_path / "made").models]
    assert main(["models", str(tmp_path / "made")]) == 0
    shown = capsys.readouterr()
    assert "mine" in shown.out
    assert "vlm models --fetch ViT-B-32:laion2b_s34b_b79k" in shown.err
    assert main(["models", str(tmp_path / "nowhere")]) == 2


def test_a_model_that_is_here_is_fetched_at_once_and_another_is_refused(model_folder):
    assert vlm.fetch_model(str(model_folder)).bytes > 10_000
    with pytest.raises(vlm.VlmError, match="no model 'nowhere'"):
        vlm.fetch_model("nowhere")
