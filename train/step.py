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
from vlm.train.distributed import average_whole_gradients, clip_gradients, gathered, mean_of_parts
from vlm.train.inputs import StepInputs
from vlm.train.loss_guard import put_back, running_statistics, why_skip
from vlm.train.objectives.loss_term import SHARED_OUTPUTS, Inputs, Outputs, TermOptions
from vlm.train.objectives.objective_registry import WeightedTerm
from vlm.train.optim import learning_rate_at, limit_temperature, set_learning_rate
from vlm.train.recovery import SkippedStep, note_skip
from vlm.train.session import Session

LossParts = dict[str, Tensor]
"""Weighted parts by name, of this process; their mean over the processes, summed, is what is minimised."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A batch as it goes through the network.

    inputs(number, names): the inputs of a part, with the named ones beyond pixels and tokens; called anew in each pass,
    just before the part goes through the network, whose generators it seeds. counted(number): those inputs that units
    are counted from; no picture among them.
    forward: inputs to outputs, all or the named ones. backward: adds gradients to the weights. waiting: a context in
    which gradients are not yet exchanged between processes.
    """

    number: int
    inputs: Callable[[int, frozenset[str]], Inputs]
    counted: Callable[[int], Inputs]
    forward: Callable[[Inputs, frozenset[str] | None], Outputs]
    backward: Callable[[Tensor], None]
    waiting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def backward_exactly(parts: Parts, terms: Sequence[WeightedTerm], options: TermOptions) -> LossParts:
    """Add the gradient of the global batch to the weights; returns the detached, weighted loss parts."""
    across = [part for part in terms if part.term.across]
    within = [part for part in terms if part.term.within]
    names_across = _inputs_of(across)
    names_within = _inputs_of(within)
    units = _global_units([parts.counted(number) for number in range(parts.number)], within, options)
    if parts.number == 1:
        inputs = parts.inputs(0, names_across | names_within)
        outputs = parts.forward(inputs, None)
        losses = _across(outputs, inputs, across, options) | _within(outputs, inputs, within, units, options)
        parts.backward(torch.stack(list(losses.values())).sum())
        return {name: loss.detach() for name, loss in losses.items()}

    losses, gradients = _first_pass(parts, across, names_across, options) if across else ({}, {})
    first = 0
    for number in range(parts.number):
        is_last = number == parts.number - 1
        with contextlib.nullcontext() if is_last else parts.waiting():
            inputs = parts.inputs(number, names_within)
            outputs = parts.forward(inputs, None)
            own = _within(outputs, inputs, within, units, options)
            carried = _carried(outputs, gradients, first=first, with_shared=is_last)
            parts.backward(torch.stack([*own.values(), *carried]).sum())
        first += _rows(inputs)
        for name, loss in own.items():
            losses[name] = losses[name] + loss.detach() if name in losses else loss.detach()
    return {part.name: losses[part.name] for part in terms}


def _first_pass(
    parts: Parts, across: Sequence[WeightedTerm], names: frozenset[str], options: TermOptions
) -> tuple[LossParts, Outputs]:
    """The losses across the batch, and their gradients to the outputs they read."""
    read = list(dict.fromkeys(name for part in across for name in part.term.outputs))
    kept: dict[str, list[Tensor]] = {name: [] for name in read}
    beside: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for number in range(parts.number):
            inputs = parts.inputs(number, names)
            outputs = parts.forward(inputs, frozenset(read))
            for name in read:
                kept[name].append(outputs[name])
            for name in names & inputs.keys():
                beside[name].append(inputs[name])
    leaves = {
        name: (rows[0] if name in SHARED_OUTPUTS else torch.cat(rows)).detach().requires_grad_()
        for name, rows in kept.items()
    }
    losses = _across(leaves, {name: torch.cat(rows) for name, rows in beside.items() if rows}, across, options)
    total = torch.stack(list(losses.values())).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def _carried(outputs: Outputs, gradients: Outputs, *, first: int, with_shared: bool) -> list[Tensor]:
    """Scalars whose gradients are the kept ones: of the rows of this part, and once of what belongs to no row."""
    scalars: list[Tensor] = []
    for name, gradient in gradients.items():
        if name not in SHARED_OUTPUTS:
            scalars.append((outputs[name] * gradient[first : first + len(outputs[name])]).sum())
        elif with_shared:
            scalars.append((outputs[name] * gradient).sum())
    return scalars


def _across(outputs: Outputs, inputs: Inputs, terms: Sequence[WeightedTerm], options: TermOptions) -> LossParts:
    return {part.name: part.weight * part.term.across(outputs, inputs, options) for part in terms if part.term.across}


def _within(
    outputs: Outputs, inputs: Inputs, terms: Sequence[WeightedTerm], units: LossParts, options: TermOptions
) -> LossParts:
    return {
        part.name: part.weight * part.term.within(outputs, inputs, options) / units[part.name]
        for part in terms
        if part.term.within
    }


def _global_units(parts: Sequence[Inputs], terms: Sequence[WeightedTerm], options: TermOptions) -> LossParts:
    """The units of the global batch by term, over the number of processes, since gradients are averaged over these."""
    units: LossParts = {}
    for part in terms:
        count = torch.stack([part.term.units(inputs, options).double() for inputs in parts]).sum()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        units[part.name] = count.clamp(min=1)
    return units


def _inputs_of(terms: Sequence[WeightedTerm]) -> frozenset[str]:
    return frozenset(name for part in terms for name in part.term.inputs)


def _rows(inputs: Inputs) -> int:
    return len(inputs["tokens"])


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Weighted loss parts, averaged over processes; the learning rate; the gradient's norm before it was cut."""

    parts: dict[str, float]
    learning_rate: float
    gradient_norm: float


def take_step(session: Session, batches: Sequence[TrainingBatch]) -> StepResult:
    """Forward and backward on one process's share of a global batch, given in parts; the update unless it is bad.

    A step whose loss or gradient is not finite, or whose loss is a spike, leaves weights, optimiser and averages as
    they were; it is noted in the state (`vlm.train.loss_guard`). Either way the step and its samples are counted.
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
