"""One optimizer step on one global batch: its gradient by gradient caching, then the update unless the step is bad.

A batch of any size goes through the network in micro-batches that fit into memory, with the gradient of the whole batch
(GradCache, Gao et al. 2021, §3):

1. The first pass keeps, without a graph, the outputs that are compared across the batch.
2. The batch-level losses are computed once on these, as if they were leaves; this gives their gradient by row.
3. The second pass runs every micro-batch again with the same randomness, and carries these gradients on into the
   weights, together with those of the sample-level losses.

What is the network's own and not a row's (temperature, bias) gets its gradient from the batch-level losses once,
however many micro-batches there are.
"""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from vlm.data.collate import TrainingBatch
from vlm.tensor_types import Tensor
from vlm.train.distributed import (
    average_losses,
    average_unsharded_gradients,
    clip_gradients,
    gather_objects,
    num_processes,
)
from vlm.train.objectives.distillation import discard_prototype_statistics, update_prototype_heads
from vlm.train.objectives.loss_term import SHARED_OUTPUTS, Inputs, LossOptions, Outputs, clamp_logit_scales
from vlm.train.optim import learning_rate_at, set_learning_rate
from vlm.train.recovery import SkippedStep, copy_running_stats, record_skipped_step, restore_running_stats, skip_reason
from vlm.train.run_setup import Session
from vlm.train.step_inputs import MicroBatchInputs, sample_numbers
from vlm.train.task import WeightedLossTerm, input_names

LossDict = dict[str, Tensor]
"""Weighted losses by name, of this process; their mean over the processes, summed, is what is minimised."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Weighted losses, averaged over processes; the learning rate; the norm of the gradient before clipping.

    averages: new ones of this process's samples, where a term keeps a state for each sample.
    """

    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    averages: Inputs = field(default_factory=dict)


def train_step(session: Session, batches: Sequence[TrainingBatch]) -> StepResult:
    """Forward and backward on one process's share of a global batch, in micro-batches; the update unless it is bad.

    A step whose loss or gradient is not finite, or whose loss is a spike, leaves weights, optimizer, EMA and batch-norm
    statistics unchanged; it is recorded in the state (`vlm.train.recovery`). Either way the step and its samples are
    counted.
    """
    state = session.state
    # a forward pass updates these, so a skipped step has to put them back
    running_stats = copy_running_stats(session.parallel_task)
    result = compute_gradients(session, batches)

    reason = skip_reason(
        result.losses,
        result.gradient_norm,
        state.spike_guard.losses,
        spike_factor=session.config.safety.spike_factor,
    )
    if reason:
        restore_running_stats(running_stats)
        discard_prototype_statistics(state.task.heads.values())
        skipped = SkippedStep(
            step=state.step + 1,
            position=state.position,
            reason=reason,
            first_key=gather_objects([batches[0].keys[0]])[0],
            learning_rate=result.learning_rate,
        )
        record_skipped_step(state, skipped)
    else:
        # skipped losses must not become what later losses are compared with
        state.spike_guard.accept(sum(result.losses.values()))
        update_weights(session, result)
        if state.averages is not None:
            numbers = sample_numbers(batches, session.corpus.sample_starts)
            state.averages.update(numbers.to(state.model.device), result.averages)

    # to None rather than to zero: frees memory, and a weight without gradient is not decayed by AdamW
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.position += session.config.batch_size
    for batch in batches:
        state.ledger.count(batch)
    return result


def compute_gradients(session: Session, batches: Sequence[TrainingBatch]) -> StepResult:
    """The gradient of the global batch, clipped; the weights do not change."""
    state = session.state
    config = session.config
    accelerator = session.accelerator
    inputs = MicroBatchInputs(
        batches=batches,
        view=state.model.view,
        device=state.model.device,
        noise=session.noise,
        seed=config.seed,
        step=state.step,
        process=accelerator.process_index,
        first_sample=state.position + accelerator.process_index * session.local_batch_size,
        with_identities=config.objective.same_pairs != "negative",
        input_providers=session.input_providers,
        averages=state.averages,
        shard_starts=session.corpus.sample_starts,
        inner_rate=session.inner_rate,
    )
    averages: Inputs = {}
    micro_batches = MicroBatches(
        count=len(batches),
        inputs=inputs,
        non_image_inputs=inputs.non_image_inputs,
        forward=session.parallel_task,
        backward=accelerator.backward,
        no_sync=session.no_sync,
        keep_averages=averages.update,
    )

    # of an undivided batch, gradients best take the place of activations that are freed; DDP and FSDP keep their own
    is_reserved = len(batches) > 1 and state.model.device.type == "cpu" and num_processes() == 1
    with reserved_gradients(state.task.parameters()) if is_reserved else contextlib.nullcontext():
        losses = backward_with_gradient_caching(micro_batches, session.terms, session.options)
    # FSDP averages the gradients of sharded weights only, DDP all of them
    average_unsharded_gradients(state.task)
    # infinity still computes the norm, which the loss-spike guard and the log need
    max_norm = config.optimizer.clip_norm or math.inf
    return StepResult(
        losses=average_losses(losses),
        learning_rate=learning_rate_at(state.step, config.optimizer, session.steps),
        gradient_norm=clip_gradients(list(state.task.parameters()), max_norm),
        averages=averages,
    )


@contextlib.contextmanager
def reserved_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients made inside go into memory that is taken on entry, while what is free of the heap is in one piece.

    Otherwise the first backward pass lays them among the activations it frees, and those of the next micro-batch do not
    fit between them: the heap grows by a third of a micro-batch's activations. The gradients have the same bits, and a
    weight that gets none keeps None, so it is not decayed.
    """
    handles: list[RemovableHandle] = []
    for parameter in parameters:
        if parameter.requires_grad:
            move = functools.partial(_move_gradient, buffer=torch.empty_like(parameter, requires_grad=False))
            handles.append(parameter.register_post_accumulate_grad_hook(move))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _move_gradient(parameter: Tensor, *, buffer: Tensor) -> None:
    # later micro-batches add to it in place
    if parameter.grad is not buffer and parameter.grad is not None:
        parameter.grad = buffer.copy_(parameter.grad)


def update_weights(session: Session, result: StepResult) -> None:
    """Move the weights along the gradients, and the EMA after them."""
    state = session.state
    set_learning_rate(state.optimizer, result.learning_rate)
    state.optimizer.step()
    clamp_logit_scales([state.task.network, *state.task.heads.values()])
    if session.ema is not None:
        session.ema.update(state.model.network, state.step + 1)
        update_prototype_heads(state.task.heads.values(), session.ema.decay_at(state.step + 1))


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """A batch as it goes through the network.

    inputs(number, names): the inputs of a micro-batch, with the named ones in addition to pixels and tokens; called
        again in each pass, just before the forward pass whose random generators it seeds.
    non_image_inputs(number): those inputs that normalisers are counted from; no image among them.
    forward: inputs to outputs, all or the named ones. backward: adds gradients to the weights.
    no_sync: a context in which gradients are not yet exchanged between processes.
    keep_averages: takes the new averages of a term with a state for each sample.
    """

    count: int
    inputs: Callable[[int, frozenset[str]], Inputs]
    non_image_inputs: Callable[[int], Inputs]
    forward: Callable[[Inputs, frozenset[str] | None], Outputs]
    backward: Callable[[Tensor], None]
    no_sync: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    keep_averages: Callable[[Inputs], None] = lambda averages: None


def backward_with_gradient_caching(
    micro_batches: MicroBatches, terms: Sequence[WeightedLossTerm], options: LossOptions
) -> LossDict:
    """Add the gradient of the global batch to the weights; returns the detached, weighted losses."""
    batch_level: list[WeightedLossTerm] = []
    sample_level: list[WeightedLossTerm] = []
    for weighted in terms:
        # a term is one or the other
        (batch_level if weighted.term.batch_level else sample_level).append(weighted)
    normalisers = _global_normalisers(micro_batches, sample_level, options)
    if micro_batches.count == 1:
        return _backward_in_one_pass(micro_batches, batch_level, sample_level, normalisers, options)

    losses: LossDict = {}
    gradients: Outputs = {}
    if batch_level:
        losses, gradients = _cache_output_gradients(micro_batches, batch_level, options)

    first_row = 0
    for number in range(micro_batches.count):
        sample_losses, num_rows = _backward_of_micro_batch(
            micro_batches, number, sample_level, normalisers, options, gradients, first_row=first_row
        )
        first_row += num_rows
        for name, loss in sample_losses.items():
            losses[name] = losses[name] + loss if name in losses else loss
    return {weighted.name: losses[weighted.name] for weighted in terms}


def _backward_of_micro_batch(
    micro_batches: MicroBatches,
    number: int,
    sample_level: Sequence[WeightedLossTerm],
    normalisers: LossDict,
    options: LossOptions,
    gradients: Outputs,
    *,
    first_row: int,
) -> tuple[LossDict, int]:
    """Second pass of one micro-batch: its detached sample-level losses and its number of rows.

    A function of its own, so that inputs and outputs are freed before those of the next micro-batch are made.
    """
    is_last = number == micro_batches.count - 1
    # DDP exchanges gradients in the last backward pass only, once for the whole batch
    with contextlib.nullcontext() if is_last else micro_batches.no_sync():
        inputs = micro_batches.inputs(number, input_names(sample_level))
        outputs = micro_batches.forward(inputs, None)
        losses = _sample_level_losses(outputs, inputs, sample_level, normalisers, options)
        surrogates = _surrogate_losses(outputs, gradients, first_row=first_row, with_shared=is_last)
        micro_batches.backward(torch.stack([*losses.values(), *surrogates]).sum())
    return _detached(losses), len(inputs["tokens"])


def _backward_in_one_pass(
    micro_batches: MicroBatches,
    batch_level: Sequence[WeightedLossTerm],
    sample_level: Sequence[WeightedLossTerm],
    normalisers: LossDict,
    options: LossOptions,
) -> LossDict:
    """The same where the whole batch fits: nothing has to be cached."""
    inputs = micro_batches.inputs(0, input_names([*batch_level, *sample_level]))
    outputs = micro_batches.forward(inputs, None)
    # batch-level losses first in both paths, so that sums of floats have one order
    inputs |= _averages(micro_batches, outputs, inputs, batch_level, options)
    losses = _batch_level_losses(outputs, inputs, batch_level, options)
    losses |= _sample_level_losses(outputs, inputs, sample_level, normalisers, options)
    micro_batches.backward(torch.stack(list(losses.values())).sum())
    return _detached(losses)


def _cache_output_gradients(
    micro_batches: MicroBatches, terms: Sequence[WeightedLossTerm], options: LossOptions
) -> tuple[LossDict, Outputs]:
    """First pass: the batch-level losses, and their gradients with respect to the outputs they read."""
    read_inputs = input_names(terms)
    output_names: dict[str, None] = {}
    for weighted in terms:
        output_names |= dict.fromkeys(weighted.term.outputs)

    cached_outputs: dict[str, list[Tensor]] = defaultdict(list)
    cached_inputs: dict[str, list[Tensor]] = defaultdict(list)
    # no graph is kept: that is what saves the memory
    with torch.no_grad():
        for number in range(micro_batches.count):
            inputs = micro_batches.inputs(number, read_inputs)
            outputs = micro_batches.forward(inputs, frozenset(output_names))
            for name in output_names:
                cached_outputs[name].append(outputs[name])
            for name in read_inputs & inputs.keys():
                cached_inputs[name].append(inputs[name])
            # before those of the next micro-batch are made
            del inputs, outputs

    # the outputs of the whole batch become leaves, so that autograd stops at them
    leaves: Outputs = {}
    for name, chunks in cached_outputs.items():
        # every micro-batch has the same shared outputs, since the weights do not change within a step
        whole = chunks[0] if name in SHARED_OUTPUTS else torch.cat(chunks)
        leaves[name] = whole.detach().requires_grad_()
    whole_inputs: Inputs = {}
    for name, chunks in cached_inputs.items():
        whole_inputs[name] = join_rows(chunks, pad_token=options.pad_token)

    whole_inputs |= _averages(micro_batches, leaves, whole_inputs, terms, options)
    losses = _batch_level_losses(leaves, whole_inputs, terms, options)
    total = torch.stack(list(losses.values())).sum()
    # unlike backward(), this accumulates into no .grad
    leaf_gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients: Outputs = {}
    for name, gradient in zip(leaves, leaf_gradients, strict=True):
        if gradient is not None:
            gradients[name] = gradient
    return _detached(losses), gradients


def join_rows(chunks: Sequence[Tensor], *, pad_token: int) -> Tensor:
    """The rows of all micro-batches; tokens, which each micro-batch has cut to its own longest text, are padded again.

    >>> join_rows([torch.tensor([[1, 2, 3]]), torch.tensor([[4]])], pad_token=0).tolist()
    [[1, 2, 3], [4, 0, 0]]
    """
    if chunks[0].ndim == 1:
        return torch.cat(list(chunks))
    longest = max(chunk.shape[-1] for chunk in chunks)
    padded: list[Tensor] = []
    for chunk in chunks:
        padded.append(F.pad(chunk, (0, longest - chunk.shape[-1]), value=pad_token))
    return torch.cat(padded)


def _detached(losses: LossDict) -> LossDict:
    # whoever keeps a loss to log it would otherwise keep its graph, and the activations of the step with it
    return {name: loss.detach() for name, loss in losses.items()}


def _surrogate_losses(outputs: Outputs, gradients: Outputs, *, first_row: int, with_shared: bool) -> list[Tensor]:
    """Second pass: scalars whose gradients are the cached ones.

    d(Σ output · g)/d(output) = g, so backward through them continues the chain rule where the first pass stopped.
    with_shared: include what belongs to no row, which must count once a batch.
    """
    surrogates: list[Tensor] = []
    for name, gradient in gradients.items():
        if name in SHARED_OUTPUTS:
            if with_shared:
                surrogates.append((outputs[name] * gradient).sum())
        else:
            own_rows = gradient[first_row : first_row + len(outputs[name])]
            surrogates.append((outputs[name] * own_rows).sum())
    return surrogates


def _averages(
    micro_batches: MicroBatches,
    outputs: Outputs,
    inputs: Inputs,
    terms: Sequence[WeightedLossTerm],
    options: LossOptions,
) -> Inputs:
    """What the losses of terms with a state for each sample read: the averages with this batch in them, kept too."""
    averages: Inputs = {}
    for weighted in terms:
        if weighted.term.new_averages:
            averages |= weighted.term.new_averages(outputs, inputs, options)
    micro_batches.keep_averages(averages)
    return averages


def _batch_level_losses(
    outputs: Outputs, inputs: Inputs, terms: Sequence[WeightedLossTerm], options: LossOptions
) -> LossDict:
    losses: LossDict = {}
    for weighted in terms:
        if weighted.term.batch_level:
            losses[weighted.name] = weighted.weight * weighted.term.batch_level(outputs, inputs, options)
    return losses


def _sample_level_losses(
    outputs: Outputs, inputs: Inputs, terms: Sequence[WeightedLossTerm], normalisers: LossDict, options: LossOptions
) -> LossDict:
    losses: LossDict = {}
    for weighted in terms:
        if weighted.term.sample_level:
            total = weighted.term.sample_level(outputs, inputs, options)
            losses[weighted.name] = weighted.weight * total / normalisers[weighted.name]
    return losses


def _global_normalisers(
    micro_batches: MicroBatches, terms: Sequence[WeightedLossTerm], options: LossOptions
) -> LossDict:
    """The units (samples, tokens) of the global batch by term, which its sample-level losses are divided by."""
    inputs = list(map(micro_batches.non_image_inputs, range(micro_batches.count)))
    normalisers: LossDict = {}
    for weighted in terms:
        counts: list[Tensor] = []
        for own in inputs:
            # in double precision, since single counts exactly only to 2^24
            counts.append(weighted.term.normaliser(own, options).double())
        count = torch.stack(counts).sum()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            # gradients are averaged over processes afterwards, so each divides by its mean share
            count = count / dist.get_world_size()
        # a batch without any unit (no caption with two sentences) has loss 0 instead of NaN
        normalisers[weighted.name] = count.clamp(min=1)
    return normalisers
