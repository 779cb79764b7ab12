"""A whole run, as it is saved with it as TOML and read back."""

import math
from dataclasses import dataclass, field
from typing import Literal

from vlm.errors import UsageError
from vlm.train.config.loader import LoaderConfig
from vlm.train.config.model import ModelConfig
from vlm.train.config.objective import ObjectiveConfig
from vlm.train.config.optimizer import OptimizerConfig
from vlm.train.config.safety import SafetyConfig

_LEAST_CACHE_GB = 1e-3
_MOST_EPOCHS = 1e9


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A pretraining run."""

    data: str = ""
    """Shards to train on: a folder, pattern, several joined with ::, or an address; or a mixture file (.toml)."""

    val: str = ""
    """Shards to measure retrieval on while training; empty measures nothing."""

    val_captions_each: int = 0
    """Captions of a picture used in that, in each language: the first so many; 0 uses all."""

    run: str = ""
    """Folder of the run."""

    batch_size: int = 256
    """Samples a step, over all processes."""

    micro_batch: int = 0
    """Samples of a process that go through the network at once; 0 takes its whole share. Gradients are the same."""

    epochs: float = 10.0
    """Passes over the data; ignored where steps is given."""

    steps: int = -1
    """Optimiser steps; -1 follows from epochs, 0 saves the fresh model."""

    seed: int = 0
    """Of weights, order, crops and drawn captions."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights stay fp32."""

    sharding: Literal["none", "fsdp"] = "none"
    """none: every process holds the whole network (DDP); fsdp: weights and optimiser are spread (FSDP2)."""

    evaluate_every: int = 500
    """Steps between measurements on val; the last step is always measured."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    peak_tflops: float = 0.0
    """TFLOP/s of a device that utilisation (MFU) is measured against; 0 takes the data sheet's, or measures a CPU."""

    tensorboard: bool = False
    """Write metrics for TensorBoard too, into RUN/tensorboard."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UsageError: naming the value, its limit and the cure.
        """
        for name, value in (("--data", self.data), ("--run", self.run)):
            if not value:
                raise UsageError(f"{name} is needed.")
        for name, value, least in _least_values(self):
            if not least <= value < math.inf:
                raise UsageError(f"{name} = {value} is outside its range; give at least {least}.")
        for name, value in _shares(self):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} = {value} is no share; give a number from 0 to 1.")
        if 0 < self.loader.cache_gb < _LEAST_CACHE_GB:
            raise UsageError(f"cache_gb = {self.loader.cache_gb} holds no shard; give gigabytes, or 0 for the default.")
        if self.val.endswith(".toml"):
            raise UsageError(f"val = {self.val!r} is a mixture; retrieval is measured on shards: name them.")
        if self.steps < 0 and not 0 < self.epochs < _MOST_EPOCHS:
            raise UsageError(f"epochs = {self.epochs} is no length; give a positive number, or --steps.")
        if self.loader.sentences and {"teacher_text", "text_embedding"} & set(self.loader.arrays):
            raise UsageError("arrays with a row for each caption do not fit sentences of them; leave out --sentences.")
        if self.optimizer.optimizer == "muon" and self.sharding == "fsdp":
            raise UsageError("--optimizer muon needs whole matrices, and fsdp spreads them; give --optimizer adamw.")
        if not 0 < self.loader.crop_scale[0] <= self.loader.crop_scale[1] <= 1:
            raise UsageError(f"crop_scale = {self.loader.crop_scale} is no range inside (0, 1].")


def _least_values(config: TrainConfig) -> tuple[tuple[str, float, float], ...]:
    loader, safety, objective = config.loader, config.safety, config.objective
    return (
        ("seed", config.seed, 0),
        ("batch_size", config.batch_size, 2),
        ("micro_batch", config.micro_batch, 0),
        ("log_every", config.log_every, 1),
        ("evaluate_every", config.evaluate_every, 1),
        ("steps", config.steps, -1),
        ("peak_tflops", config.peak_tflops, 0),
        ("checkpoint_every", safety.checkpoint_every, 1),
        ("checkpoint_minutes", safety.checkpoint_minutes, 0),
        ("keep_checkpoints", safety.keep_checkpoints, 1),
        ("spike_factor", safety.spike_factor, 0),
        ("skip_limit", safety.skip_limit, 1),
        ("rewind_limit", safety.rewind_limit, 0),
        ("hang_minutes", safety.hang_minutes, 0),
        ("workers", loader.workers, 0),
        ("shuffle_window", loader.shuffle_window, 1),
        ("max_bad_in_a_row", loader.max_bad_in_a_row, 1),
        ("cache_gb", loader.cache_gb, 0),
        ("similarity_block", objective.similarity_block, 1),
        ("text_embedding_size", objective.text_embedding_size, 0),
        ("margin", objective.margin, 0),
        ("teacher_scale", objective.teacher_scale, 0),
        ("sub_captions", objective.sub_captions, 0),
        ("local_views", objective.local_views, 0),
        ("table_rate", config.optimizer.table_rate, 0),
        ("gain_rate", config.optimizer.gain_rate, 0),
        ("kernel_rate", config.optimizer.kernel_rate, 0),
        ("temperature_rate", config.optimizer.temperature_rate, 0),
        ("image_size", config.model.image_size, 0),
        ("context_length", config.model.context_length, 0),
        ("unlocked_groups", config.model.unlocked_groups, 0),
    )


def _shares(config: TrainConfig) -> tuple[tuple[str, float], ...]:
    return (
        ("flip", config.loader.flip),
        ("max_bad", config.loader.max_bad),
        ("patch_dropout", config.model.patch_dropout),
        ("dropout", config.model.dropout),
        ("drop_path", config.model.drop_path),
        ("average_decay", config.optimizer.average_decay),
        ("parallel_share", config.objective.parallel_share),
    )
