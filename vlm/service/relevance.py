"""Which hits are likely relevant: cosines measured against the best hits of queries that have nothing to do with a row.

Cosines of one model are not those of another, and those of a text with images are lower than those of two images, so
no fixed minimum means the same everywhere. What can be measured in any index is how near its nearest row comes to a
query that has nothing to do with it:

- words: the texts of `unrelated_texts.txt`, in many languages;
- rows (an image, or a row of the index): random vectors with the mean and the covariance of the index's rows, which
  lie as its rows do but are none of them.

The best cosines of these queries give the empirical null distribution (Efron 2004, *Large-scale simultaneous
hypothesis testing: the choice of a null hypothesis*, §4): a normal one through their median m and lower quartile q.
With s = (m - q) / 0.6745,

    probability(cosine) = Φ((cosine - m) / s)

Only the lower half is fitted, because a few of the texts may well have something to do with the index, and these are at
the upper end. The number is the probability that the best hit of an unrelated query has a lower cosine: of unrelated
queries, a cut at 0.9 answers about one in ten. It is not the share of relevant hits; that depends on how many queries
have an answer in the index, which nobody knows beforehand.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from vlm.errors import UsageError
from vlm.files import compute_fingerprint, json_text, write_text
from vlm.index.embeddings_folder import UNKNOWN
from vlm.index.engine_base import EngineSnapshot
from vlm.service.query import Query
from vlm.tensor_types import Array, Float32

logger = logging.getLogger(__name__)

NullKind = Literal["words", "rows"]
EmbedTexts = Callable[[Sequence[str]], Float32[Array, "T D"]]

CALIBRATION_FILE = "relevance.json"

_NORMAL = NormalDist()
# half of a normal distribution's distance between its quartiles
_QUARTILE = _NORMAL.inv_cdf(0.75)
# the cosines of a row in half precision are no more exact
_MIN_SPREAD = 1e-3
_NUM_RANDOM = 256
_MAX_SAMPLED_ROWS = 20_000
_MIN_ROWS = 20
# of the rows that were calibrated on, how many may be gone or new before that is repeated
_MAX_CHANGE = 0.1


@dataclass(frozen=True, kw_only=True)
class NullScores:
    """The best cosines of unrelated queries in one index, by two of their quantiles."""

    median: float
    lower_quartile: float

    @property
    def spread(self) -> float:
        """Standard deviation of the normal distribution through both."""
        # the lower half only: some texts may be related to a few rows, which stretches the upper one
        return max((self.median - self.lower_quartile) / _QUARTILE, _MIN_SPREAD)

    def probability(self, cosine: float) -> float:
        """That the best hit of an unrelated query has a lower cosine; increases with the cosine.

        >>> round(NullScores(median=0.2, lower_quartile=0.18).probability(0.22), 2)
        0.75
        """
        return _NORMAL.cdf((cosine - self.median) / self.spread)

    def min_cosine(self, probability: float) -> float:
        """The cosine with this probability; above 1 where no row can be as near as that."""
        return self.median + self.spread * _NORMAL.inv_cdf(probability)


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """The cut of a query: hits with at least this probability, which is this cosine.

    best: probability of the nearest row, where no hit is as probable; None where there are hits.
    """

    kind: NullKind
    min_probability: float
    min_cosine: float
    best: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def explain(self) -> str:
        """Why there is no hit; empty where there are hits."""
        if self.best is None:
            return ""
        return (
            f"Nothing here is likely relevant: the nearest row has a probability of {self.best:.2f}, and at least "
            f"{self.min_probability:g} is asked for."
        )


def null_kind(query: Query, snapshot: EngineSnapshot) -> NullKind:
    """Which unrelated queries a query is measured against.

    Raises:
        UsageError: its kind cannot be calibrated, or the index does not know its model.
    """
    space = snapshot.details.space
    if space.fingerprint == UNKNOWN:
        raise UsageError(
            f"{snapshot.folder} was imported without its model, so that no cosine can be called relevant: omit "
            "--relevant, or import again with --model."
        )
    if query.texts:
        return "words"
    if query.images and space.modality != "image":
        raise UsageError(
            "The rows of this index are texts; what is relevant to an image among them cannot be calibrated: omit "
            "--relevant or search by words."
        )
    return "rows"


class Calibrator:
    """The null scores of an index, kept in its folder as `relevance.json` until a tenth of its rows has changed.

    A folder that cannot be written to is calibrated again by each process.
    """

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Any]] = {}

    def null_scores(self, snapshot: EngineSnapshot, kind: NullKind, embed_texts: EmbedTexts) -> NullScores:
        """Of one kind of query, measured now if need be: seconds for 100,000 rows.

        embed_texts: unit vectors of texts, by the index's model; unused for rows.

        Raises:
            UsageError: the index has too few rows.
        """
        path = snapshot.folder / CALIBRATION_FILE
        record = self._records.get(kind)
        # another process may have measured it since
        if record is None or not _fits(record, snapshot):
            self._records = _read_records(path)
            record = self._records.get(kind)
        if record is None or not _fits(record, snapshot):
            logger.info(f"Calibrating on {len(snapshot):,} rows what is relevant (once)")
            record = _identity(snapshot) | asdict(measure(snapshot, kind, embed_texts))
            self._records = {**self._records, kind: record}
            _keep(path, self._records)
        return NullScores(median=record["median"], lower_quartile=record["lower_quartile"])


def measure(snapshot: EngineSnapshot, kind: NullKind, embed_texts: EmbedTexts) -> NullScores:
    """The best cosines of unrelated queries, found as those of any query are.

    Raises:
        UsageError: the index has too few rows.
    """
    if len(snapshot) < _MIN_ROWS:
        raise UsageError(
            f"{snapshot.folder} has {len(snapshot)} rows; what is relevant can be calibrated from {_MIN_ROWS} on: omit "
            "--relevant."
        )
    queries = embed_texts(unrelated_texts()) if kind == "words" else _random_rows(snapshot)
    # the same search as for any query, so that what an approximate index misses is missed here, too
    scores, _ = snapshot.nearest(np.ascontiguousarray(queries, np.float32), 1)
    lower_quartile, median = np.quantile(scores[:, 0].astype(np.float64), [0.25, 0.5])
    return NullScores(median=float(median), lower_quartile=float(lower_quartile))


def unrelated_texts() -> list[str]:
    """The packaged texts: everyday things and scenes, as words and as phrases, in many languages."""
    return files(__package__ or "").joinpath("unrelated_texts.txt").read_text(encoding="utf-8").splitlines()


def find_best(
    snapshot: EngineSnapshot, query_vector: Float32[Array, " D"], allowed_rows: Any, null_scores: NullScores
) -> float | None:
    """The probability of the nearest row; None if there is no row."""
    scores, _ = snapshot.nearest(query_vector[None], 1, allowed_rows)
    return null_scores.probability(float(scores[0, 0])) if scores.size else None


def _random_rows(snapshot: EngineSnapshot) -> Float32[Array, "N D"]:
    """Unit vectors with the mean and covariance of the rows; the same ones for the same rows."""
    rng = np.random.default_rng(0)
    rows = snapshot.rows
    if len(rows) > _MAX_SAMPLED_ROWS:
        rows = np.sort(rng.choice(rows, _MAX_SAMPLED_ROWS, replace=False))
    vectors = snapshot.vectors(rows)
    mean = vectors.mean(axis=0)
    # a normal sum of deviations has their covariance, without its root being taken
    factors = rng.standard_normal((_NUM_RANDOM, len(rows)), np.float32) / np.sqrt(np.float32(len(rows)))
    drawn = mean + factors @ (vectors - mean)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def _identity(snapshot: EngineSnapshot) -> dict[str, Any]:
    rows = snapshot.rows
    return {
        "model_fingerprint": snapshot.details.space.fingerprint,
        "embeddings": snapshot.manifest.inputs["embeddings"],
        "texts": compute_fingerprint(*unrelated_texts()),
        "rows": len(rows),
        "last_row": int(rows[-1]) if len(rows) else -1,
    }


def _fits(record: dict[str, Any], snapshot: EngineSnapshot) -> bool:
    """Whether it is of this model and mostly of these rows; numbers of rows are never used twice."""
    now = _identity(snapshot)
    if any(record[name] != now[name] for name in ("model_fingerprint", "embeddings", "texts")):
        return False
    # rows above the last number are new, and of those below it as many are gone as are missing
    num_old = int(np.searchsorted(snapshot.rows, record["last_row"], side="right"))
    num_changed = (record["rows"] - num_old) + (now["rows"] - num_old)
    return num_changed <= _MAX_CHANGE * record["rows"]


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        # a record of another version, with other keys, is measured again
        wanted = {"model_fingerprint", "embeddings", "texts", "rows", "last_row", "median", "lower_quartile"}
        return {kind: record for kind, record in records.items() if set(record) == wanted}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning(f"{path} cannot be read and is made again: {error}")
        return {}


def _keep(path: Path, records: dict[str, dict[str, Any]]) -> None:
    try:
        write_text(path, json_text(records, indent=2) + "\n")
    except OSError as error:
        logger.info(f"The calibration is not kept, {path} cannot be written: {error.strerror or error}")
