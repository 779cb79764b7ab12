"""Gradients of open_clip's own trainer with --accum-freq k: `open_clip_accumulation.py CONFIG SAMPLES KS OUT`.

Runs its unchanged `train_one_epoch` on one batch of noise, with an optimizer that records gradients and changes no
weights. For each objective, OUT receives the network's weights, the batch and the gradients for each k.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip import CLIP, create_loss
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch

OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"init_logit_scale": 2.302585, "init_logit_bias": -10.0},
}


class Written(torch.optim.SGD):
    """Records the gradients of each step."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__(network.parameters(), lr=0.0)
        self.network, self.gradients = network, {}

    def step(self, closure: Any = None) -> None:
        """Record the gradients; weights do not change."""
        named = self.network.named_parameters()
        self.gradients = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


class Batches(list):
    """The parts of a data loader that train_one_epoch uses."""

    num_batches: int
    num_samples: int


def gradients(network: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor, objective: str, k: int) -> dict:
    """Gradients of the batch in k micro-batches."""
    size = len(images) // k
    loader = Batches(zip(images.split(size), texts.split(size), strict=True))
    loader.num_batches, loader.num_samples = k, len(images)
    words = ["--accum-freq", str(k), "--batch-size", str(size), "--device", "cpu", "--precision", "fp32"]
    words += ["--skip-scheduler", *(["--siglip"] if objective == "siglip" else [])]
    arguments = parse_args([*words, "--model", objective])
    arguments.rank, arguments.local_rank, arguments.world_size = 0, 0, 1
    arguments.distributed, arguments.distill, arguments.wandb = False, False, False
    optimizer = Written(network)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    train_one_epoch(network, data, create_loss(arguments), 0, optimizer, None, None, None, arguments)
    return optimizer.gradients


def main(config: dict[str, Any], samples: int, ks: list[int], out: Path) -> None:
    """Record the gradients for every objective and k, in double precision."""
    found = {}
    for objective, start in OBJECTIVES.items():
        torch.manual_seed(0)
        network = CLIP(**config, **start, output_dict=True).double()
        size = config["vision_cfg"]["image_size"]
        images = torch.randn(samples, 3, size, size, dtype=torch.float64)
        texts = torch.randint(1, 49408, (samples, config["text_cfg"]["context_length"]))
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        by_k = {k: gradients(network, images, texts, objective, k) for k in ks}
        found[objective] = {"start": start, "weights": weights, "images": images, "texts": texts, "gradients": by_k}
    torch.save(found, out)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
