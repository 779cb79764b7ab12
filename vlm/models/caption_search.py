"""Writing captions of a batch of images: greedily, by beam search, by diverse beam search, or sampled.

The search sees a captioner as a `CaptionState` alone. Images whose captions have all ended leave the batch as soon as
they are a quarter of it, since moving the caches costs about a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vlm.data.tokenizers import Tokenizer
from vlm.errors import UsageError
from vlm.models.caption_state import CaptionState, begin_captions
from vlm.models.decoding_options import DecodingOptions
from vlm.models.network import Captioner
from vlm.tensor_types import Bool, Float, Float64, Int64, Tensor

_LEAVING_SHARE = 0.25
# the likeliest tokens nearly always hold top_p of the probability; sorting the whole vocabulary costs more than a layer
_NUCLEUS_CANDIDATES = 512
# values whose maximum is taken first; about the square root of a vocabulary
_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class WrittenCaptions:
    """N captions of each of B images, the best first, and the image's embedding from the same pass.

    tokens: start token, prompt, what was written, and the end token unless the caption was cut; then padding.
    lengths: of the rows without padding. log_likelihoods: mean of the written tokens, the end token among them, under
    the model's own distribution, in nats.
    attention: of each token when it was written, over the M image tokens; zeros for the prompt and padding.
    """

    tokens: Int64[Tensor, "B N L"]
    lengths: Int64[Tensor, "B N"]
    log_likelihoods: Float[Tensor, "B N"]
    image_embeddings: Float[Tensor, "B D"]
    attention: Float[Tensor, "B N L M"] | None


def write_captions(
    network: Captioner,
    pixels: Float[Tensor, "B 3 H W"],
    tokenizer: Tokenizer,
    options: DecodingOptions,
    *,
    seeds: Sequence[int] = (),
    is_cached: bool = True,
    has_attention: bool = False,
) -> WrittenCaptions:
    """Write captions of images.

    seeds: of each image, for sampling; by default `options.seed` + its place. Nothing else of a batch has an influence.
    is_cached: False computes each row anew at every step.

    Raises:
        UsageError: the prompt leaves no room for a caption, the length is above the model's context, or the attention
            is asked of a captioner that keeps none.
    """
    plan = _plan(tokenizer, options)
    embeddings, image_tokens = network._encode_image(pixels)
    state = begin_captions(
        network, image_tokens, max_length=plan.max_length, is_cached=is_cached, has_attention=has_attention
    )
    logits = None
    for token in plan.prompt:
        logits = state.advance(torch.full((len(pixels), 1), token, device=pixels.device))
    assert logits is not None
    if options.beams > 1:
        rows = _BeamSearch(plan, options, state, logits).run()
    else:
        seeds = seeds or range(options.seed, options.seed + len(pixels))
        rows = _StepByStep(plan, options, state, logits, seeds).run()
    return WrittenCaptions(
        tokens=rows.tokens,
        lengths=rows.lengths,
        # the prompt was given, not written: it counts neither in the sum nor in the length
        log_likelihoods=rows.log_probabilities / (rows.lengths - len(plan.prompt)).clamp(min=1),
        image_embeddings=embeddings,
        attention=rows.attention,
    )


class _Plan(NamedTuple):
    """What holds for all rows. prompt: start token and prompt. max_length: tokens of a row, the end token counted."""

    prompt: list[int]
    max_length: int
    min_length: int
    end_token: int
    pad_token: int
    forbidden: list[int]


def _plan(tokenizer: Tokenizer, options: DecodingOptions) -> _Plan:
    context = tokenizer.context_length
    if options.max_length > context:
        raise UsageError(f"max_length = {options.max_length} is above the model's context of {context} tokens.")
    max_length = options.max_length or context
    if options.min_length > max_length:
        raise UsageError(f"min_length = {options.min_length} is above the longest caption of {max_length} tokens.")
    prompt: list[int] = tokenizer.encode([options.prompt])[0].tolist() if options.prompt else []
    # the tokenizer ends and pads every text, and a caption goes on from the prompt
    while prompt and prompt[-1] in (tokenizer.pad_token, tokenizer.end_token):
        prompt.pop()
    # some tokenizers write no start token, and padding or an end token may take its place
    prompt = prompt or [tokenizer.start_token]
    if len(prompt) >= max_length:
        raise UsageError(
            f"The prompt {options.prompt!r} fills the {max_length} tokens of a caption; shorten it or raise max_length."
        )
    # neither may be written: the first is in every row, the second marks rows that have ended. Where they are the end
    # token itself, as in GPT-2's tokenizer, it stays
    forbidden = {tokenizer.start_token, tokenizer.pad_token} - {tokenizer.end_token}
    return _Plan(prompt, max_length, options.min_length, tokenizer.end_token, tokenizer.pad_token, sorted(forbidden))


class _Rows(NamedTuple):
    """Finished rows; log_probabilities: sum over the written tokens, under the model's own distribution."""

    tokens: Int64[Tensor, "B N L"]
    lengths: Int64[Tensor, "B N"]
    log_probabilities: Float[Tensor, "B N"]
    attention: Float[Tensor, "B N L M"] | None


def constrain_scores(
    scores: Float[Tensor, "R V"], rows: Int64[Tensor, "R L"], options: DecodingOptions, plan: _Plan
) -> Float[Tensor, "R V"]:
    """Log-probabilities of the next token without what may not follow (-inf), repetitions made less likely."""
    scores = scores.clone()
    end_scores = scores[:, plan.end_token].clone()
    if options.repetition_penalty != 1:
        # of log-probabilities, which have one sign; CTRL divides logits, whose sign is arbitrary
        scores.scatter_(1, rows, scores.gather(1, rows) * options.repetition_penalty)
    size = options.no_repeat_ngram
    # a token is refused if with the last n - 1 it would repeat an n-gram of the row
    if size and rows.shape[1] >= size:
        windows = rows.unfold(1, size, 1)
        last_tokens = rows[:, rows.shape[1] - size + 1 :]
        is_same = (windows[:, :, :-1] == last_tokens[:, None]).all(dim=2)
        row_numbers, places = is_same.nonzero(as_tuple=True)
        scores[row_numbers, windows[row_numbers, places, -1]] = -torch.inf
    scores[:, plan.forbidden] = -torch.inf
    # the end is no repetition, and stays where nothing else is left
    scores[:, plan.end_token] = -torch.inf
    is_short = rows.shape[1] + 1 < plan.min_length
    must_go_on = scores.isfinite().any(dim=1) & is_short
    scores[:, plan.end_token] = end_scores.masked_fill(must_go_on, -torch.inf)
    return scores


class _StepByStep:
    """Greedy decoding and sampling: each next token is settled once and for all."""

    def __init__(
        self, plan: _Plan, options: DecodingOptions, state: CaptionState, logits: Tensor, seeds: Sequence[int]
    ) -> None:
        self._plan = plan
        self._options = options
        self._state = state
        num_images = len(logits)
        count = options.captions
        device = logits.device
        self._images = torch.arange(num_images, device=device)
        # the image is encoded once; its keys and values are copied for each caption of it
        if count > 1:
            state.select(self._images, torch.zeros((num_images, count), dtype=torch.int64, device=device))
        self._logits = logits.expand(-1, count, -1)
        self._tokens = torch.full((num_images, count, plan.max_length), plan.pad_token, device=device)
        self._tokens[:, :, : len(plan.prompt)] = torch.tensor(plan.prompt, device=device)
        self._lengths = torch.full((num_images, count), len(plan.prompt), device=device)
        self._sums = logits.new_zeros(num_images, count)
        self._has_ended = torch.zeros((num_images, count), dtype=torch.bool, device=device)
        self._attention = _empty_attention(state, self._tokens)
        self._uniform = _uniform_numbers(seeds, count, plan.max_length).to(device) if options.sample else None

    def run(self) -> _Rows:
        """Until all captions have ended or are as long as they may be."""
        plan = self._plan
        for place in range(len(plan.prompt), plan.max_length):
            tokens = self._write(place)
            if place + 1 == plan.max_length or bool(self._has_ended[self._images].all()):
                break
            tokens = self._drop_finished(tokens)
            self._logits = self._state.advance(tokens)
        return _Rows(self._tokens, self._lengths, self._sums, self._attention)

    def _write(self, place: int) -> Int64[Tensor, "B N"]:
        images = self._images
        log_probabilities = self._logits.log_softmax(dim=-1).flatten(0, 1)
        rows = self._tokens[images, :, :place].flatten(0, 1)
        scores = constrain_scores(log_probabilities, rows, self._options, self._plan)
        if self._uniform is None:
            tokens = scores.argmax(dim=1)
        else:
            tokens = draw_tokens(scores, self._uniform[images, :, place].flatten(), self._options)
        shape = (len(images), self._options.captions)
        written = log_probabilities.gather(1, tokens[:, None]).view(shape)
        had_ended = self._has_ended[images]
        # rows that have ended are computed along with the others, and what they write is thrown away
        tokens = tokens.view(shape).masked_fill(had_ended, self._plan.pad_token)
        self._tokens[images, :, place] = tokens
        self._sums[images] += written.masked_fill(had_ended, 0)
        self._lengths[images] += (~had_ended).long()
        self._has_ended[images] = had_ended | (tokens == self._plan.end_token)
        if self._attention is not None and self._state.attention is not None:
            self._attention[images, :, place] = self._state.attention * (~had_ended[:, :, None])
        return tokens

    def _drop_finished(self, tokens: Int64[Tensor, "B N"]) -> Int64[Tensor, "C N"]:
        going_on = _going_on(self._has_ended[self._images].all(dim=1))
        if going_on is None:
            return tokens
        self._state.select(going_on, torch.arange(tokens.shape[1], device=tokens.device).expand(len(going_on), -1))
        self._images = self._images[going_on]
        return tokens[going_on]


class _Finished(NamedTuple):
    """The best captions that have ended, of each group of beams; places without one have the score -inf."""

    scores: Float[Tensor, "B G S"]
    tokens: Int64[Tensor, "B G S L"]
    lengths: Int64[Tensor, "B G S"]
    sums: Float[Tensor, "B G S"]
    attention: Float[Tensor, "B G S L M"] | None

    def merged(self, group: int, images: Tensor, added: "_Finished") -> None:
        """Keep the best of those of a group and of others, in place."""
        size = self.scores.shape[2]
        scores = torch.cat([self.scores[images, group], added.scores[:, 0]], dim=1)
        best = scores.topk(size, dim=1)
        # scores decide, and all fields of a caption move with its score
        for field, new in zip(self, added, strict=True):
            if field is None or new is None:
                continue
            both = torch.cat([field[images, group], new[:, 0]], dim=1)
            field[images, group] = _gather(both, best.indices)


class _BeamSearch:
    """Beam search in groups of S beams; one group is the plain search.

    As transformers' `BeamSearchScorer`: of the 2 S best continuations those that end are finished captions if they are
    among the first S, and the first S others go on. A group is done when its S finished captions are all better than
    its best beam would be if it ended now.
    """

    def __init__(self, plan: _Plan, options: DecodingOptions, state: CaptionState, logits: Tensor) -> None:
        self._plan = plan
        self._options = options
        self._state = state
        num_images = len(logits)
        groups = options.beam_groups
        size = options.beams // groups
        device = logits.device
        self._images = torch.arange(num_images, device=device)
        state.select(self._images, torch.zeros((num_images, options.beams), dtype=torch.int64, device=device))
        self._logits = logits.expand(-1, options.beams, -1)
        shape = (num_images, groups, size)
        self._tokens = torch.full((*shape, plan.max_length), plan.pad_token, device=device)
        self._tokens[..., : len(plan.prompt)] = torch.tensor(plan.prompt, device=device)
        # all beams begin with the same words: only the first of each group may go on from there
        self._scores = logits.new_full(shape, -torch.inf)
        self._scores[:, :, 0] = 0
        self._sums = logits.new_zeros(shape)
        self._attention = _empty_attention(state, self._tokens)
        self._is_done = torch.zeros((num_images, groups), dtype=torch.bool, device=device)
        self._finished = _Finished(
            scores=torch.full_like(self._scores, -torch.inf),
            tokens=self._tokens.clone(),
            lengths=torch.full(shape, len(plan.prompt), device=device),
            sums=torch.zeros_like(self._sums),
            attention=None if self._attention is None else self._attention.clone(),
        )

    def run(self) -> _Rows:
        """Until no group can find a better caption, or the beams are as long as they may be."""
        plan = self._plan
        for place in range(len(plan.prompt), plan.max_length):
            beams, tokens = self._write(place)
            if bool(self._is_done[self._images].all()):
                break
            if place + 1 == plan.max_length:
                self._finish_beams(plan.max_length)
                break
            beams, tokens = self._drop_finished(beams, tokens)
            self._logits = self._state.advance(tokens)
        return self._best()

    def _write(self, place: int) -> tuple[Int64[Tensor, "B K"], Int64[Tensor, "B K"]]:
        """Extend all groups by a token: the beams that go on, by number, and their new tokens."""
        log_probabilities = self._logits.log_softmax(dim=-1)
        num_images, _, vocabulary = log_probabilities.shape
        size = self._options.beams // self._options.beam_groups
        by_group = log_probabilities.view(num_images, -1, size, vocabulary)
        uses = log_probabilities.new_zeros(num_images, vocabulary)
        beams: list[Tensor] = []
        tokens: list[Tensor] = []
        for group in range(self._options.beam_groups):
            from_beams, new_tokens = self._write_group(group, place, by_group[:, group], uses)
            beams.append(from_beams + group * size)
            tokens.append(new_tokens)
            is_open = ~self._is_done[self._images, group][:, None]
            # later groups are penalised for what earlier ones write at the same place (Vijayakumar et al. 2018)
            uses.scatter_add_(1, new_tokens, is_open.to(uses.dtype).expand_as(new_tokens).contiguous())
        return torch.cat(beams, dim=1), torch.cat(tokens, dim=1)

    def _write_group(
        self, group: int, place: int, log_probabilities: Float[Tensor, "B S V"], uses: Float[Tensor, "B V"]
    ) -> tuple[Int64[Tensor, "B S"], Int64[Tensor, "B S"]]:
        images = self._images
        plan = self._plan
        num_images, size, _ = log_probabilities.shape
        rows = self._tokens[images, group, :, :place].flatten(0, 1)
        scores, numbers = self._candidates(group, log_probabilities, rows, uses)
        totals = (self._scores[images, group][:, :, None] + scores).flatten(1)
        # twice as many, so that enough go on even if as many as there are beams end here
        best = totals.topk(min(2 * size, totals.shape[1]), dim=1)
        beams = torch.div(best.indices, scores.shape[2], rounding_mode="floor")
        tokens = numbers.flatten(1).gather(1, best.indices)
        written = log_probabilities[torch.arange(num_images, device=beams.device)[:, None], beams, tokens]
        sums = self._sums[images, group].gather(1, beams) + written

        is_end = tokens == plan.end_token
        length = place + 1
        # longer captions have lower sums, so ended ones are compared by a mean over a power of their length
        worth = best.values / (length - len(plan.prompt)) ** self._options.length_penalty
        may_finish = is_end[:, :size] & ~self._is_done[images, group][:, None]
        ended_scores = worth[:, :size].masked_fill(~may_finish, -torch.inf)
        self._add_finished(group, images, beams[:, :size], tokens[:, :size], ended_scores, sums[:, :size], length)

        # stable: those that go on stay in the order of their scores
        going_on = is_end.long().argsort(dim=1, stable=True)[:, :size]
        beams = beams.gather(1, going_on)
        tokens = tokens.gather(1, going_on)
        self._tokens[images, group] = _gather(self._tokens[images, group], beams)
        self._tokens[images, group, :, place] = tokens
        self._scores[images, group] = best.values.gather(1, going_on)
        self._sums[images, group] = sums.gather(1, going_on)
        self._extend_attention(group, place, beams)
        worst = self._finished.scores[images, group].min(dim=1).values
        self._is_done[images, group] |= worst >= worth.max(dim=1).values
        return beams, tokens

    def _candidates(
        self, group: int, log_probabilities: Float[Tensor, "B S V"], rows: Int64[Tensor, "R L"], uses: Tensor
    ) -> tuple[Float[Tensor, "B S C"], Int64[Tensor, "B S C"]]:
        """Scores and numbers of tokens among which the best 2 S continuations of each beam are."""
        options = self._options
        plan = self._plan
        size, vocabulary = log_probabilities.shape[1:]
        if options.repetition_penalty != 1 or options.no_repeat_ngram:
            scores = constrain_scores(log_probabilities.flatten(0, 1), rows, options, plan)
            scores = scores.view(log_probabilities.shape) - options.diversity_penalty * uses[:, None]
            return scores, torch.arange(vocabulary, device=scores.device).expand_as(scores)
        # No token is worth more than its probability here, and few are worth less: those that may not follow, and those
        # that earlier groups wrote. So the likeliest hold the best, and the rest of the vocabulary is read only once.
        num_lowered = len(plan.forbidden) + 1 + (group * size if options.diversity_penalty else 0)
        count = min(2 * size + num_lowered, vocabulary)
        scores, numbers = largest(log_probabilities, count)
        if num_lowered > len(plan.forbidden) + 1:
            scores = scores - options.diversity_penalty * uses[:, None].expand(-1, size, -1).gather(2, numbers)
        for token in plan.forbidden:
            scores = scores.masked_fill(numbers == token, -torch.inf)
        if rows.shape[1] + 1 < plan.min_length:
            is_end = numbers == plan.end_token
            # the end stays where nothing else is left
            can_go_on = (scores.isfinite() & ~is_end).any(dim=2, keepdim=True)
            scores = scores.masked_fill(is_end & can_go_on, -torch.inf)
        return scores, numbers

    def _add_finished(
        self, group: int, images: Tensor, beams: Tensor, tokens: Tensor, scores: Tensor, sums: Tensor, length: int
    ) -> None:
        if not bool(scores.isfinite().any()):
            return
        rows = _gather(self._tokens[images, group], beams)
        rows[:, :, length - 1] = tokens
        attention = None
        if self._attention is not None:
            attention = _gather(self._attention[images, group], beams)
            attention[:, :, length - 1] = self._attention_now(group, beams)
            attention = attention[:, None]
        added = _Finished(
            scores[:, None], rows[:, None], torch.full_like(tokens, length)[:, None], sums[:, None], attention
        )
        self._finished.merged(group, images, added)

    def _finish_beams(self, length: int) -> None:
        """Captions that were cut are worth what they are."""
        images = self._images
        for group in range(self._options.beam_groups):
            worth = self._scores[images, group] / (length - len(self._plan.prompt)) ** self._options.length_penalty
            worth = worth.masked_fill(self._is_done[images, group][:, None], -torch.inf)
            attention = None if self._attention is None else self._attention[images, group][:, None]
            added = _Finished(
                worth[:, None],
                self._tokens[images, group][:, None],
                torch.full_like(worth, length, dtype=torch.int64)[:, None],
                self._sums[images, group][:, None],
                attention,
            )
            self._finished.merged(group, images, added)

    def _attention_now(self, group: int, beams: Tensor) -> Tensor:
        size = self._options.beams // self._options.beam_groups
        assert self._state.attention is not None
        return _gather(self._state.attention[:, group * size : (group + 1) * size], beams)

    def _extend_attention(self, group: int, place: int, beams: Tensor) -> None:
        if self._attention is not None:
            images = self._images
            self._attention[images, group] = _gather(self._attention[images, group], beams)
            self._attention[images, group, :, place] = self._attention_now(group, beams)

    def _drop_finished(self, beams: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Move the beams to where they go on, without the images that are done if those are many."""
        going_on = _going_on(self._is_done[self._images].all(dim=1))
        if going_on is None:
            going_on = torch.arange(len(tokens), device=tokens.device)
        self._state.select(going_on, beams[going_on])
        self._images = self._images[going_on]
        return beams[going_on], tokens[going_on]

    def _best(self) -> _Rows:
        """The best captions of each image, different ones first; with groups, the best of each before the second."""
        finished = self._finished
        count = self._options.captions
        places: list[list[int]] = []
        for scores, rows in zip(finished.scores.tolist(), finished.tokens.tolist(), strict=True):
            places.append(_different_first(scores, rows)[:count])
        chosen = torch.tensor(places, device=finished.scores.device)
        picked: list[Tensor | None] = []
        for field in (finished.tokens, finished.lengths, finished.sums, finished.attention):
            picked.append(None if field is None else _gather(field.flatten(1, 2), chosen))
        return _Rows(*picked)  # pyright: ignore[reportArgumentType]


def largest(values: Float[Tensor, "B S V"], count: int) -> tuple[Float[Tensor, "B S C"], Int64[Tensor, "B S C"]]:
    """The C largest values of each row, descending, and their places, as `topk`: in a fifth of its time for a few of
    many, since the blocks with the largest maxima hold them.
    """
    num_blocks = values.shape[2] // _BLOCK
    # too few blocks to leave any out
    if num_blocks <= 2 * count:
        best = values.topk(count, dim=2)
        return best.values, best.indices
    whole = num_blocks * _BLOCK
    blocks = values[:, :, :whole].unflatten(2, (num_blocks, _BLOCK))
    numbers = blocks.amax(dim=3).topk(count, dim=2).indices
    inside = blocks.gather(2, numbers[..., None].expand(-1, -1, -1, _BLOCK)).flatten(2)
    # the last tokens fill no block
    best = torch.cat([inside, values[:, :, whole:]], dim=2).topk(count, dim=2)
    of_block = numbers.gather(2, (best.indices // _BLOCK).clamp(max=count - 1)) * _BLOCK + best.indices % _BLOCK
    places = torch.where(best.indices < count * _BLOCK, of_block, whole + best.indices - count * _BLOCK)
    return best.values, places


def draw_tokens(
    scores: Float[Tensor, "R V"], uniform: Float64[Tensor, " R"], options: DecodingOptions
) -> Int64[Tensor, " R"]:
    """A token for each row, drawn by one number of [0, 1): the place where the cumulative probability passes it."""
    # in double precision, where sums over a vocabulary stay exact enough to compare a drawn number with
    scores = scores.double() / options.temperature
    if not options.top_k and options.top_p == 1:
        return _pass_quantile(scores.softmax(dim=1), uniform)
    if options.top_k:
        scores, tokens = scores.topk(min(options.top_k, scores.shape[1]), dim=1)
        probabilities = scores.softmax(dim=1)
    else:
        # over all tokens: the nucleus is a share of the whole distribution, not of the candidates
        total = scores.logsumexp(dim=1, keepdim=True)
        best, tokens = scores.topk(min(_NUCLEUS_CANDIDATES, scores.shape[1]), dim=1)
        probabilities = (best - total).exp()
        # a flat distribution needs more than the candidates: then all tokens are sorted
        if bool((probabilities.sum(dim=1) < options.top_p).any()):
            best, tokens = scores.sort(dim=1, descending=True)
            probabilities = (best - total).exp()
    # the fewest whose sum reaches top_p: those before which it is not reached yet
    before = probabilities.cumsum(dim=1) - probabilities
    probabilities = probabilities.masked_fill(before >= options.top_p, 0)
    return tokens.gather(1, _pass_quantile(probabilities, uniform)[:, None])[:, 0]


def _pass_quantile(probabilities: Float64[Tensor, "R C"], uniform: Float64[Tensor, " R"]) -> Int64[Tensor, " R"]:
    ends = probabilities.cumsum(dim=1)
    # scaled to the last end, which rounding leaves a little off 1
    places = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True)
    return places.clamp(max=probabilities.shape[1] - 1)[:, 0]


def _uniform_numbers(seeds: Sequence[int], count: int, length: int) -> Float64[Tensor, "B N L"]:
    """The numbers by which the tokens of each image are drawn, from its own seed."""
    rows: list[np.ndarray] = []
    for seed in seeds:
        for number in range(count):
            # a key of each caption, so that none depends on how many are asked for, nor on their length
            bits = np.random.Philox(key=np.array([seed, number], np.uint64))
            rows.append(np.random.Generator(bits).random(length))
    return torch.from_numpy(np.stack(rows)).view(len(seeds), count, length)


def _going_on(is_done: Bool[Tensor, " B"]) -> Int64[Tensor, " C"] | None:
    """The images to go on with; None where too few are done to be worth the move."""
    num_done = int(is_done.sum())
    if num_done < _LEAVING_SHARE * len(is_done):
        return None
    return (~is_done).nonzero()[:, 0]


def _empty_attention(state: CaptionState, tokens: Tensor) -> Tensor | None:
    if state.attention is None:
        return None
    return state.attention.new_zeros(*tokens.shape, state.attention.shape[-1])


def _gather(values: Tensor, rows: Int64[Tensor, "B J"]) -> Tensor:
    """values[b, rows[b, j]] of all b and j."""
    return values[torch.arange(len(values), device=values.device)[:, None], rows]


def _different_first(scores: list[list[float]], rows: list[list[list[int]]]) -> list[int]:
    """Places in the flat list of G groups of S captions, ordered by rank in the group, then by score; repeats last."""
    size = len(scores[0])
    ranked: list[tuple[int, float, int]] = []
    for group, of_group in enumerate(scores):
        for rank, score in enumerate(of_group):
            ranked.append((rank, -score, group * size + rank))
    different: list[int] = []
    repeated: list[int] = []
    texts: set[tuple[int, ...]] = set()
    # the best of every group before the second of any: groups are there for variety
    for _, _, place in sorted(ranked):
        text = tuple(rows[place // size][place % size])
        (repeated if text in texts else different).append(place)
        texts.add(text)
    return different + repeated
