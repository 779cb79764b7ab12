"""`vlm relate`: what the samples of shards are to each other, for distinct and hard training batches."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import JsonOption, ShardsArgument, WorkersOption
from vlm.console import quoted, show_fields, show_json
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.tensor_types import Array, Int64

logger = logging.getLogger(__name__)

_SUFFIX = ".relations"


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
        """Relate, write, and show the counts."""
        if self.out.suffix != _SUFFIX:
            raise UsageError(f"{self.out} must end in {_SUFFIX}.")
        from vlm.data.sample_relations import relate_samples, write_relations
        from vlm.data.shards import expand_shards
        from vlm.files import check_parent_exists

        if self.out.exists():
            raise UsageError(f"{self.out} exists already; name another file or remove it.")
        check_parent_exists(self.out)
        # before the scan, which takes longer
        nearest = self._nearest()
        relations = relate_samples(
            expand_shards(self.shards),
            languages=self.languages,
            images=not self.captions_only,
            workers=self.workers,
        )
        if nearest is not None:
            relations = relations.with_neighbours(*nearest)
        write_relations(self.out, relations)
        counts = {
            "samples": relations.samples,
            "with an equal caption or image": relations.grouped_samples,
            "neighbours": sum(len(shard.neighbours) for shard in relations.shards),
        }
        if self.json:
            show_json({"out": str(self.out), "fingerprint": relations.fingerprint, **counts})
            return
        show_fields(counts, title=str(self.out))
        batches = "hard" if relations.has_neighbours else "distinct"
        logger.info(f"Next: vlm train PRESET --data SHARDS --relations {quoted(self.out)} --batches {batches}")

    def _nearest(self) -> "tuple[list[str], list[int], Int64[Array, 'N K']] | None":
        if self.embeddings is None:
            return None
        from vlm.index.curation_scores import ScoreWriter
        from vlm.index.embeddings_folder import Embeddings

        return ScoreWriter(Embeddings.open(self.embeddings)).neighbours(self.neighbours)
