import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vlm.errors import UsageError
from vlm.manifest import read_manifest
from vlm.models.load import load_model
from vlm.train.run import train
from vlm.train.run_setup import open_session, prepare_run_folder
from vlm.train.step import compute_gradients

PAGE_FAULTS = """
import resource, torch
from vlm.train.run_setup import keep_freed_memory
is_kept = keep_freed_memory()
for _ in range(3):
    torch.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8 << 20)
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], env=environment | variables, capture_output=True, text=True, check=True
    )
    is_kept, faults = done.stdout.split()
    return is_kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_freed_memory_is_used_again():
    is_kept, faults = page_faults()
    assert is_kept == "True"
    assert faults < 20 * 8192 / 2  # a tensor has 8,192 pages, of which the kernel may reclaim some meanwhile


def test_settings_of_the_environment_stay():
    is_kept, faults = page_faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert is_kept == "False"
    assert platform.libc_ver()[0] != "glibc" or faults > 20 * 8192 / 2


@pytest.mark.parametrize(
    ("settings", "is_fused"),
    [
        ({"precision": "fp32"}, True),
        ({"precision": "bf16"}, False),
        # what is computed again in the backward pass would take another attention than the first time
        ({"precision": "bf16", "model": {"gradient_checkpointing": True}}, True),
    ],
)
def test_attention_on_a_cpu_is_plain_in_bfloat16(configure, settings, is_fused):
    session = open_session(configure("run", **settings), resume=False)
    batches = next(session.open_batches())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute_gradients(session, batches)
    names = {event.key for event in profile.key_averages()}
    assert any("flash_attention" in name for name in names) is is_fused


def test_a_tower_with_batch_norm_is_trained_in_parts_only_where_it_is_locked(configure):
    model = {"architecture": "timm:test_efficientnet,image_size=32+bag@16"}
    with pytest.raises(UsageError, match=r"image_size=32\+bag@16 normalises by statistics of the batch"):
        open_session(configure("free", micro_batch=10, model=model), resume=False)
    session = open_session(configure("locked", micro_batch=10, model=model | {"lock": "image"}), resume=False)
    assert len(next(session.open_batches())) == 2


def test_values_of_fields_are_trained_on_as_captions(configure, caplog):
    loader = {"languages": ("en", "tags"), "tag_fields": ("label", "colour")}
    session = open_session(configure("run", steps=3, loader=loader), resume=False)
    drawn = [caption for parts in session.open_batches() for batch in parts for caption in batch.drawn]
    assert {caption.language for caption in drawn} == {"en", "tags"}
    (record,) = [record for record in caplog.records if "--tag-fields" in record.message]
    assert "'colour', which --tag-fields names; its fields are captions, label, scene." in record.message


def test_a_run_from_a_file_of_weights_records_it_and_sees_what_they_saw(configure, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=3).state_dict(), path)
    towers = f"timm:test_efficientnet,initial_weights={path}+bag@16"
    config = configure("run", steps=2, model={"architecture": towers, "lock": "both"})
    train(config)
    details = read_manifest(Path(config.run), "run").details
    assert details["initial_weights"]["source"] == str(path)
    assert details["initial_weights"]["matched"] == "name"
    model = load_model(config.run)
    # what timm says of this model, not the statistics of CLIP
    assert model.view.mean == (0.485, 0.456, 0.406)
    trunk = model.network.get_submodule("visual.trunk").state_dict()
    saved = torch.load(path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trunk.items())


def test_with_both_towers_locked_only_the_heads_are_trained(configure, tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=400, intermediate_size=16, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    towers = f"timm:test_vit+hf:{tmp_path / 'bert'}@16"
    config = configure("run", steps=2, model={"architecture": towers, "lock": "both"})
    session = open_session(config, resume=False)
    trained = {name for name, value in session.state.model.network.named_parameters() if value.requires_grad}
    assert trained == {"visual.head.proj.weight", "text.head.1.weight", "logit_scale"}


def test_a_run_whose_loss_had_another_meaning_is_not_gone_on_with(configure):
    objective = {"objective": "clip + 0.5*sub_captions", "sub_captions": 2}
    config = configure("run", objective=objective)
    prepare_run_folder(config, resume=False)
    # what was written with the meaning of today goes on
    prepare_run_folder(config, resume=True)
    saved = Path(config.run) / "config.toml"
    lines = saved.read_text(encoding="utf-8").splitlines(keepends=True)
    saved.write_text("".join(line for line in lines if not line.startswith("patch_threshold")), encoding="utf-8")
    with pytest.raises(UsageError, match=r"--objective '1\*clip \+ 0.5\*joint_sub_captions' --allow"):
        prepare_run_folder(config, resume=True)
    former = configure("run", objective=objective | {"objective": "1*clip + 0.5*joint_sub_captions"})
    prepare_run_folder(former, resume=True, allow=("objective.objective",))
