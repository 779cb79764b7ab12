"""Gradients of our micro-batches on the weights and batch of open_clip_accumulation.py: `vlm_accumulation.py FOUND`.

Prints as JSON, for each objective, side and k: the gradient of temperature and bias, its ratio to that of
k = 1, and the largest difference of any other weight's gradient from that of k = 1, relative to its largest entry.
"""

import json
import sys
from typing import Any

import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.model import VisionLanguageModel, build_network
from vlm.train.objectives.loss_term import Inputs, LossOptions
from vlm.train.run_config import ObjectiveConfig
from vlm.train.step import MicroBatches, backward_with_gradient_caching
from vlm.train.task import TrainingTask, build_task, parse_objective

Gradients = dict[str, torch.Tensor]
SHARED = ("logit_scale", "logit_bias")


def open_task(config: dict[str, Any], found: dict[str, Any], objective: str) -> tuple[TrainingTask, LossOptions]:
    """The same network, trained for the same objective."""
    network = build_network(config | found["start"]).double()
    network.load_state_dict(found["weights"])
    tokenizer = open_tokenizer("clip", config["text_cfg"]["context_length"])
    view = EvalTransform(size=config["vision_cfg"]["image_size"])
    model = VisionLanguageModel(name="bench", network=network, config=config, view=view, tokenizer=tokenizer)
    options = LossOptions(config=ObjectiveConfig(objective=objective), pad_token=tokenizer.pad_token)
    return build_task(model, parse_objective(objective), options).train(), options


def gradients(task: TrainingTask, options: LossOptions, images: torch.Tensor, texts: torch.Tensor, k: int) -> Gradients:
    """Gradients of the batch in k micro-batches."""
    size = len(images) // k

    def part(number: int, names: frozenset[str] = frozenset()) -> Inputs:
        chosen = slice(number * size, (number + 1) * size)
        return {"pixels": images[chosen], "tokens": texts[chosen]}

    task.zero_grad(set_to_none=True)
    micro_batches = MicroBatches(
        count=k, inputs=part, non_image_inputs=part, forward=task, backward=lambda loss: loss.backward()
    )
    backward_with_gradient_caching(micro_batches, parse_objective(options.config.objective), options)
    named = task.network.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def compared(by_k: dict[int, Gradients]) -> dict[int, dict[str, Any]]:
    """Each k compared with the first, which is the undivided batch."""
    whole = next(iter(by_k.values()))
    return {k: _beside(found, whole) for k, found in by_k.items()}


def _beside(found: Gradients, whole: Gradients) -> dict[str, Any]:
    shared = [name for name in SHARED if name in whole]
    others = whole.keys() - set(shared)
    return {
        "gradients": {name: float(found[name]) for name in shared},
        "times": {name: float(found[name] / whole[name]) for name in shared},
        "others": max(float((found[name] - whole[name]).abs().max() / whole[name].abs().max()) for name in others),
    }


def main(config: dict[str, Any], path: str) -> dict[str, Any]:
    """Compare both sides for every objective and k."""
    result: dict[str, Any] = {}
    for objective, found in torch.load(path).items():
        task, options = open_task(config, found, objective)
        ours = {k: gradients(task, options, found["images"], found["texts"], k) for k in found["gradients"]}
        result[objective] = {"open_clip": compared(found["gradients"]), "ours": compared(ours)}
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]), sys.argv[2])))
