"""`vlm curate`: shards to a selection."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import EngineOption, JsonOption, RayAddressOption, ShardsArgument, WorkersOption, call_options
from vlm.console import quoted, show_json, show_table

if TYPE_CHECKING:
    from vlm.api.data import CurationSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Filter, deduplicate and balance samples: write a selection that training applies while streaming.

    The shards stay unchanged. Filters apply in the order given, each on the samples that remain; then --and,
    then --minus, --plus and --weight. A filter is NAME:PARAMETER=VALUE,…; join several values of a parameter by +:

    usable, size:min=,max=, aspect:max=, words:min=,max=,languages=,of=, characters:…, language:any=en+de,script=,
    repeated-caption:max=, exact-duplicates, near-duplicates:distance=,
    decontaminate:against=SHARDS,distance=,similarity=, balance:concepts=FILE,cap=,languages=,case=, listed:keys=FILE,
    sample:share=, weight:times=; and by stored scores: embedding-duplicates, similarity:min=,top=, near:min=,top=,
    typical:k=,share=, atypical:k=,share=, cluster-balance:cap=.
    """

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.selection")]
    """Selection file to write."""

    filter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A filter, e.g. size:min=200."""

    and_: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="and")] = ()
    """Intersect with this selection; repeat counts multiply."""

    minus: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Subtract this selection."""

    plus: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Add the repeat counts of this selection."""

    weight: float = 1.0
    """Multiply all repeat counts by this."""

    columns: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A score file, or folder of them, made by vlm score."""

    seed: int = 0
    """Random seed of all sampling."""

    workers: WorkersOption = 1

    engine: EngineOption = "local"

    ray_address: RayAddressOption = None

    allow_damage: Annotated[bool, tyro.conf.arg(help="Curate the intact samples of truncated shards.")] = False

    dry_run: bool = False
    """Do not write the selection."""

    html: Path | None = None
    """Write a page with kept and dropped images of each filter to this file."""

    report: Path | None = None
    """Write the steps, and the counts of each balanced concept or cluster, as JSON to this file."""

    json: JsonOption = False

    def run(self) -> None:
        """Curate, compose, write, and show the steps."""
        from vlm.api.data import curate

        summary = curate(**call_options(self))
        if self.json:
            show_json(summary)
        else:
            self._show(summary)

    def _show(self, summary: "CurationSummary") -> None:
        from vlm.data.curation.curation_report import step_rows

        columns, rows = step_rows(summary.curated)
        if self.and_ or self.minus or self.plus or self.weight != 1:
            before = summary.curated.selection.kept
            rows.append(["composed", before, summary.kept, before - summary.kept, summary.visits])
        show_table(columns, rows)
        if self.dry_run:
            logger.info("Dry run: no selection was written.")
        elif not summary.kept:
            logger.warning("No sample is left; a run cannot train on this selection.")
        else:
            logger.info(f"Next: vlm train … --data {quoted(self.shards)} --selection {quoted(self.out)}")
