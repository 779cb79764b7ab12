"""Hard negatives: does a model tell a true sentence from one with a word swapped, added or replaced.

Two layouts, as their authors publish them:

- SugarCrepe (Hsieh et al. 2023) and sets made like it: a JSON file for each category, with objects (in a list, or by
  number) of `filename`, `caption` and `negative_caption`, which may be a list; and a folder of images;
- Winoground (Thrush et al. 2022): `examples.jsonl` with `image_0`, `image_1`, `caption_0`, `caption_1` and `tag`, and a
  folder of images, whose names there lack their suffix.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.errors import UsageError
from vlm.evaluation.bootstrap import mean_interval, statistic_interval
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Measurement, SampleStatistic, Value, mean_of_groups
from vlm.tensor_types import Array, Float32, Float64, Int64

NEGATIVE_CAPTION = "negative_caption"
CATEGORY = "category"
_WINOGROUND_KEYS = ("image_0", "image_1", "caption_0", "caption_1")
# by chance: a true score above a false one in two comparisons, and two true ones above two false ones
_WINOGROUND_CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}


@dataclass(frozen=True, kw_only=True)
class SentencePair:
    """Images, each with a true sentence, and sentences that are false of them.

    images, true: one of each; or two of Winoground, whose sentences are each false of the other image.
    false: of the one image.
    """

    name: str
    category: str
    images: tuple[str, ...]
    true: tuple[str, ...]
    false: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of them, the true ones first."""
        return self.true + self.false


@dataclass(frozen=True, kw_only=True)
class CategoryScores:
    """The scores of one category, each in [0, 1], and the number of its pairs."""

    num_pairs: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SentencePairsResult:
    """The scores over all pairs, and of each category. num_missing: pairs whose images are not in the set."""

    num_pairs: int
    num_missing: int
    scores: dict[str, float]
    categories: dict[str, CategoryScores]


@dataclass(frozen=True, kw_only=True)
class SentencePairs:
    """True sentences against false ones that differ by a word or by their order.

    pairs: file or folder in one of the two layouts, whose images are those of the set, by their names. Empty takes the
        set's own captions as true and its metadata field `negative_caption` as false (`category` tells them apart),
        which is how `vlm pack` reads a table of SugarCrepe.
    seed: of the bootstrap.
    """

    name: str = "sentence-pairs"
    pairs: str = ""
    seed: int = 0

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """`accuracy`; or Winoground's `text_score`, `image_score` and `group_score`; each also behind the name of a
        category (`swap_att/accuracy`), with their unweighted mean over categories (`mean_per_category`).

        Ties are resolved in expectation: a model that says the same of everything gets chance. Winoground's authors
        count a tie as wrong; no two scores of a real model are the same.

        Raises:
            UsageError: there are no pairs, or none of which the set has the images.
        """
        pairs = read_sentence_pairs(self.pairs) if self.pairs else _pairs_of_set(data)
        row_of = _rows_of_images(pairs, data)
        if not row_of:
            raise UsageError(
                f"{data.name} has none of the images of {self.pairs}, such as {pairs[0].images[0]!r}; its own have "
                f"names such as {data.keys[0]!r}."
            )
        used, images = model.image_features(data.select(sorted(set(row_of.values()))))
        # images that cannot be read have gone, and with them the rows have moved
        row_of = _rows_of_images(pairs, used)
        present = [pair for pair in pairs if row_of.keys() >= set(pair.images)]
        if not present:
            raise UsageError(f"{data.name} has only one image of each pair of {self.pairs}.")
        texts = model.text_features(list(chain.from_iterable(map(attrgetter("sentences"), present))))
        return self._measurement(
            used,
            present,
            keys=[used.keys[row_of[pair.images[0]]] for pair in present],
            outcomes=_outcomes(present, row_of, images, texts),
            num_missing=len(pairs) - len(present),
        )

    def _measurement(
        self,
        data: EvaluationSet,
        pairs: list[SentencePair],
        *,
        keys: list[str],
        outcomes: dict[str, Float64[Array, " P"]],
        num_missing: int,
    ) -> Measurement:
        rng = np.random.default_rng(self.seed)
        categories = _rows_by_category(pairs)
        values: dict[str, Value] = {}
        statistics: dict[str, SampleStatistic] = {}
        chance = _chance(pairs)
        for category, rows in ({"": np.arange(len(pairs))} | categories).items():
            # pairs of one image are not independent: whole images are drawn again
            images = np.array(keys)[rows]
            for name, of_pair in outcomes.items():
                interval = mean_interval(of_pair[rows], rng=rng, clusters=images, share=True)
                values[f"{category}/{name}" if category else name] = Value(
                    value=interval.value, low=interval.low, high=interval.high, chance=float(chance[name][rows].mean())
                )
        by_category: dict[str, CategoryScores] = {}
        for category, rows in categories.items():
            scores = {name: float(of_pair[rows].mean()) for name, of_pair in outcomes.items()}
            by_category[category] = CategoryScores(num_pairs=len(rows), scores=scores)
        if by_category:
            # of the first score only, the main one
            first = next(iter(outcomes))
            category_of = np.unique([pair.category for pair in pairs], return_inverse=True)[1]
            statistics["mean_per_category"] = mean_of_groups(outcomes[first], category_of, np.arange(len(pairs)))
            mean = statistic_interval(statistics["mean_per_category"].of_counts, len(pairs), rng=rng, clusters=keys)
            values["mean_per_category"] = Value(value=mean.value, low=mean.low, high=mean.high)
        missing = (
            f"{num_missing:,} of {num_missing + len(pairs):,} pairs are left out: their images are not in the set."
        )
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(data),
            values=values,
            samples=_samples(pairs, keys, outcomes),
            statistics=statistics,
            details=SentencePairsResult(
                num_pairs=len(pairs),
                num_missing=num_missing,
                scores={name: float(of_pair.mean()) for name, of_pair in outcomes.items()},
                categories=by_category,
            ),
            warnings=(missing,) if num_missing else (),
        )


def _rows_by_category(pairs: Sequence[SentencePair]) -> dict[str, Int64[Array, " R"]]:
    """The pairs of each category; none where there is one only."""
    categories = np.array([pair.category for pair in pairs], dtype=object)
    names = list(dict.fromkeys(categories.tolist()))
    return {name: np.flatnonzero(categories == name) for name in names} if len(names) > 1 else {}


def _samples(pairs: list[SentencePair], keys: list[str], outcomes: Mapping[str, Float64[Array, " P"]]) -> pa.Table:
    """A row for each pair; outcomes stand in a column of their own for each category, too, as the values do."""
    columns: dict[str, Any] = {
        "key": keys,
        "pair": [pair.name for pair in pairs],
        CATEGORY: [pair.category for pair in pairs],
        "true": [pair.true[0] for pair in pairs],
        "false": [pair.sentences[1] for pair in pairs],
    }
    for name, of_pair in outcomes.items():
        columns[name] = of_pair
        for category, rows in _rows_by_category(pairs).items():
            # null, not 0, outside the category: a column is averaged over its own rows alone
            is_other = np.ones(len(pairs), bool)
            is_other[rows] = False
            columns[f"{category}/{name}"] = pa.array(of_pair, mask=is_other)
    return pa.table(columns)


def read_sentence_pairs(path: str | Path) -> list[SentencePair]:
    """The pairs of a file, or of all JSON files of a folder, each of which is a category.

    Raises:
        UsageError: nothing is there, or an entry lacks a field.
    """
    location = Path(path).expanduser()
    if location.is_dir():
        winoground = location / "examples.jsonl"
        files = [winoground] if winoground.is_file() else sorted(location.glob("*.json"))
    else:
        files = [location] if location.is_file() else []
    pairs: list[SentencePair] = []
    for file in files:
        pairs += _winoground_pairs(file) if file.suffix == ".jsonl" else _sugar_crepe_pairs(file)
    if not pairs:
        raise UsageError(
            f"No sentence pairs at {str(path)!r}; give a JSON file of SugarCrepe's layout, a folder of them, or "
            "Winoground's examples.jsonl."
        )
    return pairs


def _sugar_crepe_pairs(file: Path) -> list[SentencePair]:
    content = _json(file, file.read_text(encoding="utf-8"), 1)
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    pairs: list[SentencePair] = []
    for number, entry in entries:
        where = f"{file}, entry {number}"
        _check_keys(entry, ("filename", "caption", NEGATIVE_CAPTION), where)
        pairs.append(
            SentencePair(
                name=str(number),
                category=file.stem,
                images=(str(entry["filename"]),),
                true=(str(entry["caption"]),),
                false=_texts(entry[NEGATIVE_CAPTION], where),
            )
        )
    return pairs


def _winoground_pairs(file: Path) -> list[SentencePair]:
    pairs: list[SentencePair] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        entry = _json(file, line, number)
        _check_keys(entry, _WINOGROUND_KEYS, f"{file}, line {number}")
        pairs.append(
            SentencePair(
                name=str(entry.get("id", number)),
                category=str(entry.get("collapsed_tag") or entry.get("tag") or file.stem),
                images=(str(entry["image_0"]), str(entry["image_1"])),
                true=(str(entry["caption_0"]), str(entry["caption_1"])),
            )
        )
    return pairs


def _json(file: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{file}, line {line} is not JSON: {error}.") from error


def _check_keys(entry: Any, keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if not isinstance(entry, dict) or not entry.get(key)]
    if missing:
        raise UsageError(f"{where} has no {missing[0]}; it needs {', '.join(keys)}.")


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"{where}: {NEGATIVE_CAPTION} is a text or a list of texts, not {value!r}.")
    return tuple(texts)


def _pairs_of_set(data: EvaluationSet) -> list[SentencePair]:
    pairs: list[SentencePair] = []
    for key, captions, metadata in zip(data.keys, data.captions, data.metadata, strict=True):
        texts = next(iter(captions.values()), ())
        if texts and metadata.get(NEGATIVE_CAPTION):
            pairs.append(
                SentencePair(
                    name=key,
                    category=str(metadata.get(CATEGORY, data.name)),
                    images=(key,),
                    true=texts[:1],
                    false=_texts(metadata[NEGATIVE_CAPTION], f"{data.name}, sample {key}"),
                )
            )
    if not pairs:
        raise UsageError(
            f"No sample of {data.name} has a caption and the metadata field {NEGATIVE_CAPTION}; name the file or "
            "folder of the pairs (pairs = PATH)."
        )
    return pairs


def _rows_of_images(pairs: Sequence[SentencePair], data: EvaluationSet) -> dict[str, int]:
    """The row of each image that the pairs name: by its key, else by file name or stem, as keys have no suffix."""
    rows_by_part: dict[str, int] = {}
    for row, key in enumerate(data.keys):
        # the first of a name wins; two folders with the same file name are told apart by the whole key only
        rows_by_part.setdefault(PurePosixPath(key).name, row)
        rows_by_part.setdefault(PurePosixPath(key).stem, row)
    rows: dict[str, int] = {}
    for image in set(chain.from_iterable(map(attrgetter("images"), pairs))):
        path = PurePosixPath(image)
        candidates = (data.rows_by_key.get(image), *map(rows_by_part.get, (path.name, path.stem)))
        row = next((candidate for candidate in candidates if candidate is not None), None)
        if row is not None:
            rows[image] = row
    return rows


def _outcomes(
    pairs: Sequence[SentencePair],
    row_of: Mapping[str, int],
    images: Float32[Array, "N D"],
    texts: Float32[Array, "T D"],
) -> dict[str, Float64[Array, " P"]]:
    """By the name of a score, that of each pair."""
    is_matched = {len(pair.images) > 1 for pair in pairs}
    if len(is_matched) > 1:
        raise UsageError("Pairs of one image and pairs of two cannot be evaluated together; name one of the files.")
    scores = list(_pair_scores(pairs, row_of, images, texts))
    if is_matched == {True}:
        return winoground_scores(np.stack(scores))
    return {"accuracy": np.array([true_first(of_pair[0, 0], of_pair[0, 1:]) for of_pair in scores])}


def _pair_scores(
    pairs: Sequence[SentencePair],
    row_of: Mapping[str, int],
    images: Float32[Array, "N D"],
    texts: Float32[Array, "T D"],
) -> Iterable[Float64[Array, "I S"]]:
    """Of each pair the score of each image with each sentence, in float64 and in one order, so that equals tie."""
    first = 0
    for pair in pairs:
        sentences = texts[first : first + len(pair.sentences)].astype(np.float64)
        first += len(pair.sentences)
        rows: Int64[Array, " I"] = np.array([row_of[image] for image in pair.images])
        products = images[rows].astype(np.float64)[:, None] * sentences[None]
        # not a matrix product: BLAS sums in an order that depends on shapes, so that equal sentences could differ by a
        # bit
        yield np.add.reduce(products, axis=2)


def true_first(true: float, false: Float64[Array, " F"]) -> float:
    """Probability that the true sentence is first when those that score the same are ordered at random."""
    if (false > true).any():
        return 0.0
    return 1.0 / (1.0 + np.count_nonzero(false == true))


def winoground_scores(scores: Float64[Array, "P 2 2"]) -> dict[str, Float64[Array, " P"]]:
    """Winoground's three scores of each pair, with ties in expectation.

    scores: of each image (axis 1) with each sentence (axis 2); the true ones are on the diagonal.
    text_score: for both images the true sentence scores higher than the false one. image_score: for both sentences the
    true image does. group_score: all four, which is that both true scores are above both false ones.
    """
    true_0, false_0, false_1, true_1 = scores.reshape(len(scores), 4).T
    # all four comparisons hold if the lower true score is above the higher false one
    lowest = np.minimum(true_0, true_1)
    highest = np.maximum(false_0, false_1)
    num_true = (true_0 == highest).astype(int) + (true_1 == highest)
    num_false = (false_0 == lowest).astype(int) + (false_1 == lowest)
    # of so many tied true and false scores all true ones come first in one of (t + f)! / (t! f!) orders
    orders = np.array([[1, 1, 1], [1, 2, 3], [1, 3, 6]])[num_true, num_false]
    return {
        "text_score": _above(true_0, false_0) * _above(true_1, false_1),
        "image_score": _above(true_0, false_1) * _above(true_1, false_0),
        "group_score": np.where(lowest > highest, 1.0, np.where(lowest == highest, 1.0 / orders, 0.0)),
    }


def _above(true: Float64[Array, " P"], false: Float64[Array, " P"]) -> Float64[Array, " P"]:
    return np.where(true == false, 0.5, (true > false).astype(np.float64))


def _chance(pairs: Sequence[SentencePair]) -> dict[str, Float64[Array, " P"]]:
    if len(pairs[0].images) > 1:
        return {name: np.full(len(pairs), chance) for name, chance in _WINOGROUND_CHANCE.items()}
    return {"accuracy": np.array([1.0 / (1 + len(pair.false)) for pair in pairs])}
