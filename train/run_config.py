"""Which network is trained, and what of it.

What is minimised.

How the weights move.

How samples are read, shuffled and seen.

What a run saves, and what it does when something goes wrong.

A whole run, as it is saved with it as TOML and read back.

What may change between the parts of a run.

Which differences of configuration a resumed run takes.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm.config import config_differences, flatten_config, lookup
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, how it reads text, and how it is regularised."""

    architecture: str = "tiny"
    """One of ours (tiny, tiny-coca, small), any open_clip name (ViT-B-32, coca_ViT-L-14), or IMAGE_TOWER+TEXT_TOWER."""

    start_from: str = ""
    """MODEL whose weights, view and tokenizer the run starts from; empty starts from fresh weights."""

    tokenizer: str = "clip"
    """clip, a SentencePiece .model file, or a Hugging Face folder."""

    context_length: int = 0
    """Tokens a caption; 0 takes the architecture's."""

    image_size: int = 0
    """Pixels of the square the network sees; 0 takes the architecture's."""

    lock: Literal["", "image", "text"] = ""
    """Tower whose weights stay as they are: `image` is locked-image tuning (LiT)."""

    unlocked_groups: int = 0
    """Last groups of layers of the locked tower that are trained all the same."""

    patch_dropout: float = 0.0
    """Share of patches a ViT leaves out while training."""

    dropout: float = 0.0
    """Probability of the dropout layers the towers have."""

    drop_path: float = 0.0
    """Probability of skipping a residual branch of a timm tower, rising with depth to this."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    channels_last: bool = False
    """Lay out a convolutional tower's maps with channels last."""

    compile: bool = False
    """Compile the network (torch.compile); its first steps take minutes."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A sum of weighted terms, and what they are told."""

    objective: str = "clip"
    """Terms of the table in the docs, joined by +, each with a weight if not 1: `clip`, `siglip + 2*caption`."""

    same_pairs: Literal["negative", "ignore", "positive"] = "negative"
    """What pairs of a batch with the same key, caption or image are to each other in contrastive terms."""

    margin: float = 0.2
    """Margin of the ranking term: cosines of negatives must stay this far below that of the pair."""

    negatives: Literal["both", "images", "texts", "hardest"] = "both"
    """Negatives of the ranking term: wrong images, wrong texts, both, or the hardest of each."""

    teacher: str = ""
    """MODEL that distillation learns from while training; empty reads teacher embeddings stored in the shards."""

    teacher_scale: float = 100.0
    """Inverse temperature of the teacher's similarities."""

    sub_captions: int = 0
    """Sentences drawn from a sample's captions that are shown as several positives; 0 shows one caption."""

    local_views: int = 0
    """Small crops of each image for local-to-global self-distillation."""

    parallel_share: float = 0.75
    """Share of captions that the parallel captioner predicts all at once (CapPa); the others token by token."""

    text_embedding_size: int = 0
    """Numbers in a stored text embedding that images are aligned with (`text_align`)."""

    similarity_block: int = 1024
    """Rows of the similarity matrix that are held at once; changes memory only."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon beside it, with linear warm-up and cosine decay to zero."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices inside the towers move by orthogonalised momentum, all else by AdamW, at one learning rate."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    table_rate: float = 1.0
    """Learning rate of tables of tokens, relative to the others'."""

    gain_rate: float = 1.0
    """The same, of gains and biases."""

    kernel_rate: float = 1.0
    """The same, of kernels of convolutions, patch embeddings among them."""

    temperature_rate: float = 1.0
    """The same, of temperature and bias of the similarities."""

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

    average_decay: float = 0.0
    """Decay of the EMA of the weights (EMA), which becomes the final model; 0 keeps none."""


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
    """Show one sentence, drawn, of a long caption; cut after . ! ? before a space ("Dr. Smith" too), after 。！？."""

    arrays: tuple[str, ...] = ()
    """Arrays stored in the shards that batches carry: teacher_image, teacher_text, text_embedding."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random crop's share of the image's area."""

    flip: float = 0.0
    """Probability of mirroring an image; leave at 0 where captions say left and right."""

    decode_on_device: bool = False
    """Decode JPEGs on the GPU instead of in the workers; workers then read, draw and tokenize only."""

    allow_damage: bool = False
    """Read the whole samples of shards that are cut short instead of refusing them."""

    max_bad: float = 0.01
    """Share of unusable samples past which the run fails; the first ten never count as too many, unless it is 0."""

    max_bad_in_a_row: int = 100
    """Unusable samples one after the other at which the run fails."""

    cache: str = ""
    """Folder in which remote and compressed shards are kept; empty takes $VLM_CACHE or ~/.cache/vlm/shards."""

    cache_gb: float = 0.0
    """Bound of that folder in 10⁹ bytes; 0 takes $VLM_CACHE_GB or 50."""

    trim_text: bool = True
    """Cut a batch's tokens to its longest caption, where the text tower gives the same vectors and is not compiled."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Checkpoints, bad steps, hanging processes."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""

    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints in addition; 0 goes by steps alone."""

    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""

    keep_best: str = ""
    """Metric of val whose best checkpoint is kept too, e.g. text_to_image_recall@10; empty keeps none."""

    checkpoint_to: str = ""
    """Address (fsspec: s3://…, gs://…, a folder) that every checkpoint is copied to in the background."""

    spike_factor: float = 0.0
    """A step whose loss rises above the running median by this many times its usual deviation is skipped; 0 never."""

    skip_limit: int = 5
    """Skipped steps in a row at which the run goes back to the last good checkpoint and passes over these samples."""

    rewind_limit: int = 3
    """Times a run may go back before it ends."""

    hang_minutes: float = 30.0
    """A step that takes longer ends the run with what each process was doing; 0 waits for ever."""


_MIN_CACHE_GB = 1e-3
_MAX_EPOCHS = 1e9


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A pretraining run."""

    data: str = ""
    """Shards to train on: a folder, pattern, several joined with ::, or an address; or a mixture file (.toml)."""

    val: str = ""
    """Shards to measure retrieval on while training; empty measures nothing."""

    val_captions_each: int = 0
    """Captions of an image used in that, in each language: the first so many; 0 uses all."""

    run: str = ""
    """Folder of the run."""

    batch_size: int = 256
    """Samples a step, over all processes."""

    micro_batch: int = 0
    """Samples of a process that go through the network at once; 0 takes its whole share. Gradients are the same."""

    epochs: float = 10.0
    """Passes over the data; ignored where steps is given."""

    steps: int = -1
    """Optimizer steps; -1 follows from epochs, 0 saves the fresh model."""

    seed: int = 0
    """Of weights, order, crops and drawn captions."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights stay fp32."""

    sharding: Literal["none", "fsdp"] = "none"
    """none: every process holds the whole network (DDP); fsdp: weights and optimizer are spread (FSDP2)."""

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
        for name, value, least in _minimum_values(self):
            if not least <= value < math.inf:
                raise UsageError(f"{name} = {value} is outside its range; give at least {least}.")
        for name, value in _fractions(self):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} = {value} is not a share; give a number from 0 to 1.")
        if 0 < self.loader.cache_gb < _MIN_CACHE_GB:
            raise UsageError(f"cache_gb = {self.loader.cache_gb} holds no shard; give gigabytes, or 0 for the default.")
        if self.val.endswith(".toml"):
            raise UsageError(f"val = {self.val!r} is a mixture; retrieval is measured on shards: name them.")
        if self.steps < 0 and not 0 < self.epochs < _MAX_EPOCHS:
            raise UsageError(f"epochs = {self.epochs} is not a length; give a positive number, or --steps.")
        if self.loader.sentences and {"teacher_text", "text_embedding"} & set(self.loader.arrays):
            raise UsageError("arrays with a row for each caption do not fit sentences of them; leave out --sentences.")
        if self.optimizer.optimizer == "muon" and self.sharding == "fsdp":
            raise UsageError("--optimizer muon needs whole matrices, and fsdp spreads them; give --optimizer adamw.")
        if not 0 < self.loader.crop_scale[0] <= self.loader.crop_scale[1] <= 1:
            raise UsageError(f"crop_scale = {self.loader.crop_scale} is not a range inside (0, 1].")


def _minimum_values(config: TrainConfig) -> tuple[tuple[str, float, float], ...]:
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


def _fractions(config: TrainConfig) -> tuple[tuple[str, float], ...]:
    return (
        ("flip", config.loader.flip),
        ("max_bad", config.loader.max_bad),
        ("patch_dropout", config.model.patch_dropout),
        ("dropout", config.model.dropout),
        ("drop_path", config.model.drop_path),
        ("average_decay", config.optimizer.average_decay),
        ("parallel_share", config.objective.parallel_share),
    )


FREE_ON_RESUME = frozenset(
    {
        "loader.workers",
        "loader.max_bad",
        "loader.max_bad_in_a_row",
        "loader.cache",
        "loader.cache_gb",
        "evaluate_every",
        "log_every",
        "val",
        "val_captions_each",
        "run",
        "tensorboard",
        "peak_tflops",
        "objective.similarity_block",
        "safety.checkpoint_every",
        "safety.checkpoint_minutes",
        "safety.keep_checkpoints",
        "safety.keep_best",
        "safety.checkpoint_to",
        "safety.hang_minutes",
    }
)
"""Keys that may change when a run is resumed: they have no influence on the weights."""


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The keys (dotted) in which two configurations differ, each as `KEY: before → after`."""
    differences = config_differences([before, after])
    return [f"{key}: {old!r} → {new!r}" for key, (old, new) in differences.items()]


def disallowed_changes(changed: Iterable[str], allow: Sequence[str], *, free: Collection[str] = ()) -> list[str]:
    """The changes that are not allowed.

    changed: lines `KEY: before → after`, as `changed_settings` makes them. allow: keys, or groups of them; `-` and `_`
        are the same. free: keys that may always change.

    >>> disallowed_changes(["optimizer.beta1: 0.9 → 0.8", "seed: 0 → 1"], ["optimizer"])
    ['seed: 0 → 1']
    """
    allowed = [entry.replace("-", "_") for entry in allow]
    refused: list[str] = []
    for line in changed:
        key = line.partition(":")[0]
        if key not in free and not any(key == entry or key.startswith(f"{entry}.") for entry in allowed):
            refused.append(line)
    return refused


def check_allowed_keys(allow: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse names that no key or group of the configuration has, naming the nearest.

    Raises:
        UsageError: there is such a name.
    """
    known: dict[str, None] = {}
    for key in flatten_config(values):
        parts = key.split(".")
        known |= dict.fromkeys(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    for entry in allow:
        lookup(known, entry.replace("-", "_"), "--allow")


def changed_config_error(run: Path | str, refused: Sequence[str]) -> UsageError:
    """What is said of changes that are not allowed, with the words that allow them."""
    words = " ".join(f"--allow {line.partition(':')[0]}" for line in refused)
    lines = "".join(f"\n  {line}" for line in refused)
    return UsageError(
        f"{run} was begun with another configuration:{lines}\nResume it as it was by vlm train {run} --resume, name "
        f"another run, or, if the change is meant, add: {words}"
    )
