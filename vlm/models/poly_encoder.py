"""A poly-encoder over frozen towers: scores stored image embeddings by the single tokens of a text.

Poly-encoders (Humeau et al. 2020, §4.4) lie between a dual encoder and a cross-encoder. With h the token states of a
text, c₁ … c_m learned codes and v the embedding of a candidate:

    yᵢ = Σⱼ softmaxⱼ(cᵢ · h) hⱼ          m views of the text, each what one code attends to
    y(v) = Σᵢ softmaxᵢ(v · y) yᵢ         what matters of them to this candidate
    score = y(v) · v

The towers are frozen here, so two maps are learned in place of the paper's fine-tuning: of the token states into the
joint space, and of the candidates within it; and the cosine of the towers is added, times a learned weight, so that
the reranker starts from the order there is. Candidates are read from an index: no image is opened for a query.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlm.data.tokenizers import trim_tokens
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, compute_fingerprint
from vlm.manifest import MANIFEST, Manifest, read_manifest, record_file, write_manifest
from vlm.models.model import VisionLanguageModel
from vlm.models.towers.bag_of_words import BagOfWordsTower
from vlm.models.towers.huggingface import HuggingFaceTextTower
from vlm.models.towers.tower import text_mask
from vlm.tensor_types import Bool, Float, Float32, Tensor

WEIGHTS = "poly_encoder.safetensors"
MANIFEST_KIND = "reranker"


@dataclass(frozen=True, kw_only=True)
class PolyEncoderSize:
    """codes: m, views of a text. width: of the token states. dimension: of the joint space."""

    codes: int
    width: int
    dimension: int


class PolyEncoder(nn.Module):
    """The codes, the two maps, and the weight of the towers' cosine."""

    def __init__(self, size: PolyEncoderSize, *, cosine_weight: float) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(size.width)
        self.project = nn.Linear(size.width, size.dimension, bias=False)
        self.codes = nn.Parameter(torch.randn(size.codes, size.dimension))
        self.candidates = nn.Linear(size.dimension, size.dimension, bias=False)
        # as a logarithm: an optimiser's step is as large a part of a weight of 100 as of one of 1
        self.log_cosine_weight = nn.Parameter(torch.tensor(math.log(cosine_weight)))
        # small, so that the order of the cosines is where training starts
        nn.init.normal_(self.project.weight, std=0.1 * size.width**-0.5)
        nn.init.eye_(self.candidates.weight)

    def forward(
        self,
        states: Float[Tensor, "T L W"],
        mask: Bool[Tensor, "T L"],
        texts: Float[Tensor, "T D"],
        candidates: Float[Tensor, "T C D"],
    ) -> Float[Tensor, "T C"]:
        """The score of each text's candidates.

        states, mask: of the tokens of each text, and which of them are text. texts, candidates: unit vectors of the
        towers.
        """
        views = self.views(states, mask)
        mapped = self.candidates(candidates)
        attention = (mapped @ views.mT).softmax(dim=-1)
        context = attention @ views
        cosines = (candidates @ texts[:, :, None])[..., 0]
        return (context * mapped).sum(dim=-1) + self.cosine_weight * cosines

    @property
    def cosine_weight(self) -> Float[Tensor, ""]:
        """What the towers' cosine is multiplied by; the inverse temperature of the model to begin with."""
        return self.log_cosine_weight.exp()

    def views(self, states: Float[Tensor, "T L W"], mask: Bool[Tensor, "T L"]) -> Float[Tensor, "T M D"]:
        """What each code attends to of each text; zeros for a text without tokens."""
        projected = self.project(self.norm(states))
        logits = self.codes @ projected.mT
        # a finite number: a softmax over nothing but -inf is NaN
        weights = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min / 2).softmax(dim=-1)
        return (weights * mask[:, None]) @ projected


@torch.no_grad()
def token_states(
    model: VisionLanguageModel, texts: Sequence[str]
) -> tuple[Float[Tensor, "T L W"], Bool[Tensor, "T L"], Float32[Tensor, "T D"]]:
    """The states of the tokens of texts before pooling, which positions are text, and the texts' unit vectors.

    Of a bag of words the states are the entries of its table; of open_clip's transformers what its last norm gives.

    Raises:
        UsageError: the text tower has no states of tokens that are known.
    """
    encoded = model.tokenizer.encode(list(texts))
    if model.trims_padding:
        encoded = trim_tokens(encoded, model.tokenizer)
    tokens = torch.from_numpy(encoded).to(model.device)
    text: Any = getattr(model.network, "text", model.network)
    mask = text_mask(tokens, model.tokenizer.pad_token)
    if isinstance(text, BagOfWordsTower):
        entries, mask = text.entries(tokens)
        states = text.table.weight[entries]
        vectors = model.network.encode_text(tokens)
    else:
        source = text.trunk if isinstance(text, HuggingFaceTextTower) else getattr(text, "ln_final", None)
        if source is None:
            raise UsageError(
                f"{model.name} has a text tower ({type(text).__name__}) whose token states are not known; a "
                "poly-encoder needs open_clip's transformer, one of Hugging Face, or a bag of words."
            )
        if getattr(text, "cls_emb", None) is not None:
            # a captioner's last norm sees its class token alone, which stands behind the others
            source = text.transformer
        states, vectors = _run_with_states(cast(nn.Module, source), lambda: model.network.encode_text(tokens))
        length = min(states.shape[1], mask.shape[1])
        states = states[:, :length]
        mask = mask[:, :length]
    return states.float(), mask, nn.functional.normalize(vectors.float(), dim=-1)


def _run_with_states(source: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What a module inside a network gave while something ran in this thread, and the result of that."""
    outputs: list[Any] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # a service embeds other texts by the same network at the same time
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = source.register_forward_hook(keep)
    try:
        result = run()
    finally:
        handle.remove()
    states = getattr(outputs[-1], "last_hidden_state", outputs[-1])
    return cast(Tensor, states), result


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedPolyEncoder:
    """A poly-encoder, the fingerprint of the model whose towers it was fitted to, and where that was loaded from."""

    network: PolyEncoder
    model_fingerprint: str
    model: str

    @cached_property
    def fingerprint(self) -> str:
        """Identity: the weights, and the model."""
        parts: list[bytes | str] = [self.model_fingerprint]
        for name, tensor in sorted(self.network.state_dict().items()):
            parts += [name, tensor.cpu().contiguous().numpy().tobytes()]
        return compute_fingerprint(*parts)


def save_poly_encoder(
    folder: Path, fitted: FittedPolyEncoder, *, configuration: dict[str, Any], details: dict[str, Any]
) -> None:
    """Write a reranker folder, whole or not at all.

    Raises:
        UsageError: it exists.
    """
    with atomic_folder(folder) as partial:
        tensors = {name: tensor.contiguous() for name, tensor in fitted.network.state_dict().items()}
        save_file(tensors, partial / WEIGHTS)
        manifest = Manifest(
            kind=MANIFEST_KIND,
            fingerprint=fitted.fingerprint,
            counts=asdict(fitted.network.size),
            configuration=configuration,
            inputs={"model": fitted.model_fingerprint},
            files={WEIGHTS: record_file(partial / WEIGHTS)},
            details=details | {"model": fitted.model},
        )
        write_manifest(partial, manifest)


def is_reranker_folder(folder: Path) -> bool:
    """Whether a folder holds a poly-encoder."""
    return (folder / WEIGHTS).is_file() and (folder / MANIFEST).is_file()


def read_poly_encoder(folder: Path) -> FittedPolyEncoder:
    """The poly-encoder of a reranker folder, ready to score.

    Raises:
        UsageError: it is not one. VlmError: its weights are damaged.
    """
    manifest = read_manifest(folder, MANIFEST_KIND)
    network = PolyEncoder(PolyEncoderSize(**manifest.counts), cosine_weight=1.0)
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise VlmError(f"The weights of {folder} cannot be read ({error}); fit the reranker again.") from error
    network.eval().requires_grad_(False)
    fitted = FittedPolyEncoder(
        network=network, model_fingerprint=manifest.inputs["model"], model=manifest.details["model"]
    )
    # the fingerprint covers the weights, so it is the checksum as well
    if fitted.fingerprint != manifest.fingerprint:
        raise VlmError(f"{folder} is not what its manifest says: its weights were changed. Fit the reranker again.")
    return fitted
