"""One side of the trainer benchmark: single steps on a batch in memory, one per request.

A request names the step: `kind` ours (the run's own step without the loader) or bare (forward, loss, backward,
clipping, update, as in a hand-written loop), the batch, and the micro-batch size. Texts have their full length, the
only one that the bare step supports. The first request for a step sets it up and runs it twice to warm up; each
request runs and times it once.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from measure_server import serve
from torch import nn
from torch.nn import functional as F

from vlm.data.collate import TrainingBatch
from vlm.models.model import build_network, normalise
from vlm.train.logger import RunLogger
from vlm.train.optim import build_optimizer
from vlm.train.run_config import LoaderConfig, ModelConfig, OptimizerConfig, TrainConfig
from vlm.train.run_setup import Session, open_session
from vlm.train.step import train_step

_WARM_UP = 2
_ENDLESS = 1_000_000


class Steps:
    """Answers requests; a step, once set up, is reused."""

    def __init__(self) -> None:
        self._open: dict[str, Callable[[], object]] = {}

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the requested step; returns its seconds."""
        name = json.dumps(request, sort_keys=True)
        if name not in self._open:
            step = OPENED[request["kind"]](*open_batch(request))
            for _ in range(_WARM_UP):
                step()
            self._open[name] = step
        began = time.perf_counter()
        self._open[name]()
        return {"seconds": time.perf_counter() - began}


def open_batch(request: dict[str, Any]) -> tuple[Session, list[TrainingBatch]]:
    """A run, and its first batch in micro-batches."""
    open_clip.add_model_config(request["models"])
    micro = request["micro"]
    config = TrainConfig(
        data="::".join(request["shards"]),
        run=str(Path(tempfile.mkdtemp(dir=request["folder"])) / "run"),
        batch_size=request["batch"],
        micro_batch=micro if micro < request["batch"] else 0,
        steps=_ENDLESS,
        model=ModelConfig(architecture=request["network"]),
        loader=LoaderConfig(workers=0, trim_text=False),
        optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, warmup_steps=2000, clip_norm=1.0),
    )
    session = open_session(config, resume=False)
    return session, next(session.open_batches())


def our_step(session: Session, batches: list[TrainingBatch]) -> Callable[[], object]:
    """The step of `vlm train`, including accounting and logging."""
    run_logger = RunLogger(session).__enter__()

    def step() -> None:
        run_logger.step(train_step(session, batches), batches)

    return step


def bare_step(session: Session, batches: list[TrainingBatch]) -> Callable[[], object]:
    """The same network, weights, batch and optimizer in a plain PyTorch loop; pixels are normalised beforehand."""
    network = build_network(session.state.model.config)
    network.load_state_dict(session.state.network.state_dict())
    network.train()
    optimizer = build_optimizer(network, session.config.optimizer)
    batch = batches[0]
    pixels, matching = normalise(batch.images, session.state.model.view), torch.arange(len(batch.tokens))

    def step() -> None:
        outputs = network(pixels, batch.tokens)
        logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
        loss = (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), session.config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


OPENED: dict[str, Callable[[Session, list[TrainingBatch]], Callable[[], object]]] = {
    "ours": our_step,
    "bare": bare_step,
}

if __name__ == "__main__":
    serve(Steps())
