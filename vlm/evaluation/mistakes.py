"""The worst mistakes of a model as images: what was asked, what is right, what it ranked first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.decode import jpeg_thumbnail
from vlm.errors import BadSample, VlmError
from vlm.evaluation.answers import Answers
from vlm.evaluation.comparison import KEY
from vlm.evaluation.evaluation_set import EvaluationSet

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
