"""The worst mistakes of a model as images: what was asked, what is right, what it ranked first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm.data.decode import jpeg_thumbnail
from vlm.errors import BadSample, VlmError
from vlm.evaluation.comparison import KEY
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.measurement import Measurement
from vlm.tensor_types import Array, Bool, Int64

# twice the width of a tile, for screens with two pixels a point
_THUMBNAIL_PIXELS = 320
_SAME_PAIR_SHOWN = 2
_TEXT_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class MistakeImage:
    """An image of a mistake as a JPEG; None with the reason where it is not shown."""

    key: str
    jpeg: bytes | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong row. images: the row's image, then the one that was ranked first for a text."""

    images: tuple[MistakeImage, ...]
    query: str = ""
    truth: str = ""
    prediction: str = ""
    rank: float | None = None
    probability: float | None = None

    @property
    def notes(self) -> list[str]:
        """Where the right answer stands, how sure the model was."""
        notes: list[str] = []
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
        # base64 takes four characters for three bytes
        self.bytes_left -= len(jpeg) * 4 // 3
        return MistakeImage(key=key, jpeg=jpeg)


def count_wrong(measurement: Measurement) -> int:
    """How many rows are wrong; 0 where the samples do not say."""
    table = measurement.samples
    return 0 if table is None else int(np.count_nonzero(_is_wrong(table)))


def worst_mistakes(
    measurement: Measurement, thumbnails: Thumbnails, *, limit: int, direction: str | None = None
) -> list[Mistake]:
    """The worst of the wrong rows: of a classifier those it was surest of, of a ranking those with the largest rank.

    An image and a text are shown once, and the same two classes at most twice.
    """
    table = measurement.samples
    if table is None:
        return []
    if direction is not None:
        table = table.filter(pc.field("direction") == direction)
    mistakes: list[Mistake] = []
    shown: set[str] = set()
    times: dict[tuple[Any, Any], int] = {}
    for number in _worst_first(table):
        if len(mistakes) == limit:
            break
        row = table.slice(int(number), 1).to_pylist()[0]
        pair = (row.get("truth"), row.get("prediction"))
        subjects = {row[KEY], row.get("query") or row[KEY]}
        if subjects & shown or ("query" not in row and times.get(pair, 0) == _SAME_PAIR_SHOWN):
            continue
        shown |= subjects
        times[pair] = times.get(pair, 0) + 1
        mistakes.append(_mistake(row, measurement.data, thumbnails))
    return mistakes


def _mistake(row: Mapping[str, Any], data: str, thumbnails: Thumbnails) -> Mistake:
    images = [thumbnails.image(data, row[KEY])]
    if row.get("prediction_key"):
        images.append(thumbnails.image(data, row["prediction_key"]))
    rank = row.get("rank")
    return Mistake(
        images=tuple(images),
        query=_shortened(row.get("query")),
        truth=_shortened(row.get("truth")),
        prediction=_shortened(row.get("prediction")),
        rank=None if rank is None else float(rank),
        probability=row.get("probability"),
    )


def _is_wrong(table: pa.Table) -> Bool[Array, " N"]:
    names = table.column_names
    if "rank" in names:
        # a tie for the first rank has the expected rank 1.5; null is a row without a right answer
        return np.asarray(table["rank"].cast(pa.float64()).fill_null(0.0).to_numpy() > 1)
    right, answer = ("truth", "prediction") if "truth" in names else (KEY, "prediction_key")
    if answer not in names:
        return np.zeros(table.num_rows, bool)
    is_known = table[right].is_valid().to_numpy()
    return np.asarray((table[right].to_numpy() != table[answer].to_numpy()) & is_known)


def _worst_first(table: pa.Table) -> Int64[Array, " M"]:
    """Numbers of the wrong rows."""
    rows = np.flatnonzero(_is_wrong(table))
    by: Sequence[str] = [name for name in ("probability", "rank") if name in table.column_names]
    if not by:
        return rows
    badness = table[by[0]].cast(pa.float64()).fill_null(0.0).to_numpy()
    return rows[np.argsort(-badness[rows], kind="stable")]


def _shortened(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…"
