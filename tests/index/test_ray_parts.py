"""Embedding and captioning on Ray leave the files of a local run, also when one of three processes is killed."""

import json
import os
import pickle
import threading
import time
from pathlib import Path

import psutil
import pytest

import vlm
from tests.index.kill_embed import SLOWED
from tests.random_model import write_random_model
from vlm.cli.main import main
from vlm.errors import UsageError, VlmError
from vlm.index import ray_parts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Eight shards of six scenes."""
    from vlm.data.pack import PackConfig, pack
    from vlm.data.sources.source import SceneOptions, SourceOptions
    from vlm.data.sources.source_registry import open_source

    folder = tmp_path_factory.mktemp("ray") / "shards"
    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=48, pixels=32)))
    pack(source, folder, PackConfig(samples_per_shard=6))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, scene_tokenizer) -> str:
    """A model that embeds and captions."""
    return str(write_random_model(tmp_path_factory.mktemp("model") / "coca", "tiny-coca", scene_tokenizer))


def files_of(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too; the manifests without their time and command."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in files if name.endswith("manifest.json")]:
        values = json.loads(files[name])
        del values["made_at"], values["command"]
        files[name] = json.dumps(values).encode()
    return files


@pytest.fixture
def ray_in_this_process(monkeypatch):
    """In place of Ray: everything travels by pickle, tasks end in reverse order, and each is done twice."""

    def run(open_worker, tasks, cluster, *, name_of):
        worker = pickle.loads(pickle.dumps(open_worker))()
        for number in reversed(range(len(tasks))):
            for _ in range(2):
                worker(pickle.loads(pickle.dumps(tasks[number])))
            yield number, None

    monkeypatch.setattr(ray_parts, "run_on_ray", run)


def test_embeddings_of_a_cluster_are_those_of_one_process(ray_in_this_process, model, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"modality": "both", "batch_size": 4, "workers": 0}
    local = vlm.embed(model, shards, "local", **options)
    on_ray = vlm.embed(model, shards, "ray", engine="ray", processes=3, **options)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    for ours, theirs in zip(on_ray.summaries, local.summaries, strict=True):
        assert (ours.rows, ours.new_rows, ours.missing_parts) == (theirs.rows, theirs.new_rows, 0)
        assert ours.ended_here


def test_a_cluster_runs_the_export_that_one_process_runs(ray_in_this_process, scene_tokenizer, shards, tmp_path):
    model = write_random_model(tmp_path / "model", "tiny", scene_tokenizer)
    vlm.export(model, to="onnx")
    options = {"modality": "both", "batch_size": 4, "workers": 0, "device": "cpu"}
    vlm.embed(model, shards, tmp_path / "local", **options)
    vlm.embed(model, shards, tmp_path / "ray", engine="ray", processes=3, **options)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert json.loads(files_of(tmp_path / "ray")["images/manifest.json"])["configuration"]["backend"] == "onnx"


def test_a_cluster_goes_on_with_what_a_local_run_left(ray_in_this_process, model, shards, tmp_path):
    vlm.embed(model, shards, tmp_path / "local", workers=0)
    vlm.embed(model, shards, tmp_path / "ray", workers=0)
    (tmp_path / "ray" / "parts" / "part-00002.npy").write_bytes(b"damaged")
    again = vlm.embed(model, shards, tmp_path / "ray", workers=0, engine="ray").summaries[0]
    assert (again.rows, again.new_rows) == (48, 6)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    complete = vlm.embed(model, shards, tmp_path / "ray", workers=0, engine="ray").summaries[0]
    assert (complete.was_complete, complete.new_rows) == (True, 0)


def test_a_selection_is_embedded_by_a_cluster(ray_in_this_process, model, shards, tmp_path):
    selection = tmp_path / "half.selection"
    assert main(["curate", shards, str(selection), "--filter", "sample:share=0.5"]) == 0
    for engine in ("local", "ray"):
        vlm.embed(model, shards, tmp_path / engine, workers=0, selection=selection, engine=engine)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_captions_of_a_cluster_are_those_of_one_process(ray_in_this_process, model, shards, tmp_path):
    decoding = vlm.DecodingOptions(max_length=6)
    for engine in ("local", "ray"):
        summary = vlm.caption_shards(model, shards, tmp_path / engine, decoding=decoding, workers=0, engine=engine)
        assert summary.new_samples == 48
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_a_machine_that_does_not_see_the_folder_is_named(model, shards, tmp_path, monkeypatch):
    def run_elsewhere(open_worker, tasks, cluster, *, name_of):
        # what only the machine that began the work has
        for mark in (tmp_path / "out").glob(".ray.*"):
            mark.unlink()
        open_worker()
        yield

    monkeypatch.setattr(ray_parts, "run_on_ray", run_elsewhere)
    with pytest.raises(VlmError, match=r"does not see the folder .*out.*shared storage"):
        vlm.embed(model, shards, tmp_path / "out", workers=0, engine="ray")
    assert not list((tmp_path / "out").glob(".ray.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes = 0"),
        ({"device": "cuda:1"}, "uses a GPU of its own"),
        ({"engine": "spark"}, "spark"),
        ({"engine": "local", "ray_address": "head:6379"}, "--ray-address head:6379 is for --engine ray"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(options, message, model, shards, tmp_path):
    with pytest.raises(UsageError, match=message):
        vlm.embed(model, shards, tmp_path / "out", **{"engine": "ray", "workers": 0} | options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def slow_cluster(tmp_path_factory):
    """Ray with three CPUs, on which writing takes long enough to be killed at it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    folder = tmp_path_factory.mktemp("slowed")
    (folder / "sitecustomize.py").write_text(SLOWED, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        options = {"include_dashboard": False, "object_store_memory": 80 << 20, "log_to_driver": False}
        ray.init(address="local", num_cpus=3, logging_level="error", **options)
        yield
        ray.shutdown()


def kill_one_process(out: Path, killed: list[int]) -> None:
    """SIGKILL a process of Ray Data while a part is half-written, once one is whole."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(out.glob("parts/*.json")) and any(out.glob("parts/.*.part")):
            # as Ray titles the process of an actor that is at work on a task
            busy = [
                p for p in psutil.process_iter(["cmdline"]) if "ray::MapWorker" in " ".join(p.info["cmdline"] or [])
            ]
            if busy:
                busy[0].kill()
                killed.append(busy[0].pid)
                return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["embed", "caption"])
def test_a_process_killed_in_the_middle_changes_no_byte(slow_cluster, verb, model, shards, tmp_path):
    def words(out: Path, *more: str) -> list[str]:
        where = [str(out)] if verb == "embed" else ["--out", str(out), "--max-length", "6"]
        return [verb, model, shards, *where, "--workers", "0", "--batch-size", "4", *more]

    assert main(words(tmp_path / "local")) == 0
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_process, args=(tmp_path / "ray", killed), daemon=True)
    killer.start()
    assert main(words(tmp_path / "ray", "--engine", "ray", "--processes", "3")) == 0
    killer.join()
    assert killed
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
