"""Which weights are trained: locked towers (LiT), and those no objective reads."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.batch_norm import batch_norm_layers, freeze_batch_norm
from vlm.tensors import Tensor


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
