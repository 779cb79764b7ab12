"""Weights spread over two processes (FSDP2) are trained, measured, averaged and saved as whole ones are."""

import re

import pytest
from safetensors.torch import load_file

from tests import preloaded
from tests.train.test_processes import command, environment
from vlm.train.history import read_metrics


def options(scene_shards):
    steps = ["--steps", "4", "--checkpoint-every", "2", "--micro-batch", "3", "--evaluate-every", "2"]
    return [*steps, "--val", str(scene_shards / "val"), "--ema-decay", "0.5"]


def test_spread_weights_train_as_whole_ones_and_go_on_in_one_process(
    scene_shards, scene_tokenizer, tmp_path, free_port
):
    logs: dict[str, list[str]] = {}
    for kind, processes in (("none", 1), ("fsdp", 2)):
        words = command(scene_shards / "train", scene_tokenizer, tmp_path / kind, workers=0)
        words += [*options(scene_shards), "--sharding", kind]
        logs[kind] = preloaded.run_ranks(words, processes=processes, port=free_port(), env=environment())
    # what is sharded is counted, and said by one process
    (share,) = re.findall(r"FSDP2: ([\d.]+)% of .* are sharded over 2 cpu processes; this one holds", logs["fsdp"][0])
    assert float(share) > 99
    assert "FSDP2" not in logs["fsdp"][1] + logs["none"][0]
    whole, spread = (read_metrics(tmp_path / kind / "metrics.jsonl") for kind in ("none", "fsdp"))
    for name in ("loss", "gradient_norm", "logit_scale"):
        assert [line[name] for line in spread] == pytest.approx([line[name] for line in whole], rel=1e-4)
    assert spread[-1]["text_to_image_recall@10"] == pytest.approx(whole[-1]["text_to_image_recall@10"], abs=0.1)
    ours, theirs = (load_file(tmp_path / kind / "model" / "open_clip_model.safetensors") for kind in ("fsdp", "none"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5

    alone = command(scene_shards / "train", scene_tokenizer, tmp_path / "fsdp", workers=0)
    more = ["--steps", "6", "--resume", "--allow", "sharding", "steps"]
    preloaded.run([*alone, *options(scene_shards), *more], check=True, capture_output=True, env=environment())
    assert read_metrics(tmp_path / "fsdp" / "metrics.jsonl")[-1]["step"] == 6
