"""Reading a checkpoint back into the state, whatever the number of processes then and now."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from vlm.console import say
from vlm.data.ledger import Ledger
from vlm.errors import VlmError
from vlm.models.folder import WEIGHTS
from vlm.train.checkpoints.files import damage_of, list_checkpoints, read_values, remove_leavings
from vlm.train.checkpoints.mirror import Mirror
from vlm.train.checkpoints.sharded import fill, spread_like
from vlm.train.checkpoints.snapshot import AVERAGE, HEADS, OPTIMIZER
from vlm.train.state import TrainState


def restore_newest(folder: Path, state: TrainState, *, mirror: Mirror | None = None, is_main: bool = True) -> bool:
    """Read the newest undamaged checkpoint, of the folder or of its copies, into `state`; False if there is none.

    All processes call it; the main one chooses.

    Raises:
        VlmError: there are checkpoints, but all are damaged, or it cannot be told whether there are any.
    """
    path = agreed_path(lambda: newest_undamaged(folder, mirror), is_main=is_main)
    if path is None:
        return False
    restore(path, state, is_main=is_main)
    return True


def newest_undamaged(folder: Path, mirror: Mirror | None = None) -> Path | None:
    """The newest checkpoint that every file of has its checksum; one that is only in the copies is fetched."""
    if folder.is_dir():
        remove_leavings(folder)
    own, copied = {path.name for path in list_checkpoints(folder)}, _copied(folder, mirror)
    for name in sorted(own | copied, reverse=True):
        damage = damage_of(folder / name) if name in own else "absent"
        if damage and name in own:
            say(f"{folder / name} is damaged ({damage}); trying {'its copy' if name in copied else 'the one before'}.")
        if damage and mirror and name in copied:
            say(f"Fetching {name} from {mirror.place}.")
            damage = mirror.fetch(name, folder)
            if damage:
                say(f"The copy of {name} in {mirror.place} is damaged ({damage}); trying the one before it.")
        if not damage:
            return folder / name
    if own or copied:
        number = len(own | copied)
        raise VlmError(f"All {number} checkpoints in {folder} are damaged; start the run anew in another folder.")
    return None


def _copied(folder: Path, mirror: Mirror | None) -> set[str]:
    """The checkpoints that are in the copies; where these cannot be reached, the run's own must do."""
    if mirror is None:
        return set()
    try:
        return set(mirror.names())
    except VlmError as error:
        if not list_checkpoints(folder):
            raise
        say(f"{error}; going by the checkpoints in {folder}.")
        return set()


def agreed_path(choose: Callable[[], Path | None], *, is_main: bool) -> Path | None:
    """What the main process chooses, on all; what it raises is raised by all."""
    if not dist.is_initialized():
        return choose()
    told: list[Path | VlmError | None] = [None]
    if is_main:
        try:
            told = [choose()]
        except VlmError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], VlmError):
        raise told[0]
    return told[0]


def restore(path: Path, state: TrainState, *, is_main: bool = True) -> None:
    """Read a checkpoint into the state; its ledger, that of all processes together, is carried on by the main one.

    Raises:
        VlmError: it is not of this network and these heads.
    """
    values = read_values(path)
    state.take_values(values)
    state.ledger = Ledger.from_values(values["ledger"]) if is_main else Ledger()
    weights = load_file(path / WEIGHTS)
    _fill_all(state.network.state_dict(), weights, path / WEIGHTS)
    heads = state.student.heads.state_dict()
    if heads or (path / HEADS).is_file():
        _fill_all(heads, _load(path / HEADS), path / HEADS)
    if state.average is not None:
        if not (path / AVERAGE).is_file():
            say(f"{path} holds no averaged weights; the average starts from its weights.")
        _fill_all(state.average, _load(path / AVERAGE) or weights, path / AVERAGE)
    _restore_optimizer(state, load_file(path / OPTIMIZER))


def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def _fill_all(held: Mapping[str, Tensor], read: Mapping[str, Tensor], where: Path) -> None:
    wrong = sorted(held.keys() ^ read.keys()) or [name for name in held if held[name].shape != read[name].shape]
    if wrong:
        raise VlmError(f"{where} is not of the network being trained: {', '.join(wrong[:3])} differ.")
    for name, target in held.items():
        fill(target, read[name])


def _restore_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter, {})[key] = tensor
    names = {parameter: name for name, parameter in state.student.named_parameters()}
    state.optimizer.state.clear()
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            held = by_parameter.pop(names[parameter], {})
            if held:
                state.optimizer.state[parameter] = {key: spread_like(held[key], parameter) for key in held}
    if by_parameter:
        raise VlmError(f"The checkpoint's optimiser knows {next(iter(by_parameter))}, which is not trained now.")
