"""A run as it is opened: all that stays the same while its state changes.

`open_session` puts it together: data, model, task, optimizer and state, and the run's folder with its configuration.
"""

import ctypes
import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm.config import from_toml, read_toml, to_toml
from vlm.data.batch_order import arrange_batches
from vlm.data.caption_sampler import CaptionMix, CaptionSampler, warn_of_unseen_fields
from vlm.data.class_labels import open_class_labels
from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.corpus import Corpus, open_corpus, read_sources
from vlm.data.device_prefetch import DevicePrefetcher
from vlm.data.gpu_decode import check_decoder
from vlm.data.loader import WORKER_THREADS, stream_batches
from vlm.data.precomputed_features import CachedFeatures, PrecomputedFeatures
from vlm.data.sample_relations import read_relations
from vlm.data.sampler import BatchSampler
from vlm.data.shard_cache import ShardCache, default_cache
from vlm.data.shards import count_samples, expand_shards
from vlm.data.tokenizers import CAUSAL_PREFIX, open_tokenizer
from vlm.data.transforms import ASPECT, EvalTransform, LocalCrops, RandomResizedCrop
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.manifest import is_complete
from vlm.model_spec import CHECKPOINTS
from vlm.models.dropout import PerSampleNoise, use_per_sample_dropout
from vlm.models.load import load_network
from vlm.models.low_rank import LowRank, add_adapters
from vlm.models.model import VisionLanguageModel, build_network, enable_padding_trim, fit_to_tokenizer, model_config
from vlm.models.towers.tower import batch_norm_layers
from vlm.models.towers.tower_registry import initial_preprocess, set_dropout
from vlm.models.variants import with_image_size
from vlm.train.attention import reduce_attention_work
from vlm.train.averaging import EMA
from vlm.train.bfloat16 import compute_in_bfloat16
from vlm.train.caption_packing import packing_tower
from vlm.train.checkpoint.manager import RemoteCheckpointStore, restore_newest
from vlm.train.distributed import apply_fsdp, no_gradient_sync
from vlm.train.drift import DriftGuard, open_drift_guard
from vlm.train.feature_cache import keep_locked_features, open_cached_features
from vlm.train.metrics import FlopCounter
from vlm.train.objectives.global_contrastive import GlobalAverages, inner_rate_at
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.optim import build_optimizer
from vlm.train.run_config import (
    LoaderConfig,
    ModelConfig,
    TrainConfig,
    changed_config_error,
    changed_settings,
    check_allowed_keys,
    check_for_own_shapes,
    disallowed_changes,
    free_on_resume,
)
from vlm.train.state import TrainState
from vlm.train.step_inputs import InputProvider, check_loss_inputs, needs_ema, open_input_providers
from vlm.train.task import (
    FORMER_NAMES,
    TrainingTask,
    WeightedLossTerm,
    build_task,
    lock_tower,
    parse_objective,
)
from vlm.train.teacher_views import check_text_embeddings, check_views
from vlm.train.validation import Validation, keep_features, open_validation

logger = logging.getLogger(__name__)


CONFIG = "config.toml"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a run trains with.

    parallel_task: the task as the accelerator wraps it. noise: what the network's dropout layers draw from.
    input_providers: models that compute inputs while training, by the inputs they give. flops: counts those of the
    task. validation: what is measured meanwhile. steps: number of the last step. num_micro_batches: into how many a
    process splits its share of a batch.
    trims_padding: whether batches are cut to their longest caption. cached: features of locked towers, if they are.
    drift: what is told and held of the start's figures, where a model is tuned for captions.
    """

    config: TrainConfig
    folder: Path
    corpus: Corpus
    validation: Validation | None
    accelerator: Accelerator
    state: TrainState
    parallel_task: nn.Module
    terms: tuple[WeightedLossTerm, ...]
    options: LossOptions
    noise: PerSampleNoise
    input_providers: dict[str, InputProvider]
    ema: EMA | None
    flops: FlopCounter
    steps: int
    num_micro_batches: int
    trims_padding: bool
    cached: CachedFeatures | None = None
    drift: DriftGuard | None = None

    def no_sync(self) -> AbstractContextManager[object]:
        """A context in which gradients are not yet exchanged between processes."""
        if self.config.sharding == "fsdp":
            return no_gradient_sync(self.state.task)
        # accelerator.no_sync does nothing for one process under a launcher, which is wrapped all the same
        if isinstance(self.parallel_task, DistributedDataParallel):
            return self.parallel_task.no_sync()
        return nullcontext()

    @property
    def local_batch_size(self) -> int:
        """Samples of a global batch that this process trains on."""
        return self.config.batch_size // self.accelerator.num_processes

    @property
    def inner_rate(self) -> float:
        """γ of the next step, for terms with a moving average of each sample; 1 where there are none."""
        config, num_samples = self.config, self.corpus.order.num_samples
        if self.state.averages is None:
            return 1.0
        decay_epochs = config.objective.inner_rate_epochs
        if decay_epochs < 0:
            decay_epochs = self.steps * config.batch_size / num_samples / 2
        epoch = self.state.position // num_samples
        return inner_rate_at(epoch, lowest=config.objective.inner_rate, decay_epochs=decay_epochs)

    def open_batches(self) -> Iterator[list[TrainingBatch]]:
        """The batches from the state's position to the run's end, each as its micro-batches; the next empties it."""
        config, state = self.config, self.state
        plan = BatchSampler(
            order=self.corpus.order,
            batch_size=config.batch_size,
            position=state.position,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            parts=self.num_micro_batches,
        )
        mix = self.corpus.caption_mix
        collate = build_collator(
            config, plan, state.model, trim_text=self.trims_padding, caption_mix=mix, cached=self.cached
        )
        stream: Iterator[TrainingBatch] = stream_batches(
            plan,
            self.corpus.shards,
            collate,
            # numbered from the state's position, where the batch sampler begins
            numbers=range((self.steps - state.step) * self.num_micro_batches),
            workers=config.loader.workers,
            threads=WORKER_THREADS,
            cache=resolve_shard_cache(config.loader),
        )
        view = collate.view if collate.decode_on_device else None
        # to a CPU there is nothing to copy ahead
        if view is not None or self.accelerator.device.type == "cuda":
            stream = iter(DevicePrefetcher(stream, self.accelerator.device, view))
        while micro_batches := list(itertools.islice(stream, self.num_micro_batches)):
            yield micro_batches
            # the images of two large batches at once would take twice the memory
            micro_batches.clear()


def open_session(config: TrainConfig, *, resume: bool, allow: tuple[str, ...] = ()) -> Session:
    """Open a run, new or resumed.

    allow: keys of the configuration that may have changed since the run was begun.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run being resumed.
    """
    config.check()
    terms = parse_objective(config.objective.objective)
    accelerator = build_accelerator(config)
    corpus, validation = open_data(config, resolve_shard_cache(config.loader), accelerator.device)
    num_micro_batches = count_micro_batches(config, accelerator.num_processes)

    reads_bias = any("logit_bias" in weighted.term.outputs for weighted in terms)
    model = build_model(config, accelerator.device, with_bias=reads_bias)
    trims_padding = config.loader.trim_text and not config.model.compile and enable_padding_trim(model.network)
    # for the evaluations of the run, whose captions would else be padded to the whole context
    model.trims_padding = trims_padding
    options = LossOptions(config=config.objective, pad_token=model.tokenizer.pad_token)
    noise = PerSampleNoise(seed=config.seed)
    task = open_task(config, model, terms, options, noise)
    flops = FlopCounter(task.train())  # before the network is wrapped or sharded
    parallel_task = parallelize_task(accelerator, task, config)

    ema = EMA.from_network(config.optimizer.average_decay, model.network) if needs_ema(config, terms) else None
    # before a checkpoint is read into the network
    drift = open_drift_guard(config, model.network) if config.model.start_from or config.safety.max_drift else None
    input_providers = open_input_providers(config, model, terms, ema)
    check_loss_inputs(config, terms, task, input_providers)
    if config.loader.arrays:
        check_text_embeddings(corpus.shards, config.loader.arrays, model)
    state = TrainState(
        task=task,
        model=model,
        optimizer=build_optimizer(task, config.optimizer),
        sequence=corpus.fingerprint,
        ema_weights=ema.weights if ema else None,
        averages=open_averages(terms, corpus),
    )
    open_folder(config, state, corpus, accelerator, resume=resume, allow=allow)
    cached = _open_features(config, corpus, validation, model)
    # every process has written its share
    accelerator.wait_for_everyone()
    steps = total_steps(config, corpus.order.num_samples)
    _warn_of_sizes(config, steps, corpus.order.num_samples, accelerator)
    return Session(
        config=config,
        folder=Path(config.run),
        corpus=corpus,
        validation=validation,
        accelerator=accelerator,
        state=state,
        parallel_task=parallel_task,
        terms=terms,
        options=options,
        noise=noise,
        input_providers=input_providers,
        ema=ema,
        flops=flops,
        steps=steps,
        num_micro_batches=num_micro_batches,
        trims_padding=trims_padding,
        cached=cached,
        drift=drift,
    )


def _open_features(
    config: TrainConfig, corpus: Corpus, validation: Validation | None, model: VisionLanguageModel
) -> CachedFeatures | None:
    """What locked trunks give, computed once: of the samples trained on, if configured, and of what is evaluated."""
    cached = open_cached_features(config, corpus.shards, model) if config.loader.cache_features else None
    if validation is not None:
        keep_features(validation, config, model)
    return cached


def open_averages(terms: tuple[WeightedLossTerm, ...], corpus: Corpus) -> GlobalAverages | None:
    """The moving averages of all samples, none seen yet, where a term keeps them."""
    keeps_averages = any(weighted.term.new_averages for weighted in terms)
    return GlobalAverages.unseen(corpus.sample_starts[-1]) if keeps_averages else None


def _warn_of_sizes(config: TrainConfig, steps: int, num_samples: int, accelerator: Accelerator) -> None:
    """Warn, once, of a warm-up as long as the run, and of batches larger than the data."""
    if not accelerator.is_main_process:
        return
    if 0 < steps <= config.optimizer.warmup_steps:
        logger.warning(
            f"The warm-up of {config.optimizer.warmup_steps:,} steps is as long as the run of {steps:,} or longer: the "
            "learning rate never reaches its peak. Give a smaller --warmup-steps, or train longer."
        )
    if config.objective.same_pairs == "negative" and config.batch_size > num_samples:
        logger.warning(
            f"A batch of {config.batch_size:,} holds samples twice, since there are {num_samples:,}: each is then a "
            "negative of its own copy. Give a smaller --batch-size, or --same-pairs ignore."
        )


def open_data(config: TrainConfig, cache: ShardCache | None, device: torch.device) -> tuple[Corpus, Validation | None]:
    """What is trained on, and what is measured meanwhile; errors come now rather than at the first evaluation."""
    corpus = open_training_corpus(config, cache)
    if config.loader.decode_on_device:
        check_decoder(device)
    if config.loader.arrays:
        check_views(corpus.shards, config.loader)
    if config.loader.tag_fields:
        warn_of_unseen_fields(config.loader.tag_fields, corpus.shards[0], cache)
    # indexed through the run's own cache; later reads meet them there
    for shards in (config.val, config.val_other):
        count_samples(expand_shards(shards) if shards else [], cache=cache)
    measures = config.val or config.val_other or config.val_suite
    return corpus, open_validation(config) if measures else None


def open_training_corpus(config: TrainConfig, cache: ShardCache | None) -> Corpus:
    """The shards the configuration names, with the order of their samples."""
    corpus = open_corpus(
        read_sources(
            config.data,
            config.loader.selection,
            captions_from=config.loader.captions_from,
            caption_mix=config.loader.caption_mix,
        ),
        seed=config.seed,
        window=config.loader.shuffle_window,
        allow_damage=config.loader.allow_damage,
        cache=cache,
    )
    if config.loader.batches == "random":
        return corpus
    return arrange_batches(
        corpus,
        read_relations(Path(config.loader.relations)),
        config.loader.batches,
        batch_size=config.batch_size,
        cluster=config.loader.hard_cluster,
        cache=cache,
    )


def resolve_shard_cache(loader: LoaderConfig) -> ShardCache | None:
    """Where remote and compressed shards are cached, as configured; None, as the environment says, where nothing is."""
    if not (loader.cache or loader.cache_gb):
        return None
    default = default_cache()
    return dataclasses.replace(
        default,
        folder=Path(loader.cache) if loader.cache else default.folder,
        max_bytes=int(loader.cache_gb * 1e9) if loader.cache_gb else default.max_bytes,
    )


def build_model(config: TrainConfig, device: torch.device, *, with_bias: bool = False) -> VisionLanguageModel:
    """The model to train: that of `start_from`, or the architecture with fresh weights drawn from the seed.

    with_bias: give fresh logits the bias and temperature sigmoid losses start from (SigLIP, Zhai et al. 2023, §3.2).

    Raises:
        UsageError: the model cannot be trained as configured.
    """
    model_settings = config.model
    if model_settings.start_from:
        model = dataclasses.replace(_start_model(model_settings, str(device)), name=config.run)
        if model_settings.dropout or model_settings.drop_path or model_settings.patch_dropout:
            model = _with_dropout(model, model_settings)
    else:
        model = _fresh_model(config, device, with_bias=with_bias)
    if config.objective.temperature:
        model.network.get_parameter("logit_scale").data.fill_(-math.log(config.objective.temperature))
    if model_settings.gradient_checkpointing:
        model.network.set_grad_checkpointing(True)
    if model_settings.lora_rank:
        return _with_adapters(model, config)
    return model


def _with_adapters(model: VisionLanguageModel, config: TrainConfig) -> VisionLanguageModel:
    """The model with fresh adapters in the towers that are not locked, drawn from the seed."""
    settings = config.model
    towers: tuple[str, ...] = ("visual", "text")
    if settings.lock == "image":
        towers = ("text",)
    elif settings.lock == "text":
        towers = ("visual",)
    adapters = LowRank(rank=settings.lora_rank, alpha=settings.lora_alpha or 2 * settings.lora_rank, towers=towers)
    torch.manual_seed(config.seed)
    add_adapters(model.network, adapters)
    return dataclasses.replace(model, config=model.config | adapters.to_config())


def _start_model(model_settings: ModelConfig, device: str) -> VisionLanguageModel:
    """The model of `start_from`, with the image size that is configured.

    Raises:
        UsageError: the configuration asks for another tokenizer or context length than the model's own.
    """
    model = load_network(model_settings.start_from, device=device)
    length = model.tokenizer.context_length
    if model_settings.context_length not in (0, length):
        raise UsageError(
            f"{model_settings.start_from} reads {length} tokens, and --context-length {model_settings.context_length} "
            "does not change that; leave it out."
        )
    # clip is the default, so it is no request
    if model_settings.tokenizer != ModelConfig.tokenizer:
        tokenizer = open_tokenizer(model_settings.tokenizer, length)
        if tokenizer.fingerprint() != model.tokenizer.fingerprint():
            raise UsageError(
                f"{model_settings.start_from} reads the tokens of its own tokenizer, and --tokenizer "
                f"{model_settings.tokenizer} is another; leave it out."
            )
    pixels = model_settings.image_size or model.view.size
    if pixels != model.view.size:
        logger.info(f"The image tower of {model_settings.start_from} goes from {model.view.size} to {pixels} px.")
    return with_image_size(model, pixels)


def _fresh_model(config: TrainConfig, device: torch.device, *, with_bias: bool) -> VisionLanguageModel:
    model_settings = config.model
    architecture = model_config(model_settings.architecture)
    length = model_settings.context_length or architecture["text_cfg"].get("context_length")
    named = model_settings.tokenizer
    # clip is the default, so it is no request; a language model reads its own tokens alone
    if named == ModelConfig.tokenizer and architecture["text_cfg"].get("tower", "").startswith("limber:"):
        named = CAUSAL_PREFIX + architecture["text_cfg"]["folder"]
    tokenizer = open_tokenizer(named, length)
    if model_settings.image_size:
        architecture["vision_cfg"]["image_size"] = model_settings.image_size
    architecture = set_dropout(
        fit_to_tokenizer(architecture, tokenizer),
        dropout=model_settings.dropout,
        drop_path=model_settings.drop_path,
        patch_dropout=model_settings.patch_dropout,
    )
    if config.loader.trim_text and not model_settings.compile and "multimodal_cfg" not in architecture:
        # captioners always have this layout
        # open_clip's layout without it adds the positions of the whole context, so its rows cannot be trimmed
        architecture["custom_text"] = True
    if with_bias:
        architecture |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    # open_clip and timm initialise from the global generator
    torch.manual_seed(config.seed)
    network = build_network(architecture).to(device)
    image_size = architecture["vision_cfg"].get("image_size", 224)
    size = image_size if isinstance(image_size, int) else int(image_size[0])
    # trained weights see what they were trained to see, not CLIP's statistics
    preprocess: dict[str, Any] = {"size": size, **initial_preprocess(architecture["vision_cfg"])}
    if model_settings.resize_mode:
        if preprocess.get("resize_mode") == ASPECT:
            raise UsageError("Images keep their shape by the tower's tokens=; leave --resize-mode out.")
        preprocess["resize_mode"] = model_settings.resize_mode
    view = EvalTransform.from_preprocess(preprocess)
    return VisionLanguageModel(
        name=config.run, network=network, config=architecture, view=view, tokenizer=tokenizer, device=device
    )


def _with_dropout(model: VisionLanguageModel, model_settings: ModelConfig) -> VisionLanguageModel:
    """The same weights in a network with dropout."""
    architecture = set_dropout(
        model.config,
        dropout=model_settings.dropout,
        drop_path=model_settings.drop_path,
        patch_dropout=model_settings.patch_dropout,
    )
    network = build_network(architecture).to(model.device)
    network.load_state_dict(model.network.state_dict())
    return dataclasses.replace(model, network=network, config=architecture)


def open_task(
    config: TrainConfig,
    model: VisionLanguageModel,
    terms: tuple[WeightedLossTerm, ...],
    options: LossOptions,
    noise: PerSampleNoise,
) -> TrainingTask:
    """The network with the heads of its objective, locked as configured, its dropout drawing from `noise`."""
    for tower in ("image", "text"):
        if config.model.lock in (tower, "both"):
            lock_tower(model.network, tower, config.model.unlocked_groups)
    # locked ones keep their statistics
    if config.micro_batch and (batch_norms := batch_norm_layers(model.network)):
        raise UsageError(
            f"{config.model.start_from or config.model.architecture} normalises by statistics of the batch "
            f"({batch_norms[0]} and {len(batch_norms) - 1} more layers), so micro-batches would not give the gradient "
            "of the whole batch. Leave out --micro-batch, or use a tower with layer norms (a ViT, a ConvNeXt)."
        )
    if config.model.locked_features_gb:
        keep_locked_features(model.network, config.model.locked_features_gb)
    # after locking, before the optimizer sees the parameters: it replaces modules, not weights
    use_per_sample_dropout(model.network, noise)
    # FSDP's processes take part in each pass of a tower, so all need the same number; groups of parts take more memory
    may_skip = config.sharding != "fsdp" and (not config.micro_batch or packing_tower(model.network) is not None)
    task = build_task(model, terms, options, skip_padding=model.trims_padding and may_skip)
    if any(isinstance(module, nn.MultiheadAttention) for module in task.modules()):
        reduce_attention_work(task.network, config.model, model.device, reads_patches=task.needs_patches)
    return task


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Device and processes; on a CPU, this process keeps the memory it frees."""
    # never with accelerate's own mixed precision: it has one for the whole process, and refuses a second run of another
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def parallelize_task(accelerator: Accelerator, task: TrainingTask, config: TrainConfig) -> nn.Module:
    """The task as its processes train it together; build the optimizer afterwards, since weights may be sharded."""
    task.train()
    if config.model.channels_last:
        task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.model.compile:
        # in place, so that the names in state_dict stay without a prefix
        task.compile()
    if config.sharding == "fsdp":
        apply_fsdp(task, accelerator.device, is_bf16=config.precision == "bf16")
        return task
    if config.precision == "bf16":
        compute_in_bfloat16(task, accelerator.device, config.model)
    return accelerator.prepare_model(task)


# of mallopt in glibc's malloc.h
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU free, for those of the next step.

    By default glibc maps every large tensor and unmaps it when freed, so each step meets pages the kernel has to clear
    first, up to a third of its time. Returns False, and changes nothing, where the environment configures the allocator
    already (MALLOC_*, GLIBC_TUNABLES) or the C library is not glibc.

    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_MAX.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    keeps_large_blocks = bool(mallopt(_MMAP_MAX, 0))
    keeps_the_top = bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
    return keeps_large_blocks and keeps_the_top


def count_micro_batches(config: TrainConfig, num_processes: int) -> int:
    """How many micro-batches a process's share of a batch is split into.

    Raises:
        UsageError: the share cannot be split evenly.
    """
    if not config.micro_batch:
        return 1
    local_batch_size = config.batch_size // num_processes
    size = min(config.micro_batch, local_batch_size)
    if local_batch_size % size:
        divisors = [divisor for divisor in range(1, size + 1) if local_batch_size % divisor == 0]
        raise UsageError(
            f"micro_batch = {config.micro_batch} does not divide a process's {local_batch_size} samples of the batch "
            f"of {config.batch_size}; try {max(divisors)}."
        )
    return local_batch_size // size


def total_steps(config: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of the run; the last epoch is filled up to a whole batch."""
    if config.steps >= 0:
        return config.steps
    # a fraction, since 0.29 * 100 is 28.999… in floating point
    samples_seen = round(Fraction(str(config.epochs)) * num_samples)
    return max(1, -(-samples_seen // config.batch_size))


def build_collator(
    config: TrainConfig,
    plan: BatchSampler,
    model: VisionLanguageModel,
    *,
    trim_text: bool,
    caption_mix: CaptionMix | None = None,
    cached: CachedFeatures | None = None,
) -> TrainingCollator:
    """What the workers make of the samples of a batch. trim_text: cut its tokens to the longest caption."""
    if model.view.grid:
        check_for_own_shapes(config)
    view = RandomResizedCrop.of_view(model.view, scale=config.loader.crop_scale, flip=config.loader.flip)
    objective = config.objective
    num_crops = objective.local_views
    return TrainingCollator(
        plan=plan,
        view=view,
        tokenizer=model.tokenizer,
        draw=CaptionSampler(
            languages=config.loader.languages,
            language_weights=config.loader.language_weights,
            tag_fields=config.loader.tag_fields,
            sentences=config.loader.sentences,
        ),
        arrays=PrecomputedFeatures(names=config.loader.arrays) if config.loader.arrays else None,
        seed=config.seed,
        max_bad_in_a_row=config.loader.max_bad_in_a_row,
        decode_on_device=config.loader.decode_on_device,
        num_sentences=objective.sub_captions,
        local=LocalCrops.for_global_crop(view, number=num_crops) if num_crops else None,
        has_identities=objective.same_pairs != "negative",
        class_labels=open_class_labels(objective.class_field, objective.class_names) if objective.class_field else None,
        trim_text=trim_text,
        caption_mix=caption_mix,
        cached=cached,
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
    """Claim the run's folder for this configuration; with `resume`, restore the state from its newest checkpoint."""
    if accelerator.is_main_process:
        prepare_run_folder(config, resume=resume, allow=allow)
    # the others must not look for checkpoints before the main process has checked the folder
    accelerator.wait_for_everyone()
    if resume:
        restore_state(
            config, state, corpus, remote_store=open_remote_store(config), is_main=accelerator.is_main_process
        )


def prepare_run_folder(config: TrainConfig, *, resume: bool, allow: tuple[str, ...] = ()) -> None:
    """Make the run's folder, with `config.toml` in it.

    allow: keys, or groups of them, that may differ from those the run was begun with.

    Raises:
        UsageError: the folder is in use without `resume`, or the run was begun with another configuration.
    """
    run = Path(config.run)
    saved = run / CONFIG
    check_allowed_keys(allow, asdict(config))
    remote_store = open_remote_store(config)
    if not resume and remote_store and remote_store.names():
        raise UsageError(
            f"{remote_store.url} holds checkpoints of a run already; resume it with --resume, or name another run."
        )
    if resume and saved.is_file():
        _check_same_losses(run, config)
        changed = changed_settings(asdict(from_toml(TrainConfig, saved)), asdict(config))
        refused = disallowed_changes(changed, allow, free=free_on_resume(config))
        # everything that has an influence on the weights must be what the run was begun with
        if refused:
            raise changed_config_error(run, refused)
        for line in disallowed_changes(changed, (), free=free_on_resume(config)):
            logger.info(f"Changed, as allowed: {line}")
    elif run.exists() and (is_complete(run) or any(run.iterdir())):
        raise UsageError(f"{run} exists already; resume it with --resume, name another run, or remove it.")
    run.mkdir(parents=True, exist_ok=True)
    write_text(saved, to_toml(config))


def _check_same_losses(run: Path, config: TrainConfig) -> None:
    """Refuse to go on with a loss whose name meant another one when the run was begun.

    Raises:
        UsageError: it was begun before terms got other meanings (`FORMER_NAMES`), and has one of them.
    """
    # a setting that came with the new meanings
    if "patch_threshold" in read_toml(run / CONFIG).get("objective", {}):
        return
    terms = parse_objective(config.objective.objective)
    if not any(weighted.name in FORMER_NAMES for weighted in terms):
        return
    summands: list[str] = []
    for weighted in terms:
        summands.append(f"{weighted.weight:g}*{FORMER_NAMES.get(weighted.name, weighted.name)}")
    former = " + ".join(summands)
    raise UsageError(
        f"{run} was begun when {' and '.join(FORMER_NAMES)} computed what {' and '.join(FORMER_NAMES.values())} do "
        f"now: go on with --objective '{former}' --allow objective.objective."
    )


def restore_state(
    config: TrainConfig, state: TrainState, corpus: Corpus, *, remote_store: RemoteCheckpointStore | None, is_main: bool
) -> None:
    """Restore the newest undamaged checkpoint, if there is one.

    Raises:
        UsageError: the checkpoint belongs to another sequence of samples.
    """
    if not restore_newest(Path(config.run) / CHECKPOINTS, state, remote_store=remote_store, is_main=is_main):
        return
    if state.sequence != corpus.fingerprint:
        raise UsageError(
            f"{config.data} is not what {config.run} was begun with: shards, selections or shares have changed since, "
            "so the run cannot resume from its position. Restore them, or begin another run with --start-from this one."
        )
    if is_main:
        logger.info(f"Resuming {config.run} after step {state.step:,}.")


def open_remote_store(config: TrainConfig) -> RemoteCheckpointStore | None:
    """Where checkpoints are uploaded to, if anywhere."""
    address = config.safety.checkpoint_to
    return RemoteCheckpointStore(address=address, run=Path(config.run).name) if address else None
