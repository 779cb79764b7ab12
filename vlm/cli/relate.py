"""`vlm relate`: what the samples of shards are to each other, for distinct and hard training batches."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.options import JsonOption, ShardsArgument, WorkersOption
from vlm.console import quoted, show_fields, show_json, spaced_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Relate:
    """Find samples with equal captions or nearly the same image and, given embeddings, the nearest neighbours of each.

    vlm train --batches distinct keeps equal samples out of one batch, --batches hard puts similar ones into one; both
    read the file by --relations.
    """

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.relations")]
    """File to write."""

    languages: tuple[str, ...] = ()
    """Languages of the captions to compare; empty takes the first of each sample, as vlm train does."""

    captions_only: bool = False
    """Do not look for near-duplicate images, which decodes every image."""

    embeddings: Path | None = None
    """Image embeddings of the same shards, made by vlm embed: store the nearest neighbours of each sample."""

    neighbours: int = 32
    """Number of neighbours of a sample."""

    workers: WorkersOption = 1

    json: JsonOption = False

    def run(self) -> None:
        """Relate, show the counts."""
        from vlm.api.data import relate

        summary = relate(
            self.shards,
            self.out,
            languages=self.languages,
            images=not self.captions_only,
            embeddings=self.embeddings,
            neighbours=self.neighbours,
            workers=self.workers,
        )
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        batches = "hard" if summary.neighbours else "distinct"
        logger.info(f"Next: vlm train PRESET --data SHARDS --relations {quoted(self.out)} --batches {batches}")
