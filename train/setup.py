"""Opening a run: its folder and configuration, its data, its model, its state."""

import dataclasses
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vlm import __version__
from vlm.config import from_toml, to_toml
from vlm.console import say
from vlm.data.batches import AssembleTraining, TrainingBatch
from vlm.data.loader import stream_batches
from vlm.data.order import SampleOrder
from vlm.data.plan import TrainingPlan
from vlm.data.shards import count_samples, expand_shards
from vlm.data.tokenizers import open_tokenizer
from vlm.data.views import FixedView, RandomView
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.manifest import is_complete
from vlm.models.encoder import VisionLanguageModel
from vlm.models.loading import CHECKPOINTS, load_model
from vlm.models.network import build_network, fit_to_tokenizer, model_config
from vlm.train.config import FREE_ON_RESUME, TrainConfig, differences
from vlm.train.ledger import Ledger
from vlm.train.optimizer import build_optimizer
from vlm.train.state import TrainState, restore_newest

CONFIG = "config.toml"


def claim_folder(config: TrainConfig, *, resume: bool) -> None:
    """Make the run's folder, with `config.toml` in it.

    Raises:
        UsageError: the folder is in use and `resume` was not asked for, or the run was begun otherwise.
    """
    run = Path(config.run)
    saved = run / CONFIG
    if resume and saved.is_file():
        changed = [
            line
            for line in differences(asdict(from_toml(TrainConfig, saved)), asdict(config))
            if line.split(":")[0] not in FREE_ON_RESUME
        ]
        if changed:
            raise UsageError(
                f"{run} was begun with another configuration ({'; '.join(changed)}). Resume it as it was by "
                f"vlm train {run} --resume, or name another run."
            )
    elif run.exists() and (is_complete(run) or any(run.iterdir())):
        raise UsageError(f"{run} exists already; go on with --resume, name another run, or remove it.")
    run.mkdir(parents=True, exist_ok=True)
    write_text(saved, to_toml(config))


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run as it is opened: what stays the same while its state changes.

    trained is the network as the accelerator wraps it; steps is the number of the last step.
    """

    config: TrainConfig
    folder: Path
    shards: list[str]
    val_shards: list[str]
    accelerator: Accelerator
    state: TrainState
    trained: nn.Module
    steps: int
    batches: Iterator[TrainingBatch]


def open_session(config: TrainConfig, *, resume: bool) -> Session:
    """Open a run, new or resumed.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run being resumed.
    """
    config.check()
    shards = expand_shards(config.data)
    val_shards = expand_shards(config.val) if config.val else []
    counts = tuple(count_samples(shards, allow_damage=config.loader.allow_damage))
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    model = build_model(config, accelerator.device)
    if accelerator.is_main_process:
        claim_folder(config, resume=resume)
    accelerator.wait_for_everyone()
    state = open_state(config, model, resume=resume, is_main=accelerator.is_main_process)
    steps = total_steps(config, sum(counts))
    plan = TrainingPlan(
        order=SampleOrder(counts=counts, seed=config.seed, window=config.loader.shuffle_window),
        batch_size=config.batch_size,
        position=state.position,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    assemble = assemble_training(config, plan, model)
    numbers = range(steps - state.step)
    return Session(
        config=config,
        folder=Path(config.run),
        shards=shards,
        val_shards=val_shards,
        accelerator=accelerator,
        state=state,
        trained=accelerator.prepare_model(model.network.train()),
        steps=steps,
        batches=stream_batches(plan, shards, assemble, numbers=numbers, workers=config.loader.workers),
    )


def open_state(config: TrainConfig, model: VisionLanguageModel, *, resume: bool, is_main: bool) -> TrainState:
    """A fresh state, or that of the newest undamaged checkpoint."""
    state = TrainState(model=model, optimizer=build_optimizer(model.network, config.optimizer))
    if resume and restore_newest(Path(config.run) / CHECKPOINTS, state):
        if is_main:
            say(f"Resuming {config.run} after step {state.step:,}.")
        else:
            state.ledger = Ledger()  # the saved one is the sum over processes; the main process carries it on
    return state


def assemble_training(config: TrainConfig, plan: TrainingPlan, model: VisionLanguageModel) -> AssembleTraining:
    """What the workers do with the samples of a batch."""
    return AssembleTraining(
        plan=plan,
        view=RandomView(
            size=model.view.size,
            scale=config.loader.crop_scale,
            flip=config.loader.flip,
            interpolation=model.view.interpolation,
        ),
        tokenizer=model.tokenizer,
        languages=config.loader.languages,
        seed=config.seed,
    )


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimiser steps of the run; the last epoch is filled up to a whole batch."""
    if config.steps >= 0:
        return config.steps
    return max(1, -(-int(config.epochs * num_samples) // config.batch_size))


def build_model(config: TrainConfig, device: torch.device) -> VisionLanguageModel:
    """The model to train: that of `start_from`, or the architecture with fresh weights drawn from the seed."""
    chosen = config.model
    if chosen.start_from:
        model = load_model(chosen.start_from, device=str(device))
        return dataclasses.replace(model, name=config.run)
    architecture = model_config(chosen.architecture)
    length = chosen.context_length or architecture["text_cfg"].get("context_length")
    tokenizer = open_tokenizer(chosen.tokenizer, length)
    architecture = fit_to_tokenizer(architecture, tokenizer)
    if chosen.image_size:
        architecture["vision_cfg"]["image_size"] = chosen.image_size
    torch.manual_seed(config.seed)
    network = build_network(architecture).to(device)
    view = FixedView(size=_side(architecture["vision_cfg"].get("image_size", 224)))
    return VisionLanguageModel(
        name=config.run, network=network, config=architecture, view=view, tokenizer=tokenizer, device=device
    )


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
