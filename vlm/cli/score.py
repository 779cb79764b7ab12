"""`vlm score`: scores of embedded images, for vlm curate."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import JsonOption
from vlm.console import quoted, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.index.curation_scores import ScoreColumn

logger = logging.getLogger(__name__)

_SUMMARY = ("least", "median", "most")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score embedded images for `vlm curate`: CLIP score, duplicates, clusters, similarity to a target set.

    The scores are written as Parquet files to EMBEDDINGS/signals; pass that folder to vlm curate --columns.
    """

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Image embeddings, made by vlm embed."""

    texts: Path | None = None
    """Embeddings of the same shards' captions (--modality text): write the CLIP score, similarity."""

    duplicates: float | None = None
    """Minimum cosine similarity of duplicate images: write duplicates."""

    clusters: int | None = None
    """Number of k-means clusters: write cluster and centre-distance."""

    near: Path | None = None
    """Embeddings of a target set: write near."""

    overlap: Path | None = None
    """Embeddings of an evaluation set to decontaminate from: write overlap."""

    seed: int = 0
    """Random seed of k-means."""

    json: JsonOption = False

    def run(self) -> None:
        """Compute the scores and show their distributions."""

        requested = (self.texts, self.duplicates, self.clusters, self.near, self.overlap)
        if all(value is None for value in requested):
            raise UsageError("Nothing to compute; give --texts, --duplicates, --clusters, --near or --overlap.")
        scores = self._compute()
        if self.json:
            show_json(list(map(vars, scores)))
            return
        show_table(["score", "rows", "min", "median", "max", "details"], list(map(_row, scores)))
        logger.info(f"Next: vlm curate SHARDS OUT.selection --columns {quoted(self.embeddings / 'signals')} --filter …")

    def _compute(self) -> "list[ScoreColumn]":
        from vlm.index.curation_scores import ScoreWriter
        from vlm.index.embeddings_folder import Embeddings

        writer = ScoreWriter(Embeddings.open(self.embeddings))
        scores: list[ScoreColumn] = []
        if self.texts is not None:
            scores.append(writer.similarity(Embeddings.open(self.texts)))
        if self.duplicates is not None:
            scores.append(writer.duplicates(self.duplicates))
        if self.clusters is not None:
            scores += writer.clusters(self.clusters, seed=self.seed)
        if self.near is not None:
            scores.append(writer.near(Embeddings.open(self.near)))
        if self.overlap is not None:
            scores.append(writer.overlap(Embeddings.open(self.overlap)))
        return scores


def _row(score: "ScoreColumn") -> list[object]:
    summary = [score.facts.get(name, "") for name in _SUMMARY]
    details = [f"{name} {value}" for name, value in score.facts.items() if name not in _SUMMARY]
    return [score.name, score.rows, *summary, ", ".join(details)]
