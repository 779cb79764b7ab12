"""Opening a run: its folder and configuration, its data, its model, its state."""

import dataclasses
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
from vlm.data.device_decode import check_decoder
from vlm.data.ledger import Ledger
from vlm.data.loader import stream_batches
from vlm.data.mixture_file import read_sources
from vlm.data.plan import TrainingPlan
from vlm.data.shards import count_samples, expand_shards
from vlm.data.storage.cache import ShardCache, default_cache
from vlm.data.tokenizers import open_tokenizer
from vlm.data.training_batches import AssembleTraining, TrainingBatch
from vlm.data.transfer import DeviceAhead
from vlm.data.views import FixedView, RandomView
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.manifest import is_complete
from vlm.models.encoder import VisionLanguageModel
from vlm.models.loading import CHECKPOINTS, load_model
from vlm.models.network import build_network, fit_to_tokenizer, model_config
from vlm.train.config import FREE_ON_RESUME, LoaderConfig, TrainConfig, differences
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
    corpus: Corpus
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
    cache = choose_cache(config.loader)
    corpus = find_corpus(config, cache)
    val_shards = expand_shards(config.val) if config.val else []
    count_samples(val_shards, cache=cache)  # refused now rather than at the first evaluation
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    if config.loader.decode_on_device:
        check_decoder(accelerator.device)
    model = build_model(config, accelerator.device)
    if accelerator.is_main_process:
        claim_folder(config, resume=resume)
    accelerator.wait_for_everyone()
    state = open_state(config, model, corpus, resume=resume, is_main=accelerator.is_main_process)
    steps = total_steps(config, corpus.order.num_samples)
    plan = TrainingPlan(
        order=corpus.order,
        batch_size=config.batch_size,
        position=state.position,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    assemble = assemble_training(config, plan, model)
    numbers = range(steps - state.step)
    batches = stream_batches(plan, corpus.shards, assemble, numbers=numbers, workers=config.loader.workers, cache=cache)
    return Session(
        config=config,
        folder=Path(config.run),
        corpus=corpus,
        val_shards=val_shards,
        accelerator=accelerator,
        state=state,
        trained=accelerator.prepare_model(model.network.train()),
        steps=steps,
        batches=iter(DeviceAhead(batches, accelerator.device, assemble.view if assemble.decode_on_device else None)),
    )


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


def open_state(
    config: TrainConfig, model: VisionLanguageModel, corpus: Corpus, *, resume: bool, is_main: bool
) -> TrainState:
    """A fresh state, or that of the newest undamaged checkpoint.

    Raises:
        UsageError: the checkpoint belongs to another sequence of samples.
    """
    state = TrainState(
        model=model, optimizer=build_optimizer(model.network, config.optimizer), sequence=corpus.fingerprint
    )
    if not (resume and restore_newest(Path(config.run) / CHECKPOINTS, state)):
        return state
    if state.sequence != corpus.fingerprint:
        raise UsageError(
            f"{config.data} is not what {config.run} was begun with: shards, selections or shares have changed since, "
            "so the run cannot go on from its place. Restore them, or begin another run with --start-from this one."
        )
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
        draw=CaptionDraw(
            languages=config.loader.languages,
            language_weights=config.loader.language_weights,
            sentences=config.loader.sentences,
        ),
        arrays=StoredArrays(names=config.loader.arrays),
        seed=config.seed,
        max_bad_in_a_row=config.loader.max_bad_in_a_row,
        decode_on_device=config.loader.decode_on_device,
    )


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimiser steps of the run; the last epoch is filled up to a whole batch."""
    if config.steps >= 0:
        return config.steps
    return max(1, -(-round(Fraction(str(config.epochs)) * num_samples) // config.batch_size))


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
