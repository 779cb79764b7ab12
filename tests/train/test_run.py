import json
import shutil
import tomllib
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.api.data import train_tokenizer
from vlm.errors import UsageError, VlmError
from vlm.manifest import read_manifest
from vlm.models.load import WEIGHTS, load_model
from vlm.train.checkpoint.checkpoint_files import EMA_WEIGHTS, list_checkpoints
from vlm.train.run import train
from vlm.train.run_setup import open_session


def weights_of(run):
    return load_file(Path(run) / "model" / "open_clip_model.safetensors")


def assert_same_weights(one, other):
    first, second = weights_of(one), weights_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt_after(config, whole, step):
    """A copy of a finished run as a kill after `step` would have left it: checkpoints up to it, no end."""
    run = Path(config.run)
    shutil.copytree(whole, run)
    for name in ("manifest.json", "model", "curves.png", "ledger.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = (run / "config.toml").read_text().replace(str(whole), str(run))
    (run / "config.toml").write_text(text)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return run


def test_a_run_leaves_what_explains_and_repeats_it(configure, scene_shards):
    config = configure("run", val=str(scene_shards / "val"), val_captions_each=1)
    summary = train(config)
    run = Path(config.run)
    assert summary.steps == 12
    assert summary.samples == 240
    assert tomllib.loads((run / "config.toml").read_text())["batch_size"] == 20
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    manifest = read_manifest(run, "run")
    assert manifest.fingerprint == load_model(str(run)).fingerprint
    assert manifest.details["environment"]["torch"] == torch.__version__
    assert 0 <= summary.metrics["text_to_image_recall@1"] <= 1
    ledger = json.loads((run / "ledger.json").read_text())
    assert sum(shard["asked"] for shard in ledger["shards"]) == ledger["total"]["seen"] == 240


@pytest.mark.parametrize("git", ["", "#!/bin/sh\nexec /bin/sleep 60\n"], ids=["none", "silent"])
def test_a_run_ends_well_where_git_gives_no_commit(configure, monkeypatch, tmp_path, git):
    if git:
        (tmp_path / "git").write_text(git)
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("vlm.train.run._GIT_SECONDS", 0.2)
    train(configure("plain", steps=1))
    assert read_manifest(tmp_path / "plain", "run").details["environment"]["commit"] == ""


def test_the_final_model_has_the_ema_of_the_weights(configure):
    config = configure("run", steps=3, optimizer={"average_decay": 0.9, "warmup_steps": 1})
    train(config)
    checkpoint = list_checkpoints(Path(config.run) / "checkpoints")[-1]
    ema = load_file(checkpoint / EMA_WEIGHTS)
    final = weights_of(config.run)
    assert final.keys() == ema.keys()
    assert all(torch.equal(final[name], ema[name]) for name in ema)
    trained = load_file(checkpoint / WEIGHTS)
    assert any(not torch.equal(trained[name], ema[name]) for name in ema)


def test_training_lowers_the_loss_below_chance(configure, history):
    config = configure("run", steps=60, model={"architecture": "micro"})
    train(config)
    losses = [loss for _, loss, _ in history(config.run)]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_resumed_run_sees_the_same_samples_and_losses_with_any_number_of_workers(configure, history, workers):
    whole = configure("whole")
    train(whole)
    again = configure("again", loader={"workers": workers})
    interrupt_after(again, whole.run, 8)
    train(again, resume=True)
    assert history(again.run) == history(whole.run)
    assert_same_weights(again.run, whole.run)


def test_muon_resumes_as_adamw_does(configure, history):
    muon = {"warmup_steps": 2, "learning_rate": 3e-3, "optimizer": "muon", "table_rate": 5.0}
    whole, again = (configure(name, optimizer=muon) for name in ("whole", "again"))
    train(whole)
    interrupt_after(again, whole.run, 8)
    train(again, resume=True)
    assert history(again.run) == history(whole.run)
    assert_same_weights(again.run, whole.run)


def test_the_number_of_workers_changes_nothing(configure, history):
    runs = [configure(f"run{workers}", steps=4, loader={"workers": workers}) for workers in (0, 2)]
    for config in runs:
        train(config)
    assert history(runs[0].run) == history(runs[1].run)


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(configure, history, caplog):
    whole = configure("whole")
    train(whole)
    torn = configure("torn")
    run = interrupt_after(torn, whole.run, 12)
    weights = list_checkpoints(run / "checkpoints")[-1] / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    train(torn, resume=True)
    assert "trying the one before" in caplog.text
    assert history(torn.run) == history(whole.run)


def test_all_checkpoints_damaged_is_an_error_that_says_so(configure):
    whole = configure("whole")
    train(whole)
    torn = configure("torn")
    run = interrupt_after(torn, whole.run, 12)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        (checkpoint / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(VlmError, match="All 2 checkpoints"):
        train(torn, resume=True)


def test_a_run_that_exists_is_not_overwritten(configure):
    config = configure("run", steps=2)
    train(config)
    with pytest.raises(UsageError, match="resume it with --resume"):
        train(config)


def test_a_resumed_run_refuses_another_configuration_and_names_the_difference(configure):
    train(configure("run", steps=2))
    with pytest.raises(UsageError, match=r"batch_size: 20 → 30"):
        train(configure("run", steps=2, batch_size=30), resume=True)


def test_no_steps_save_the_fresh_model(configure):
    config = configure("fresh", steps=0)
    train(config)
    assert load_model(config.run).embedding_size == 16


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(configure):
    config = configure("run", optimizer={"learning_rate": 1e20, "clip_norm": 0.0, "warmup_steps": 0})
    with pytest.raises(VlmError, match=r"5 steps in a row could not be used \(step 2: the loss clip is nan"):
        train(config)


def test_a_captioner_trains_and_writes(configure):
    config = configure("coca", model={"architecture": "micro-coca"}, objective={"objective": "coca"}, steps=3)
    summary = train(config)
    assert summary.metrics["caption"] > 0
    model = load_model(config.run)
    assert all(isinstance(text, str) for text in model.caption_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)))


def test_coca_without_a_decoder_is_refused(configure):
    with pytest.raises(UsageError, match="needs a network with a decoder"):
        train(configure("run", objective={"objective": "coca"}))


def test_fine_tuning_starts_from_a_model(configure):
    first = configure("first", steps=3)
    train(first)
    second = configure("second", steps=0, model={"start_from": first.run})
    train(second)
    assert_same_weights(first.run, second.run)


def test_fine_tuning_at_another_image_size_interpolates_the_positions(configure):
    """It used to train at the old size, whatever --image-size said."""
    first = configure("first", steps=2)
    train(first)
    train(configure("second", steps=1, model={"start_from": first.run, "image_size": 48}))
    assert load_model(str(Path(first.run).parent / "second")).view.size == 48
    with pytest.raises(UsageError, match="reads 24 tokens, and --context-length 12 does not change that"):
        train(configure("third", steps=1, model={"start_from": first.run, "context_length": 12}))


def test_another_tokenizer_than_the_start_models_own_is_refused(configure, scene_shards, tmp_path):
    """Its tokens would not be those that the weights have learned; it used to be passed over in silence."""
    first = configure("first", steps=0)
    train(first)
    train_tokenizer(str(scene_shards / "train"), tmp_path / "other.model", vocabulary=280, languages=("de",))
    model = {"start_from": first.run, "tokenizer": str(tmp_path / "other.model")}
    with pytest.raises(UsageError, match=r"reads the tokens of its own tokenizer, and --tokenizer .*other.model is an"):
        train(configure("second", steps=1, model=model))


def test_a_batch_larger_than_the_data_is_told(configure, logged):
    train(configure("run", steps=1, batch_size=600))
    assert "A batch of 600 holds samples twice" in logged.text
    logged.clear()
    train(configure("other", steps=1, batch_size=600, objective={"same_pairs": "ignore"}))
    assert "holds samples twice" not in logged.text


@pytest.mark.parametrize("objective", ["clip", "coca"])
def test_micro_batches_train_as_the_whole_batch(configure, history, objective):
    architecture = {"clip": "micro", "coca": "micro-coca"}[objective]
    # what is dropped belongs to the sample, not to its place in the micro-batch
    model = {"architecture": architecture, "patch_dropout": 0.5}
    options = {"model": model, "objective": {"objective": objective}, "steps": 6}
    runs = [configure(f"parts{size}", micro_batch=size, **options) for size in (0, 5)]
    for config in runs:
        train(config)
    whole, parts = (history(config.run) for config in runs)
    assert [samples for _, _, samples in whole] == [samples for _, _, samples in parts]
    assert [loss for _, loss, _ in parts] == pytest.approx([loss for _, loss, _ in whole], rel=1e-4)


def test_a_batch_is_let_go_before_the_next_one_comes(configure):
    batches = open_session(configure("run", micro_batch=5, steps=2), resume=False).open_batches()
    first = next(batches)
    images = [weakref.ref(micro_batch.images) for micro_batch in first]
    next(batches)
    # both at once are what a large batch takes most memory for
    assert not first
    assert [image() for image in images] == [None] * 4


def test_a_micro_batch_that_does_not_divide_is_refused_with_one_that_does(configure):
    with pytest.raises(UsageError, match=r"micro_batch = 6 does not divide a process's 20 samples.*try 5"):
        train(configure("run", micro_batch=6))


def test_a_changed_setting_resumes_only_where_it_is_allowed(configure):
    config = configure("run", steps=4)
    train(config)
    changed = configure("run", steps=8, optimizer={"learning_rate": 1e-3})
    with pytest.raises(UsageError, match=r"--allow steps --allow optimizer\.learning_rate"):
        train(changed, resume=True)
    assert train(changed, resume=True, allow=("steps", "optimizer")).steps == 8


def test_a_run_that_was_moved_resumes_where_it_lies(configure, history, tmp_path):
    from vlm.api.training import train as train_preset

    train(configure("run", steps=4))
    (tmp_path / "run").rename(tmp_path / "moved")
    summary = train_preset(tmp_path / "moved", resume=True, allow=("steps",), steps=8)
    assert summary.run == str(tmp_path / "moved")
    assert not (tmp_path / "run").exists()
    assert [step for step, *_ in history(summary.run)] == list(range(1, 9))
