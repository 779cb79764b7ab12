"""Retrieval metrics of embedded images and captions, with several captions an image and several images a caption."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from vlm.errors import UsageError
from vlm.evaluation.rank_counts import PositivePairs, RankCounts, count_ranks
from vlm.evaluation.rank_metrics import Ranks, average_precision, normalised_gain
from vlm.tensor_types import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

# the cut-offs of the literature, as in Karpathy and Fei-Fei 2015
RECALL_AT = (1, 5, 10)
GAIN_AT = 10
# a hundred million pairs take 5 GB
_MOST_PAIRS = 100_000_000
# every positive is counted by itself, which is the work of so many passes over the scores
_MOST_POSITIVES = 32

SameText = Literal["positive", "negative"]
"""What another image with the same caption text is to a caption: right as well, or wrong (as CLIP_benchmark has it)."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of retrieval: recall in [0, 1] by cut-off, median rank from 1, number of queries.

    recall is the fraction of queries with a positive in the top k; mean_reciprocal_rank is that of the first positive.
    ndcg by cut-off and mean_average_precision are of all positives, and absent where only the best one was counted.
    """

    recall: dict[int, float]
    median_rank: float
    num_queries: int
    mean_reciprocal_rank: float | None = None
    ndcg: dict[int, float] = field(default_factory=dict)
    mean_average_precision: float | None = None

    def metrics(self, name: str) -> dict[str, float]:
        """Flat names to values, each beginning with the name of the direction."""
        flat = {f"{name}_recall@{k}": value for k, value in self.recall.items()}
        flat[f"{name}_median_rank"] = self.median_rank
        if self.mean_reciprocal_rank is not None:
            flat[f"{name}_mrr"] = self.mean_reciprocal_rank
        flat |= {f"{name}_ndcg@{k}": value for k, value in self.ndcg.items()}
        if self.mean_average_precision is not None:
            flat[f"{name}_map"] = self.mean_average_precision
        return flat


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Both directions over the same images, and how many samples were skipped.

    by_language: the captions of each language alone against all images, where there are several languages.
    """

    text_to_image: Direction
    image_to_text: Direction
    num_images: int
    num_texts: int
    num_bad: int = 0
    by_language: dict[str, "RetrievalResult"] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat names to values, as logged."""
        return self.text_to_image.metrics("text_to_image") | self.image_to_text.metrics("image_to_text")


def measure_retrieval(
    images: Float32[Array, "N D"],
    texts: Float32[Array, "T D"],
    captions: Sequence[Sequence[str]],
    *,
    num_bad: int = 0,
    same_text: SameText = "positive",
    every_positive: bool = True,
) -> RetrievalResult:
    """All metrics in both directions.

    captions: those of each image, in the order of `texts`. Every caption is a query; an image is a positive when it
    has the same caption text, so that two images with equal captions are no error of the model, unless `same_text`
    says so. Images without captions are candidates but not queries.
    every_positive: nDCG and mAP, too, which count all positives of a query.

    Raises:
        UsageError: captions are so often the same that their pairs would not fit into memory.
    """
    flat_captions = FlatCaptions.from_images(captions)
    by_text, by_image = count_retrieval(
        images, texts, flat_captions, same_text=same_text, every_positive=every_positive
    )
    return RetrievalResult(
        text_to_image=direction_of(query_values(by_text)),
        image_to_text=direction_of(query_values(by_image)),
        num_images=len(images),
        num_texts=len(flat_captions.texts),
        num_bad=num_bad,
    )


@dataclass(frozen=True)
class FlatCaptions:
    """The captions of images one after the other, and the number of the image of each."""

    texts: list[str]
    images: Int64[Array, " T"]

    @classmethod
    def from_images(cls, captions: Sequence[Sequence[str]]) -> "FlatCaptions":
        """Of the captions of each image."""
        numbers = np.repeat(np.arange(len(captions)), np.fromiter(map(len, captions), np.int64, len(captions)))
        return cls(list(chain.from_iterable(captions)), numbers)

    def select(self, numbers: Int64[Array, " S"]) -> "FlatCaptions":
        """Some of them."""
        return FlatCaptions([self.texts[number] for number in numbers], self.images[numbers])

    def pairs(self, num_images: int, same_text: SameText) -> PositivePairs:
        """Which captions are right for which images.

        Raises:
            UsageError: there are too many.
        """
        columns = np.arange(len(self.texts))
        if same_text == "negative":
            return PositivePairs(rows=self.images, columns=columns)
        numbers: dict[str, int] = {}
        text_of = np.fromiter((numbers.setdefault(text, len(numbers)) for text in self.texts), np.int64)
        # the images of each text, each once, in the order of the texts
        image_of_text = np.unique(text_of * num_images + self.images)
        first = np.searchsorted(image_of_text // max(1, num_images), np.arange(len(numbers) + 1))
        images_each = np.diff(first)[text_of]
        num_pairs = int(images_each.sum())
        if num_pairs > _MOST_PAIRS:
            raise UsageError(
                f"{len(self.texts):,} captions with {len(numbers):,} different texts make {num_pairs:,} pairs of an "
                "image and a right caption, more than fit into memory. Captions this alike name classes: evaluate "
                "classification, or take fewer images."
            )
        before = np.cumsum(images_each) - images_each
        place = np.arange(num_pairs) - np.repeat(before - first[text_of], images_each)
        return PositivePairs(rows=image_of_text[place] % max(1, num_images), columns=np.repeat(columns, images_each))


def count_retrieval(
    images: Float32[Array, "N D"],
    texts: Float32[Array, "T D"],
    captions: FlatCaptions,
    *,
    same_text: SameText = "positive",
    every_positive: bool = True,
) -> tuple[RankCounts, RankCounts]:
    """The counts of texts that look for images, and of images that look for texts.

    every_positive: of all positives of a query, unless it has too many on average; then of the best one, as without.

    Raises:
        UsageError: there are more pairs than fit into memory.
        VlmError: an embedding is not finite.
    """
    pairs = captions.pairs(len(images), same_text)
    if every_positive and len(pairs.rows) > _MOST_POSITIVES * len(texts):
        logger.warning(
            f"A caption is right for {len(pairs.rows) / len(texts):,.0f} images on average, since so many have the "
            "same text; nDCG and mAP, which count each of them, are left out."
        )
        every_positive = False
    by_image, by_text = count_ranks(images, texts, pairs, every_positive=every_positive)
    assert by_text is not None
    return by_text, by_image


def query_values(
    counts: RankCounts, *, recall_at: Sequence[int] = RECALL_AT, gain_at: int = GAIN_AT
) -> dict[str, Float[Array, " Q"]]:
    """For each query that has a positive: recall@k, reciprocal rank (mrr) and rank; and where every positive was
    counted, ndcg@k and average precision (map). All are expectations over the orderings of ties."""
    ranks = Ranks.from_counts(counts)
    values = {f"recall@{k}": ranks.hits(k) for k in recall_at}
    values["mrr"] = ranks.reciprocal()
    if counts.positives.sum() == counts.num_positives.sum():
        values[f"ndcg@{gain_at}"] = normalised_gain(counts, gain_at)
        values["map"] = average_precision(counts)
    values["rank"] = ranks.expected()
    return values


def direction_of(values: dict[str, Float[Array, " Q"]]) -> Direction:
    """The means of `query_values`, and the median of the ranks."""
    means = {name: float(of_query.mean()) for name, of_query in values.items()}
    return Direction(
        recall={int(name.removeprefix("recall@")): mean for name, mean in means.items() if name.startswith("recall@")},
        median_rank=float(np.median(values["rank"])),
        num_queries=len(values["rank"]),
        mean_reciprocal_rank=means["mrr"],
        ndcg={int(name.removeprefix("ndcg@")): mean for name, mean in means.items() if name.startswith("ndcg@")},
        mean_average_precision=means.get("map"),
    )
