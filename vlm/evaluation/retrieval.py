"""Recall of pictures by captions and of captions by pictures, with several captions a picture.

Where the right answers stand among all, with ties broken by no one's favour; in chunks, never all at once.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.collate import EvalBatch, EvalCollator
from vlm.data.loader import stream_batches
from vlm.data.sampler import SequentialBatches
from vlm.data.samples import Captions, select_languages
from vlm.data.shards import count_samples
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.tensors import Array, Float, Float32, Int, Tensor, UInt8

QUERIES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """For each query the standing of its best right answer under an exchangeable breaking of ties.

    above: wrong answers that score strictly higher than the best right one.
    tied_wrong, tied_right: wrong and right answers that score exactly the same as it (tied_right >= 1).
    """

    above: Int[Array, " Q"]
    tied_negatives: Int[Array, " Q"]
    tied_positives: Int[Array, " Q"]

    def recall(self, k: int) -> float:
        """Share of queries with a right answer among the first k, expected over all orders of tied answers."""
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Float[Array, " Q"]:
        """Probability per query of a right answer among the first k.

        With j = k - above places left for the tie, all j go to wrong answers with probability
        C(tied_wrong, j) / C(tied_wrong + tied_right, j).
        """
        left = np.maximum(k - self.above, 0)
        miss = np.ones(len(left))
        for place in range(int(left.max(initial=0))):
            wrong = np.maximum(self.tied_negatives - place, 0)
            everyone = np.maximum(self.tied_negatives + self.tied_positives - place, 1)
            miss = np.where(place < left, miss * wrong / everyone, miss)
            if not miss[left > place].any():
                break
        return 1.0 - miss

    def expected(self) -> Float[Array, " Q"]:
        """Expected rank of the first right answer, counted from 1."""
        return self.above + 1 + self.tied_negatives / (self.tied_positives + 1)

    def median(self) -> float:
        """Median over the queries of the expected rank."""
        return float(np.median(self.expected()))


def rank_candidates(
    queries: Float32[Array, "Q D"],
    candidates: Float32[Array, "N D"],
    positives: list[list[int]],
    *,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Ranks:
    """Rank the right answers of each query by inner product.

    right: for each query the numbers of its right answers, at least one.
    Memory: queries_at_once × N scores.

    Raises:
        VlmError: a score is not finite: the model has diverged, and ranks would mean nothing.
    """
    above, tied_negatives, tied_positives = [np.empty(len(queries), np.int64) for _ in range(3)]
    for first in range(0, len(queries), queries_at_once):
        chunk = slice(first, min(first + queries_at_once, len(queries)))
        scores = queries[chunk] @ candidates.T
        if not np.isfinite(scores).all():
            raise VlmError(
                "The model gives embeddings that are not finite: its weights have diverged. Measure an earlier "
                "checkpoint, or train it anew with a lower learning rate."
            )
        rows = np.repeat(np.arange(len(scores)), [len(found) for found in positives[chunk]])
        columns = np.concatenate([np.asarray(found, dtype=np.int64) for found in positives[chunk]])
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, rows, scores[rows, columns])
        above[chunk] = (scores > best[:, None]).sum(axis=1)
        tied_positives[chunk] = np.bincount(rows, scores[rows, columns] == best[rows], minlength=len(scores))
        tied_negatives[chunk] = (scores == best[:, None]).sum(axis=1) - tied_positives[chunk]
    return Ranks(above=above, tied_negatives=tied_negatives, tied_positives=tied_positives)


RECALL_AT = (1, 5, 10)
IMAGES_AT_ONCE = 256


@runtime_checkable
class DualEncoder(Protocol):
    """What retrieval needs of a model."""

    @property
    def view(self) -> EvalTransform:
        """How a picture is fitted."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of pictures."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of retrieval: recall in [0, 1] by cut-off, median rank from 1, number of queries."""

    recall: dict[int, float]
    median_rank: float
    num_queries: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Both directions over the same pictures, and how many samples could not be used."""

    text_to_image: Direction
    image_to_text: Direction
    num_images: int
    num_texts: int
    num_bad: int = 0

    def metrics(self) -> dict[str, float]:
        """Flat names to values, as logs want them."""
        flat: dict[str, float] = {}
        for name, direction in (("text_to_image", self.text_to_image), ("image_to_text", self.image_to_text)):
            flat |= {f"{name}_recall@{k}": value for k, value in direction.recall.items()}
            flat[f"{name}_median_rank"] = direction.median_rank
        return flat


def iter_sample_batches(shards: Sequence[str], view: EvalTransform | None, *, workers: int) -> Iterable[EvalBatch]:
    """Every sample of the shards once, in file order, ready for a model."""
    plan = SequentialBatches(counts=count_samples(list(shards)), batch_size=IMAGES_AT_ONCE)
    return stream_batches(plan, shards, EvalCollator(view=view), numbers=range(len(plan)), workers=workers)


def evaluate_retrieval(
    model: DualEncoder,
    shards: Sequence[str],
    *,
    languages: tuple[str, ...] = (),
    captions_each: int = 0,
    workers: int = 0,
) -> Retrieval:
    """Embed all pictures and all their captions, then rank each against the whole other side.

    captions_each: only the first so many captions of a picture in each language are used; 0 uses all.

    Raises:
        UsageError: no sample can be used.
    """
    images: list[Tensor] = []
    captions: list[tuple[str, ...]] = []
    num_bad = 0
    for batch in iter_sample_batches(shards, model.view, workers=workers):
        num_bad += len(batch.unread) + len(batch.undecoded)
        if batch.decoded:
            images.append(model.embed_images(batch.images))
            captions += [_texts(item.captions, languages, captions_each) for item in batch.decoded]
    if not images or not any(captions):
        raise UsageError(f"No picture with a caption in {languages or 'any language'} can be used in {shards[0]} …")
    texts = [text for of_image in captions for text in of_image]
    return measure_retrieval(torch.cat(images).numpy(), model.embed_texts(texts).numpy(), captions, num_bad=num_bad)


def measure_retrieval(
    images: Float32[Array, "N D"], texts: Float32[Array, "T D"], captions: Sequence[Sequence[str]], *, num_bad: int = 0
) -> Retrieval:
    """Recall and median rank in both directions.

    captions: those of each picture, in the order of `texts`. Every caption is a query; a picture is a right answer
    when it carries the same caption text, so that two pictures with equal captions are no error of the model.
    Pictures without captions are answers but no queries.
    """
    flat = [text for of_image in captions for text in of_image]
    images_of: dict[str, set[int]] = defaultdict(set)
    for number, of_image in enumerate(captions):
        for text in of_image:
            images_of[text].add(number)
    texts_of: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(flat):
        texts_of[text].append(number)
    with_captions = [number for number, of_image in enumerate(captions) if of_image]
    right_texts = [sorted({place for text in captions[number] for place in texts_of[text]}) for number in with_captions]
    return Retrieval(
        text_to_image=_direction(rank_candidates(texts, images, [sorted(images_of[text]) for text in flat])),
        image_to_text=_direction(
            rank_candidates(images[np.asarray(with_captions, dtype=np.int64)], texts, right_texts)
        ),
        num_images=len(images),
        num_texts=len(flat),
        num_bad=num_bad,
    )


def _texts(captions: Captions, languages: tuple[str, ...], captions_each: int) -> tuple[str, ...]:
    if not captions:
        return ()
    chosen = select_languages(captions, languages).values()
    return tuple(text for texts in chosen for text in texts[: captions_each or None])


def _direction(ranks: Ranks) -> Direction:
    return Direction(
        recall={k: ranks.recall(k) for k in RECALL_AT},
        median_rank=ranks.median(),
        num_queries=len(ranks.above),
    )
