"""Batch normalisation: where it is, and how to hold its statistics still."""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.tensors import Tensor


def batch_norm_layers(network: nn.Module) -> list[str]:
    """Names of the layers that use statistics of the batch while training, as batch normalisation does.

    With them a batch in parts differs from the whole one. Frozen ones are not among them.
    """
    return [name for name, module in network.named_modules() if _reads_batch(module) and not _is_frozen(module)]


def freeze_batch_norm(network: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Make these layers (all of them when none are named) normalise by their running statistics for good.

    Gains and biases are trained as before. In a fresh network the statistics are mean 0 and variance 1, so its layers
    become plain gains; this is meant for trained towers. Returns the names of the layers that were frozen.
    """
    chosen = [name for name in batch_norm_layers(network) if names is None or name in names]
    for name in chosen:
        module = network.get_submodule(name)
        module.eval()
        module.register_forward_pre_hook(stay_in_evaluation)
    return chosen


def stay_in_evaluation(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook: whatever mode the network is in, this layer normalises by its running statistics."""
    module.training = False


def _reads_batch(module: nn.Module) -> bool:
    # timm's evolved normalisation (EvoNorm B) keeps running statistics without being a batch norm
    return isinstance(module, _BatchNorm) or isinstance(getattr(module, "running_var", None), Tensor)


def _is_frozen(module: nn.Module) -> bool:
    return stay_in_evaluation in module._forward_pre_hooks.values()
