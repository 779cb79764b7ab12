"""Trouble planted in real runs: each ends as designed, with its message, and with accounts that add up."""

import json
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import preloaded
from tests.data.tar_fixture import write_tar
from tests.train.test_kill import command
from tests.waiting import wait_until
from vlm.errors import VlmError
from vlm.train.objectives.contrastive import CLIP
from vlm.train.objectives.loss_term import LossTerm
from vlm.train.run import train
from vlm.train.task import LOSS_TERMS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plant(monkeypatch):
    """A function that makes the loss of samples at positions [first, last) of a run `factor` times what it is."""

    def make(first: int, last: int, factor: float) -> None:
        def planted(outputs, inputs, options):
            assert CLIP.batch_level is not None
            rows = inputs["rows"]
            is_hit = bool(((rows >= first) & (rows < last)).any())
            return CLIP.batch_level(outputs, inputs, options) * (factor if is_hit else 1.0)

        term = LossTerm(summary="planted", paper="", outputs=CLIP.outputs, inputs=("rows", "same"), batch_level=planted)
        monkeypatch.setitem(LOSS_TERMS, "planted", term)

    return make


def ledger_of(config):
    return json.loads((Path(config.run) / "ledger.json").read_text())["total"]


def skips_of(config):
    return json.loads((Path(config.run) / "manifest.json").read_text())["details"]["skipped"]


def test_nothing_of_a_skipped_step_reaches_the_weights(configure, plant):
    plant(100, 120, float("nan"))
    options = {"objective": {"objective": "planted"}, "safety": {"checkpoint_every": 5}}
    config = configure("run", steps=6, optimizer={"average_decay": 0.5, "warmup_steps": 2}, **options)
    train(config)
    before, after = (
        {file.name: load_file(file) for file in (Path(config.run) / "checkpoints" / name).glob("*.safetensors")}
        for name in ("step-00000005", "step-00000006")
    )
    assert before.keys() == after.keys() >= {"optimizer.safetensors", "average.safetensors"}
    for file, tensors in before.items():
        assert all(torch.equal(tensor, after[file][name]) for name, tensor in tensors.items())


def test_one_batch_of_nan_is_skipped_and_accounted_for(configure, plant):
    plant(100, 120, float("nan"))
    config = configure("run", steps=12, objective={"objective": "planted"}, micro_batch=5)
    summary = train(config)
    assert summary.steps == 12
    assert summary.skipped_steps == 1
    (skip,) = skips_of(config)
    assert skip["step"] == 6
    assert skip["position"] == 100
    assert skip["reason"] == "the loss planted is nan"
    assert ledger_of(config)["seen"] == 240


def test_a_spike_is_skipped_where_that_is_asked_for(configure, plant):
    plant(600, 620, 50.0)
    options = {"steps": 36, "objective": {"objective": "planted"}}
    assert train(configure("watched", safety={"spike_factor": 8.0}, **options)).skipped_steps == 1
    assert train(configure("unwatched", **options)).skipped_steps == 0


def test_lasting_trouble_goes_back_and_passes_over_its_samples(configure, plant):
    plant(100, 220, float("nan"))
    config = configure("run", steps=20, objective={"objective": "planted"})
    summary = train(config)
    assert summary.steps == 20
    jumps = [entry for entry in skips_of(config) if "to_step" in entry]
    assert [(jump["from_step"], jump["to_step"], jump["first"], jump["last"]) for jump in jumps] == [(10, 4, 80, 200)]
    total = ledger_of(config)
    assert total["passed_over"] == 120
    assert total["asked"] == summary.samples == total["seen"] + total["passed_over"] == 20 * 20 + 120


def test_trouble_without_end_ends_the_run_with_all_there_is_to_know(configure, plant):
    plant(100, 10**9, float("inf"))
    config = configure("run", steps=100, objective={"objective": "planted"}, safety={"rewind_limit": 2})
    with pytest.raises(VlmError, match=r"rolled back 2 times, the limit.*learning rate was.*--resume"):
        train(config)


def test_more_bad_samples_than_max_bad_allows_end_the_run(configure, tmp_path):
    shard = write_tar(tmp_path / "0.tar", ["", "", "", "no image"] * 5)
    allowed = train(configure("allowed", data=shard, steps=2, loader={"max_bad": 0.5}))
    assert allowed.bad_samples == 10
    with pytest.raises(VlmError, match=r"5 of 20 samples cannot be used, the limit is 0\.0%.*no image.*--max-bad"):
        train(configure("refused", data=shard, steps=2, loader={"max_bad": 0.0}))


def run_cli(words, **more):
    return subprocess.run(words, capture_output=True, text=True, check=False, **more)


def test_a_lost_worker_is_named_with_what_is_saved(scene_shards, scene_tokenizer, tmp_path):
    run = tmp_path / "run"
    words = command(scene_shards, scene_tokenizer, run, 1, "--steps", "100000")
    process = preloaded.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(run.glob("checkpoints/step-*"))) >= 2, process=process)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "resource" not in child.name()
    ]
    for child in workers:
        child.kill()
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was lost" in talk
    assert "Everything up to step" in talk
    assert f"vlm train {run} --resume" in talk


@pytest.mark.parametrize(
    ("kind", "said"), [("full", "free"), pytest.param("read-only", "Read-only file system", marks=pytest.mark.slow)]
)
def test_a_run_that_cannot_save_ends_with_what_it_has(scene_shards, scene_tokenizer, tmp_path, kind, said):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Umr", "true"], check=False).returncode:
        pytest.skip("no name spaces of one's own here")
    disk = tmp_path / "disk"
    disk.mkdir()
    spoil = {
        "full": f"head -c 100M /dev/zero > {disk}/filler 2>/dev/null",
        "read-only": f"mount -o remount,ro {disk}",
    }[kind]
    words = command(scene_shards, scene_tokenizer, disk / "run", 0, "--steps", "100000")
    script = f"""
    mount -t tmpfs -o size=60m tmpfs {disk}
    ( while [ ! -d {disk}/run/checkpoints/step-00000005 ]; do sleep 0.1; done; {spoil} ) &
    "$@"
    echo "code $?"
    ls {disk}/run/checkpoints
    """
    done = run_cli(["unshare", "-Umr", "bash", "-c", script, "-", *words], cwd=ROOT, timeout=240)
    assert "code 1" in done.stdout, done.stderr[-2000:]
    assert said in done.stderr
    assert "step-0000" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(scene_shards, scene_tokenizer, capsys):
    from vlm.cli.main import main

    assert main(command(scene_shards, scene_tokenizer, Path("/proc/vlm-run"), 0)[3:]) == 1
    assert "/proc" in capsys.readouterr().err
