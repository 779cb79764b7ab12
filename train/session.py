"""A run as it is opened: all that stays the same while its state changes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from vlm.data.corpus import Corpus
from vlm.data.device_decode import check_decoder
from vlm.data.loader import stream_batches
from vlm.data.plan import TrainingPlan
from vlm.data.shards import count_samples, expand_shards
from vlm.data.storage.cache import ShardCache
from vlm.data.training_batches import TrainingBatch
from vlm.data.transfer import DeviceAhead
from vlm.errors import UsageError
from vlm.models.encoder import VisionLanguageModel
from vlm.models.row_noise import RowNoise, draw_by_row
from vlm.models.short_texts import accept_short_texts
from vlm.train.averaging.running_mean import RunningMean
from vlm.train.config import TrainConfig
from vlm.train.inputs import Provider
from vlm.train.locking import lock_tower
from vlm.train.objectives.table import WeightedTerm, parse_objective
from vlm.train.objectives.term import TermOptions
from vlm.train.optimizer import build_optimizer
from vlm.train.providers import check_inputs, needs_average, open_providers
from vlm.train.reinforcement.views import check_views
from vlm.train.setup import (
    assemble_training,
    build_model,
    choose_cache,
    claim_folder,
    find_corpus,
    open_accelerator,
    open_mirror,
    restore_state,
    total_steps,
    wrap_student,
)
from vlm.train.sharding import without_exchange
from vlm.train.state import TrainState
from vlm.train.student import Student, build_student
from vlm.train.telemetry.flops import FlopCounts


@dataclass(frozen=True, kw_only=True)
class Session:
    """trained: the student as the accelerator wraps it. steps: number of the last step. parts: how often a process goes
    through the network in one. flops: counts those of the student. noise: what the network's layers draw from.
    trims_text: whether batches are cut to their longest caption.
    """

    config: TrainConfig
    folder: Path
    corpus: Corpus
    val_shards: list[str]
    accelerator: Accelerator
    state: TrainState
    trained: nn.Module
    terms: tuple[WeightedTerm, ...]
    options: TermOptions
    noise: RowNoise
    providers: dict[str, Provider]
    average: RunningMean | None
    flops: FlopCounts
    steps: int
    parts: int
    trims_text: bool

    def waiting(self) -> AbstractContextManager[object]:
        """A context in which gradients are not yet exchanged between processes."""
        if self.config.sharding == "fsdp":
            return without_exchange(self.state.student)
        return self.accelerator.no_sync(self.trained)

    @property
    def share(self) -> int:
        """Samples of a global batch that this process takes."""
        return self.config.batch_size // self.accelerator.num_processes

    def open_batches(self) -> Iterator[list[TrainingBatch]]:
        """The batches from the state's position to the run's end, each in its parts."""
        config, state = self.config, self.state
        plan = TrainingPlan(
            order=self.corpus.order,
            batch_size=config.batch_size,
            position=state.position,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            parts=self.parts,
        )
        assemble = assemble_training(config, plan, state.model, trim_text=self.trims_text)
        stream = stream_batches(
            plan,
            self.corpus.shards,
            assemble,
            numbers=range((self.steps - state.step) * self.parts),
            workers=config.loader.workers,
            cache=choose_cache(config.loader),
        )
        view = assemble.view if assemble.decode_on_device else None
        ahead = iter(DeviceAhead(stream, self.accelerator.device, view))
        while part := [batch for _, batch in zip(range(self.parts), ahead, strict=False)]:
            yield part


def parts_of_share(config: TrainConfig, num_processes: int) -> int:
    """How many times a process goes through the network in one step.

    Raises:
        UsageError: the share does not divide.
    """
    share, size = config.batch_size // num_processes, config.micro_batch
    if size and share % min(size, share):
        raise UsageError(
            f"micro_batch = {size} does not divide a process's {share} samples of the batch of {config.batch_size}; "
            f"try {max(divisor for divisor in range(1, min(size, share) + 1) if share % divisor == 0)}."
        )
    return share // min(size, share) if size else 1


def open_session(config: TrainConfig, *, resume: bool, allow: tuple[str, ...] = ()) -> Session:
    """Open a run, new or resumed.

    allow: keys of the configuration that may have changed since the run was begun.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run being resumed.
    """
    config.check()
    terms = parse_objective(config.objective.objective)
    accelerator = open_accelerator(config)
    corpus, val_shards = open_data(config, choose_cache(config.loader), accelerator.device)
    parts = parts_of_share(config, accelerator.num_processes)
    model = build_model(config, accelerator.device, with_bias=any("logit_bias" in part.term.outputs for part in terms))
    trims_text = config.loader.trim_text and not config.model.compile and accept_short_texts(model.network)
    options = TermOptions(config=config.objective, pad_token=model.tokenizer.pad_token)
    noise = RowNoise(seed=config.seed)
    student = open_student(config, model, terms, options, noise)
    flops = FlopCounts(student.train())
    trained = wrap_student(accelerator, student, config)
    average = RunningMean.begin(config.optimizer.average_decay, model.network) if needs_average(config, terms) else None
    providers = open_providers(config, model, terms, average)
    check_inputs(config, terms, student, providers)
    state = open_state(config, student, model, corpus, average)
    open_folder(config, state, corpus, accelerator, resume=resume, allow=allow)
    return Session(
        config=config,
        folder=Path(config.run),
        corpus=corpus,
        val_shards=val_shards,
        accelerator=accelerator,
        state=state,
        trained=trained,
        terms=terms,
        options=options,
        noise=noise,
        providers=providers,
        average=average,
        flops=flops,
        steps=total_steps(config, corpus.order.num_samples),
        parts=parts,
        trims_text=trims_text,
    )


def open_folder(
    config: TrainConfig,
    state: TrainState,
    corpus: Corpus,
    accelerator: Accelerator,
    *,
    resume: bool,
    allow: tuple[str, ...],
) -> None:
    """Claim the run's folder for this configuration; with `resume`, bring the state to where the run had come."""
    if accelerator.is_main_process:
        claim_folder(config, resume=resume, allow=allow)
    accelerator.wait_for_everyone()
    if resume:
        restore_state(config, state, corpus, mirror=open_mirror(config), is_main=accelerator.is_main_process)


def open_data(config: TrainConfig, cache: ShardCache, device: torch.device) -> tuple[Corpus, list[str]]:
    """What is trained on, and the shards retrieval is measured on; refused now rather than at the first evaluation."""
    corpus = find_corpus(config, cache)
    if config.loader.decode_on_device:
        check_decoder(device)
    check_views(corpus.shards, config.loader)
    val_shards = expand_shards(config.val) if config.val else []
    count_samples(val_shards, cache=cache)
    return corpus, val_shards


def open_student(
    config: TrainConfig,
    model: VisionLanguageModel,
    terms: tuple[WeightedTerm, ...],
    options: TermOptions,
    noise: RowNoise,
) -> Student:
    """The network with the heads of its objective, locked where asked for, drawing what it drops from `noise`."""
    if config.model.lock:
        lock_tower(model.network, config.model.lock, config.model.unlocked_groups)
    draw_by_row(model.network, noise)
    return build_student(model, terms, options)


def open_state(
    config: TrainConfig,
    student: Student,
    model: VisionLanguageModel,
    corpus: Corpus,
    average: RunningMean | None,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        student=student,
        model=model,
        optimizer=build_optimizer(student, config.optimizer),
        sequence=corpus.fingerprint,
        average=average.weights if average else None,
    )
