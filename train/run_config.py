"""The configuration of a run, saved with it as TOML, and what of it may change when the run is resumed."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from vlm.config import config_differences, flatten_config, from_values, lookup
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, tokenizer and regularisation."""

    architecture: str = "tiny"
    """tiny, tiny-coca, small, any open_clip architecture (ViT-B-32, coca_ViT-L-14), or IMAGE_TOWER+TEXT_TOWER.

    Options follow a tower after commas; initial_weights=FILE gives the trunk weights that are on this machine.
    """

    start_from: str = ""
    """MODEL to initialise from: architecture, weights, image transform and tokenizer; empty initialises randomly."""

    tokenizer: str = "clip"
    """clip, a SentencePiece .model file, or a Hugging Face folder."""

    context_length: int = 0
    """Context length in tokens; 0 uses the architecture's."""

    resize_mode: Literal["", "shortest", "squash", "longest"] = ""
    """How images are made square: cropped, squashed or padded; empty uses the architecture's.

    The image tower's option tokens=N keeps their shape instead (timm:naflexvit_…,tokens=196): at most N patches.
    """

    image_size: int = 0
    """Input resolution in pixels; 0 uses the architecture's. Position embeddings of start_from are interpolated."""

    lock: Literal["", "image", "text", "both"] = ""
    """Tower to freeze: `image` is locked-image tuning (LiT); `both` leaves only the heads after the trunks to train."""

    locked_features_gb: float = 0.0
    """GB (10⁹ bytes) of memory for what a captioner's locked image tower gave: a view seen again costs nothing."""

    unlocked_groups: int = 0
    """Number of last layer groups of each locked tower to train all the same."""

    lora_rank: int = 0
    """Rank of low-rank adapters (LoRA) for the matrices of the towers of start_from; 0 trains the weights themselves.

    The adapters are added to the weights at the end; needs the extra lora (peft).
    """

    lora_alpha: float = 0.0
    """α of the adapters, which are scaled by α / rank; 0 is twice the rank."""

    patch_dropout: float = 0.0
    """Fraction of patches a ViT drops while training (patch dropout)."""

    dropout: float = 0.0
    """Dropout probability, for towers and caption decoders with dropout layers."""

    drop_path: float = 0.0
    """Maximum stochastic-depth rate of a timm tower; it rises linearly with depth."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory (gradient checkpointing)."""

    channels_last: bool = False
    """Use the channels-last memory format for a convolutional tower."""

    compile: bool = False
    """Compile the network (torch.compile); the first steps take minutes."""


_SIMILARITIES_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A weighted sum of loss terms, and their parameters."""

    objective: str = "clip"
    """Loss terms (docs/objectives.md) joined by +, each with its weight if not 1: `clip`, `siglip + 2*caption`."""

    same_pairs: Literal["negative", "ignore", "positive"] = "negative"
    """How to treat in-batch pairs that share a key, caption or image: as negatives, ignored, or as extra positives."""

    margin: float = 0.2
    """Margin of the ranking loss between the cosines of a pair and its negatives."""

    negatives: Literal["both", "images", "texts", "hardest"] = "both"
    """Negatives of the ranking loss: images, texts, both, or the hardest of each."""

    positive_sigma: float = 0.5
    """σ of the weights of positives (`weighted_dcl`); smaller favours hard positives more."""

    temperature: float = 0.0
    """Temperature to start from (sogclr keeps it); 0 uses the architecture's, e.g. 0.07, or that of start_from."""

    inner_rate: float = 0.2
    """γ of sogclr and fastclip: the share of a batch in the moving average of each of its samples, at its lowest."""

    inner_rate_epochs: float = -1
    """Epochs in which γ falls from 1 along a cosine; -1 is half of the run, 0 only the first epoch."""

    rho: float = 6.5
    """ρ of fastclip: how far negatives are to be from positives, in temperatures; larger lowers the temperature."""

    teacher: str = ""
    """Teacher MODEL for online distillation; empty uses teacher embeddings stored in the shards."""

    teacher_scale: float = 100.0
    """Inverse temperature of the teacher's similarities."""

    sub_captions: int = 0
    """Sentences sampled per image as multiple positives; 0 uses one caption."""

    patch_threshold: float = 0.1
    """Patches whose stretched similarity to a sentence is below this have no part in its group (`grouping`)."""

    local_views: int = 0
    """Local crops per image for local-to-global self-distillation."""

    prototypes: int = 4096
    """Number of prototypes (`dino`); DINO's own recipes have 65536."""

    prototype_temperature: float = 0.1
    """Temperature of the crops' distribution over prototypes (`dino`)."""

    target_temperature: float = 0.04
    """Temperature of the EMA network's distribution over prototypes (`dino`)."""

    parallel_share: float = 0.75
    """Fraction of captions predicted in parallel (CapPa); the others autoregressively."""

    label_smoothing: float = 0.0
    """Share of the next token's probability that `caption` spreads over all tokens (label smoothing)."""

    text_embedding_size: int = 0
    """Dimension of the stored text embeddings that images are aligned with (`text_align`)."""

    class_field: str = ""
    """Metadata field with the class of a sample (`classify`); dots select nested fields."""

    class_names: str = ""
    """File of class names, one a line or a JSON list (`classify`)."""

    similarity_block: int = 0
    """Rows of the similarity matrix computed at once, which affects time and memory only; 0 takes as many as make a
    million similarities, at least 256."""

    def rows_at_once(self, num_columns: int) -> int:
        """Rows of the similarity matrix in a block, by the number of columns."""
        # a block that stays in the processor's cache is also the quicker one; below 256 rows launching takes the time
        return self.similarity_block or max(256, _SIMILARITIES_AT_ONCE // num_columns)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon with AdamW, with linear warm-up and cosine decay to zero."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices inside the towers and AdamW for the rest, at one learning rate."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    table_rate: Annotated[float, tyro.conf.arg(name="embedding-lr-mult")] = 1.0
    """Learning-rate multiplier for token embeddings."""

    gain_rate: Annotated[float, tyro.conf.arg(name="norm-lr-mult")] = 1.0
    """Learning-rate multiplier for gains and biases."""

    kernel_rate: Annotated[float, tyro.conf.arg(name="conv-lr-mult")] = 1.0
    """Learning-rate multiplier for convolution kernels, patch embeddings included."""

    temperature_rate: Annotated[float, tyro.conf.arg(name="logit-scale-lr-mult")] = 1.0
    """Learning-rate multiplier for logit scale and logit bias."""

    weight_decay: float = 0.1
    """Weight decay, on matrices only, not on gains, biases and logit scale."""

    beta1: float = 0.9
    """β₁ of Adam: decay of the first moment."""

    beta2: float = 0.98
    """β₂ of Adam: decay of the second moment."""

    epsilon: float = 1e-6
    """ε of Adam."""

    layer_decay: Annotated[float, tyro.conf.arg(name="layer-lr-decay")] = 1.0
    """Learning-rate multiplier from each group of layers to the one before it (BEiT, §A); 1 trains all alike."""

    warmup_steps: int = 100
    """Warm-up steps."""

    clip_norm: Annotated[float, tyro.conf.arg(name="grad-clip-norm")] = 1.0
    """Gradient-norm clipping threshold; 0 disables it."""

    average_decay: Annotated[float, tyro.conf.arg(name="ema-decay")] = 0.0
    """EMA decay; the EMA weights become the final model. 0 disables EMA."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are read, shuffled and augmented."""

    workers: int = 1
    """Workers that read, decode and tokenize, four to a process; does not affect results."""

    shuffle_window: int = 65536
    """Size of the window in which samples are shuffled, after the shards are."""

    selection: str = ""
    """Selection file of `vlm curate`: which samples to use, and how often per epoch; empty uses each once."""

    batches: Literal["random", "distinct", "hard"] = "random"
    """Samples of a batch: random ones; without equal captions or near-duplicate images; or mutually similar ones."""

    relations: str = ""
    """File of `vlm relate`: which samples are equal or similar; for distinct and hard batches."""

    hard_cluster: int = 8
    """Mutually similar samples that stand together in a hard batch; 1 is a distinct batch."""

    captions_from: str = ""
    """Folder of new captions of these shards, written by `vlm caption`; empty uses those in the shards alone."""

    caption_mix: float = 0.5
    """Probability of a new caption, of those of --captions-from, instead of the sample's own."""

    languages: tuple[str, ...] = ()
    """Caption languages to sample from; empty uses the first of each sample. `tags` stands for its tags."""

    language_weights: tuple[float, ...] = ()
    """Sampling weight of each language; empty weighs all equally."""

    tag_fields: tuple[str, ...] = ()
    """Metadata fields whose values are tags as well, e.g. colour and year; needs `tags` among --languages."""

    sentences: bool = False
    """Sample one sentence of a long caption; split after . ! ? before a space ("Dr. Smith" too), and after 。！？."""

    arrays: tuple[str, ...] = ()
    """Precomputed features to load from the shards: teacher_image, teacher_text, text_embedding."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random crop's share of the image area (scale of RandomResizedCrop)."""

    flip: float = 0.0
    """Probability of a horizontal flip; keep 0 if captions mention left and right."""

    cache_features: bool = False
    """Compute the features of locked towers once, and train on them: images are then seen without crops and flips."""

    feature_folder: str = ""
    """Folder of these features, which runs on the same shards can share; empty keeps them in RUN/features."""

    caption_blend: float = 0.0
    """Average the cached captions of a sample by Dirichlet weights of this concentration; 0 takes one caption."""

    decode_on_device: bool = False
    """Decode JPEGs on the GPU (nvJPEG) instead of in the workers."""

    allow_damage: bool = False
    """Use the intact samples of truncated shards instead of failing."""

    max_bad: float = 0.01
    """Abort when more than this fraction of samples is corrupt (the first ten are tolerated, unless 0)."""

    max_bad_in_a_row: int = 100
    """Abort at this many corrupt samples in a row."""

    cache: str = ""
    """Cache folder for remote and compressed shards; empty uses $VLM_CACHE or ~/.cache/vlm/shards."""

    cache_gb: float = 0.0
    """Maximum size of the cache in GB (10⁹ bytes); 0 uses $VLM_CACHE_GB or 50."""

    trim_text: Annotated[
        bool,
        tyro.conf.arg(help="Always pad captions to the full context length.", help_behavior_hint="(default: False)"),
    ] = True
    """Pad captions to the batch's longest (on a CPU less, or nothing) if vectors stay; not if compiled."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Checkpoints, skipped steps, watchdog."""

    checkpoint_every: int = 500
    """Checkpoint interval in steps; the last step is always saved."""

    checkpoint_minutes: float = 0.0
    """Additional checkpoint interval in minutes; 0 disables it."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

    keep_best: str = ""
    """Val metric whose best checkpoint to keep, too, e.g. text_to_image_recall@10; empty keeps none."""

    checkpoint_to: str = ""
    """URL (fsspec: s3://…, gs://…, or a folder) to upload every checkpoint to in the background."""

    spike_factor: float = 0.0
    """Skip a step whose loss exceeds the running median by this many times its usual deviation; 0 never skips."""

    skip_limit: int = 5
    """Roll back to the last good checkpoint, past these samples, at this many skipped steps in a row."""

    rewind_limit: Annotated[int, tyro.conf.arg(name="rollback-limit")] = 3
    """Maximum number of rollbacks before the run fails."""

    max_drift: float = 0.0
    """How far recall@1 or top1, on val, val_other or val_suite, may fall below the start model; then the weights are
    drawn back towards it. 0 holds nothing."""

    early_stop: int = 0
    """Stop after so many evaluations in a row without a better keep_best metric; the model is that of the best one.

    0 trains to the end, and the model is the last one.
    """

    hang_minutes: Annotated[float, tyro.conf.arg(name="watchdog-minutes")] = 30.0
    """Watchdog timeout: end the run with a stack trace of each process if a step takes longer; 0 disables it."""


# a megabyte: less would hold no shard, and is likely a mistaken unit
_MIN_CACHE_GB = 1e-3
_MAX_EPOCHS = 1e9
# e^(1/σ) stays a number in single precision
_LEAST_SIGMA = 0.02
_MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Data, length and precision of a run."""

    data: str = ""
    """Training shards: a folder, a pattern, a URL, several joined by ::, or a mixture file (.toml)."""

    val: str = ""
    """Shards to evaluate retrieval on while training; empty disables it."""

    val_captions_each: int = 0
    """Captions per image and language for that evaluation, the first ones; 0 uses all."""

    val_limit: int = 0
    """Images of val to evaluate on, the first ones; 0 uses all."""

    val_other: str = ""
    """Shards of other data, on which a fine-tuned model should stay as good as start_from: retrieval there is logged
    as other/…, and how far it has fallen as drift/other/…; see max_drift."""

    val_suite: str = ""
    """Evaluation suite (a name or a TOML file) to run at the same steps; logged as DATA/EVALUATOR/VALUE."""

    val_suite_root: str = "."
    """Folder of the suite's data."""

    run: str = ""
    """Run folder."""

    batch_size: int = 256
    """Global batch size, over all processes."""

    micro_batch: int = 0
    """Micro-batch per process (gradient caching: same gradients, less memory); 0 uses its whole share of the batch."""

    epochs: float = 10.0
    """Number of epochs; ignored if steps is given."""

    steps: int = -1
    """Optimizer steps; -1 derives them from epochs, 0 saves the initial model."""

    seed: int = 0
    """Random seed for initialisation, shuffling, crops and caption sampling."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass (autocast); weights stay fp32."""

    sharding: Literal["none", "fsdp"] = "none"
    """none: replicate the network (DDP); fsdp: shard weights and optimizer state (FSDP2)."""

    evaluate_every: int = 500
    """Evaluation interval on val and val_suite in steps; the last step is always evaluated."""

    evaluate_budget: float = 0.0
    """Largest share of the run's time for evaluations, e.g. 0.02: one that would exceed it is put off to a later
    multiple of evaluate_every; 0 puts none off."""

    log_every: int = 10
    """Logging interval in steps (metrics.jsonl)."""

    peak_tflops: float = 0.0
    """Peak TFLOP/s of a device for MFU; 0 uses the data sheet's, or measures a CPU."""

    tensorboard: bool = False
    """Log metrics to TensorBoard, too, in RUN/tensorboard."""

    wandb: str = ""
    """Project of Weights & Biases to log metrics to, too; $WANDB_MODE offline keeps them in RUN/wandb."""

    trackio: str = ""
    """Trackio project to log metrics to, too, on this machine ($TRACKIO_DIR)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def check(self) -> None:
        """Check values against their limits, and those that cannot work together.

        Raises:
            UsageError: naming the value, its limit and the cure.
        """
        for name, value in (("--data", self.data), ("--run", self.run)):
            if not value:
                raise UsageError(f"{name} is needed.")
        # written as "not inside", since NaN is neither below nor above a limit
        for name, value, least in _minimum_values(self):
            if not least <= value < math.inf:
                raise UsageError(f"{name} = {value} is outside its range; give at least {least}.")
        for name, value in _fractions(self):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} = {value} is not a share; give a number from 0 to 1.")
        if 0 < self.loader.cache_gb < _MIN_CACHE_GB:
            raise UsageError(f"cache_gb = {self.loader.cache_gb} holds no shard; give gigabytes, or 0 for the default.")
        for name, value in (("val", self.val), ("val_other", self.val_other)):
            if value.endswith(".toml"):
                raise UsageError(f"{name} = {value!r} is a mixture; retrieval is measured on shards: name them.")
        if self.safety.early_stop and not (self.safety.keep_best and (self.val or self.val_suite)):
            raise UsageError(
                f"early_stop = {self.safety.early_stop} judges held-out data: give --val SHARDS (or --val-suite), and "
                "--keep-best METRIC, e.g. text_to_image_recall@10."
            )
        if self.steps < 0 and not 0 < self.epochs < _MAX_EPOCHS:
            raise UsageError(f"epochs = {self.epochs} is not a length; give a positive number, or --steps.")
        if self.loader.sentences and {"teacher_text", "text_embedding"} & set(self.loader.arrays):
            raise UsageError("arrays with a row for each caption do not fit sentences of them; leave out --sentences.")
        if 0 < self.objective.temperature < _MIN_TEMPERATURE:
            raise UsageError(
                f"temperature = {self.objective.temperature} is below the least, {_MIN_TEMPERATURE} (CLIP §2.5)."
            )
        if (self.loader.batches == "random") != (not self.loader.relations):
            raise UsageError(
                f"batches = {self.loader.batches!r} and relations = {self.loader.relations!r} do not fit: distinct and "
                "hard batches need --relations FILE (vlm relate SHARDS FILE), and random ones none."
            )
        if self.loader.caption_blend and not self.loader.cache_features:
            raise UsageError("caption_blend averages cached features; give --cache-features with a locked text tower.")
        if self.model.lora_rank:
            self._check_adapters()
        if self.optimizer.optimizer == "muon" and self.sharding == "fsdp":
            raise UsageError("--optimizer muon needs whole matrices, and fsdp shards them; give --optimizer adamw.")
        if not 0 < self.loader.crop_scale[0] <= self.loader.crop_scale[1] <= 1:
            raise UsageError(f"crop_scale = {self.loader.crop_scale} is not a range inside (0, 1].")

    def _check_adapters(self) -> None:
        rank = f"lora_rank = {self.model.lora_rank}"
        if not self.model.start_from:
            raise UsageError(f"{rank}: adapters change a trained model a little; name it by --start-from MODEL.")
        if self.model.lock == "both" or self.model.unlocked_groups:
            raise UsageError(
                f"{rank} adapts whole towers: give --lock image or text to leave one as it is, without "
                "--unlocked-groups, or leave --lora-rank out."
            )
        if self.sharding == "fsdp":
            raise UsageError(f"{rank}: adapters are small, and fsdp shards weights; leave one of them out.")


def check_for_own_shapes(config: TrainConfig) -> None:
    """Refuse what shows squares only to a model whose images keep their shape."""
    problems = (
        (config.loader.decode_on_device, "--decode-on-device fills squares"),
        (config.objective.local_views, "--local-views are squares"),
        (config.objective.teacher or "teacher_image" in config.loader.arrays, "a teacher sees squares"),
    )
    for is_problem, reason in problems:
        if is_problem:
            raise UsageError(f"Images keep their shape (the image tower's tokens=), and {reason}; leave one out.")


def _minimum_values(config: TrainConfig) -> tuple[tuple[str, float, float], ...]:
    loader, safety, objective = config.loader, config.safety, config.objective
    return (
        ("seed", config.seed, 0),
        # a pair alone has no negatives
        ("batch_size", config.batch_size, 2),
        ("micro_batch", config.micro_batch, 0),
        ("log_every", config.log_every, 1),
        ("evaluate_every", config.evaluate_every, 1),
        ("evaluate_budget", config.evaluate_budget, 0),
        ("val_captions_each", config.val_captions_each, 0),
        ("val_limit", config.val_limit, 0),
        # -1 stands for what `epochs` makes
        ("steps", config.steps, -1),
        ("peak_tflops", config.peak_tflops, 0),
        ("checkpoint_every", safety.checkpoint_every, 1),
        ("checkpoint_minutes", safety.checkpoint_minutes, 0),
        ("keep_checkpoints", safety.keep_checkpoints, 1),
        ("spike_factor", safety.spike_factor, 0),
        ("skip_limit", safety.skip_limit, 1),
        ("rewind_limit", safety.rewind_limit, 0),
        ("early_stop", safety.early_stop, 0),
        ("hang_minutes", safety.hang_minutes, 0),
        ("workers", loader.workers, 0),
        ("caption_blend", loader.caption_blend, 0),
        ("shuffle_window", loader.shuffle_window, 1),
        ("max_bad_in_a_row", loader.max_bad_in_a_row, 1),
        ("hard_cluster", loader.hard_cluster, 1),
        ("cache_gb", loader.cache_gb, 0),
        ("similarity_block", objective.similarity_block, 0),
        ("text_embedding_size", objective.text_embedding_size, 0),
        ("margin", objective.margin, 0),
        ("temperature", objective.temperature, 0),
        ("inner_rate_epochs", objective.inner_rate_epochs, -1),
        ("rho", objective.rho, 0),
        ("teacher_scale", objective.teacher_scale, 0),
        ("positive_sigma", objective.positive_sigma, _LEAST_SIGMA),
        ("sub_captions", objective.sub_captions, 0),
        ("local_views", objective.local_views, 0),
        ("prototypes", objective.prototypes, 2),
        ("prototype_temperature", objective.prototype_temperature, _LEAST_SIGMA),
        ("target_temperature", objective.target_temperature, _LEAST_SIGMA),
        ("table_rate", config.optimizer.table_rate, 0),
        ("gain_rate", config.optimizer.gain_rate, 0),
        ("kernel_rate", config.optimizer.kernel_rate, 0),
        ("temperature_rate", config.optimizer.temperature_rate, 0),
        ("image_size", config.model.image_size, 0),
        ("context_length", config.model.context_length, 0),
        ("unlocked_groups", config.model.unlocked_groups, 0),
        ("locked_features_gb", config.model.locked_features_gb, 0),
        ("lora_rank", config.model.lora_rank, 0),
        ("lora_alpha", config.model.lora_alpha, 0),
    )


def _fractions(config: TrainConfig) -> tuple[tuple[str, float], ...]:
    return (
        ("flip", config.loader.flip),
        ("caption_mix", config.loader.caption_mix),
        ("max_bad", config.loader.max_bad),
        ("patch_dropout", config.model.patch_dropout),
        ("dropout", config.model.dropout),
        ("drop_path", config.model.drop_path),
        ("average_decay", config.optimizer.average_decay),
        ("parallel_share", config.objective.parallel_share),
        ("patch_threshold", config.objective.patch_threshold),
        ("inner_rate", config.objective.inner_rate),
        ("label_smoothing", config.objective.label_smoothing),
        ("max_drift", config.safety.max_drift),
        ("layer_decay", config.optimizer.layer_decay),
    )


def override(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other settings, each by its own name or by its flag's, or a group of them by theirs.

    >>> override(TrainConfig(), {"learning_rate": 1e-4, "loader": {"workers": 4}}).loader.workers
    4

    Raises:
        UsageError: there is no such setting, or a value does not fit.
    """
    values = asdict(config)
    places = _places()
    for name, value in settings.items():
        # `optimizer` is a group and a setting in it; the value says which is meant
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            values[name] |= value
            continue
        group, key = lookup(places, name, "setting")
        target = values[group] if group else values
        target[key] = value
    return from_values(TrainConfig, values, where="settings")


def _places() -> dict[str, tuple[str, str]]:
    """The group (empty for none) and the key of each setting, by its name and by that of its flag."""
    places: dict[str, tuple[str, str]] = {}
    for name, kind in get_type_hints(TrainConfig).items():
        if not is_dataclass(kind):
            places[name] = ("", name)
            continue
        for key, hint in get_type_hints(kind, include_extras=True).items():
            flags = [flag.name for flag in getattr(hint, "__metadata__", ()) if getattr(flag, "name", None)]
            for spelling in (key, *(flag.replace("-", "_") for flag in flags)):
                places[spelling] = (name, key)
    return places


FREE_ON_RESUME = frozenset(
    {
        "loader.workers",
        "loader.max_bad",
        "loader.max_bad_in_a_row",
        "loader.cache",
        "loader.cache_gb",
        "loader.feature_folder",
        "evaluate_every",
        "evaluate_budget",
        "log_every",
        "val",
        "val_captions_each",
        "val_limit",
        "val_other",
        "val_suite",
        "val_suite_root",
        "run",
        "tensorboard",
        "wandb",
        "trackio",
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
"""Keys that may change when a run is resumed, since they have no influence on the weights."""

_JUDGED = frozenset(
    {"evaluate_every", "evaluate_budget", "val", "val_captions_each", "val_limit", "val_other", "val_suite"}
    | {"val_suite_root", "safety.keep_best"}
)


FREE_OF_SCORES = FREE_ON_RESUME - _JUDGED
"""Those that have no influence on the score of a run either."""


def free_on_resume(config: TrainConfig) -> frozenset[str]:
    """The keys that may change when this run is resumed: evaluations that stop it or draw it back have an influence."""
    judges = config.safety.early_stop or config.safety.max_drift
    return FREE_OF_SCORES if judges else FREE_ON_RESUME


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
    # with a dot at the end, a key is allowed exactly if it begins like an entry: "seed" does not allow "seeds"
    allowed = tuple(f"{entry.replace('-', '_')}." for entry in allow)
    refused: list[str] = []
    for line in changed:
        key = line.partition(":")[0]
        if key not in free and not f"{key}.".startswith(allowed):
            refused.append(line)
    return refused


def check_allowed_keys(allow: Sequence[str], values: Mapping[str, Any]) -> None:
    """Check that every name is a key or a group of the configuration; the nearest is named.

    Raises:
        UsageError: there is such a name.
    """
    # groups count too: --allow optimizer allows all of its keys
    known: dict[str, None] = {}
    for key in flatten_config(values):
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            known[".".join(parts[:depth])] = None
    for entry in allow:
        lookup(known, entry.replace("-", "_"), "--allow")


def changed_config_error(run: Path | str, refused: Sequence[str]) -> UsageError:
    """The error for changes that are not allowed, with the options that allow them."""
    options = " ".join(f"--allow {line.partition(':')[0]}" for line in refused)
    lines = "".join(f"\n  {line}" for line in refused)
    return UsageError(
        f"{run} was begun with another configuration:{lines}\nResume it unchanged by vlm train {run} --resume, name "
        f"another run, or, if the change is intended, add: {options}"
    )
