"""What a run is told, as frozen dataclasses; saved with the run as TOML and read back."""

import math
from dataclasses import dataclass, field
from typing import Literal

from vlm.errors import UsageError

_LEAST_CACHE_GB = 1e-3
_MOST_EPOCHS = 1e9


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, and how it reads text."""

    architecture: str = "tiny"
    """One of ours (tiny, tiny-coca, small) or any open_clip name (ViT-B-32, coca_ViT-L-14, …)."""

    start_from: str = ""
    """MODEL whose weights, view and tokenizer the run starts from; empty starts from fresh weights."""

    tokenizer: str = "clip"
    """clip, a SentencePiece .model file, or a Hugging Face folder."""

    context_length: int = 0
    """Tokens a caption; 0 takes the architecture's."""

    image_size: int = 0
    """Pixels of the square the network sees; 0 takes the architecture's."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are read, shuffled and seen."""

    workers: int = 1
    """Processes that read, decode and tokenize; does not change what is read."""

    shuffle_window: int = 65536
    """Samples that are shuffled together after the shards are."""

    selection: str = ""
    """File of `vlm curate` that says which samples are seen, and how often; empty sees each once an epoch."""

    languages: tuple[str, ...] = ()
    """Languages captions are drawn from; empty takes the first of each sample. `tags` stands for its tags."""

    language_weights: tuple[float, ...] = ()
    """How often each of them is drawn, in proportion; empty draws evenly."""

    sentences: bool = False
    """Show one sentence, drawn, of a long caption instead of the whole."""

    arrays: tuple[str, ...] = ()
    """Arrays stored in the shards that batches carry: teacher_image, teacher_text, text_embedding."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random crop's share of the picture's area."""

    flip: float = 0.0
    """Probability of mirroring a picture; leave at 0 where captions say left and right."""

    decode_on_device: bool = False
    """Decode JPEGs on the GPU instead of in the workers; workers then read, draw and tokenize only."""

    allow_damage: bool = False
    """Read the whole samples of shards that are cut short instead of refusing them."""

    max_bad: float = 0.01
    """Share of unusable samples past which the run fails."""

    max_bad_in_a_row: int = 100
    """Unusable samples one after the other at which the run fails."""

    cache: str = ""
    """Folder in which remote and compressed shards are kept; empty takes $VLM_CACHE or ~/.cache/vlm/shards."""

    cache_gb: float = 0.0
    """Bound of that folder in 10⁹ bytes; 0 takes $VLM_CACHE_GB or 50."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    objective: Literal["clip", "coca"] = "clip"
    """clip: softmax contrastive; coca: contrastive and captioning."""

    contrastive_weight: float = 1.0
    """Weight of the contrastive part of coca."""

    caption_weight: float = 2.0
    """Weight of the captioning part of coca."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    weight_decay: float = 0.1
    """On matrices only; gains, biases and the temperature are left alone."""

    beta1: float = 0.9
    """Decay of the mean of the gradient."""

    beta2: float = 0.98
    """Decay of the mean of its square."""

    epsilon: float = 1e-6
    """Added to the root of the latter."""

    warmup_steps: int = 100
    """Steps from zero to the peak."""

    clip_norm: float = 1.0
    """The gradient's norm is cut to this; 0 leaves it."""


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

    epochs: float = 10.0
    """Passes over the data; ignored where steps is given."""

    steps: int = -1
    """Optimiser steps; -1 follows from epochs, 0 saves the fresh model."""

    seed: int = 0
    """Of weights, order, crops and drawn captions."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights stay fp32."""

    evaluate_every: int = 500
    """Steps between measurements on val; the last step is always measured."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UsageError: naming the value, its limit and the cure.
        """
        for name, value in (("--data", self.data), ("--run", self.run)):
            if not value:
                raise UsageError(f"{name} is needed.")
        limits: tuple[tuple[str, float, float], ...] = (
            ("seed", self.seed, 0),
            ("batch_size", self.batch_size, 2),
            ("log_every", self.log_every, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("keep_checkpoints", self.keep_checkpoints, 1),
            ("workers", self.loader.workers, 0),
            ("shuffle_window", self.loader.shuffle_window, 1),
            ("max_bad_in_a_row", self.loader.max_bad_in_a_row, 1),
            ("cache_gb", self.loader.cache_gb, 0),
            ("steps", self.steps, -1),
        )
        for name, value, least in limits:
            if not least <= value < math.inf:
                raise UsageError(f"{name} = {value} is outside its range; give at least {least}.")
        for name, value in (("flip", self.loader.flip), ("max_bad", self.loader.max_bad)):
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
        if not 0 < self.loader.crop_scale[0] <= self.loader.crop_scale[1] <= 1:
            raise UsageError(f"crop_scale = {self.loader.crop_scale} is no range inside (0, 1].")


FREE_ON_RESUME = frozenset(
    {
        "loader.workers",
        "loader.max_bad",
        "loader.max_bad_in_a_row",
        "loader.cache",
        "loader.cache_gb",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "val",
        "val_captions_each",
        "run",
    }
)
"""Keys that may change when a run is resumed: they have no influence on the weights."""


def differences(one: dict, other: dict, prefix: str = "") -> list[str]:
    """The keys (dotted) in which two configurations differ, with both values."""
    found: list[str] = []
    for name in one:
        first, second = one[name], other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            found += differences(first, second, f"{prefix}{name}.")
        elif first != second:
            found.append(f"{prefix}{name}: {first!r} → {second!r}")
    return found
