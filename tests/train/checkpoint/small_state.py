"""A state around a network of a few numbers, with everything a checkpoint may hold."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.model import VisionLanguageModel
from vlm.train.state import TrainState
from vlm.train.task import TrainingTask


class NoTokenizer(Tokenizer):
    """Stands where a tokenizer has to; leaves a file in the folder as each does."""

    def save(self, folder: Path) -> None:
        (folder / "vlm_tokenizer.json").write_text("{}")


class SmallNetwork(nn.Module):
    """Two layers with weights of different shapes, a buffer, and a EMA."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(rows))))


class SmallTask(TrainingTask):
    """The network and a head; what objectives read of it is not asked here."""

    def __init__(self, network: nn.Module, heads: dict[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        self.network, self.heads = network, nn.ModuleDict(heads)


def small_state(seed: int = 0, *, has_head: bool = True, has_average: bool = True, width: int = 3) -> TrainState:
    torch.manual_seed(seed)
    network = SmallNetwork()
    task = SmallTask(network, {"side": nn.Linear(2, width)} if has_head else {})
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    config = {"embed_dim": 2, "vision_cfg": {"image_size": 8}, "text_cfg": {"context_length": 4}}
    tokenizer = NoTokenizer.__new__(NoTokenizer)
    model = VisionLanguageModel(
        name="small", network=cast(Any, network), config=config, view=EvalTransform(size=8), tokenizer=tokenizer
    )
    state = TrainState(task=task, model=model, optimizer=optimizer, sequence="sequence")
    if has_average:
        state.ema_weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step(state, torch.randn(6, 4))
    return state


def step(state: TrainState, rows: torch.Tensor) -> float:
    """One step on the rows, all weights included; gives the loss."""
    made = state.network(rows)
    if state.task.heads:
        made = torch.cat([made, state.task.heads["side"](made)], dim=1)
    loss = (made - rows.sum(dim=1, keepdim=True)).square().mean()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.position += len(rows)
    if state.ema_weights is not None:
        for name, tensor in state.network.state_dict().items():
            mean = state.ema_weights[name]
            mean.lerp_(tensor, 0.5) if mean.is_floating_point() else mean.copy_(tensor)
    return float(loss.detach())
