"""One optimiser step on one global batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.training_batches import TrainingBatch
from vlm.train.exact import Parts, backward_exactly
from vlm.train.guard.bad_steps import put_back, running_statistics, why_skip
from vlm.train.guard.rewind import SkippedStep, note_skip
from vlm.train.inputs import StepInputs
from vlm.train.optimizer import learning_rate_at, limit_temperature, set_learning_rate
from vlm.train.processes import gathered, mean_of_parts
from vlm.train.session import Session
from vlm.train.sharding import average_whole_gradients, clip_gradients


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Weighted loss parts, averaged over processes; the learning rate; the gradient's norm before it was cut."""

    parts: dict[str, float]
    learning_rate: float
    gradient_norm: float


def take_step(session: Session, batches: Sequence[TrainingBatch]) -> StepResult:
    """Forward and backward on one process's share of a global batch, given in parts; the update unless it is bad.

    A step whose loss or gradient is not finite, or whose loss is a spike, leaves weights, optimiser and averages as
    they were; it is noted in the state (`vlm.train.guard`). Either way the step and its samples are counted.
    """
    state, safety = session.state, session.config.safety
    statistics = running_statistics(session.trained)
    result = compute_gradients(session, batches)
    reason = why_skip(result.parts, result.gradient_norm, state.guard.losses, spike_factor=safety.spike_factor)
    if reason:
        put_back(statistics)
        skipped = SkippedStep(
            step=state.step + 1,
            position=state.position,
            reason=reason,
            first_key=gathered([batches[0].keys[0]])[0],
            learning_rate=result.learning_rate,
        )
        note_skip(state, skipped)
    else:
        state.guard.accept(sum(result.parts.values()))
        update_weights(session, result)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.position += session.config.batch_size
    for batch in batches:
        state.ledger.count(batch)
    return result


def compute_gradients(session: Session, batches: Sequence[TrainingBatch]) -> StepResult:
    """The gradient of the global batch, cut to the largest norm allowed; the weights stay as they are."""
    state, accelerator = session.state, session.accelerator
    inputs = StepInputs(
        batches=batches,
        view=state.model.view,
        device=state.model.device,
        noise=session.noise,
        seed=session.config.seed,
        step=state.step,
        process=accelerator.process_index,
        first_row=state.position + accelerator.process_index * session.share,
        with_same=session.config.objective.same_pairs != "negative",
        providers=session.providers,
    )
    parts = Parts(
        number=len(batches),
        inputs=inputs,
        counted=inputs.counted,
        forward=session.trained,
        backward=accelerator.backward,
        waiting=session.waiting,
    )
    losses = backward_exactly(parts, session.terms, session.options)
    average_whole_gradients(state.student)
    limit = session.config.optimizer.clip_norm or math.inf
    return StepResult(
        parts=mean_of_parts(losses),
        learning_rate=learning_rate_at(state.step, session.config.optimizer, session.steps),
        gradient_norm=clip_gradients(list(state.student.parameters()), limit),
    )


def update_weights(session: Session, result: StepResult) -> None:
    """Move the weights along the gradients, and their running mean after them."""
    state = session.state
    set_learning_rate(state.optimizer, result.learning_rate)
    state.optimizer.step()
    limit_temperature(state.model.network)
    if session.average is not None:
        session.average.update(state.model.network, state.step + 1)
