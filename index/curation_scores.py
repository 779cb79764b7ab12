"""Scores: a value for each embedded image, stored with its embeddings, by which `vlm curate` selects without a model.

similarity  cosine of an image and its own captions, the highest of them (CLIP score filtering: Schuhmann et al. 2021,
            LAION-400M; DataComp, Gadre et al. 2023, section 5)
duplicates  number of the group of images that are linked by cosines above a threshold
            (SemDeDup, Abbas et al. 2023, over all pairs instead of inside clusters)
cluster     number of the nearest of K centroids (spherical k-means), and centre-distance, 1 - cosine to it
            (prototypicality: Sorscher et al. 2022)
near        the highest cosine to any row of a target's embeddings (image-based filtering of DataComp)
overlap     the highest cosine to any image of evaluation shards (decontamination)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np

from vlm.console import track
from vlm.data.curation.score_columns import ScoreRows, write_score_column
from vlm.data.dedup import connected_components
from vlm.data.tar import open_index
from vlm.errors import UsageError
from vlm.index.embeddings_folder import Embeddings
from vlm.tensor_types import Array, Float32, Int64

Value = TypeVar("Value")

FOLDER = "signals"
_ROWS_AT_ONCE = 4096
_MAX_ROWS_FOR_ALL_PAIRS = 200_000
_CLUSTER_ITERATIONS = 20
_ALONE = -1
# single precision may put the cosine of equal rows so far below 1
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class ScoreColumn:
    """A score that was written: its file, its number of rows, and the distribution of its values."""

    name: str
    path: Path
    rows: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreWriter:
    """Computes scores of the images of an embeddings folder and writes them into its `signals/`."""

    images: Embeddings

    def __post_init__(self) -> None:
        if self.images.space.modality != "image":
            raise UsageError(f"{self.images.folder} holds texts; scores are about images: embed with --modality image.")
        (self.images.folder / FOLDER).mkdir(exist_ok=True)

    @cached_property
    def vectors(self) -> Float32[Array, "N D"]:
        """All rows."""
        return np.concatenate(list(self.images.blocks()))

    @cached_property
    def _sample_columns(self) -> tuple[list[str], list[int], list[str]]:
        """Shard content, number and key of each row."""
        contents: dict[str, str] = {}
        shards: list[str] = []
        numbers: list[int] = []
        keys: list[str] = []
        # by content, so that a score is still found after the shards were moved
        for origin in self.images.origins():
            if origin.shard not in contents:
                contents[origin.shard] = open_index(origin.shard).fingerprint
            shards.append(contents[origin.shard])
            numbers.append(origin.number)
            keys.append(origin.key)
        return shards, numbers, keys

    def similarity(self, texts: Embeddings) -> ScoreColumn:
        """The highest cosine of each image with one of its own captions.

        Raises:
            UsageError: the texts are of another model, or of other shards.
        """
        self._check_same_space(texts)
        if texts.space.modality != "text":
            raise UsageError(f"{texts.folder} holds images; embed the captions with --modality text.")
        rows = {(origin.shard, origin.number): row for row, origin in enumerate(self.images.origins())}
        best = np.full(len(self.images), -np.inf, np.float32)
        origins = texts.origins()
        for block in texts.blocks():
            # the block first: where it ends, zip has not taken the next origin yet
            for vector, origin in zip(block, origins, strict=False):
                row = rows.get((origin.shard, origin.number))
                if row is not None:
                    best[row] = max(best[row], float(vector @ self.vectors[row]))
        has_text = np.isfinite(best)
        if not has_text.any():
            raise UsageError(f"{texts.folder} holds no captions of the images of {self.images.folder}.")
        return self._write("similarity", best.clip(-1, 1), {"texts": texts.manifest.fingerprint}, is_scored=has_text)

    def duplicates(self, threshold: float) -> ScoreColumn:
        """Groups of images linked by cosines of at least `threshold`; the number is that of the group's first row,
        -1 for an image alone.

        All pairs are compared up to 200,000 rows; beyond, those in near lists of an inverted file.
        """
        if not 0 < threshold <= 1:
            raise UsageError(f"A cosine of {threshold} is outside 0 to 1.")
        groups = connected_components(self._similar_pairs(threshold), len(self.vectors))
        sizes = np.bincount(groups)
        groups[sizes[groups] == 1] = _ALONE
        facts = {"threshold": threshold, "groups of several": int((sizes > 1).sum())}
        return self._write("duplicates", groups, facts | {"beyond the first": int((sizes[sizes > 1] - 1).sum())})

    def neighbours(self, number: int) -> tuple[list[str], list[int], Int64[Array, "N K"]]:
        """Shard content and sample number of each row, and its `number` nearest other rows, the nearest first.

        All pairs are compared up to 200,000 rows; beyond, those in near lists of an inverted file, which may find
        fewer: -1 for none.
        """
        if not 1 <= number < len(self.vectors):
            raise UsageError(f"{number:,} neighbours of {len(self.vectors):,} images; give 1 to one less than that.")
        index = self._searchable()
        nearest = np.full((len(self.vectors), number), _ALONE, np.int64)
        first = 0
        for block in _blocks(self.vectors, "neighbours"):
            _, positions = index.search(block, number + 1)
            for row, own in enumerate(positions, first):
                # of rows that are equal to it the row itself need not be the first
                others = own[(own != row) & (own >= 0)][:number]
                nearest[row, : len(others)] = others
            first += len(block)
        shards, numbers, _ = self._sample_columns
        return shards, numbers, nearest

    def clusters(self, number: int, *, seed: int = 0) -> list[ScoreColumn]:
        """The nearest of `number` centroids, and 1 - cosine to it."""
        if not 1 <= number <= len(self.vectors):
            raise UsageError(f"{number:,} clusters of {len(self.vectors):,} images; give 1 to {len(self.vectors):,}.")
        means = faiss.Kmeans(
            self.vectors.shape[1],
            number,
            niter=_CLUSTER_ITERATIONS,
            spherical=True,
            seed=seed,
            # small clusters are meant; FAISS would warn below 39 images each
            min_points_per_centroid=1,
        )
        means.train(self.vectors)
        cosines, nearest = means.assign(self.vectors)
        details = {"clusters": number, "seed": seed}
        return [
            self._write("cluster", nearest.astype(np.int64), details),
            self._write("centre-distance", (1 - cosines.clip(-1, 1)).astype(np.float32), details),
        ]

    def near(self, target: Embeddings) -> ScoreColumn:
        """The highest cosine to any row of `target`."""
        return self._write("near", self._highest_cosine(target, "near"), {"target": target.manifest.fingerprint})

    def overlap(self, evaluation: Embeddings) -> ScoreColumn:
        """The highest cosine to any image of the evaluation shards that were embedded."""
        against = [open_index(address).fingerprint for address in evaluation.manifest.details["shards"]]
        return self._write("overlap", self._highest_cosine(evaluation, "overlap"), {"against": against})

    def _highest_cosine(self, other: Embeddings, what: str) -> Float32[Array, " N"]:
        self._check_same_space(other)
        index = faiss.IndexFlatIP(other.dimension)
        for block in other.blocks():
            index.add(block)
        highest: list[Float32[Array, " B"]] = []
        for block in _blocks(self.vectors, what):
            cosines, _ = index.search(block, 1)
            highest.append(cosines[:, 0].clip(-1, 1))
        return np.concatenate(highest)

    def _similar_pairs(self, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of rows that are linked, as two arrays."""
        index = self._searchable()
        first = 0
        for block in _blocks(self.vectors, "duplicates"):
            limits, _, neighbours = index.range_search(block, threshold - _ROUNDING)
            yield first + np.repeat(np.arange(len(block)), np.diff(limits.astype(np.int64))), neighbours
            first += len(block)

    def _searchable(self) -> faiss.Index:
        """The rows in an index: all pairs up to a number of rows, then an inverted file."""
        count, dimension = self.vectors.shape
        index: faiss.Index = faiss.IndexFlatIP(dimension)
        # time grows with the square of the rows
        if count > _MAX_ROWS_FOR_ALL_PAIRS:
            lists = int(4 * count**0.5)
            index = faiss.IndexIVFFlat(index, dimension, lists, faiss.METRIC_INNER_PRODUCT)
            # about 40 rows a list, of which FAISS's k-means wants at least 39
            index.train(self.vectors[:: max(1, count // (40 * lists))])
            index.nprobe = 16
        index.add(self.vectors)
        return index

    def _check_same_space(self, other: Embeddings) -> None:
        if other.space.fingerprint != self.images.space.fingerprint:
            raise UsageError(
                f"{other.folder} was made by another model than {self.images.folder}; embed both with the same."
            )

    def _write(
        self, name: str, values: np.ndarray, facts: dict[str, Any], *, is_scored: np.ndarray | None = None
    ) -> ScoreColumn:
        scored_rows = np.arange(len(values)) if is_scored is None else np.flatnonzero(is_scored)
        shards, numbers, keys = self._sample_columns
        path = self.images.folder / FOLDER / f"{name}.parquet"
        rows = ScoreRows(
            shards=_select(shards, scored_rows),
            numbers=_select(numbers, scored_rows),
            keys=_select(keys, scored_rows),
            values=values[scored_rows],
        )
        write_score_column(path, name, rows, model=self.images.space.fingerprint, details=facts)
        return ScoreColumn(
            name=name, path=path, rows=len(scored_rows), facts=facts | _distribution(values[scored_rows])
        )


def _select(values: Sequence[Value], rows: Int64[Array, " N"]) -> list[Value]:
    return [values[row] for row in rows]


def _distribution(values: np.ndarray) -> dict[str, float]:
    """Least, median and most of scores; nothing for the numbers of groups."""
    if values.dtype.kind != "f":
        return {}
    return {"least": values.min().item(), "median": np.median(values).item(), "most": values.max().item()}


def _blocks(vectors: Float32[Array, "N D"], what: str) -> Iterator[Float32[Array, "N D"]]:
    starts = range(0, len(vectors), _ROWS_AT_ONCE)
    for first in track(starts, total=len(starts), what=what, unit="block"):
        yield vectors[first : first + _ROWS_AT_ONCE]
