"""Which weights are trained: locked towers (LiT), and those no objective reads.

What is trained: the network with the heads objectives add, giving just the outputs they read.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.coca import can_caption_in_parallel, parallel_logits
from vlm.models.factory import is_captioner
from vlm.models.model import VisionLanguageModel
from vlm.models.patch_features import ImageReading, has_patches, read_crops, read_image
from vlm.models.towers.tower import batch_norm_layers, freeze_batch_norm
from vlm.tensors import Bool, Float, Int64, Tensor
from vlm.train.objectives.captioning import MASK_EMBEDDING, draw_parallel
from vlm.train.objectives.loss_term import SHARED_OUTPUTS, Heads, Inputs, Outputs, TermOptions
from vlm.train.objectives.objective_registry import WeightedTerm


def lock_tower(network: nn.Module, tower: Literal["image", "text"], unlocked_groups: int = 0) -> int:
    """Leave a tower's weights as they are but for its last groups of layers (LiT, Zhai et al. 2022, §3.1).

    Groups are open_clip's: of its own transformers the projection is the last one, the last block with its norm the
    one before, then block by block, then the embeddings; of a timm tower those of timm, and the projection that
    stands behind it is always trained, since no pretraining gave it. Batch norms of locked groups keep their
    statistics. Autograd builds no graph below the first weight that is trained. Returns the number of locked weights.

    Raises:
        UsageError: the tower cannot be locked, or not in part.
    """
    module = network.get_submodule("visual") if tower == "image" else getattr(network, "text", network)
    before = _trained(module)
    if type(module).__name__ == "TimmModel":
        _lock_timm(module.get_submodule("trunk"), unlocked_groups)
    elif module is network:  # open_clip's CLIP keeps the parts of its text tower in itself
        network.lock_text_tower(unlocked_layers=unlocked_groups)  # pyright: ignore[reportCallIssue]
    else:
        _lock_module(module, tower, unlocked_groups)
    for parameter in _trained(module) - before:
        parameter.requires_grad_(False)  # fixed positions, which open_clip unlocks with their group
    locked = before - _trained(module)
    _keep_statistics(module)
    return sum(parameter.numel() for parameter in locked)


def _lock_module(module: nn.Module, tower: str, unlocked_groups: int) -> None:
    if not hasattr(module, "lock"):
        if unlocked_groups:
            raise UsageError(
                f"unlocked_groups = {unlocked_groups}: this {tower} tower can only be locked whole; give 0."
            )
        module.requires_grad_(False)
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # open_clip's adapter of Hugging Face prints
            module.lock(unlocked_groups)  # pyright: ignore[reportCallIssue]
    except AssertionError as error:
        raise UsageError(f"unlocked_groups = {unlocked_groups}: {error}; give 0 to lock all of it.") from error


def _lock_timm(trunk: nn.Module, unlocked_groups: int) -> None:
    """As open_clip's TimmModel.lock, whose frozen batch norms lose the activations timm fuses into them."""
    if not unlocked_groups:
        trunk.requires_grad_(False)
        return
    from timm.models import group_parameters

    groups: dict[int, list[str]] = group_parameters(trunk, trunk.group_matcher())  # pyright: ignore[reportCallIssue]
    for number in sorted(groups)[:-unlocked_groups]:
        for name in groups[number]:
            trunk.get_parameter(name).requires_grad_(False)


def _keep_statistics(module: nn.Module) -> None:
    """Use the stored mean and variance in the layers of batch statistics none of whose weights are trained."""
    names = batch_norm_layers(module)
    locked = [name for name in names if not _trained(module.get_submodule(name))]
    freeze_batch_norm(module, locked)


def freeze_unread(student: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> list[str]:
    """Freeze the trained weights that none of these outputs depends on; returns their names.

    The student is run once on the inputs, in evaluation mode; what its outputs depend on is read from autograd's graph.
    """
    modes = {module: module.training for module in student.modules()}
    student.eval()
    try:
        made = student(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    read = _reached(made[name] for name in outputs)
    unread = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    unread = {name: parameter for name, parameter in unread.items() if parameter not in read}
    for parameter in unread.values():
        parameter.requires_grad_(False)
    return list(unread)


def _reached(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The leaves the outputs were computed from."""
    found: set[Tensor] = set()
    seen: set[object] = set()
    waiting: list[object] = [output.grad_fn or output for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            found.add(leaf)
        waiting += [following for following, _ in getattr(node, "next_functions", ())]
    return found


def _trained(module: nn.Module) -> set[Tensor]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}


class Student(nn.Module):
    """The network and its heads; `forward` maps inputs to outputs, both by name (`vlm.train.objectives.loss_term`)."""

    def __init__(
        self, network: nn.Module, heads: Heads, outputs: Sequence[str], options: TermOptions, *, image_size: int
    ) -> None:
        super().__init__()
        self.network = network
        self.heads = nn.ModuleDict(heads)
        self.options = options
        self.image_size = image_size
        self._makers = choose_makers(network, outputs)

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs it reads beyond pixels and tokens; `text_embedding` is read where it is given."""
        embedded = {"text_embedding"} if takes_embeddings(self.network) else set[str]()
        return frozenset(embedded.union(*(maker.inputs for maker in self._makers)))

    def forward(self, inputs: Inputs, outputs: frozenset[str] | None = None) -> Outputs:
        """The outputs that were chosen, or those of them that are named; none whose inputs are missing."""
        reading = Pass(self, inputs)
        made: Outputs = {}
        for maker in self._makers:
            is_read = outputs is None or not outputs.isdisjoint(maker.provides)
            if is_read and inputs.keys() >= set(maker.inputs):
                made |= maker.make(reading)
        made["logit_scale"] = self.network.get_parameter("logit_scale").exp()
        bias = getattr(self.network, "logit_bias", None)
        if bias is not None:
            made["logit_bias"] = bias
        return made

    @property
    def reads_patches(self) -> bool:
        """Whether an output is made of the features of patches."""
        return any("patch_features" in maker.provides for maker in self._makers)


class Pass:
    """One pass through the student: what several outputs are made of is computed once."""

    def __init__(self, student: Student, inputs: Inputs) -> None:
        self.student, self.network, self.inputs = student, student.network, inputs

    @cached_property
    def image(self) -> ImageReading:
        """What the image tower makes of the pictures."""
        return read_image(self.network, self.inputs["pixels"], with_patches=self.student.reads_patches)

    @cached_property
    def image_features(self) -> Float[Tensor, "B D"]:
        """Unit vectors of the pictures."""
        return F.normalize(self.image.image, dim=-1)

    @cached_property
    def text(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the captions, of any length, and what a decoder goes on with."""
        if takes_embeddings(self.network) and "text_embedding" in self.inputs:
            return self.network.text.project(self.inputs["text_embedding"]), None  # pyright: ignore
        if is_captioner(self.network):
            return cast(tuple[Tensor, Tensor], self.network.get_submodule("text")(self.inputs["tokens"]))
        return self.encode_text(self.inputs["tokens"]), None

    def encode_text(self, tokens: Int64[Tensor, "T L"]) -> Float[Tensor, "T D"]:
        """Embeddings of other texts than the captions."""
        return self.network.encode_text(tokens)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, kw_only=True)
class OutputMaker:
    """A way to compute outputs. fits: whether a network can. inputs: what it reads beyond pixels and tokens."""

    provides: tuple[str, ...]
    make: Callable[[Pass], Outputs]
    inputs: tuple[str, ...] = ()
    fits: Callable[[nn.Module], bool] = lambda network: True
    cure: str = ""


def takes_embeddings(network: nn.Module) -> bool:
    """Whether the text tower is a language model whose embeddings can be computed beforehand (FLAME)."""
    return bool(getattr(getattr(network, "text", None), "takes_embeddings", False))


def image_features(reading: Pass) -> Outputs:
    """Unit vectors of pictures."""
    return {"image_features": reading.image_features}


def text_features(reading: Pass) -> Outputs:
    """Unit vectors of captions."""
    return {"text_features": F.normalize(reading.text[0], dim=-1)}


def caption_logits(reading: Pass) -> Outputs:
    """Logits of the token after each of the caption's, with their labels (CoCa, §3.2)."""
    memory, states, tokens = reading.image.memory, reading.text[1], reading.inputs["tokens"]
    assert memory is not None
    assert states is not None
    logits = reading.network.get_submodule("text_decoder")(memory, states[:, :-1])
    return {"logits": logits, "labels": tokens[:, 1:]}


def parallel_caption_logits(reading: Pass) -> Outputs:
    """The same where a share of the captions is predicted at once (CapPa, §3)."""
    student, memory = reading.student, reading.image.memory
    assert memory is not None
    logits, labels = parallel_logits(
        reading.network,
        memory,
        reading.inputs["tokens"],
        student.heads.get_submodule(MASK_EMBEDDING).get_parameter("weight")[0],
        draw_parallel(reading.inputs["rows"], student.options.config.parallel_share),
        pad_token=student.options.pad_token,
    )
    return {"parallel_logits": logits, "parallel_labels": labels}


def sentence_features(reading: Pass) -> Outputs:
    """Unit vectors [B, S, D] of the sentences drawn from each sample's captions; zeros where there is none."""
    sub_tokens, pad_token = reading.inputs["sub_tokens"], reading.student.options.pad_token
    is_there: Bool[Tensor, "B S"] = (sub_tokens != pad_token).any(dim=-1)
    length = sub_tokens.shape[2]
    # a row of nothing but padding makes some towers divide by zero, so they are shown the caption in its place
    caption = F.pad(reading.inputs["tokens"][:, :length], (0, max(0, length - reading.inputs["tokens"].shape[1])))
    shown = torch.where(is_there[..., None], sub_tokens, caption[:, None])
    features = reading.encode_text(shown.flatten(0, 1)).unflatten(0, sub_tokens.shape[:2])
    return {"sub_features": F.normalize(features, dim=-1) * is_there[..., None]}


def patch_features(reading: Pass) -> Outputs:
    """Patches [B, P, D] in the joint space, not of unit length (`vlm.models.patch_features`)."""
    patches = reading.image.patches
    assert patches is not None
    return {"patch_features": patches}


def crop_features(reading: Pass) -> Outputs:
    """Unit vectors [B, V, D] of small crops."""
    crops = reading.inputs["local_pixels"]
    features = read_crops(reading.network, crops.flatten(0, 1), reading.student.image_size)
    return {"local_features": F.normalize(features, dim=-1).unflatten(0, crops.shape[:2])}


def aligned_image(reading: Pass) -> Outputs:
    """The picture in the space of stored caption embeddings [B, E]: head `text_align` on its unit vector."""
    return {"aligned_image": reading.student.heads.get_submodule("text_align")(reading.image_features)}


_CAPTIONER = "it needs a network with a decoder, e.g. --architecture tiny-coca"

MAKERS: tuple[OutputMaker, ...] = (
    OutputMaker(provides=("image_features",), make=image_features),
    OutputMaker(provides=("text_features",), make=text_features),
    OutputMaker(provides=("logits", "labels"), make=caption_logits, fits=is_captioner, cure=_CAPTIONER),
    OutputMaker(
        provides=("parallel_logits", "parallel_labels"),
        make=parallel_caption_logits,
        inputs=("rows",),
        fits=can_caption_in_parallel,
        cure=_CAPTIONER,
    ),
    OutputMaker(provides=("sub_features",), make=sentence_features, inputs=("sub_tokens",)),
    OutputMaker(
        provides=("patch_features",),
        make=patch_features,
        fits=has_patches,
        cure="it needs an image tower with patches, a ViT or one of timm",
    ),
    OutputMaker(provides=("local_features",), make=crop_features, inputs=("local_pixels",)),
    OutputMaker(provides=("aligned_image",), make=aligned_image),
)
"""Adding an output is one function and one line here."""


def choose_makers(network: nn.Module, outputs: Sequence[str]) -> list[OutputMaker]:
    """What gives the outputs, each once.

    Raises:
        UsageError: the network cannot give one of them.
    """
    chosen: list[OutputMaker] = []
    for name in dict.fromkeys(outputs):
        if name in SHARED_OUTPUTS or any(name in maker.provides for maker in chosen):
            continue
        maker = next(maker for maker in MAKERS if name in maker.provides)
        if not maker.fits(network):
            raise UsageError(f"The objective reads {name}: {maker.cure}.")
        chosen.append(maker)
    return chosen


def build_student(model: VisionLanguageModel, terms: Sequence[WeightedTerm], options: TermOptions) -> Student:
    """The student of a sum of terms, on the model's device, with fresh heads drawn from torch's global generator.

    Weights that no term reads (a decoder that writes no captions, an unused temperature) are frozen, since nothing
    would move them but weight decay, and since several processes wait for the gradient of every trained weight.
    """
    heads: Heads = {}
    for part in terms:
        heads |= part.term.heads(model, options) if part.term.heads else {}
    outputs = list(dict.fromkeys(name for part in terms for name in part.term.outputs))
    if "logit_bias" in outputs and getattr(model.network, "logit_bias", None) is None:
        model.network.register_parameter("logit_bias", nn.Parameter(torch.zeros((), device=model.device)))
    student = Student(model.network, heads, outputs, options, image_size=model.view.size).to(model.device)
    freeze_unread(student, example_inputs(model, student, options), outputs)
    return student


def example_inputs(model: VisionLanguageModel, student: Student, options: TermOptions) -> Inputs:
    """Two samples of nothing, with every input the student reads."""
    size, length = model.view.size, model.tokenizer.context_length
    kind = model.network.get_parameter("logit_scale").dtype
    tokens = torch.full((2, length), options.pad_token)
    examples: Inputs = {
        "rows": torch.arange(2),
        "sub_tokens": tokens[:, None],
        "local_pixels": torch.zeros(2, 1, 3, size, size, dtype=kind),
    }
    if takes_embeddings(model.network):
        examples["text_embedding"] = torch.zeros(2, model.network.text.embedding_size, dtype=kind)  # pyright: ignore
    read = {name: tensor for name, tensor in examples.items() if name in student.inputs}
    given = {"pixels": torch.zeros(2, 3, size, size, dtype=kind), "tokens": tokens} | read
    return {name: tensor.to(model.device) for name, tensor in given.items()}
