"""Values of embedded pictures by which `vlm curate` selects: similarity, duplicates, clusters, nearness.

They are written as Parquet files into EMBEDDINGS/signals; give that folder to vlm curate by --columns.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_json, show_table
from vlm.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm signals`."""

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Embeddings of pictures, made by vlm embed."""

    texts: Path | None = None
    """Embeddings of the captions of the same shards (--modality text): write similarity."""

    duplicates: float | None = None
    """Cosine from which two pictures count as the same: write duplicates."""

    clusters: int | None = None
    """Number of clusters: write cluster and centre-distance."""

    near: Path | None = None
    """Embeddings of a target set: write near."""

    overlap: Path | None = None
    """Embeddings of an evaluation set to keep away from: write overlap."""

    seed: int = 0
    """Of the first centres of the clusters."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Compute what is asked for, say how it is spread."""
    asked = (arguments.texts, arguments.duplicates, arguments.clusters, arguments.near, arguments.overlap)
    if all(given is None for given in asked):
        raise UsageError("Nothing is asked for; give --texts, --duplicates, --clusters, --near or --overlap.")
    from vlm.index.embeddings import Embeddings
    from vlm.index.scores import ScoreColumn, ScoreWriter

    writer = ScoreWriter(Embeddings.open(arguments.embeddings))
    written: list[ScoreColumn] = []
    if arguments.texts is not None:
        written.append(writer.similarity(Embeddings.open(arguments.texts)))
    if arguments.duplicates is not None:
        written.append(writer.duplicates(arguments.duplicates))
    if arguments.clusters is not None:
        written += writer.clusters(arguments.clusters, seed=arguments.seed)
    if arguments.near is not None:
        written.append(writer.near(Embeddings.open(arguments.near)))
    if arguments.overlap is not None:
        written.append(writer.overlap(Embeddings.open(arguments.overlap)))
    if arguments.json:
        show_json([vars(signal) for signal in written])
        return
    columns = ["signal", "rows", "least", "median", "most", "details"]
    spread = ("least", "median", "most")
    show_table(
        columns,
        [
            [
                signal.name,
                signal.rows,
                *(signal.facts.get(name, "") for name in spread),
                ", ".join(f"{name} {value}" for name, value in signal.facts.items() if name not in spread),
            ]
            for signal in written
        ],
    )
    logger.info(f"Next: vlm curate SHARDS OUT.selection --columns {arguments.embeddings / 'signals'} --rule …")
