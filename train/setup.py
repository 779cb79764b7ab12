"""The pieces of a run: its folder and configuration, its data, its model, its state."""

import dataclasses
import math
import platform
import subprocess
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vlm import __version__
from vlm.config import from_toml, to_toml
from vlm.console import say
from vlm.data.arrays import StoredArrays
from vlm.data.captions import CaptionDraw
from vlm.data.corpus import Corpus, open_corpus
from vlm.data.local_views import LocalViews
from vlm.data.mixture_file import read_sources
from vlm.data.plan import TrainingPlan
from vlm.data.storage.cache import ShardCache, default_cache
from vlm.data.tokenizers import open_tokenizer
from vlm.data.training_batches import AssembleTraining
from vlm.data.views import FixedView, RandomView
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.manifest import is_complete
from vlm.models.allocator import keep_freed_memory
from vlm.models.encoder import VisionLanguageModel
from vlm.models.loading import CHECKPOINTS, load_network
from vlm.models.network import build_network, fit_to_tokenizer, model_config, set_dropout
from vlm.models.towers.batch_norm import batch_norm_layers
from vlm.train.checkpoints.mirror import Mirror
from vlm.train.checkpoints.restore import restore_newest
from vlm.train.config import FREE_ON_RESUME, LoaderConfig, ModelConfig, TrainConfig, differences
from vlm.train.guard.allowed import check_allow, refusal, still_refused
from vlm.train.sharding import shard_student
from vlm.train.state import TrainState

CONFIG = "config.toml"


def claim_folder(config: TrainConfig, *, resume: bool, allow: tuple[str, ...] = ()) -> None:
    """Make the run's folder, with `config.toml` in it.

    allow: keys, or groups of them, that may differ from those the run was begun with.

    Raises:
        UsageError: the folder is in use and `resume` was not asked for, or the run was begun otherwise.
    """
    run = Path(config.run)
    saved = run / CONFIG
    check_allow(allow, asdict(config))
    mirror = open_mirror(config)
    if not resume and mirror and mirror.names():
        raise UsageError(
            f"{mirror.place} holds checkpoints of a run already; go on with --resume, or name another run."
        )
    if resume and saved.is_file():
        changed = differences(asdict(from_toml(TrainConfig, saved)), asdict(config))
        refused = still_refused(changed, allow, free=FREE_ON_RESUME)
        if refused:
            raise refusal(run, refused)
        for line in still_refused(changed, (), free=FREE_ON_RESUME):
            say(f"Changed, as allowed: {line}")
    elif run.exists() and (is_complete(run) or any(run.iterdir())):
        raise UsageError(f"{run} exists already; go on with --resume, name another run, or remove it.")
    run.mkdir(parents=True, exist_ok=True)
    write_text(saved, to_toml(config))


def find_corpus(config: TrainConfig, cache: ShardCache) -> Corpus:
    """What the configuration says to stream."""
    return open_corpus(
        read_sources(config.data, config.loader.selection),
        seed=config.seed,
        window=config.loader.shuffle_window,
        allow_damage=config.loader.allow_damage,
        cache=cache,
    )


def choose_cache(loader: LoaderConfig) -> ShardCache:
    """Where remote and compressed shards are kept: as configured, else as the environment says."""
    default = default_cache()
    return dataclasses.replace(
        default,
        folder=Path(loader.cache) if loader.cache else default.folder,
        max_bytes=int(loader.cache_gb * 1e9) if loader.cache_gb else default.max_bytes,
    )


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes and precision; on a CPU, this process keeps the memory it frees from now on."""
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def wrap_student(accelerator: Accelerator, student: nn.Module, config: TrainConfig) -> nn.Module:
    """The student as its processes train it together; make the optimiser afterwards, since weights may be spread."""
    student.train()
    if config.model.channels_last:
        student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.model.compile:
        student.compile()
    if config.sharding == "fsdp":
        shard_student(student, accelerator.device, is_bf16=config.precision == "bf16")
        return student
    return accelerator.prepare_model(student)


def restore_state(
    config: TrainConfig, state: TrainState, corpus: Corpus, *, mirror: Mirror | None, is_main: bool
) -> None:
    """Be what the newest undamaged checkpoint says, if there is one.

    Raises:
        UsageError: the checkpoint belongs to another sequence of samples.
    """
    if not restore_newest(Path(config.run) / CHECKPOINTS, state, mirror=mirror, is_main=is_main):
        return
    if state.sequence != corpus.fingerprint:
        raise UsageError(
            f"{config.data} is not what {config.run} was begun with: shards, selections or shares have changed since, "
            "so the run cannot go on from its place. Restore them, or begin another run with --start-from this one."
        )
    if is_main:
        say(f"Resuming {config.run} after step {state.step:,}.")


def open_mirror(config: TrainConfig) -> Mirror | None:
    """Where checkpoints are copied to."""
    address = config.safety.checkpoint_to
    return Mirror(address=address, run=Path(config.run).name) if address else None


def assemble_training(
    config: TrainConfig, plan: TrainingPlan, model: VisionLanguageModel, *, trim_text: bool
) -> AssembleTraining:
    """What the workers do with the samples of a batch. trim_text: cut its tokens to the longest caption."""
    view = RandomView(
        size=model.view.size,
        scale=config.loader.crop_scale,
        flip=config.loader.flip,
        interpolation=model.view.interpolation,
    )
    crops = config.objective.local_views
    return AssembleTraining(
        plan=plan,
        view=view,
        tokenizer=model.tokenizer,
        draw=CaptionDraw(
            languages=config.loader.languages,
            language_weights=config.loader.language_weights,
            sentences=config.loader.sentences,
        ),
        arrays=StoredArrays(names=config.loader.arrays),
        seed=config.seed,
        max_bad_in_a_row=config.loader.max_bad_in_a_row,
        decode_on_device=config.loader.decode_on_device,
        num_sentences=config.objective.sub_captions,
        local=LocalViews.beside(view, number=crops) if crops else None,
        has_identities=config.objective.same_pairs != "negative",
        trim_text=trim_text,
    )


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimiser steps of the run; the last epoch is filled up to a whole batch."""
    if config.steps >= 0:
        return config.steps
    return max(1, -(-round(Fraction(str(config.epochs)) * num_samples) // config.batch_size))


def build_model(config: TrainConfig, device: torch.device, *, with_bias: bool = False) -> VisionLanguageModel:
    """The model to train: that of `start_from`, or the architecture with fresh weights drawn from the seed.

    with_bias: give fresh logits the bias and temperature sigmoid losses start from (SigLIP, Zhai et al. 2023, §3.2).

    Raises:
        UsageError: the model cannot be trained as asked.
    """
    chosen = config.model
    if chosen.start_from:
        model = dataclasses.replace(load_network(chosen.start_from, device=str(device)), name=config.run)
        if chosen.dropout or chosen.drop_path or chosen.patch_dropout:
            model = _with_dropout(model, chosen)
    else:
        model = _fresh_model(config, device, with_bias=with_bias)
    statistics = batch_norm_layers(model.network)
    if statistics and config.micro_batch:
        raise UsageError(
            f"{chosen.architecture} normalises by statistics of the batch ({statistics[0]} and {len(statistics) - 1} "
            "more layers), so a batch in parts would not be the whole one. Leave out --micro-batch, or take a tower "
            "with layer norms (a ViT, a ConvNeXt)."
        )
    if chosen.gradient_checkpointing:
        model.network.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    return model


def _fresh_model(config: TrainConfig, device: torch.device, *, with_bias: bool) -> VisionLanguageModel:
    chosen = config.model
    architecture = model_config(chosen.architecture)
    length = chosen.context_length or architecture["text_cfg"].get("context_length")
    tokenizer = open_tokenizer(chosen.tokenizer, length)
    if chosen.image_size:
        architecture["vision_cfg"]["image_size"] = chosen.image_size
    architecture = set_dropout(
        fit_to_tokenizer(architecture, tokenizer),
        dropout=chosen.dropout,
        drop_path=chosen.drop_path,
        patch_dropout=chosen.patch_dropout,
    )
    if config.loader.trim_text and not chosen.compile and "multimodal_cfg" not in architecture:
        architecture["custom_text"] = True  # open_clip's other layout adds the positions of the whole context
    if with_bias:
        architecture |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    torch.manual_seed(config.seed)
    network = build_network(architecture).to(device)
    view = FixedView(size=_side(architecture["vision_cfg"].get("image_size", 224)))
    return VisionLanguageModel(
        name=config.run, network=network, config=architecture, view=view, tokenizer=tokenizer, device=device
    )


def _with_dropout(model: VisionLanguageModel, chosen: ModelConfig) -> VisionLanguageModel:
    """The same weights in a network that drops at random."""
    architecture = set_dropout(
        model.config, dropout=chosen.dropout, drop_path=chosen.drop_path, patch_dropout=chosen.patch_dropout
    )
    network = build_network(architecture).to(model.device)
    network.load_state_dict(model.network.state_dict())
    return dataclasses.replace(model, network=network, config=architecture)


def environment() -> dict[str, Any]:
    """What a run was made with: versions, machine, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).resolve().parent, check=False
    )
    return {
        "vlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "commit": commit.stdout.strip(),
    }


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else int(size[0])
