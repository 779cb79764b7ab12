"""Retrieval metrics of embedded images and captions, with several captions an image and several images a caption.

Candidates that score the same count in expectation: the mean over all their orderings. Formulas for tied groups:
McSherry and Najork 2008, "Computing information retrieval performance measures efficiently in the presence of tied
scores". A positive is a candidate that is right for a query; relevance is binary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from vlm.errors import UsageError
from vlm.evaluation.rank_counts import CANDIDATES_AT_ONCE, QUERIES_AT_ONCE, PositivePairs, RankCounts, count_ranks
from vlm.tensor_types import Array, Float, Float32, Int, Int64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """For each query the rank of its best positive, with ties resolved in expectation over all orderings.

    above: negatives that score strictly higher than the best positive.
    tied_negatives, tied_positives: negatives and positives with exactly its score (tied_positives >= 1).
    """

    above: Int[Array, " Q"]
    tied_negatives: Int[Array, " Q"]
    tied_positives: Int[Array, " Q"]

    @classmethod
    def from_counts(cls, counts: RankCounts) -> "Ranks":
        """Those of the queries that have a positive, in their order."""
        best = counts.best_groups
        return cls(above=counts.above[best], tied_negatives=counts.tied[best], tied_positives=counts.positives[best])

    @classmethod
    def by_chance(cls, num_positives: Int[Array, " Q"], num_candidates: int) -> "Ranks":
        """Those of a model that scores all candidates the same, which is what orders them at random."""
        return cls(
            above=np.zeros_like(num_positives),
            tied_negatives=num_candidates - num_positives,
            tied_positives=num_positives,
        )

    def recall(self, k: int) -> float:
        """Fraction of queries with a positive in the top k, in expectation over all orderings of ties."""
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Float[Array, " Q"]:
        """Probability per query of a positive in the top k.

        With j = k - above positions left for the tie, all j go to negatives with probability
        C(tied_negatives, j) / C(tied_negatives + tied_positives, j).
        """
        positions_left = np.maximum(k - self.above, 0)
        # binomials themselves overflow from a thousand candidates on
        miss = np.ones(len(positions_left))
        # the quotient of binomials, one factor for each position
        for position in range(int(positions_left.max(initial=0))):
            negatives = np.maximum(self.tied_negatives - position, 0)
            tied = np.maximum(self.tied_negatives + self.tied_positives - position, 1)
            is_open = position < positions_left
            miss = np.where(is_open, miss * negatives / tied, miss)
            # no query can miss any more: the factors after this are zero
            if not miss[is_open].any():
                break
        return 1.0 - miss

    def expected(self) -> Float[Array, " Q"]:
        """Expected rank of the first positive, from 1."""
        return self.above + 1 + self.tied_negatives / (self.tied_positives + 1)

    def median(self) -> float:
        """Median over the queries of the expected rank."""
        return float(np.median(self.expected()))

    def reciprocal(self) -> Float[Array, " Q"]:
        """Expected reciprocal of the first positive's rank per query; its mean is the MRR.

        Among n negatives and p positives the first j are negatives, and the next is not, with probability
        p / (n + p) · (n / (n + p - 1)) · … · ((n - j + 1) / (n + p - j)).
        """
        # queries share few different triples, and the series is summed once for each
        triples = np.stack([self.above, self.tied_negatives, self.tied_positives])
        different, query_of = np.unique(triples, axis=1, return_inverse=True)
        values = np.empty(different.shape[1])
        for number, (above, negatives, positives) in enumerate(different.T.tolist()):
            places = np.arange(negatives)
            factors = (negatives - places) / np.maximum(negatives + positives - 1 - places, 1)
            chances = np.append(1.0, np.cumprod(factors)) * (positives / (negatives + positives))
            values[number] = (chances / np.arange(above + 1, above + negatives + 2)).sum()
        return values[query_of]


def average_precision(counts: RankCounts) -> Float[Array, " Q"]:
    """Expected average precision of each query that has a positive, over all candidates; its mean is the mAP.

    counts: of every positive. With R positives and n candidates before a group of r positives and t negatives, the i-th
    place of the group holds a positive with probability r / (r + t), and then R + 1 + (i - 1)(r - 1) / (r + t - 1)
    positives are expected up to it.
    """
    groups = _TiedGroups.from_counts(counts)
    # a group of one has no others; its precision is computed apart below
    others = np.maximum(groups.size - 1, 1)
    slope = (groups.positives - 1) / others
    # sums of 1 / (n + i) are differences of harmonic numbers, so a group costs two look-ups whatever its size
    harmonic = np.append(0.0, np.cumsum(1.0 / np.arange(1, counts.num_candidates + 1)))
    # the sum of (a + (i-1)·slope) / (n + i) over i, with the part that does not depend on i taken out
    constant = groups.positives_before + 1 - slope * (groups.before + 1)
    steps = harmonic[groups.before + groups.size] - harmonic[groups.before]
    precision = np.where(
        groups.size == 1,
        (groups.positives_before + 1) / (groups.before + 1),
        groups.positives / groups.size * (groups.size * slope + constant * steps),
    )
    return groups.sum_by_query(precision) / groups.positives_by_query()


def normalised_gain(counts: RankCounts, k: int) -> Float[Array, " Q"]:
    """Expected nDCG@k of each query that has a positive: gain 1 for a positive, discount log2(rank + 1).

    counts: of every positive. Source: Järvelin and Kekäläinen 2002, with the discount of Burges et al. 2005.
    """
    groups = _TiedGroups.from_counts(counts)
    # a tied group's discounts are averaged over its places, cut off at k
    discounts = np.append(0.0, np.cumsum(1.0 / np.log2(np.arange(2, k + 2))))
    places = discounts[np.minimum(groups.before + groups.size, k)] - discounts[np.minimum(groups.before, k)]
    gain = groups.sum_by_query(groups.positives / groups.size * places)
    # the best order has all positives first: its gain is the sum of so many discounts
    return gain / discounts[np.minimum(groups.positives_by_query(), k)]


@dataclass(frozen=True)
class _TiedGroups:
    """Candidates with the same score, as groups with at least a positive. before: candidates that score higher."""

    positives: Int[Array, " G"]
    size: Int[Array, " G"]
    before: Int[Array, " G"]
    positives_before: Int[Array, " G"]
    first_of_query: Int[Array, " Q"]

    @classmethod
    def from_counts(cls, counts: RankCounts) -> "_TiedGroups":
        first = counts.best_groups
        cumulated = np.cumsum(counts.positives)
        so_far = cumulated - counts.positives
        groups_each = np.diff(first, append=len(counts.query))
        positives_before = so_far - np.repeat(so_far[first], groups_each)
        return cls(
            positives=counts.positives,
            size=counts.positives + counts.tied,
            before=counts.above + positives_before,
            positives_before=positives_before,
            first_of_query=first,
        )

    def sum_by_query(self, values: Float[Array, " G"]) -> Float[Array, " Q"]:
        # from first to last, so that the differences of a cumulated sum add up to it exactly
        query = np.zeros(len(values), np.int64)
        query[self.first_of_query] = 1
        return np.bincount(np.cumsum(query) - 1, values, minlength=len(self.first_of_query))

    def positives_by_query(self) -> Int[Array, " Q"]:
        if not len(self.first_of_query):
            return self.positives
        return np.add.reduceat(self.positives, self.first_of_query)


def chance_counts(num_positives: Int[Array, " Q"], num_candidates: int) -> RankCounts:
    """The counts of a model that scores all candidates the same."""
    query = np.flatnonzero(num_positives)
    return RankCounts(
        query=query,
        score=np.zeros(len(query)),
        positives=num_positives[query],
        above=np.zeros_like(query),
        tied=num_candidates - num_positives[query],
        num_positives=num_positives,
        num_candidates=num_candidates,
        best_wrong=np.full(len(num_positives), -1),
        wrong_score=np.zeros(len(num_positives), np.float32),
    )


def rank_candidates(
    queries: Float32[Array, "Q D"],
    candidates: Float32[Array, "N D"],
    positives: list[list[int]],
    *,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Ranks:
    """Rank the best positive of each query among all candidates by inner product, as `count_ranks` does.

    positives: for each query the positions of its positives, at least one. queries_at_once: a block of scores holds;
    it changes no rank.

    Raises:
        VlmError: an embedding is not finite: the model has diverged, and ranks would mean nothing.
    """
    rows = np.repeat(np.arange(len(queries)), list(map(len, positives)))
    columns = np.fromiter(chain.from_iterable(positives), np.int64)
    pairs = PositivePairs(rows=rows, columns=columns)
    counts, _ = count_ranks(queries, candidates, pairs, both=False, block=(queries_at_once, CANDIDATES_AT_ONCE))
    return Ranks.from_counts(counts)


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
        # equal texts share a number: an image of any of them is right for all
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
    by_cutoff: dict[str, dict[int, float]] = {"recall": {}, "ndcg": {}}
    for name, mean in means.items():
        metric, _, cutoff = name.partition("@")
        if cutoff:
            by_cutoff[metric][int(cutoff)] = mean
    return Direction(
        recall=by_cutoff["recall"],
        median_rank=float(np.median(values["rank"])),
        num_queries=len(values["rank"]),
        mean_reciprocal_rank=means["mrr"],
        ndcg=by_cutoff["ndcg"],
        mean_average_precision=means.get("map"),
    )
