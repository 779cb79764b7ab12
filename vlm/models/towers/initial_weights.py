"""Weights that a fresh trunk starts from, from a file of any origin: by the names of its tensors, else by their order.

Ports of one architecture name its layers differently, and still define them in one order; so where names differ, the
n-th tensor of the file is taken for the n-th of the trunk, if every shape and every last word of a name (weight, bias,
running_mean) agrees. What follows the trunk's last tensor can only be a classifier, which is left out.
"""

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vlm.errors import UsageError, VlmError
from vlm.model_spec import locate_weights
from vlm.tensor_types import Tensor

logger = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# what trainers wrap around the tensors: a key of the file, and words before each name
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_COUNTER = "num_batches_tracked"
# weight and bias
_CLASSIFIER_TENSORS = 2
_CURE = "Name the tower these weights are of, and the image size they were trained at."


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What a trunk got its weights from. matched: by the names of the tensors, or by their order. tensors: how many."""

    source: str
    matched: Literal["name", "order"]
    tensors: int


def load_initial_weights(trunk: nn.Module, source: str, tower: str) -> LoadedWeights:
    """Give a trunk the weights of `source`: a .safetensors or .pth file, a folder with one, or `package:NAME`.

    Raises:
        UsageError: there is no such file, or its tensors are another network's (the first that does not fit is named).
        VlmError: it cannot be read.
    """
    path = _weights_file(locate_weights(source), tower)
    weights = _without_wrappers(_read_tensors(path))
    own: dict[str, Tensor] = {}
    for name, tensor in trunk.state_dict().items():
        if not name.endswith(_COUNTER):
            own[name] = tensor
    matched: Literal["name", "order"] = "name"
    if own.keys() <= weights.keys():
        mapping = {name: name for name in own}
    elif path.suffix == ".safetensors":
        # sorted when it was written, so its order says nothing
        missing = next(name for name in own if name not in weights)
        raise UsageError(
            f"{path} does not fit {tower}: it has no {missing}, and begins with {next(iter(weights), 'nothing')}. "
            f"{_CURE}"
        )
    else:
        matched = "order"
        mapping = _match_by_order(own, weights, source=str(path), tower=tower)
    for name, other in mapping.items():
        if own[name].shape != weights[other].shape:
            raise UsageError(
                f"{path} does not fit {tower}: {other} has shape {_shape(weights[other])}, and {name} "
                f"{_shape(own[name])}. {_CURE}"
            )
    trunk.load_state_dict({name: weights[other] for name, other in mapping.items()}, strict=False)
    if matched == "order":
        first = next(iter(mapping.items()))
        logger.info(
            f"{tower}: {path.name} names its {len(mapping)} tensors otherwise ({first[1]} for {first[0]}), so they "
            "were matched by their order; all shapes agree."
        )
    return LoadedWeights(source=source, matched=matched, tensors=len(mapping))


def _match_by_order(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str, tower: str
) -> dict[str, str]:
    """The name in the file for each of the trunk's.

    Raises:
        UsageError: a tensor does not fit the one at its place, or more follow than a classifier has.
    """
    others = list(weights)
    for number, (name, tensor) in enumerate(own.items()):
        if number == len(others):
            raise UsageError(
                f"{source} does not fit {tower}: it ends after {len(others)} tensors, before {name} "
                f"({_shape(tensor)}). {_CURE}"
            )
        other = others[number]
        is_same_kind = name.rpartition(".")[2] == other.rpartition(".")[2]
        if tensor.shape != weights[other].shape or not is_same_kind:
            raise UsageError(
                f"{source} does not fit {tower}, by name or by order: tensor {number + 1} is {other} "
                f"({_shape(weights[other])}) there, and {name} ({_shape(tensor)}) here. {_CURE}"
            )
    rest = others[len(own) :]
    if len(rest) > _CLASSIFIER_TENSORS:
        raise UsageError(
            f"{source} does not fit {tower}: {len(rest)} tensors follow the last of the tower, from {rest[0]} on, "
            f"which is more than a classifier has. {_CURE}"
        )
    return dict(zip(own, others, strict=False))


def _weights_file(source: str, tower: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{tower}: there are no weights {source!r}; give a .safetensors or .pth file, or its folder.")
    # safetensors before pickles of the same weights
    for suffix in _SUFFIXES:
        files = sorted(path.glob(f"*{suffix}"))
        if len(files) > 1:
            raise UsageError(f"{tower}: {source} holds several files ({files[0].name}, {files[1].name}); name one.")
        if files:
            return files[0]
    raise UsageError(f"{tower}: {source} holds no weights ({', '.join(_SUFFIXES)}).")


def _read_tensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # tensors alone: a pickle from anywhere could run code
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VlmError(f"{path} cannot be read as weights (tensors only, no other Python objects): {reason}") from error


def _without_wrappers(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by their bare names, without what trainers wrap around them, and without counters."""
    for key in _WRAPPERS:
        inner = values.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
            values = inner
    weights: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and not name.endswith(_COUNTER):
            weights[name] = value
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
