"""`vlm.train`, `vlm.evaluate`, `vlm.embed`: the verbs as calls, in one process and in several."""

import json
import os
from typing import Any

import pytest
import torch

import vlm
from tests.data.tar_fixture import write_tar
from vlm.api.embedding import EmbedResult
from vlm.cli.main import main
from vlm.files import compute_fingerprint
from vlm.models.load import load_model
from vlm.train.history import read_metrics
from vlm.train.presets import open_preset

SETTINGS: dict[str, Any] = {
    "steps": 3,
    "batch_size": 16,
    "workers": 0,
    "architecture": "micro",
    "log_every": 1,
    "warmup_steps": 1,
}
# what differs between two equal calls
TIMES = {"seconds", "samples_per_second", "images_per_second", "data_wait", "mfu", "memory_bytes", "eta_seconds"}


@pytest.fixture(scope="module")
def trained(scene_shards, scene_tokenizer, tmp_path_factory):
    """A run, its summary, and the options it was made with; of an architecture that every process knows."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options: dict[str, Any] = SETTINGS | {"architecture": "tiny", "tokenizer": str(scene_tokenizer)}
    data, val = scene_shards / "train", scene_shards / "val"
    return run, vlm.train("tiny", data=data, val=[str(val)], run=run, **options), options


def without_times(values):
    if isinstance(values, dict):
        return {name: without_times(value) for name, value in values.items() if name not in TIMES}
    return values


def printed_json(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_what_the_verb_makes_and_prints(capsys, trained, scene_shards, tmp_path):
    run, summary, options = trained
    assert (summary.run, summary.steps, summary.samples) == (str(run), 3, 48)
    assert summary.samples_per_second == pytest.approx(48 / summary.seconds)
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    data = ["--data", scene_shards / "train", "--val", scene_shards / "val"]
    printed = printed_json(capsys, "train", "tiny", *data, *flags, "--run", tmp_path / "run", "--json")
    assert printed.keys() == summary.to_json().keys()
    assert without_times(printed) | {"run": str(run)} == without_times(summary.to_json())


def test_the_throughput_of_the_summary_is_that_of_the_whole_run(trained):
    run, summary, _ = trained
    lines = [line["samples_per_second"] for line in read_metrics(run / "metrics.jsonl")]
    assert summary.metrics["samples_per_second"] == pytest.approx(sum(lines) / len(lines))


def test_a_stream_gives_the_batches_that_training_sees(trained, scene_shards):
    run, _, _ = trained
    batches = vlm.stream(scene_shards / "train", batch_size=16, languages=["en"], image_size=32, workers=0)
    for line, batch in zip(read_metrics(run / "metrics.jsonl"), batches, strict=False):
        pairs = map("\t".join, zip(batch.keys, batch.texts, strict=True))
        assert line["samples"] == compute_fingerprint(*pairs)


def test_a_run_is_the_preset_of_another_and_is_resumed(trained, tmp_path, scene_shards):
    run, _, _ = trained
    # other data as paths, like the rest of the shards
    others = {"val_other": [scene_shards / "val"], "val_limit": 20}
    other = vlm.train(run, run=tmp_path / "other", optimizer={"learning_rate": 1e-4, "beta1": 0.8}, steps=2, **others)
    assert "other/text_to_image_recall@1" in other.metrics
    assert other.steps == 2
    assert open_preset(other.run).optimizer.beta1 == 0.8
    assert vlm.train(other.run, resume=True).samples == other.samples
    with pytest.raises(vlm.UsageError, match="steps: 2 → 3"):
        vlm.train(other.run, resume=True, steps=3)
    with pytest.raises(vlm.UsageError, match="exists already"):
        vlm.train(other.run)
    with pytest.raises(vlm.UsageError, match="There is no run"):
        vlm.train(tmp_path / "gone", resume=True)


@pytest.mark.parametrize(("warmup", "is_told"), [(2, False), (3, True), (500, True)])
def test_a_warm_up_as_long_as_the_run_is_told(scene_shards, scene_tokenizer, tmp_path, logged, warmup, is_told):
    settings = SETTINGS | {"warmup_steps": warmup, "tokenizer": str(scene_tokenizer)}
    vlm.train("tiny", data=scene_shards / "train", run=tmp_path / "run", **settings)
    assert (f"warm-up of {warmup} steps is as long as the run of 3 or longer" in logged.text) == is_told


@pytest.mark.slow
def test_several_processes_train_the_same_run(trained, scene_shards, tmp_path, capsys):
    run, summary, options = trained
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    data = ["--data", scene_shards / "train", "--val", scene_shards / "val"]
    words = ["train", "tiny", *data, *flags, "--run", tmp_path / "run", "--processes", 2, "--json"]
    printed = printed_json(capsys, *words)
    # the fingerprint of the samples of the last step, in order
    assert printed["metrics"]["samples"] == summary.metrics["samples"]
    lines, others = read_metrics(run / "metrics.jsonl"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert "RANK" not in os.environ


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_run_with_one_message(scene_tokenizer, tmp_path, capfd):
    # a batch of two damaged samples, which one of two processes is to replace
    write_tar(tmp_path / "0.tar", ["unreadable image"] * 8, prefix="k")
    settings = SETTINGS | {"architecture": "tiny", "tokenizer": str(scene_tokenizer), "max_bad_in_a_row": 4}
    with pytest.raises(vlm.VlmError, match=r"4 samples in a row cannot be used.*From process \d of 2; the others"):
        vlm.train("tiny", data=tmp_path, run=tmp_path / "run", processes=2, **settings)
    assert "Traceback" not in capfd.readouterr().err


def test_a_batch_that_is_too_large_for_the_device_says_what_to_change(trained, monkeypatch, tmp_path):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run, _, _ = trained
    monkeypatch.setattr("vlm.train.run.train_step", run_out)
    with pytest.raises(vlm.VlmError, match=r"16 samples does not fit .* smaller --micro-batch"):
        vlm.train(run, run=tmp_path / "run")


def test_processes_out_of_range_are_refused(trained, monkeypatch, tmp_path):
    run, _, _ = trained
    with pytest.raises(vlm.UsageError, match="processes = 0"):
        vlm.train(run, run=tmp_path / "run", processes=0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vlm.UsageError, match="has started 2 processes already"):
        vlm.train(run, run=tmp_path / "run", processes=2)


def test_an_evaluation_is_what_the_verb_prints_and_writes(capsys, trained, scene_shards, tmp_path):
    run, _, _ = trained
    val = scene_shards / "val"
    options = {"classes": val, "label": "label", "workers": 0, "out": tmp_path / "report"}
    evaluation = vlm.evaluate(run, retrieval=[val], **options)
    words = ["eval", run, "--retrieval", val, "--classes", val, "--workers", 0, "--json"]
    assert printed_json(capsys, *words) == evaluation.to_json()
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text()) == evaluation.to_json()
    assert (tmp_path / "report" / "report.html").is_file()
    # a model that is loaded already serves, and classes may be a list
    assert evaluation.zero_shot
    names = list(dict.fromkeys(score.name for score in evaluation.zero_shot.classes))
    again = vlm.evaluate(load_model(str(run)), classes=val, class_names=names, workers=0)
    assert again.zero_shot
    assert again.zero_shot.top1 == pytest.approx(evaluation.zero_shot.top1, abs=0.2)
    with pytest.raises(vlm.UsageError, match="Nothing to evaluate"):
        vlm.evaluate(run)


def test_recall_is_in_percent_for_people(capsys, trained, scene_shards):
    run, _, _ = trained
    retrieval = vlm.evaluate(run, retrieval=scene_shards / "val", workers=0).retrieval
    assert retrieval
    recall = retrieval.text_to_image.recall
    assert main(["eval", str(run), "--retrieval", str(scene_shards / "val"), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {value:.1%} " in printed for value in recall.values())


@pytest.mark.parametrize("modality", ["image", "both"])
def test_embeddings_are_what_the_verb_makes_and_prints(capsys, trained, scene_shards, tmp_path, modality):
    run, _, _ = trained
    val = scene_shards / "val"
    result = vlm.embed(run, val, tmp_path / "a", modality=modality, workers=0)
    assert isinstance(result, EmbedResult)
    assert result.image
    assert result.image.rows == 40
    assert (result.text is None) == (modality == "image")
    printed = printed_json(capsys, "embed", run, val, tmp_path / "b", "--modality", modality, "--workers", 0, "--json")
    told = json.dumps(without_times(result.to_json())).replace(str(tmp_path / "a"), str(tmp_path / "b"))
    assert json.loads(told) == {name: without_times(value) for name, value in without_times(printed).items()}
    # repeated, it is complete
    again = vlm.embed(run, val, tmp_path / "a", modality=modality, workers=0).image
    assert again
    assert again.was_complete


def test_what_the_system_refuses_is_an_error_of_ours(trained, scene_shards, tmp_path):
    run, _, _ = trained
    (tmp_path / "file").write_text("")
    with pytest.raises(vlm.VlmError, match=r"Not a directory \(.*file"):
        vlm.embed(run, scene_shards / "val", tmp_path / "file" / "out", workers=0)
