"""The inputs of a step, and the models that compute some of them while training: a teacher, the EMA of the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from vlm.data.collate import NO_IDENTITY, TrainingBatch, content_hash
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.dropout import PerSampleNoise
from vlm.models.load import load_model
from vlm.models.model import VisionLanguageModel, autocast_to, normalise
from vlm.models.network import Network
from vlm.tensor_types import Float, Int64, Tensor, UInt8
from vlm.train.averaging import EMA
from vlm.train.objectives.global_contrastive import IMAGE_AVERAGE, INNER_RATE, TEXT_AVERAGE, GlobalAverages
from vlm.train.objectives.loss_term import Inputs
from vlm.train.run_config import TrainConfig
from vlm.train.state import seed_step
from vlm.train.task import TrainingTask, WeightedLossTerm, input_names, takes_embeddings

InputProvider = Callable[[UInt8[Tensor, "B 3 H W"], Sequence[str]], Inputs]
"""Inputs that a model computes from images and captions while training, without gradient."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchInputs:
    """The micro-batches of one process's share of a global batch.

    first_sample: number, in the run, of its first sample. input_providers: by the input they give.
    averages: of all samples, where a term keeps them; shard_starts: the number of each shard's first sample in the
    data; inner_rate: γ of this step.
    """

    batches: Sequence[TrainingBatch]
    view: EvalTransform
    device: torch.device
    noise: PerSampleNoise
    seed: int
    step: int
    process: int
    first_sample: int
    with_identities: bool
    input_providers: dict[str, InputProvider]
    averages: GlobalAverages | None = None
    shard_starts: tuple[int, ...] = ()
    inner_rate: float = 1.0

    def __call__(self, number: int, names: frozenset[str]) -> Inputs:
        """The inputs of a micro-batch, on the device; what the network draws from is seeded for it."""
        batch = self.batches[number]
        inputs = self.non_image_inputs(number)
        images = batch.images.to(self.device, non_blocking=True)
        inputs["pixels"] = normalise(images, self.view)
        if batch.local_images is not None and "local_pixels" in names:
            local = batch.local_images.to(self.device, non_blocking=True)
            inputs["local_pixels"] = normalise(local.flatten(0, 1), self.view).unflatten(0, local.shape[:2])
        active_providers = [self.input_providers[name] for name in sorted(names & self.input_providers.keys())]
        for input_provider in dict.fromkeys(active_providers):  # one may give several of the inputs
            # raw pixels, since a teacher normalises them by its own statistics
            inputs |= input_provider(images, batch.captions)
        # the last thing before the forward pass, so that both passes of gradient caching draw the same
        self.noise.rows = inputs["rows"]
        seed_step(self.seed, self.step, self.process, number)
        return inputs

    def non_image_inputs(self, number: int) -> Inputs:
        """All inputs of a micro-batch but images and what providers compute."""
        batch = self.batches[number]
        inputs: Inputs = {"tokens": batch.tokens, "rows": self._rows(number)} | batch.arrays
        if batch.sub_tokens is not None:
            inputs["sub_tokens"] = batch.sub_tokens
        if batch.class_labels is not None:
            inputs["class_label"] = batch.class_labels
        if self.with_identities:
            inputs["same"] = pair_identities(batch)
        if self.averages is not None:
            samples = sample_numbers([batch], self.shard_starts)
            inputs |= self.averages.inputs(samples)
            inputs[INNER_RATE] = torch.full((len(samples),), self.inner_rate)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def _rows(self, number: int) -> Int64[Tensor, " B"]:
        # numbers in the run, so that noise drawn by them does not depend on micro-batches or processes
        first = self.first_sample + sum(len(batch.keys) for batch in self.batches[:number])
        return torch.arange(first, first + len(self.batches[number].keys))


def sample_numbers(batches: Sequence[TrainingBatch], shard_starts: Sequence[int]) -> Int64[Tensor, " B"]:
    """The numbers, in the data, of the samples shown: of a replaced one that of its replacement."""
    numbers: list[int] = []
    for batch in batches:
        numbers += [shard_starts[sample.shard] + sample.number for sample in batch.used]
    return torch.tensor(numbers)


def pair_identities(batch: TrainingBatch) -> Int64[Tensor, "B G"]:
    """What makes two pairs the same: key and image as the loader hashed them, where it did, and the caption."""
    captions = _text_identities(batch.captions)
    if batch.identities is None:
        return torch.cat([_text_identities(batch.keys), captions], dim=1)
    return torch.cat([batch.identities, captions.to(batch.identities.device)], dim=1)


def _text_identities(texts: Sequence[str]) -> Int64[Tensor, "B 1"]:
    """A hash of each text; an empty one is the same as no other."""
    return torch.tensor([content_hash(text.encode()) if text else NO_IDENTITY for text in texts])[:, None]


class OnlineTeacher:
    """Another model, run on what the student sees: gives `teacher_image` and `teacher_text`, of unit length.

    Images come in the student's view and are brought to the size and the statistics of the teacher's; captions go
    through the teacher's own tokenizer. The teacher is frozen and runs in its own precision.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        model.network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"], captions: Sequence[str]) -> Inputs:
        """Embeddings of images and captions, on the teacher's device."""
        model = self.model
        # from the student's pixels, not the file: the teacher has to see the same crop
        resized = resize_images(images.to(model.device), model.view.size, model.view.interpolation)
        pixels = normalise(resized, model.view)
        tokens = torch.from_numpy(model.tokenizer.encode(list(captions))).to(model.device)
        with autocast_to(model.precision, model.device):
            image = model.network.encode_image(pixels)
            text = model.network.encode_text(tokens)
        return {
            "teacher_image": F.normalize(image.float(), dim=-1),
            "teacher_text": F.normalize(text.float(), dim=-1),
        }


class EMATeacher:
    """The student's own image tower with the EMA of its weights (EMA): gives `global_target`.

    weights: by the names they have in the network; read in each call, so they may be updated in place. What is not
    among them (buffers) is the student's own. The tower runs in evaluation mode, so it neither drops anything nor
    changes statistics.

    Raises:
        UsageError: the weights are not the network's.
    """

    def __init__(self, weights: dict[str, Tensor], model: VisionLanguageModel) -> None:
        unknown = weights.keys() - model.network.state_dict().keys()
        if unknown:
            raise UsageError(f"The averaged weights are of another network: it has no {min(unknown)}.")
        self.model = model
        self.weights = weights
        self._encoder = _ImageEncoder(model.network)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"], captions: Sequence[str]) -> Inputs:
        """Unit vectors of the whole view; captions are not read."""
        pixels = normalise(images.to(self.model.device), self.model.view)
        modes = {module: module.training for module in self._encoder.modules()}
        self._encoder.eval()
        try:
            # functional_call replaces parameters and keeps the buffers of the module itself
            named = {f"network.{name}": tensor for name, tensor in self.weights.items()}
            image: Tensor = functional_call(self._encoder, named, (pixels,))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return {"global_target": F.normalize(image.float(), dim=-1)}


def resize_images(images: UInt8[Tensor, "B 3 H W"], size: int, interpolation: str) -> UInt8[Tensor, "B 3 S S"]:
    """Square images at another size, antialiased; unchanged if they have it already."""
    if images.shape[-2:] == (size, size):
        return images
    # antialiased like the image library's resize, without which a smaller teacher sees aliasing
    resized = F.interpolate(images.float(), size=(size, size), mode=interpolation, antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class _ImageEncoder(nn.Module):
    """`encode_image` as the forward pass, since that is what `functional_call` calls."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.network.encode_image(pixels)


_TEACHER_INPUTS = frozenset({"teacher_image", "teacher_text"})
_EMA_INPUTS = frozenset({"global_target"})
_HINTS = {
    "sub_tokens": "--sub-captions N, the sentences shown of each sample",
    "class_label": "--class-field NAME --class-names FILE",
    "local_pixels": "--local-views N, the small crops of each image",
    "teacher_image": "--teacher MODEL, or --arrays teacher_image teacher_text of shards made by vlm reinforce",
    "teacher_text": "--teacher MODEL, or --arrays teacher_image teacher_text of shards made by vlm reinforce",
    "text_embedding": "--arrays text_embedding of shards made by vlm reinforce --text-model",
}
_ALWAYS_AVAILABLE = frozenset({"pixels", "tokens", "rows", "same", IMAGE_AVERAGE, TEXT_AVERAGE, INNER_RATE})


def needs_ema(config: TrainConfig, terms: Sequence[WeightedLossTerm]) -> bool:
    """Whether an EMA of the weights is kept.

    Raises:
        UsageError: a term learns from it, and it has no decay.
    """
    if _EMA_INPUTS & input_names(terms) and not config.optimizer.average_decay:
        raise UsageError(
            f"objective = {config.objective.objective!r} learns from the EMA of the weights; give its decay, "
            "e.g. --ema-decay 0.996."
        )
    return bool(config.optimizer.average_decay)


def open_input_providers(
    config: TrainConfig, model: VisionLanguageModel, terms: Sequence[WeightedLossTerm], ema: EMA | None
) -> dict[str, InputProvider]:
    """Models that compute inputs while training, by the inputs they give.

    Raises:
        UsageError: a teacher is named and no term learns from it, or there is no such model.
    """
    read = input_names(terms)
    providers: dict[str, InputProvider] = {}
    if config.objective.teacher:
        if not _TEACHER_INPUTS & read:
            raise UsageError(
                f"teacher = {config.objective.teacher!r}, but the objective {config.objective.objective!r} learns from "
                "none; add a term, e.g. 'clip + distill'."
            )
        teacher = OnlineTeacher(load_model(config.objective.teacher, device=str(model.device)))
        providers |= dict.fromkeys(_TEACHER_INPUTS & read, teacher)
    if ema and _EMA_INPUTS & read:
        # functional_call would need the whole EMA, of which each process has a share
        if config.sharding == "fsdp":
            raise UsageError(
                f"objective = {config.objective.objective!r} learns from the whole mean of the weights, of which each "
                "process would hold a share; leave out --sharding fsdp."
            )
        providers |= dict.fromkeys(_EMA_INPUTS, EMATeacher(ema.weights, model))
    return providers


def check_loss_inputs(
    config: TrainConfig,
    terms: Sequence[WeightedLossTerm],
    task: TrainingTask,
    input_providers: dict[str, InputProvider],
) -> None:
    """Check that every input the terms read is given by something.

    Raises:
        UsageError: naming the input and what gives it.
    """
    # BYOL's collapse: constant embeddings agree perfectly
    if {weighted.name for weighted in terms} == {"local_to_global"}:
        raise UsageError(
            "objective = 'local_to_global' alone is least where all images are alike; add a term that tells them "
            "apart, e.g. 'clip + local_to_global'."
        )
    available = _ALWAYS_AVAILABLE | input_providers.keys() | set(config.loader.arrays)
    available |= {"sub_tokens"} if config.objective.sub_captions else set[str]()
    available |= {"class_label"} if config.objective.class_field else set[str]()
    available |= {"local_pixels"} if config.objective.local_views else set[str]()
    # a language model embeds the captions itself where no embedding of them is stored (FLAME)
    optional = {"text_embedding"} if takes_embeddings(task.network) else set[str]()
    for name in sorted((input_names(terms) | (task.inputs - optional)) - available):
        raise UsageError(f"objective = {config.objective.objective!r} needs {name}: give {_HINTS.get(name, name)}.")
