"""One optimiser step on one batch."""

from dataclasses import dataclass

import torch

from vlm.data.training_batches import TrainingBatch
from vlm.errors import VlmError
from vlm.models.encoder import normalise
from vlm.train.objectives import LossParts, choose_objective
from vlm.train.optimizer import learning_rate_at, limit_temperature, set_learning_rate
from vlm.train.setup import Session
from vlm.train.state import seed_step


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Weighted loss parts of this process, the learning rate used, the gradient's norm before it was cut."""

    parts: LossParts
    learning_rate: float
    gradient_norm: float


def train_step(session: Session, batch: TrainingBatch) -> StepResult:
    """Forward, backward, update; counts the step and its samples in the state.

    Raises:
        VlmError: the loss is not finite; the weights are then as before.
    """
    config, state, model = session.config, session.state, session.state.model
    seed_step(config.seed, state.step, session.accelerator.process_index)
    rate = learning_rate_at(state.step, config.optimizer, session.steps)
    set_learning_rate(state.optimizer, rate)

    pixels = normalise(batch.images.to(model.device, non_blocking=True), model.view)
    outputs = session.trained(pixels, batch.tokens.to(model.device, non_blocking=True))
    parts = choose_objective(config.objective)(outputs, config.objective, model.tokenizer.pad_token)
    loss = torch.stack(list(parts.values())).sum()
    if not torch.isfinite(loss):
        raise VlmError(
            f"The loss is {float(loss.detach())} at step {state.step + 1:,} (first sample of the batch: "
            f"{batch.keys[0]!r}); the weights are as before this step. Try a lower learning rate, a longer "
            "warm-up or --precision fp32, and go on from the last checkpoint with --resume."
        )
    session.accelerator.backward(loss)
    limit = config.optimizer.clip_norm or torch.inf
    norm = session.accelerator.clip_grad_norm_(session.trained.parameters(), limit)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    limit_temperature(model.network)

    state.step += 1
    state.position += config.batch_size
    state.ledger.count(batch)
    return StepResult(parts=parts, learning_rate=rate, gradient_norm=float(norm) if norm is not None else 0.0)
