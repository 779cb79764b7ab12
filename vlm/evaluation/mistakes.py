"""What models answered, sample by sample, from the tables of all evaluators; the worst mistakes as images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vlm.data.decode import jpeg_thumbnail
from vlm.errors import BadSample, VlmError
from vlm.evaluation.comparison import KEY, sample_outcomes
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.measurement import Measurement, Value
from vlm.tensor_types import Array, Bool, Float64

# captions of all languages together, beside those of each language
_ALL_CAPTIONS = "all"
_DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Rows that one kind of question was asked of.

    title: the direction of retrieval; empty where there is one kind only.
    table: `key`, and of `query`, `truth`, `prediction`, `prediction_key`, `rank`, `probability`, `reason` some.
    is_wrong: rows that are wrong, in words `noun`; badness: how much, larger is worse.
    """

    title: str
    table: pa.Table
    is_wrong: Bool[Array, " N"]
    badness: Float64[Array, " N"]
    noun: str = "wrong"

    @property
    def ranks(self) -> Float64[Array, " M"]:
        """Expected ranks of the best right answers, of the rows that have one; empty where none is known."""
        if "rank" not in self.table.column_names:
            return np.zeros(0)
        return self.table["rank"].drop_null().cast(pa.float64()).to_numpy()


def answers_of(measurement: Measurement) -> list[Answers]:
    """The answers of each direction of retrieval, or of a classifier, or the captions that were written."""
    table = measurement.samples
    if table is None or not table.num_rows:
        return []
    if "direction" in table.column_names:
        return [_of_direction(table, direction) for direction in table["direction"].unique().to_pylist()]
    if "truth" in table.column_names and "prediction" in table.column_names:
        return [_of_classifier(table)]
    if "caption" in table.column_names:
        return _of_captioner(measurement, table)
    if {"true", "false"} <= set(table.column_names):
        return _of_sentence_pairs(measurement, table)
    return []


def classified(measurement: Measurement) -> pa.Table | None:
    """The samples with a true class and a prediction; None for what is no classification.

    Its column `is_right` says whether the prediction is (one of) the true class(es).
    """
    table = measurement.samples
    if table is None or not {"truth", "prediction"} <= set(table.column_names) or "direction" in table.column_names:
        return None
    is_right = _is_right(table)
    known = pa.array(is_right, mask=~np.asarray(table["truth"].is_valid()))
    return table.append_column("is_right", known).filter(pc.field("is_right").is_valid())


def split_by_language(values: Mapping[str, Value]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The values of all languages together; and by language the names of its own, under the name of the former.

    >>> half = Value(value=0.5)
    >>> split_by_language({"recall@1": half, "de/recall@1": half, "top1": half, "top1/fr": half})
    (['recall@1', 'top1'], {'de': {'recall@1': 'de/recall@1'}, 'fr': {'top1': 'top1/fr'}})
    """
    plain: list[str] = []
    by_language: dict[str, dict[str, str]] = {}
    for name in values:
        before, _, after = name.partition("/")
        if after in values:
            by_language.setdefault(before, {})[after] = name
        elif before in values and after:
            by_language.setdefault(after, {})[before] = name
        else:
            plain.append(name)
    return plain, by_language


def _of_direction(table: pa.Table, direction: str) -> Answers:
    rows = table.filter(pc.field("direction") == direction)
    if "captions" in rows.column_names:
        rows = rows.filter(pc.field("captions") == _ALL_CAPTIONS)
    columns: dict[str, pa.ChunkedArray] = {KEY: rows[KEY]}
    # the best wrong candidate is the one ranked first where the right one is not
    names = {"query": "caption", "rank": f"{direction}_rank"}
    names |= {"prediction_key": "wrong_key"} if direction == "text_to_image" else {"prediction": "wrong_caption"}
    for name, column in names.items():
        if column in rows.column_names:
            columns[name] = rows[column]
    ranks = columns["rank"].cast(pa.float64()).fill_null(0.0).to_numpy()
    return Answers(
        title=_DIRECTIONS.get(direction, direction.replace("_", " ")),
        table=pa.table(columns),
        # a tie for the first rank has the expected rank 1.5
        is_wrong=np.asarray(ranks > 1),
        badness=ranks,
    )


def _of_classifier(table: pa.Table) -> Answers:
    known = [name for name in (KEY, "truth", "prediction", "rank", "probability") if name in table.column_names]
    is_wrong = ~_is_right(table) & np.asarray(table["truth"].is_valid())
    badness = np.zeros(table.num_rows)
    # the surest mistakes say more than the farthest ones
    for name in ("rank", "probability"):
        if name in known:
            badness = table[name].cast(pa.float64()).fill_null(0.0).to_numpy()
    return Answers(title="", table=table.select(known), is_wrong=is_wrong, badness=badness)


def _of_captioner(measurement: Measurement, table: pa.Table) -> list[Answers]:
    """Captions that are false, or where the main value is a degree the lower half by it."""
    outcomes = sample_outcomes(measurement, next(iter(measurement.values), ""))
    if outcomes is None or len(outcomes[1]) != table.num_rows:
        return []
    figures = outcomes[1]
    columns = {KEY: table[KEY], "prediction": table["caption"]}
    if "reason" in table.column_names:
        columns["reason"] = table["reason"]
    is_verdict = set(np.unique(figures)) <= {0.0, 1.0}
    is_wrong = figures < 1 if is_verdict else figures <= np.median(figures)
    noun = "wrong" if is_verdict else "in the lower half"
    return [Answers(title="", table=pa.table(columns), is_wrong=np.asarray(is_wrong), badness=-figures, noun=noun)]


def _of_sentence_pairs(measurement: Measurement, table: pa.Table) -> list[Answers]:
    """The false sentence was preferred to the true one."""
    outcomes = sample_outcomes(measurement, next(iter(measurement.values), ""))
    if outcomes is None or len(outcomes[1]) != table.num_rows:
        return []
    # a tie is half right
    columns = {KEY: table[KEY], "truth": table["true"], "prediction": table["false"]}
    return [Answers(title="", table=pa.table(columns), is_wrong=outcomes[1] < 1, badness=1 - outcomes[1])]


def _is_right(table: pa.Table) -> Bool[Array, " N"]:
    """Of several true classes any is right, as the column `correct` says where there is one."""
    if "correct" in table.column_names:
        return np.asarray(table["correct"].fill_null(False).to_numpy()).astype(bool)
    return np.asarray(table["truth"].to_numpy() == table["prediction"].to_numpy()).astype(bool)


# twice the width of a tile, for screens with two pixels a point
_THUMBNAIL_PIXELS = 320
_SAME_PAIR_SHOWN = 2
_TEXT_LENGTH = 300

Explain = Callable[[Image.Image, str, str], bytes | None]
"""A heat map over an image for a text rather than another (empty: as it is), as a JPEG; None where a model has none."""


@dataclass(frozen=True, kw_only=True)
class MistakeImage:
    """An image of a mistake as a JPEG; None with the reason where it is not shown.

    heat: where it matches the text `seen`, drawn over it as a JPEG; None where that was not asked for.
    """

    key: str
    jpeg: bytes | None = None
    reason: str = ""
    heat: bytes | None = None
    seen: str = ""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong row. images: the row's image, then the one that was ranked first for a text."""

    images: tuple[MistakeImage, ...]
    query: str = ""
    truth: str = ""
    prediction: str = ""
    rank: float | None = None
    probability: float | None = None
    reason: str = ""

    @property
    def has_heat(self) -> bool:
        """Whether heat maps are shown."""
        return any(image.heat for image in self.images)

    @property
    def notes(self) -> list[str]:
        """What is wrong, where the right answer stands, how sure the model was."""
        notes = [self.reason] if self.reason else []
        if self.rank is not None and self.rank > 1:
            notes.append(f"right answer at rank {self.rank:,.4g}")
        if self.probability is not None:
            notes.append(f"{self.probability:.1%} sure")
        return notes


@dataclass(kw_only=True)
class Thumbnails:
    """Small images of evaluation sets by name, until so many bytes are used up; each is made once."""

    sets: Mapping[str, EvaluationSet]
    bytes_left: int
    _made: dict[tuple[str, str], MistakeImage] = field(default_factory=dict)

    def image(self, data: str, key: str) -> MistakeImage:
        """The image of a key, or why it is not shown."""
        if (data, key) not in self._made:
            self._made[data, key] = self._make(data, key)
        return self._made[data, key]

    def with_heat(self, image: MistakeImage, data: str, explain: Explain, text: str, other: str) -> MistakeImage:
        """The same with a heat map of a text rather than another; without one where model or image have none."""
        opened = self.sets.get(data)
        if opened is None or image.jpeg is None or not text or self.bytes_left <= 0:
            return image
        heat = explain(opened.open_image(opened.rows_by_key[image.key]), text, "" if other == text else other)
        self._count(heat or b"")
        return replace(image, heat=heat, seen=text)

    def caption(self, data: str, key: str) -> str:
        """The first caption of a key; empty where there is none."""
        opened = self.sets.get(data)
        row = None if opened is None else opened.rows_by_key.get(key)
        if opened is None or row is None:
            return ""
        return next((texts[0] for texts in opened.captions[row].values() if texts), "")

    def _make(self, data: str, key: str) -> MistakeImage:
        opened = self.sets.get(data)
        row = None if opened is None else opened.rows_by_key.get(key)
        if opened is None or row is None:
            return MistakeImage(key=key, reason="the image is not at hand")
        if self.bytes_left <= 0:
            return MistakeImage(key=key, reason="left out to keep the page small")
        try:
            jpeg = jpeg_thumbnail(opened.open_image(row), pixels=_THUMBNAIL_PIXELS)
        except (BadSample, VlmError, OSError) as error:
            return MistakeImage(key=key, reason=str(error))
        self._count(jpeg)
        return MistakeImage(key=key, jpeg=jpeg)

    def _count(self, jpeg: bytes) -> None:
        # base64 takes four characters for three bytes
        self.bytes_left -= len(jpeg) * 4 // 3


def worst_mistakes(
    answers: Answers, data: str, thumbnails: Thumbnails, *, limit: int, explain: Explain | None = None
) -> list[Mistake]:
    """The worst of the wrong rows, as images of the set of this name.

    An image and a text are shown once, and the same two classes at most twice.
    explain: makes the heat maps: of a query over both images; of an answer over the image, rather than of the truth.
    """
    rows = np.flatnonzero(answers.is_wrong)
    rows = rows[np.argsort(-answers.badness[rows], kind="stable")]
    mistakes: list[Mistake] = []
    shown: set[str] = set()
    times: dict[tuple[str, str], int] = {}
    for number in rows.tolist():
        if len(mistakes) == limit:
            break
        row = answers.table.slice(number, 1).to_pylist()[0]
        subjects = {row[KEY], row.get("query") or row[KEY]}
        pair = (str(row.get("truth")), str(row.get("prediction")))
        if subjects & shown or ("truth" in row and times.get(pair, 0) == _SAME_PAIR_SHOWN):
            continue
        shown |= subjects
        times[pair] = times.get(pair, 0) + 1
        mistake = _mistake(row, data, thumbnails)
        if explain is not None:
            text, other = (mistake.query, "") if mistake.query else (mistake.prediction, mistake.truth)
            images = [thumbnails.with_heat(image, data, explain, text, other) for image in mistake.images]
            mistake = replace(mistake, images=tuple(images))
        mistakes.append(mistake)
    return mistakes


def _mistake(row: Mapping[str, Any], data: str, thumbnails: Thumbnails) -> Mistake:
    images = [thumbnails.image(data, row[KEY])]
    if row.get("prediction_key"):
        images.append(thumbnails.image(data, row["prediction_key"]))
    truth = row.get("truth")
    if truth is None and row.get("prediction"):
        truth = thumbnails.caption(data, row[KEY])
    return Mistake(
        images=tuple(images),
        query=_shortened(row.get("query")),
        truth=_shortened(truth),
        prediction=_shortened(row.get("prediction")),
        rank=row.get("rank"),
        probability=row.get("probability"),
        reason=_shortened(row.get("reason")),
    )


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…"
