"""The training task: an objective, and a network with the heads that it adds, which computes what its loss terms read.

An objective is an expression that sums loss terms by name (`parse_objective`). Also here: which weights of the network
are trained; towers can be locked (LiT), and what no term reads is frozen.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.config import lookup
from vlm.data.precomputed_features import IMAGE_FEATURE, TEXT_FEATURE
from vlm.data.tokenizers import Padding
from vlm.errors import UsageError
from vlm.models.coca import can_caption_in_parallel, parallel_logits
from vlm.models.model import VisionLanguageModel, is_captioner
from vlm.models.network import Network
from vlm.models.patch_features import ImageTowerOutput, encode_crops, run_image_tower, supports_patch_features
from vlm.models.towers.tower import batch_norm_layers, freeze_batch_norm
from vlm.tensor_types import Bool, Float, Int64, Tensor
from vlm.train.caption_packing import encode_captions
from vlm.train.objectives.captioning import CAPPA, CAPTION, MASK_EMBEDDING, choose_parallel_captions
from vlm.train.objectives.classification import CLASS_HEAD, CLASSIFY
from vlm.train.objectives.contrastive import CLIP, DCL, RANKING, SIGLIP, WEIGHTED_DCL
from vlm.train.objectives.distillation import DINO, DISTILL, LOCAL_TO_GLOBAL, PROTOTYPE_HEAD, TEXT_ALIGN
from vlm.train.objectives.fine_grained import GROUPING, JOINT_SUB_CAPTIONS, SPARC, SUB_CAPTIONS
from vlm.train.objectives.global_contrastive import FASTCLIP, SOGCLR
from vlm.train.objectives.loss_term import SHARED_OUTPUTS, Heads, Inputs, LossOptions, LossTerm, Outputs

LOSS_TERMS: dict[str, LossTerm] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "dcl": DCL,
    "weighted_dcl": WEIGHTED_DCL,
    "ranking": RANKING,
    "sogclr": SOGCLR,
    "fastclip": FASTCLIP,
    "distill": DISTILL,
    "text_align": TEXT_ALIGN,
    "classify": CLASSIFY,
    "caption": CAPTION,
    "cappa": CAPPA,
    "sub_captions": SUB_CAPTIONS,
    "joint_sub_captions": JOINT_SUB_CAPTIONS,
    "grouping": GROUPING,
    "sparc": SPARC,
    "local_to_global": LOCAL_TO_GLOBAL,
    "dino": DINO,
}
"""Adding a loss term is one function in a file of `vlm.train.objectives` and one line here."""

ALIASES: dict[str, str] = {
    "coca": "clip + 2*caption",
    "dreamlip": "clip + sub_captions + grouping",
    "gpt4image": "classify + text_align",
    "rs-m-clip": "clip + dino",
}
"""Aliases of sums that papers use."""

FORMER_NAMES: dict[str, str] = {"sub_captions": "joint_sub_captions", "grouping": "sparc"}
"""What two terms computed before 2026-11-29 is computed by these since; their names went to DreamLIP's own forms."""

_SUMMAND = re.compile(r"(?:(?P<weight>[0-9.eE+-]+)\s*\*\s*)?(?P<name>[a-z][a-z0-9_-]*)")


@dataclass(frozen=True, kw_only=True)
class WeightedLossTerm:
    """A term of a sum."""

    name: str
    weight: float
    term: LossTerm


def input_names(terms: Iterable[WeightedLossTerm]) -> frozenset[str]:
    """Names of the inputs that any of the terms reads."""
    names: set[str] = set()
    for weighted in terms:
        names.update(weighted.term.inputs)
    return frozenset(names)


def parse_objective(expression: str) -> tuple[WeightedLossTerm, ...]:
    """The terms of an expression such as `siglip + 2*caption`.

    >>> [(weighted.name, weighted.weight) for weighted in parse_objective("coca")]
    [('clip', 1.0), ('caption', 2.0)]

    Raises:
        UsageError: it cannot be read, names an unknown term (the nearest is named) or one twice.
    """
    terms: list[WeightedLossTerm] = []
    # an alias stands for a whole expression, not for a term of one
    for summand in ALIASES.get(expression.strip(), expression).split("+"):
        match = _SUMMAND.fullmatch(summand.strip())
        try:
            weight = float(match["weight"] or 1) if match else 0.0
        except ValueError:
            weight = 0.0
        # a term without weight still costs its forward pass, and nan passes every other comparison
        if not match or not 0 < weight < float("inf"):
            raise UsageError(
                f"objective = {expression!r}: {summand.strip()!r} is not a term; write NAME or WEIGHT*NAME joined by "
                f"+, e.g. 'clip + 2*caption'. Names: {', '.join([*LOSS_TERMS, *ALIASES])}."
            )
        name = match["name"]
        terms.append(WeightedLossTerm(name=name, weight=weight, term=lookup(LOSS_TERMS, name, "objective")))
    # losses are kept by name: the second would replace the first
    names = [weighted.name for weighted in terms]
    if len(set(names)) < len(names):
        raise UsageError(f"objective = {expression!r} names a term twice; give it one weight.")
    return tuple(terms)


class TrainingTask(nn.Module):
    """The network and its heads; `forward` maps inputs to outputs, both by name (`vlm.train.objectives.loss_term`).

    padding: of captions, which go through their tower without it; None: as whole rows.
    """

    def __init__(
        self,
        network: Network,
        heads: Heads,
        outputs: Sequence[str],
        options: LossOptions,
        *,
        image_size: int,
        padding: Padding | None = None,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.network = network
        self.heads = nn.ModuleDict(heads)
        self.options = options
        self.image_size = image_size
        # decided once: which outputs are computed does not depend on the batch
        self._output_heads = select_output_heads(network, outputs)

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs it reads in addition to pixels and tokens; `text_embedding` is read if it is given."""
        names = {"text_embedding"} if takes_embeddings(self.network) else set[str]()
        for output_head in self._output_heads:
            names.update(output_head.inputs)
        return frozenset(names)

    def forward(self, inputs: Inputs, outputs: frozenset[str] | None = None) -> Outputs:
        """All outputs the objective reads, or the named ones; without those whose inputs are missing."""
        context = ForwardContext(self, inputs)
        computed: Outputs = {}
        for output_head in self._output_heads:
            is_read = outputs is None or not outputs.isdisjoint(output_head.provides)
            if is_read and inputs.keys() >= set(output_head.inputs):
                computed |= output_head.compute(context)
        # inside the forward pass, since DDP follows what its outputs depend on
        computed["logit_scale"] = self.network.get_parameter("logit_scale").exp()
        bias = getattr(self.network, "logit_bias", None)
        if bias is not None:
            computed["logit_bias"] = bias
        for name in SHARED_OUTPUTS & self.heads.keys():
            computed[name] = self.heads[name]()
        if PROTOTYPE_HEAD in self.heads:
            computed["prototype_centre"] = self.heads.get_submodule(PROTOTYPE_HEAD).get_buffer("centre")
        return computed

    @property
    def needs_patches(self) -> bool:
        """Whether an output is computed from the features of patches."""
        return any("patch_features" in output_head.provides for output_head in self._output_heads)


class ForwardContext:
    """One forward pass: what several outputs are computed from is computed once."""

    def __init__(self, task: TrainingTask, inputs: Inputs) -> None:
        self.task = task
        self.network: Network = task.network
        self.inputs = inputs

    @cached_property
    def image(self) -> ImageTowerOutput:
        """The output of the image tower, or of its head alone where the features of a frozen trunk are given."""
        if IMAGE_FEATURE in self.inputs:
            visual: Any = self.network.get_submodule("visual")
            return ImageTowerOutput(image=visual.project(self.inputs[IMAGE_FEATURE]))
        return run_image_tower(self.network, self.inputs["pixels"], with_patches=self.task.needs_patches)

    @cached_property
    def image_features(self) -> Float[Tensor, "B D"]:
        """Unit vectors of the images."""
        return F.normalize(self.image.image, dim=-1)

    @cached_property
    def text(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the captions, not normalised, and the states a decoder continues from."""
        text: Any = getattr(self.network, "text", None)
        if TEXT_FEATURE in self.inputs:
            return text.project(self.inputs[TEXT_FEATURE]), None
        if takes_embeddings(self.network) and "text_embedding" in self.inputs:
            return text.project(self.inputs["text_embedding"]), None
        if is_captioner(self.network):
            return cast(tuple[Tensor, Tensor], self.network.get_submodule("text")(self.inputs["tokens"]))
        tokens = self.inputs["tokens"]
        # not on the device without data on which FLOPs are counted
        if self.task.padding is not None and tokens.device.type == "cpu":
            return encode_captions(self.network, tokens, self.task.padding), None
        return self.encode_text(tokens), None

    @cached_property
    def local_features(self) -> Float[Tensor, "B V D"]:
        """Unit vectors of the small crops."""
        crops = self.inputs["local_pixels"]
        features = encode_crops(self.network, crops.flatten(0, 1), self.task.image_size)
        return F.normalize(features, dim=-1).unflatten(0, crops.shape[:2])

    def encode_text(self, tokens: Int64[Tensor, "T L"]) -> Float[Tensor, "T D"]:
        """Embeddings of other texts than the captions."""
        return self.network.encode_text(tokens)


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """A way to compute outputs.

    inputs: what it reads in addition to pixels and tokens. is_supported: whether a network can compute them. hint:
    which networks can.
    """

    provides: tuple[str, ...]
    compute: Callable[[ForwardContext], Outputs]
    inputs: tuple[str, ...] = ()
    is_supported: Callable[[nn.Module], bool] = lambda network: True
    hint: str = ""


def image_features(context: ForwardContext) -> Outputs:
    """Unit vectors of images."""
    return {"image_features": context.image_features}


def text_features(context: ForwardContext) -> Outputs:
    """Unit vectors of captions."""
    return {"text_features": F.normalize(context.text[0], dim=-1)}


def caption_logits(context: ForwardContext) -> Outputs:
    """Logits of the next token at each position of the caption, with their labels (CoCa, §3.2)."""
    memory = context.image.memory
    states = context.text[1]
    tokens = context.inputs["tokens"]
    assert memory is not None
    assert states is not None
    logits = context.network.get_submodule("text_decoder")(memory, states[:, :-1])
    return {"logits": logits, "labels": tokens[:, 1:]}


def parallel_caption_logits(context: ForwardContext) -> Outputs:
    """The same, with a share of the captions predicted all at once (CapPa, §3)."""
    task = context.task
    memory = context.image.memory
    assert memory is not None
    logits, labels = parallel_logits(
        context.network,
        memory,
        context.inputs["tokens"],
        task.heads.get_submodule(MASK_EMBEDDING).get_parameter("weight")[0],
        choose_parallel_captions(context.inputs["rows"], task.options.config.parallel_share),
        pad_token=task.options.pad_token,
    )
    return {"parallel_logits": logits, "parallel_labels": labels}


def sub_caption_features(context: ForwardContext) -> Outputs:
    """Unit vectors [B, S, D] of the sentences drawn from each sample's captions; zeros where there is none."""
    sub_tokens = context.inputs["sub_tokens"]
    pad_token = context.task.options.pad_token
    is_present: Bool[Tensor, "B S"] = (sub_tokens != pad_token).any(dim=-1)
    length = sub_tokens.shape[2]
    # a row of nothing but padding makes some towers divide by zero, so they get the caption instead
    caption = context.inputs["tokens"][:, :length]
    caption = F.pad(caption, (0, length - caption.shape[1]))
    tokens = torch.where(is_present[..., None], sub_tokens, caption[:, None])
    features = context.encode_text(tokens.flatten(0, 1)).unflatten(0, sub_tokens.shape[:2])
    # absent sentences become zeros, which have no similarity to anything
    return {"sub_features": F.normalize(features, dim=-1) * is_present[..., None]}


def patch_features(context: ForwardContext) -> Outputs:
    """Patches [B, P, D] in the joint space, not normalised (`vlm.models.patch_features`)."""
    patches = context.image.patches
    assert patches is not None
    return {"patch_features": patches}


def local_crop_features(context: ForwardContext) -> Outputs:
    """Unit vectors [B, V, D] of small crops."""
    return {"local_features": context.local_features}


def aligned_image_features(context: ForwardContext) -> Outputs:
    """The image in the space of precomputed caption embeddings [B, E]: head `text_align` on its unit vector."""
    return {"aligned_image": context.task.heads.get_submodule("text_align")(context.image_features)}


def class_logits(context: ForwardContext) -> Outputs:
    """Logits of the classes [B, K]: head `classify` on the image's embedding, not normalised."""
    return {"class_logits": context.task.heads.get_submodule(CLASS_HEAD)(context.image.image)}


def prototype_cosines(context: ForwardContext) -> Outputs:
    """Cosines with the prototypes: of crops [B, V, K], and of the EMA network's whole views [B, K]."""
    head: Any = context.task.heads.get_submodule(PROTOTYPE_HEAD)
    crops = context.local_features
    return {"crop_prototypes": head(crops), "target_prototypes": head.teach(context.inputs["global_target"].to(crops))}


_CAPTIONER = "it needs a network with a decoder, e.g. --architecture tiny-coca"


OUTPUT_HEADS: tuple[OutputHead, ...] = (
    OutputHead(provides=("image_features",), compute=image_features),
    OutputHead(provides=("text_features",), compute=text_features),
    OutputHead(provides=("logits", "labels"), compute=caption_logits, is_supported=is_captioner, hint=_CAPTIONER),
    OutputHead(
        provides=("parallel_logits", "parallel_labels"),
        compute=parallel_caption_logits,
        inputs=("rows",),
        is_supported=can_caption_in_parallel,
        hint=_CAPTIONER,
    ),
    OutputHead(provides=("sub_features",), compute=sub_caption_features, inputs=("sub_tokens",)),
    OutputHead(
        provides=("patch_features",),
        compute=patch_features,
        is_supported=supports_patch_features,
        hint="it needs an image tower with patches, a ViT or one of timm",
    ),
    OutputHead(provides=("local_features",), compute=local_crop_features, inputs=("local_pixels",)),
    OutputHead(
        provides=("crop_prototypes", "target_prototypes"),
        compute=prototype_cosines,
        inputs=("local_pixels", "global_target"),
    ),
    OutputHead(provides=("aligned_image",), compute=aligned_image_features),
    OutputHead(provides=("class_logits",), compute=class_logits),
)
"""Adding an output is one function and one line here."""


def select_output_heads(network: nn.Module, outputs: Sequence[str]) -> list[OutputHead]:
    """The heads that compute these outputs, each once.

    Raises:
        UsageError: the network cannot compute one of them.
    """
    selected: list[OutputHead] = []
    for name in dict.fromkeys(outputs):
        # temperatures and bias are weights themselves: no head computes them
        if name in SHARED_OUTPUTS:
            continue
        output_head = next(output_head for output_head in OUTPUT_HEADS if name in output_head.provides)
        if output_head in selected:
            continue
        if not output_head.is_supported(network):
            raise UsageError(f"The objective reads {name}: {output_head.hint}.")
        selected.append(output_head)
    return selected


def takes_embeddings(network: nn.Module) -> bool:
    """Whether the text tower is a language model whose embeddings can be precomputed (FLAME)."""
    return bool(getattr(getattr(network, "text", None), "takes_embeddings", False))


def build_task(
    model: VisionLanguageModel, terms: Sequence[WeightedLossTerm], options: LossOptions, *, skip_padding: bool = False
) -> TrainingTask:
    """The task of a sum of terms, on the model's device, with fresh heads drawn from torch's global generator.

    Weights that no term reads (a decoder that writes no captions, an unused temperature) are frozen, since nothing
    would move them but weight decay, and since several processes wait for the gradient of every trained weight.
    """
    # heads are drawn in the order of the terms, so the same objective and seed give the same heads
    heads: Heads = {}
    output_names: dict[str, None] = {}
    for weighted in terms:
        heads |= weighted.term.heads(model, options) if weighted.term.heads else {}
        output_names |= dict.fromkeys(weighted.term.outputs)
    outputs = list(output_names)
    # SigLIP's bias, which open_clip's networks have only where their configuration sets init_logit_bias
    if "logit_bias" in outputs and getattr(model.network, "logit_bias", None) is None:
        model.network.register_parameter("logit_bias", nn.Parameter(torch.zeros((), device=model.device)))
    # a captioner's decoder goes on from the states of the whole rows
    is_skipped = skip_padding and model.device.type == "cpu" and not is_captioner(model.network)
    padding = Padding.of(model.tokenizer) if is_skipped else None
    task = TrainingTask(model.network, heads, outputs, options, image_size=model.view.size, padding=padding)
    task.to(model.device)
    freeze_unused_parameters(task, example_inputs(model, task, options), outputs)
    return task


def example_inputs(model: VisionLanguageModel, task: TrainingTask, options: LossOptions) -> Inputs:
    """Two empty samples, with every input the task reads."""
    size = model.view.size
    kind = model.network.get_parameter("logit_scale").dtype
    tokens = torch.full((2, model.tokenizer.context_length), options.pad_token)
    examples: Inputs = {
        "rows": torch.arange(2),
        "sub_tokens": tokens[:, None],
        "local_pixels": torch.zeros(2, 1, 3, size, size, dtype=kind),
        "global_target": torch.zeros(2, model.embedding_size, dtype=kind),
    }
    if takes_embeddings(model.network):
        text: Any = model.network.get_submodule("text")
        examples["text_embedding"] = torch.zeros(2, text.embedding_size, dtype=kind)

    inputs: Inputs = {"pixels": torch.zeros(2, 3, size, size, dtype=kind), "tokens": tokens}
    inputs |= {name: tensor for name, tensor in examples.items() if name in task.inputs}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def lock_tower(network: Network, tower: Literal["image", "text"], unlocked_groups: int = 0) -> int:
    """Freeze a tower's weights but for its last groups of layers (LiT, Zhai et al. 2022, §3.1).

    Groups are open_clip's: of its own transformers the projection is the last one, the last block with its norm the one
    before, then block by block, then the embeddings; of a timm tower those of timm, and the projection after it is
    always trained, since no pretraining gave it. Batch norms of locked groups keep their statistics. Autograd builds no
    graph below the first weight that is trained. Returns the number of locked weights.

    Raises:
        UsageError: the tower cannot be locked, or not in part.
    """
    module = network.get_submodule("visual") if tower == "image" else getattr(network, "text", network)
    before = _trainable_parameters(module)
    if type(module).__name__ == "TimmModel":
        _lock_timm(module.get_submodule("trunk"), unlocked_groups)
    elif module is network:  # open_clip's CLIP keeps the parts of its text tower in itself
        cast(Any, network).lock_text_tower(unlocked_layers=unlocked_groups)
    else:
        _lock_module(module, tower, unlocked_groups)
    # fixed positions, which open_clip unlocks with their group
    for parameter in _trainable_parameters(module) - before:
        parameter.requires_grad_(False)
    locked = before - _trainable_parameters(module)
    _freeze_batch_norm_statistics(module)
    return sum(parameter.numel() for parameter in locked)


def _lock_module(module: Any, tower: str, unlocked_groups: int) -> None:
    if not hasattr(module, "lock"):
        if unlocked_groups:
            raise UsageError(
                f"unlocked_groups = {unlocked_groups}: this {tower} tower can only be locked whole; give 0."
            )
        module.requires_grad_(False)
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # open_clip's adapter for Hugging Face prints
            module.lock(unlocked_groups)
    except AssertionError as error:
        raise UsageError(f"unlocked_groups = {unlocked_groups}: {error}; give 0 to lock all of it.") from error


def _lock_timm(trunk: Any, unlocked_groups: int) -> None:
    """Like open_clip's TimmModel.lock, whose frozen batch norms lose the activations timm fuses into them."""
    if not unlocked_groups:
        trunk.requires_grad_(False)
        return
    from timm.models import group_parameters

    groups: dict[int, list[str]] = group_parameters(trunk, trunk.group_matcher())
    for number in sorted(groups)[:-unlocked_groups]:
        for name in groups[number]:
            trunk.get_parameter(name).requires_grad_(False)


def _freeze_batch_norm_statistics(module: nn.Module) -> None:
    """Normalise by the stored mean and variance in the batch norms none of whose weights are trained."""
    names = batch_norm_layers(module)
    locked: list[str] = []
    for name in names:
        if not _trainable_parameters(module.get_submodule(name)):
            locked.append(name)
    freeze_batch_norm(module, locked)


def freeze_unused_parameters(task: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> list[str]:
    """Freeze the trained weights that none of these outputs depends on; returns their names.

    DDP would wait for their gradients for ever. The task runs once on the inputs, in evaluation mode; what its outputs
    depend on is read from autograd's graph.
    """
    # per module, since frozen batch norms stay in evaluation mode
    modes = {module: module.training for module in task.modules()}
    # in training mode a layer may be dropped, and its weights would seem unused
    task.eval()
    try:
        computed = task(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    # the graph alone tells: no backward pass, whose gradients would have to be cleared
    read = _graph_leaves(computed[name] for name in outputs)
    unused: list[str] = []
    for name, parameter in task.named_parameters():
        if parameter.requires_grad and parameter not in read:
            parameter.requires_grad_(False)
            unused.append(name)
    return unused


def _graph_leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The leaf tensors that the outputs were computed from."""
    # with a list instead of recursion: graphs of deep networks exceed Python's stack
    leaves: set[Tensor] = set()
    visited: set[object] = set()
    # an output without a grad_fn is a weight itself
    pending: list[object] = [output.grad_fn or output for output in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        # an AccumulateGrad node holds its leaf as `variable`
        leaf = node if isinstance(node, torch.Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(leaf)
        # each with the number of an output of it, which does not matter here
        for next_node, _ in getattr(node, "next_functions", ()):
            pending.append(next_node)
    return leaves


def _trainable_parameters(module: nn.Module) -> set[Tensor]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}
