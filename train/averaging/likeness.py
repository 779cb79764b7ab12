"""Whether two models are so alike that a mean of their weights is a model again."""

import json
from dataclasses import asdict
from typing import Any

import torch

from vlm.errors import UsageError, VlmError
from vlm.models.encoder import VisionLanguageModel
from vlm.train.averaging.weighted_mean import Weights

_TRAINING_ONLY = frozenset({"patch_dropout", "timm_drop", "timm_drop_path"})
"""Keys of open_clip's configuration that an evaluated network does not feel; runs of one soup may differ in them."""

_SHOWN = 4


def refuse_unlike(first: VisionLanguageModel, other: VisionLanguageModel) -> None:
    """Refuse two models that differ in more than the values of their weights.

    Raises:
        UsageError: they differ in configuration, view, tokenizer, names or shapes of weights; it says where.
    """
    found = differences(first, other)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UsageError(
            f"{first.name} and {other.name} cannot be averaged, they are different networks: "
            f"{'; '.join(found[:_SHOWN])}{more}. Average models that were tuned from the same start."
        )


def differences(first: VisionLanguageModel, other: VisionLanguageModel) -> list[str]:
    """In what two models differ beside the values of their weights, with both values."""
    pairs = [
        (_flat("model_cfg", first.config), _flat("model_cfg", other.config)),
        (_flat("view", asdict(first.view)), _flat("view", asdict(other.view))),
    ]
    found = [
        f"{name} {one.get(name, 'absent')} against {two.get(name, 'absent')}"
        for one, two in pairs
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]
    if first.tokenizer.fingerprint() != other.tokenizer.fingerprint():
        found.append("the tokenizer")
    return found + _unlike_weights(first.network.state_dict(), other.network.state_dict())


def refuse_not_finite(model: VisionLanguageModel) -> None:
    """Refuse a model that has diverged: one NaN spoils a whole soup.

    Raises:
        VlmError: a weight is NaN or infinite; the tensor is named.
    """
    for name, value in model.network.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise VlmError(f"{model.name} has weights that are not finite (in {name}); leave it out.")


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, str]:
    """Leaves by dotted name, as JSON, so that a tuple and the list it is saved as are the same."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(f"{prefix}.{name}", value)
        elif name not in _TRAINING_ONLY:
            flat[f"{prefix}.{name}"] = json.dumps(value)
    return flat


def _unlike_weights(first: Weights, other: Weights) -> list[str]:
    one, two = ({name: str(list(value.shape)) for name, value in weights.items()} for weights in (first, other))
    return [
        f"{name} {one.get(name, 'absent')} against {two.get(name, 'absent')}"
        for name in one | two
        if one.get(name) != two.get(name)
    ]
