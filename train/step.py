"""One optimiser step on one global batch.

The gradient of a batch of any size, from parts that fit: cached outputs and replayed randomness.

A batch goes through the network in parts. The first pass keeps, without gradient, the outputs that are compared across
the batch; the loss on them is computed once, as if they were leaves, which gives its gradient to each row (Gao et al.
2021, GradCache, §3). The second pass runs every part again with the same randomness and carries these gradients on into
the weights. What is the network's own and not a row's (temperature, bias) has its gradient from the loss once, however
many parts there are.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vlm.data.collate import TrainingBatch
from vlm.tensors import Tensor
from vlm.train.distributed import average_losses, average_unsharded_gradients, clip_gradients, gather_objects
from vlm.train.inputs import MicroBatchInputs
from vlm.train.loss_guard import copy_running_stats, restore_running_stats, skip_reason
from vlm.train.objectives.loss_term import SHARED_OUTPUTS, Inputs, LossOptions, Outputs
from vlm.train.objectives.objective_registry import WeightedLossTerm
from vlm.train.optim import clamp_logit_scale, learning_rate_at, set_learning_rate
from vlm.train.recovery import SkippedStep, record_skipped_step
from vlm.train.session import Session

LossDict = dict[str, Tensor]
"""Weighted parts by name, of this process; their mean over the processes, summed, is what is minimised."""


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """A batch as it goes through the network.

    inputs(number, names): the inputs of a part, with the named ones beyond pixels and tokens; called anew in each pass,
    just before the part goes through the network, whose generators it seeds. counted(number): those inputs that units
    are counted from; no picture among them.
    forward: inputs to outputs, all or the named ones. backward: adds gradients to the weights. waiting: a context in
    which gradients are not yet exchanged between processes.
    """

    count: int
    inputs: Callable[[int, frozenset[str]], Inputs]
    non_image_inputs: Callable[[int], Inputs]
    forward: Callable[[Inputs, frozenset[str] | None], Outputs]
    backward: Callable[[Tensor], None]
    no_sync: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def backward_with_gradient_caching(
    micro_batches: MicroBatches, terms: Sequence[WeightedLossTerm], options: LossOptions
) -> LossDict:
    """Add the gradient of the global batch to the weights; returns the detached, weighted loss parts."""
    batch_level = [weighted for weighted in terms if weighted.term.batch_level]
    sample_level = [weighted for weighted in terms if weighted.term.sample_level]
    batch_level_names = _input_names(batch_level)
    sample_level_names = _input_names(sample_level)
    normalisers = _global_normalisers(
        [micro_batches.non_image_inputs(number) for number in range(micro_batches.count)], sample_level, options
    )
    if micro_batches.count == 1:
        inputs = micro_batches.inputs(0, batch_level_names | sample_level_names)
        outputs = micro_batches.forward(inputs, None)
        losses = _batch_level_losses(outputs, inputs, batch_level, options) | _sample_level_losses(
            outputs, inputs, sample_level, normalisers, options
        )
        micro_batches.backward(torch.stack(list(losses.values())).sum())
        return {name: loss.detach() for name, loss in losses.items()}

    losses, gradients = (
        _cache_output_gradients(micro_batches, batch_level, batch_level_names, options) if batch_level else ({}, {})
    )
    first = 0
    for number in range(micro_batches.count):
        is_last = number == micro_batches.count - 1
        with contextlib.nullcontext() if is_last else micro_batches.no_sync():
            inputs = micro_batches.inputs(number, sample_level_names)
            outputs = micro_batches.forward(inputs, None)
            sample_losses = _sample_level_losses(outputs, inputs, sample_level, normalisers, options)
            surrogates = _surrogate_losses(outputs, gradients, first=first, with_shared=is_last)
            micro_batches.backward(torch.stack([*sample_losses.values(), *surrogates]).sum())
        first += _num_rows(inputs)
        for name, loss in sample_losses.items():
            losses[name] = losses[name] + loss.detach() if name in losses else loss.detach()
    return {weighted.name: losses[weighted.name] for weighted in terms}


def _cache_output_gradients(
    micro_batches: MicroBatches, batch_level: Sequence[WeightedLossTerm], names: frozenset[str], options: LossOptions
) -> tuple[LossDict, Outputs]:
    """The losses across the batch, and their gradients to the outputs they read."""
    read = list(dict.fromkeys(name for weighted in batch_level for name in weighted.term.outputs))
    cached: dict[str, list[Tensor]] = {name: [] for name in read}
    extra_inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for number in range(micro_batches.count):
            inputs = micro_batches.inputs(number, names)
            outputs = micro_batches.forward(inputs, frozenset(read))
            for name in read:
                cached[name].append(outputs[name])
            for name in names & inputs.keys():
                extra_inputs[name].append(inputs[name])
    leaves = {
        name: (rows[0] if name in SHARED_OUTPUTS else torch.cat(rows)).detach().requires_grad_()
        for name, rows in cached.items()
    }
    losses = _batch_level_losses(
        leaves, {name: torch.cat(rows) for name, rows in extra_inputs.items() if rows}, batch_level, options
    )
    total = torch.stack(list(losses.values())).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def _surrogate_losses(outputs: Outputs, gradients: Outputs, *, first: int, with_shared: bool) -> list[Tensor]:
    """Scalars whose gradients are the kept ones: of the rows of this part, and once of what belongs to no row."""
    scalars: list[Tensor] = []
    for name, gradient in gradients.items():
        if name not in SHARED_OUTPUTS:
            scalars.append((outputs[name] * gradient[first : first + len(outputs[name])]).sum())
        elif with_shared:
            scalars.append((outputs[name] * gradient).sum())
    return scalars


def _batch_level_losses(
    outputs: Outputs, inputs: Inputs, terms: Sequence[WeightedLossTerm], options: LossOptions
) -> LossDict:
    return {
        weighted.name: weighted.weight * weighted.term.batch_level(outputs, inputs, options)
        for weighted in terms
        if weighted.term.batch_level
    }


def _sample_level_losses(
    outputs: Outputs, inputs: Inputs, terms: Sequence[WeightedLossTerm], normalisers: LossDict, options: LossOptions
) -> LossDict:
    return {
        weighted.name: weighted.weight
        * weighted.term.sample_level(outputs, inputs, options)
        / normalisers[weighted.name]
        for weighted in terms
        if weighted.term.sample_level
    }


def _global_normalisers(
    micro_batches: Sequence[Inputs], terms: Sequence[WeightedLossTerm], options: LossOptions
) -> LossDict:
    """The units of the global batch by term, over the number of processes, since gradients are averaged over these."""
    normalisers: LossDict = {}
    for weighted in terms:
        count = torch.stack([weighted.term.normaliser(inputs, options).double() for inputs in micro_batches]).sum()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        normalisers[weighted.name] = count.clamp(min=1)
    return normalisers


def _input_names(terms: Sequence[WeightedLossTerm]) -> frozenset[str]:
    return frozenset(name for weighted in terms for name in weighted.term.inputs)


def _num_rows(inputs: Inputs) -> int:
    return len(inputs["tokens"])


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Weighted loss parts, averaged over processes; the learning rate; the gradient's norm before it was cut."""

    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float


def train_step(session: Session, batches: Sequence[TrainingBatch]) -> StepResult:
    """Forward and backward on one process's share of a global batch, given in parts; the update unless it is bad.

    A step whose loss or gradient is not finite, or whose loss is a spike, leaves weights, optimiser and averages as
    they were; it is noted in the state (`vlm.train.loss_guard`). Either way the step and its samples are counted.
    """
    state, safety = session.state, session.config.safety
    statistics = copy_running_stats(session.parallel_task)
    result = compute_gradients(session, batches)
    reason = skip_reason(
        result.losses, result.gradient_norm, state.spike_guard.losses, spike_factor=safety.spike_factor
    )
    if reason:
        restore_running_stats(statistics)
        skipped = SkippedStep(
            step=state.step + 1,
            position=state.position,
            reason=reason,
            first_key=gather_objects([batches[0].keys[0]])[0],
            learning_rate=result.learning_rate,
        )
        record_skipped_step(state, skipped)
    else:
        state.spike_guard.accept(sum(result.losses.values()))
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
    inputs = MicroBatchInputs(
        batches=batches,
        view=state.model.view,
        device=state.model.device,
        noise=session.noise,
        seed=session.config.seed,
        step=state.step,
        process=accelerator.process_index,
        first_sample=state.position + accelerator.process_index * session.local_batch_size,
        with_identities=session.config.objective.same_pairs != "negative",
        input_providers=session.input_providers,
    )
    micro_batches = MicroBatches(
        count=len(batches),
        inputs=inputs,
        non_image_inputs=inputs.non_image_inputs,
        forward=session.parallel_task,
        backward=accelerator.backward,
        no_sync=session.no_sync,
    )
    losses = backward_with_gradient_caching(micro_batches, session.terms, session.options)
    average_unsharded_gradients(state.task)
    limit = session.config.optimizer.clip_norm or math.inf
    return StepResult(
        losses=average_losses(losses),
        learning_rate=learning_rate_at(state.step, session.config.optimizer, session.steps),
        gradient_norm=clip_gradients(list(state.task.parameters()), limit),
    )


def update_weights(session: Session, result: StepResult) -> None:
    """Move the weights along the gradients, and their running mean after them."""
    state = session.state
    set_learning_rate(state.optimizer, result.learning_rate)
    state.optimizer.step()
    clamp_logit_scale(state.model.network)
    if session.ema is not None:
        session.ema.update(state.model.network, state.step + 1)
