"""One objective on a small network with everything that draws at random, as a whole batch and in parts."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlm.models.dropout import PerSampleNoise, use_per_sample_dropout
from vlm.models.model import build_network, enable_padding_trim
from vlm.train.distributed import apply_fsdp, average_unsharded_gradients, no_gradient_sync, to_full_tensor
from vlm.train.objectives.loss_term import Inputs, LossOptions, Outputs
from vlm.train.run_config import ObjectiveConfig
from vlm.train.step import MicroBatches, backward_with_gradient_caching
from vlm.train.task import TrainingTask, build_task, parse_objective

CLASSES = 5

SAMPLES, LENGTH, VOCABULARY, PAD, SIZE, WIDTH = 8, 10, 40, 0, 32, 16


class Case:
    """A student with its inputs; the same in every process, drawn from the seed.

    trims: each part is cut to its own longest text, and the network is one that can read such rows: it has no decoder,
        and no dropout in its text tower.
    dtype: of weights and inputs; bfloat16 stands for mixed precision as accelerate does it: weights and loss in
    float32, the forward pass under autocast.
    """

    def __init__(
        self,
        expression: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        trims: bool = False,
        samples: int = SAMPLES,
        **config: Any,
    ) -> None:
        self.trims = trims
        self.samples = samples
        self.is_sharded = False
        self.is_mixed = dtype == torch.bfloat16
        dtype = torch.float32 if self.is_mixed else dtype
        if "classify" in expression or expression == "gpt4image":
            config |= {"class_field": "kind", "class_names": str(class_names_file())}
        self.config = ObjectiveConfig(objective=expression, text_embedding_size=12, **config)
        self.options = LossOptions(config=self.config, pad_token=PAD)
        self.terms = parse_objective(expression)
        self.noise = PerSampleNoise(seed=seed)
        torch.manual_seed(seed)
        model = small_model(with_decoder=not trims)
        assert enable_padding_trim(model.network) == trims
        assert use_per_sample_dropout(model.network, self.noise) >= (1 if trims else 2)
        self.task: TrainingTask = build_task(model, self.terms, self.options).to(dtype).train()
        self.inputs = draw_inputs(seed, dtype, samples)

    def shard(self) -> None:
        """Spread the weights over the processes (FSDP2), every layer of its own, for all that follows."""
        apply_fsdp(self.task, torch.device("cpu"), is_bf16=False, min_parameters=1)
        whole = [name for name, parameter in self.task.named_parameters() if not isinstance(parameter, DTensor)]
        # temperatures and the bias alone
        assert all(name.endswith(("logit_scale", "logit_bias")) for name in whole), whole
        self.is_sharded = True

    def gradients(
        self, *, split: int = 1, process: int = 0, processes: int = 1
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Loss parts and gradients of this process's share of the batch, in `split` parts."""
        self.task.zero_grad(set_to_none=True)
        is_replicated = processes > 1 and not self.is_sharded
        wrapped = DistributedDataParallel(self.task) if is_replicated else self.task

        def forward(inputs: Inputs, names: frozenset[str] | None) -> Outputs:
            return self.forward(wrapped, inputs, names)

        share = self.samples // processes
        size = share // split

        def part(number: int, names: frozenset[str] = frozenset(self.inputs)) -> Inputs:
            first = process * share + number * size
            rows = {name: tensor[first : first + size] for name, tensor in self.inputs.items()}
            if self.trims:
                rows |= {name: cut_padding(rows[name]) for name in ("tokens", "sub_tokens")}
            self.noise.rows = rows["rows"]
            return rows

        micro_batches = MicroBatches(
            count=split,
            inputs=part,
            non_image_inputs=part,
            forward=forward,
            backward=lambda loss: loss.backward(),
            no_sync=self._no_sync(wrapped),
        )
        losses = backward_with_gradient_caching(micro_batches, self.terms, self.options)
        average_unsharded_gradients(self.task)
        found = {
            name: to_full_tensor(parameter.grad).clone()
            for name, parameter in self.task.named_parameters()
            if parameter.grad is not None
        }
        return losses, found

    def _no_sync(self, wrapped: nn.Module) -> Callable[[], AbstractContextManager[object]]:
        if self.is_sharded:
            return partial(no_gradient_sync, self.task)
        return wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext

    def forward(self, task: nn.Module, inputs: Inputs, names: frozenset[str] | None = None) -> Outputs:
        """The student's outputs, in float32 also where it computes in bfloat16."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.is_mixed):
            outputs = task(inputs, names)
        return cast(Outputs, convert_to_fp32(outputs)) if self.is_mixed else outputs


def class_names_file() -> Path:
    """A file of CLASSES names."""
    path = Path(tempfile.mkdtemp()) / "classes.txt"
    path.write_text("".join(f"class {number}\n" for number in range(CLASSES)), encoding="utf-8")
    return path


def cut_padding(tokens: torch.Tensor) -> torch.Tensor:
    """Rows cut to the longest of them."""
    return tokens[..., : int((tokens != PAD).flatten(0, -2).any(dim=0).nonzero().max()) + 1]


def undivided(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """The plain way: one forward pass, the terms added up, one backward pass."""
    case.task.zero_grad(set_to_none=True)
    case.noise.rows = case.inputs["rows"]
    outputs = case.forward(case.task, case.inputs)
    total = torch.zeros((), dtype=case.inputs["pixels"].dtype)
    inputs = dict(case.inputs)
    for part in case.terms:
        if part.term.new_averages:
            inputs |= part.term.new_averages(outputs, case.inputs, case.options)
    for part in case.terms:
        if part.term.batch_level:
            total = total + part.weight * part.term.batch_level(outputs, inputs, case.options)
        if part.term.sample_level:
            normaliser = part.term.normaliser(inputs, case.options)
            total = total + part.weight * part.term.sample_level(outputs, inputs, case.options) / normaliser
    total.backward()
    found = {name: tensor.grad for name, tensor in case.task.named_parameters() if tensor.grad is not None}
    return float(total.detach()), {name: gradient.clone() for name, gradient in found.items()}


def small_model(*, with_decoder: bool):
    """A captioner with patch dropout, dropout, a temperature and a bias; or without decoder and without dropout."""
    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform
    from vlm.models.model import VisionLanguageModel

    pooler = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
    size = {"width": WIDTH, "heads": 2, "layers": 1, "context_length": LENGTH, "vocab_size": VOCABULARY}
    config: dict[str, Any] = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": SIZE,
            "patch_size": 8,
            "width": WIDTH,
            "head_width": 8,
            "layers": 1,
            "patch_dropout": 0.25,
        }
        | (pooler if with_decoder else {}),
        "text_cfg": size | {"pad_id": PAD},
        "custom_text": True,
        "init_logit_bias": -2.0,
    }
    if with_decoder:
        config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        config["multimodal_cfg"] = size
    else:
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": 2}
    network = build_network(config)
    if with_decoder:
        text = network.get_submodule("text")
        text.token_embedding = nn.Sequential(text.get_submodule("token_embedding"), nn.Dropout(0.2))
    tokenizer = open_tokenizer("clip", LENGTH)
    return VisionLanguageModel(
        name="small", network=network, config=config, view=EvalTransform(size=SIZE), tokenizer=tokenizer
    )


def draw_inputs(seed: int, dtype: torch.dtype, samples: int = SAMPLES) -> Inputs:
    """Inputs of every kind for a batch; three samples share identities with another."""
    draw = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    def tokens(*shape: int) -> torch.Tensor:
        words = torch.randint(3, VOCABULARY, (*shape, LENGTH), generator=draw)
        lengths = torch.randint(4, LENGTH + 1, shape, generator=draw)
        places = torch.arange(LENGTH)
        words = torch.where(places == lengths[..., None] - 1, 2, words)
        return torch.where(places < lengths[..., None], words, PAD)

    same = torch.arange(1, samples + 1)[:, None].repeat(1, 2)
    same[5, 0], same[6, 1], same[7, 1] = same[1, 0], same[2, 1], 0
    sub_tokens = tokens(samples, 3)
    sub_tokens[2, 1:] = PAD
    # two samples were not seen yet
    averages = torch.stack([torch.linspace(-3, 1, samples, dtype=dtype), torch.linspace(1, -2, samples, dtype=dtype)])
    averages[:, [0, 4]] = torch.nan
    return {
        "pixels": values(samples, 3, SIZE, SIZE),
        "tokens": tokens(samples),
        "rows": torch.arange(100, 100 + samples),
        "same": same,
        "sub_tokens": sub_tokens,
        "class_label": torch.randint(0, CLASSES, (samples,), generator=draw),
        "local_pixels": values(samples, 2, 3, SIZE, SIZE),
        "teacher_image": F.normalize(values(samples, 12), dim=-1),
        "teacher_text": F.normalize(values(samples, 12), dim=-1),
        "text_embedding": values(samples, 12),
        "global_target": F.normalize(values(samples, WIDTH), dim=-1),
        "image_average": averages[0],
        "text_average": averages[1],
        "inner_rate": torch.full((samples,), 0.3, dtype=dtype),
    }
