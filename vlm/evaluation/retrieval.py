"""Image-text retrieval of a model on a set: metrics in both directions, for all captions and for each language."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.data.samples import UNNAMED, Captions, select_languages
from vlm.errors import BadSample, UsageError
from vlm.evaluation.bootstrap import (
    RESAMPLES,
    STATISTIC_RESAMPLES,
    Interval,
    mean_interval,
    statistic_interval,
    weighted_median,
)
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedEncoder, EvaluatedModel
from vlm.evaluation.measurement import Measurement, SampleStatistic, Value, median_of
from vlm.evaluation.rank_counts import RankCounts
from vlm.evaluation.retrieval_metrics import (
    FlatCaptions,
    RetrievalResult,
    SameText,
    chance_counts,
    count_retrieval,
    direction_of,
    query_values,
)
from vlm.tensor_types import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

ALL_LANGUAGES = "all"
_TEXT_TO_IMAGE = "text_to_image"
_IMAGE_TO_TEXT = "image_to_text"
_ALL_CAPTIONS = "all"
# recall@k has a handful of different values, the other metrics as many as there are queries
_MOST_OUTCOMES = 16
# the median of so many ranks hardly moves, and its draws would take minutes
_MOST_MEDIAN_RANKS = 50_000
_MEDIAN_RESAMPLES = 500


def evaluate_retrieval(
    model: EvaluatedEncoder,
    shards: Sequence[str],
    *,
    languages: tuple[str, ...] = (),
    captions_each: int = 0,
    workers: int = 0,
) -> RetrievalResult:
    """Embed all images and all their captions, then rank each against all of the other modality.

    languages, captions_each: as of `Retrieval`.

    Raises:
        UsageError: no sample can be used.
    """
    evaluator = Retrieval(languages=languages, captions_each=captions_each)
    data = open_evaluation_set("::".join(shards))
    result, warnings = evaluator.measure(EvaluatedModel(model, workers=workers), data)
    for warning in warnings:
        logger.warning(warning)
    return result


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Every caption looks for its image among all images, and every image for its captions among all captions.

    languages: of the captions; none takes the first of each image, `all` every language of the set. With several, the
        captions of all are queries and candidates together, and besides those of each language alone.
    captions_each: captions per image and language, the first ones; 0 uses all. An image without a caption in these
        languages is a candidate, but not a query.
    same_text: what another image with the same caption text is to a caption.
    every_positive: measure nDCG and mAP, too, which count all positives of a query.
    seed: of the bootstrap.
    """

    name: str = "retrieval"
    languages: tuple[str, ...] = ()
    captions_each: int = 0
    same_text: SameText = "positive"
    every_positive: bool = True
    seed: int = 0

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Values named as in `RetrievalResult.metrics`, those of a language behind its name (`de/…`), with intervals by
        image; a row of samples for each query: the expected rank of its first positive, and its best wrong candidate.

        Raises:
            UsageError: no image with a caption can be used.
            VlmError: the model has diverged.
        """
        rng = np.random.default_rng(self.seed)
        combined, warnings = self._all_captions(model, data)
        values = combined.values(rng)
        tables = [combined.samples()]
        statistics = combined.medians(0)
        by_language: dict[str, RetrievalResult] = {}
        for language in self._several_languages(combined):
            scope = combined.of_language(language)
            values |= scope.values(rng)
            # the statistics name rows of the whole table, so each scope begins where those before it end
            statistics |= scope.medians(sum(map(len, tables)))
            tables.append(scope.samples())
            by_language[language] = scope.result()
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(combined.images),
            values=values,
            samples=pa.concat_tables(tables, promote_options="default"),
            statistics=statistics,
            details=replace(combined.result(), by_language=by_language),
            warnings=warnings,
        )

    def measure(self, model: EvaluatedModel, data: EvaluationSet) -> tuple[RetrievalResult, tuple[str, ...]]:
        """The figures alone, without intervals and samples; and what the reader should know of them.

        Raises: as `run`.
        """
        combined, warnings = self._all_captions(model, data)
        by_language: dict[str, RetrievalResult] = {}
        for language in self._several_languages(combined):
            by_language[language] = combined.of_language(language).result()
        return replace(combined.result(), by_language=by_language), warnings

    def _several_languages(self, combined: "_Scope") -> list[str]:
        """The languages to measure apart; none where there is one only."""
        present = list(dict.fromkeys(combined.languages.tolist()))
        return present if len(present) > 1 else []

    def _all_captions(self, model: EvaluatedModel, data: EvaluationSet) -> tuple["_Scope", tuple[str, ...]]:
        num_all = len(data) + data.num_bad
        data, images = model.image_features(data)
        languages = self.languages
        if languages == (ALL_LANGUAGES,):
            # captions of no named language count as the first one named
            # a dictionary, not a set: languages keep the order in which the data names them
            held = dict.fromkeys(chain.from_iterable(data.captions))
            languages = tuple(filter(None, held))
        by_image = [_select_captions(captions, languages, self.captions_each) for captions in data.captions]
        warnings = _check_languages(data, languages, by_image)
        captions = FlatCaptions.from_images([list(map(itemgetter(1), of_image)) for of_image in by_image])
        language_of = list(map(itemgetter(0), chain.from_iterable(by_image)))
        scope = _Scope(
            evaluator=self,
            language="",
            data=data,
            images=images,
            captions=captions,
            languages=np.array(language_of, dtype=object),
            texts=model.text_features(captions.texts),
            num_bad=num_all - len(data),
        )
        return scope, warnings


def _select_captions(captions: Captions, languages: tuple[str, ...], captions_each: int) -> list[tuple[str, str]]:
    """The languages and texts of an image's captions that are evaluated."""
    selected: list[tuple[str, str]] = []
    try:
        for language, texts in select_languages(captions, languages).items():
            selected += [(language, text) for text in texts[: captions_each or None]]
    except BadSample:
        return []
    return selected


def _check_languages(
    data: EvaluationSet, languages: tuple[str, ...], by_image: list[list[tuple[str, str]]]
) -> tuple[str, ...]:
    """What of the requested languages is missing, in words; raises UsageError where there is no caption at all."""
    held = set(chain.from_iterable(data.captions))
    available = ", ".join(sorted(filter(None, held)))
    wanted = ", ".join(languages) or "any language"
    if not any(by_image):
        hint = f"; its captions are in {available}" if available and languages else ""
        raise UsageError(f"No image with a caption in {wanted} can be used in {data.name}{hint}.")
    warnings: list[str] = []
    # captions of unnamed language count as the first one requested
    for language in () if UNNAMED in held else languages:
        if language not in held:
            warnings.append(f"No image has a caption in {language!r}; there are captions in {available}.")
    if num_without := sum(not of_image for of_image in by_image):
        warnings.append(
            f"{num_without:,} of {len(by_image):,} images have no caption in {wanted}: they are candidates of the "
            "texts, but no queries."
        )
    return tuple(warnings)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scope:
    """Captions that are ranked together, of all languages or of one, with all images.

    languages: of each caption. num_bad: images of the set that are left out.
    """

    evaluator: "Retrieval"
    language: str
    data: EvaluationSet
    images: Float32[Array, "N D"]
    captions: FlatCaptions
    languages: Array
    texts: Float32[Array, "T D"]
    num_bad: int

    def of_language(self, language: str) -> "_Scope":
        """The captions of one language."""
        rows = np.flatnonzero(self.languages == language)
        return replace(
            self,
            language=language,
            captions=self.captions.select(rows),
            languages=self.languages[rows],
            texts=self.texts[rows],
        )

    @cached_property
    def counts(self) -> dict[str, RankCounts]:
        """By direction."""
        by_text, by_image = count_retrieval(
            self.images,
            self.texts,
            self.captions,
            same_text=self.evaluator.same_text,
            every_positive=self.evaluator.every_positive,
        )
        return {_TEXT_TO_IMAGE: by_text, _IMAGE_TO_TEXT: by_image}

    @cached_property
    def query_values(self) -> dict[str, dict[str, Float[Array, " Q"]]]:
        """By direction and name."""
        return {direction: query_values(counts) for direction, counts in self.counts.items()}

    def result(self) -> RetrievalResult:
        """The means and medians."""
        return RetrievalResult(
            text_to_image=direction_of(self.query_values[_TEXT_TO_IMAGE]),
            image_to_text=direction_of(self.query_values[_IMAGE_TO_TEXT]),
            num_images=len(self.images),
            num_texts=len(self.texts),
            num_bad=self.num_bad,
        )

    def _prefix(self, direction: str) -> str:
        return f"{self.language}/{direction}_" if self.language else f"{direction}_"

    def values(self, rng: np.random.Generator) -> dict[str, Value]:
        """The figures of both directions, with intervals by image and what chance gives."""
        values: dict[str, Value] = {}
        for direction, counts in self.counts.items():
            # chance by the same code, for the same numbers of positives: it is no 1/N where captions are shared
            by_chance = query_values(chance_counts(counts.num_positives, counts.num_candidates))
            # captions of one image are not independent, so whole images are drawn again
            images = self._images_of(direction)
            for name, of_query in self.query_values[direction].items():
                interval = _rank_interval(of_query, images, rng) if name == "rank" else _interval(of_query, images, rng)
                chance = np.median(by_chance[name]) if name == "rank" else by_chance[name].mean()
                shown = "median_rank" if name == "rank" else name
                values[f"{self._prefix(direction)}{shown}"] = Value(
                    value=interval.value, low=interval.low, high=interval.high, chance=float(chance)
                )
        return values

    def _images_of(self, direction: str) -> Int64[Array, " Q"]:
        """The image of each query."""
        queries = self.counts[direction].queries
        return self.captions.images[queries] if direction == _TEXT_TO_IMAGE else queries

    def medians(self, first_row: int) -> dict[str, SampleStatistic]:
        """The median ranks as functions of the rows of `samples`, which begin at a row of the table."""
        statistics: dict[str, SampleStatistic] = {}
        for direction, values in self.query_values.items():
            ranks = values["rank"]
            if len(ranks) <= _MOST_MEDIAN_RANKS:
                rows = first_row + np.arange(len(ranks))
                name = f"{self._prefix(direction)}median_rank"
                statistics[name] = median_of(ranks, rows, resamples=_MEDIAN_RESAMPLES)
            first_row += len(ranks)
        return statistics

    def samples(self) -> pa.Table:
        """A row for each query of both directions."""
        tables = [self._samples_of(direction) for direction in self.counts]
        return pa.concat_tables(tables, promote_options="default")

    def _samples_of(self, direction: str) -> pa.Table:
        counts = self.counts[direction]
        keys = np.array(self.data.keys, dtype=object)
        texts = np.array(self.captions.texts, dtype=object)
        has_wrong = counts.best_wrong[counts.queries] >= 0
        wrong = np.maximum(counts.best_wrong[counts.queries], 0)
        num_queries = len(wrong)
        columns: dict[str, Any] = {
            "key": pa.array(keys[self._images_of(direction)], pa.string()),
            "direction": pa.array([direction] * num_queries, pa.string()),
            "captions": pa.array([self.language or _ALL_CAPTIONS] * num_queries, pa.string()),
            "score": counts.best_score,
            "wrong_score": pa.array(counts.wrong_score[counts.queries], mask=~has_wrong),
        }
        if direction == _TEXT_TO_IMAGE:
            columns["caption"] = pa.array(texts[counts.queries], pa.string())
            columns["language"] = pa.array(self.languages[counts.queries], pa.string())
            columns["wrong_key"] = pa.array(keys[wrong], pa.string(), mask=~has_wrong)
        else:
            columns["wrong_key"] = pa.array(keys[self.captions.images[wrong]], pa.string(), mask=~has_wrong)
            columns["wrong_caption"] = pa.array(texts[wrong], pa.string(), mask=~has_wrong)
        for name, of_query in self.query_values[direction].items():
            columns[f"{self._prefix(direction)}{name}"] = of_query
        return pa.table(columns)


def _interval(of_query: Float[Array, " Q"], images: Int64[Array, " Q"], rng: np.random.Generator) -> Interval:
    # of outcomes draws cost nothing; the others differ from query to query, and each draw has to add them up
    resamples = RESAMPLES if len(np.unique(of_query)) <= _MOST_OUTCOMES else STATISTIC_RESAMPLES
    return mean_interval(of_query, rng=rng, clusters=images, share=True, resamples=resamples)


def _rank_interval(ranks: Float[Array, " Q"], images: Int64[Array, " Q"], rng: np.random.Generator) -> Interval:
    if len(ranks) > _MOST_MEDIAN_RANKS:
        return Interval(value=float(np.median(ranks)), low=None, high=None)

    def median(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        return weighted_median(ranks, counts)

    return statistic_interval(median, len(ranks), rng=rng, clusters=images, resamples=_MEDIAN_RESAMPLES)
