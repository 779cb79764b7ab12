"""Image-text retrieval: recall and median rank in both directions, with several captions per image and exact ties."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.collate import EvalBatch, EvalCollator
from vlm.data.loader import stream_batches
from vlm.data.sampler import SequentialBatches
from vlm.data.samples import UNNAMED, Captions, select_languages
from vlm.data.shards import count_samples
from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError, VlmError
from vlm.tensor_types import Array, Float, Float32, Int, Tensor, UInt8

logger = logging.getLogger(__name__)

# the cut-offs of the literature, as in Karpathy and Fei-Fei 2015
RECALL_AT = (1, 5, 10)
IMAGES_AT_ONCE = 256
# a block of scores of 512 queries and a million candidates takes 2 GB
QUERIES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """For each query the rank of its best positive, with ties resolved in expectation over all orderings.

    above: negatives that score strictly higher than the best positive.
    tied_negatives, tied_positives: negatives and positives with exactly its score (tied_positives >= 1).
    """

    above: Int[Array, " Q"]
    tied_negatives: Int[Array, " Q"]
    tied_positives: Int[Array, " Q"]

    def recall(self, k: int) -> float:
        """Fraction of queries with a positive in the top k, in expectation over all orderings of ties."""
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Float[Array, " Q"]:
        """Probability per query of a positive in the top k.

        With j = k - above positions left for the tie, all j go to negatives with probability
        C(tied_negatives, j) / C(tied_negatives + tied_positives, j).
        """
        positions_left = np.maximum(k - self.above, 0)
        miss = np.ones(len(positions_left))
        # the quotient of binomials, one factor for each position
        for position in range(int(positions_left.max(initial=0))):
            negatives = np.maximum(self.tied_negatives - position, 0)
            tied = np.maximum(self.tied_negatives + self.tied_positives - position, 1)
            is_open = position < positions_left
            miss = np.where(is_open, miss * negatives / tied, miss)
            if not miss[is_open].any():
                break
        return 1.0 - miss

    def expected(self) -> Float[Array, " Q"]:
        """Expected rank of the first positive, from 1."""
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
    """Rank the positives of each query among all candidates by inner product.

    positives: for each query the positions of its positives, at least one.
    Memory: queries_at_once × N scores.

    Raises:
        VlmError: a score is not finite: the model has diverged, and ranks would mean nothing.
    """
    above = np.empty(len(queries), np.int64)
    tied_negatives = np.empty(len(queries), np.int64)
    tied_positives = np.empty(len(queries), np.int64)
    for first in range(0, len(queries), queries_at_once):
        chunk = slice(first, min(first + queries_at_once, len(queries)))
        scores = queries[chunk] @ candidates.T
        if not np.isfinite(scores).all():
            raise VlmError(
                "The model's embeddings are not finite: its weights have diverged. Evaluate an earlier checkpoint, or "
                "retrain with a lower learning rate."
            )
        # the positives of all queries of the chunk, flat: row is the query, column the candidate
        rows = np.repeat(np.arange(len(scores)), list(map(len, positives[chunk])))
        columns = np.fromiter(chain.from_iterable(positives[chunk]), np.int64)
        positive_scores = scores[rows, columns]
        # maximum.at, since rows repeat: best[rows] = … would keep the last positive of each query
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, rows, positive_scores)
        # counted, not sorted: linear in the candidates, and ties stay visible
        above[chunk] = (scores > best[:, None]).sum(axis=1)
        tied_positives[chunk] = np.bincount(rows, positive_scores == best[rows], minlength=len(scores))
        tied_negatives[chunk] = (scores == best[:, None]).sum(axis=1) - tied_positives[chunk]
    return Ranks(above=above, tied_negatives=tied_negatives, tied_positives=tied_positives)


@runtime_checkable
class DualEncoder(Protocol):
    """What retrieval needs of a model."""

    @property
    def view(self) -> EvalTransform:
        """The transform of its images."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of images."""
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
    """Both directions over the same images, and how many samples were skipped."""

    text_to_image: Direction
    image_to_text: Direction
    num_images: int
    num_texts: int
    num_bad: int = 0

    def metrics(self) -> dict[str, float]:
        """Flat names to values, as logged."""
        flat: dict[str, float] = {}
        for name, direction in (("text_to_image", self.text_to_image), ("image_to_text", self.image_to_text)):
            for k, value in direction.recall.items():
                flat[f"{name}_recall@{k}"] = value
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
    """Embed all images and all their captions, then rank each against all of the other modality.

    captions_each: number of captions per image and language, the first ones; 0 uses all. An image without a caption in
    these languages is a candidate, but not a query.

    Raises:
        UsageError: no sample can be used.
    """
    images: list[Tensor] = []
    captions: list[tuple[str, ...]] = []
    found_languages: set[str] = set()
    num_bad = 0
    for batch in iter_sample_batches(shards, model.view, workers=workers):
        num_bad += len(batch.unread)
        if batch.decoded:
            images.append(model.embed_images(batch.images))
            for sample in batch.decoded:
                captions.append(_select_captions(sample.captions, languages, captions_each))
                found_languages.update(sample.captions)
    available = ", ".join(sorted(filter(None, found_languages)))
    wanted = ", ".join(languages) or "any language"
    if not images or not any(captions):
        hint = f"; its captions are in {available}" if available and languages else ""
        raise UsageError(f"No image with a caption in {wanted} can be used in {shards[0]} …{hint}.")
    # captions of unnamed language count as the first one requested
    for language in () if UNNAMED in found_languages else languages:
        if language not in found_languages:
            logger.warning(f"No image has a caption in {language!r}; there are captions in {available}.")
    if num_without := captions.count(()):
        logger.warning(
            f"{num_without:,} of {len(captions):,} images have no caption in {wanted}: they are candidates of the "
            "texts, but no queries."
        )
    texts = list(chain.from_iterable(captions))
    return measure_retrieval(torch.cat(images).numpy(), model.embed_texts(texts).numpy(), captions, num_bad=num_bad)


def _select_captions(captions: Captions, languages: tuple[str, ...], captions_each: int) -> tuple[str, ...]:
    selected: list[str] = []
    try:
        for texts in select_languages(captions, languages).values():
            selected += texts[: captions_each or None]
    except BadSample:
        return ()
    return tuple(selected)


def measure_retrieval(
    images: Float32[Array, "N D"], texts: Float32[Array, "T D"], captions: Sequence[Sequence[str]], *, num_bad: int = 0
) -> Retrieval:
    """Recall and median rank in both directions.

    captions: those of each image, in the order of `texts`. Every caption is a query; an image is a positive when it
    has the same caption text, so that two images with equal captions are no error of the model. Images without
    captions are candidates but not queries.
    """
    # by text, not by number: an equal caption of another image is a match, too
    flat_captions = list(chain.from_iterable(captions))
    images_by_text: dict[str, set[int]] = defaultdict(set)
    for image, of_image in enumerate(captions):
        for text in of_image:
            images_by_text[text].add(image)
    captions_by_text: dict[str, list[int]] = defaultdict(list)
    for caption, text in enumerate(flat_captions):
        captions_by_text[text].append(caption)

    positive_images = [sorted(images_by_text[text]) for text in flat_captions]
    captioned_images: list[int] = []
    positive_captions: list[list[int]] = []
    for image, of_image in enumerate(captions):
        if of_image:
            captioned_images.append(image)
            own_captions: set[int] = set()
            for text in of_image:
                own_captions.update(captions_by_text[text])
            positive_captions.append(sorted(own_captions))
    image_queries = images[np.asarray(captioned_images, dtype=np.int64)]
    return Retrieval(
        text_to_image=_direction(rank_candidates(texts, images, positive_images)),
        image_to_text=_direction(rank_candidates(image_queries, texts, positive_captions)),
        num_images=len(images),
        num_texts=len(flat_captions),
        num_bad=num_bad,
    )


def _direction(ranks: Ranks) -> Direction:
    return Direction(
        recall={k: ranks.recall(k) for k in RECALL_AT},
        median_rank=ranks.median(),
        num_queries=len(ranks.above),
    )
