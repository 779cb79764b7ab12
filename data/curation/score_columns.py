"""Score columns: values that a model or a neighbour search gave to samples, stored next to the embeddings for filters.

A file is Parquet, a row a sample, with the columns

- `shard` (string): `TarIndex.fingerprint` of the tar, so that tars may be moved and renamed;
- `number` (int64): the sample's number in that tar;
- `key` (string): its key, to notice a changed tar;
- `value`: float32 for a score, int64 for the number of a group (below 0: in none), as in `SCORES`;

and the schema metadata `vlm-column` (the format, "1"), `signal` (a name of `SCORES`), `model` (fingerprint of the
model that embedded, may be empty) and `details` (a JSON object; for `overlap` it holds `against`, the list of the
fingerprints of the evaluation shards). A score may be spread over several files (one a shard, say), of one model and
with the same details. Shards and samples in any order; a sample has one row or none. A sample without a row, or with
a value that is not a number, is dropped by the filters that use the score, and counted as `without value`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.config import suggest
from vlm.data.curation.sample_table import SampleTable, compute
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write

FORMAT = "1"
SCORES: dict[str, tuple[pa.DataType, str]] = {
    "similarity": (pa.float32(), "cosine of image and caption, the highest of a sample's captions"),
    "duplicates": (pa.int64(), "group of samples with nearly the same embedding, below 0 for a sample alone"),
    "cluster": (pa.int64(), "cluster the sample is in"),
    "centre-distance": (pa.float32(), "distance to the centre of the sample's cluster, smaller is more typical"),
    "near": (pa.float32(), "nearness to a target set, larger is nearer"),
    "overlap": (pa.float32(), "cosine to the nearest sample of the evaluation shards in the details"),
}
"""Scores by name: type of the value and meaning."""


@dataclass(frozen=True, kw_only=True)
class ScoreRows:
    """The rows of one score: parallel shard (fingerprint), number, key, value."""

    shards: Sequence[str]
    numbers: Sequence[int] | np.ndarray
    keys: Sequence[str]
    values: Sequence[float] | np.ndarray


def write_score_column(
    path: Path, score: str, rows: ScoreRows, *, model: str = "", details: Mapping[str, Any] | None = None
) -> None:
    """Write one score of some samples, atomically.

    Raises:
        UsageError: there is no such score.
    """
    kind = _kind_of(score)
    fields = {"shard": pa.dictionary(pa.int32(), pa.string()), "number": pa.int64(), "key": pa.string(), "value": kind}
    metadata = {
        "vlm-column": FORMAT,
        "signal": score,
        "model": model,
        "details": json.dumps(dict(details or {}), ensure_ascii=False, sort_keys=True),
    }
    columns = [
        # a fingerprint is repeated for all rows of its shard
        pa.array(rows.shards, pa.string()).dictionary_encode(),
        pa.array(np.asarray(rows.numbers, dtype=np.int64)),
        pa.array(rows.keys, pa.string()),
        pa.array(np.asarray(rows.values), kind),
    ]
    with atomic_write(path) as file:
        pq.write_table(pa.table(columns, schema=pa.schema(fields, metadata=metadata)), file)


@dataclass(frozen=True, kw_only=True)
class ScoreValues:
    """A score aligned to a sample table: values [N], and whether each sample has one (bool [N])."""

    values: np.ndarray
    has_value: np.ndarray
    model: str
    details: dict[str, Any] = field(default_factory=dict)


class ScoreColumns:
    """The stored columns of some files, or of the folders that hold them.

    Raises:
        UsageError: a path does not exist, or a file is not a score column.
    """

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self._files: dict[str, list[Path]] = {}
        for path in paths:
            for file in _column_files(path):
                self._files.setdefault(_read_metadata(file)["signal"], []).append(file)

    def __contains__(self, score: str) -> bool:
        return score in self._files

    def aligned_values(self, score: str, sample_table: SampleTable) -> ScoreValues:
        """A score aligned to the samples of a table.

        Raises:
            UsageError: no file holds it; the command that makes it is named.
            VlmError: its files are of several models, have two rows of a sample, or rows of samples that do not exist.
        """
        _kind_of(score)
        if score not in self:
            raise UsageError(
                f"There is no {score!r} ({SCORES[score][1]}) among the columns given ({_listed(self._files)}): "
                f"make it by vlm score EMBEDDINGS and give it by --columns FILE."
            )
        files = self._files[score]
        metadata = _read_metadata(files[0])
        for file in files[1:]:
            if _read_metadata(file) != metadata:
                raise VlmError(
                    f"{files[0]} and {file} hold {score!r} of different models or details; give those of one."
                )
        columns = ["shard", "number", "key", "value"]
        tables: list[pa.Table] = []
        for file in files:
            tables.append(pq.read_table(file, columns=columns).replace_schema_metadata())
        table = pa.concat_tables(tables)
        values, has_value = _align_to_samples(table, sample_table, f"{score!r} ({files[0]})")
        return ScoreValues(
            values=values,
            has_value=has_value,
            model=metadata["model"],
            details=json.loads(metadata["details"]),
        )


def _align_to_samples(table: pa.Table, sample_table: SampleTable, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The values [N] of a table's samples, and whether each has one. what: names the column in errors."""
    # which of the scanned shards each row is of; rows of other shards are left out
    known_shards = pa.array([shard.fingerprint for shard in sample_table.shards], pa.string())
    shards = compute.fill_null(compute.index_in(table.column("shard").cast(pa.string()), known_shards), -1).to_numpy()
    rows = np.flatnonzero(shards >= 0)
    shards = shards[rows]

    numbers = table.column("number").to_numpy()[rows]
    sizes = np.array([shard.samples for shard in sample_table.shards], dtype=np.int64)[shards]
    if np.any((numbers < 0) | (numbers >= sizes)):
        raise VlmError(f"{what} has a row of sample {numbers.max():,} of a shard of {sizes.min():,}; compute it again.")
    positions = sample_table.starts[shards] + numbers
    if len(np.unique(positions)) < len(positions):
        raise VlmError(f"{what} has two rows of one sample; give each file once.")

    # the keys must agree, or the scores would silently be those of other samples
    expected = sample_table.table.column("key").take(pa.array(positions))
    is_equal = compute.equal(table.column("key").take(pa.array(rows)).cast(pa.large_string()), expected).to_numpy()
    if not is_equal.all():
        wrong = int(np.flatnonzero(~is_equal)[0])
        raise VlmError(
            f"{what} calls sample {numbers[wrong]:,} of a shard {table.column('key')[int(rows[wrong])]!s}, the shard "
            f"{expected[wrong]!s}: the shards have changed since; embed and compute the score again."
        )

    stored = table.column("value").to_numpy()[rows]
    values = np.zeros(len(sample_table), dtype=stored.dtype)
    has_value = np.zeros(len(sample_table), dtype=bool)
    values[positions] = stored
    # a value that is not a number counts as none: no comparison with a limit could be true of it
    has_value[positions] = np.isfinite(stored)
    return values, has_value


def _kind_of(score: str) -> pa.DataType:
    if score not in SCORES:
        raise UsageError(f"There is no score {score!r}; {suggest(score, list(SCORES))}")
    return SCORES[score][0]


def _column_files(path: Path) -> list[Path]:
    # sorted, so that messages name the same file every time
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(f"There is no column file (*.parquet) at {str(path)!r}; vlm score EMBEDDINGS writes them.")
    return files


def _read_metadata(file: Path) -> dict[str, str]:
    try:
        metadata = pq.read_schema(file).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{file} is not a score column, or is damaged ({error}); compute it again.") from error
    if metadata.get(b"vlm-column") != FORMAT.encode():
        raise UsageError(f"{file} is not a score column of format {FORMAT}; vlm score EMBEDDINGS writes them.")
    return {name: metadata[name.encode()].decode() for name in ("signal", "model", "details")}


def _listed(files: Mapping[str, Any]) -> str:
    return ", ".join(files) or "none was given"
