"""`vlm curate`: shards to a selection."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import EngineOption, JsonOption, RayAddressOption, ShardsArgument, WorkersOption
from vlm.console import quoted, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.data.curation.pipeline import CurationResult
    from vlm.data.selection import Selection

logger = logging.getLogger(__name__)

_SUFFIX = ".selection"


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
        self._check()
        from vlm.data.curation.curation_report import render_curation_report
        from vlm.data.curation.filter import parse_filter
        from vlm.data.curation.pipeline import FILTERS, compose_selections, curate
        from vlm.data.curation.score_columns import ScoreColumns
        from vlm.data.selection import read_selection, write_selection
        from vlm.data.shards import expand_shards
        from vlm.files import write_text
        from vlm.pages import Provenance
        from vlm.ray_engine import RayCluster, check_engine

        filters = [parse_filter(text, FILTERS) for text in self.filter]
        # read before the long scan, which a selection that cannot be read would waste
        intersect = list(map(read_selection, self.and_))
        subtract = list(map(read_selection, self.minus))
        plus = list(map(read_selection, self.plus))
        check_engine(self.engine, self.ray_address)
        # a process more at least, where locally 0 scans in this one
        cluster = RayCluster(processes=max(self.workers, 1), address=self.ray_address, uses_gpus=False)
        result = curate(
            expand_shards(self.shards),
            filters,
            columns=ScoreColumns(self.columns),
            seed=self.seed,
            workers=self.workers,
            allow_damage=self.allow_damage,
            cluster=cluster if self.engine == "ray" else None,
        )
        selection = compose_selections(
            result.selection, intersect=intersect, subtract=subtract, plus=plus, weight=self.weight, seed=self.seed
        )
        if self.html:
            title = f"Curation of {self.shards}"
            write_text(self.html, render_curation_report(result, title=title, provenance=Provenance.current()))
            logger.info(f"Page: {self.html}")
        if self.report:
            write_text(self.report, json.dumps(result.report(selection), ensure_ascii=False, indent=1) + "\n")
            logger.info(f"Report: {self.report}")
        if not self.dry_run:
            write_selection(self.out, selection)
        self._show(result, selection)

    def _check(self) -> None:
        """Refuse, before the long scan, outputs that cannot be written and numbers out of range.

        Raises:
            UsageError: OUT lacks the suffix or exists, a folder is missing, or a number is out of range.
        """
        from vlm.files import check_parent_exists

        for name in ("seed", "workers", "weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} = {value} is outside its range; give a number from 0 on.")
        for page in (self.html, self.report):
            if page is not None:
                check_parent_exists(page)
        if self.out.suffix != _SUFFIX:
            raise UsageError(f"{str(self.out)!r} must end in {_SUFFIX}, e.g. {self.out.with_suffix(_SUFFIX)}")
        if self.dry_run:
            return
        if self.out.exists():
            raise UsageError(f"{self.out} exists already, and runs may depend on it; remove it or choose another name.")
        check_parent_exists(self.out)

    def _show(self, result: "CurationResult", selection: "Selection") -> None:
        from vlm.data.curation.curation_report import step_rows

        if self.json:
            written = {} if self.dry_run else {"out": str(self.out)}
            show_json({**written, **result.summary(selection), "lineage": list(selection.lineage)})
            return
        columns, rows = step_rows(result)
        if self.and_ or self.minus or self.plus or self.weight != 1:
            before = result.selection.kept
            rows.append(["composed", before, selection.kept, before - selection.kept, selection.visits])
        show_table(columns, rows)
        if self.dry_run:
            logger.info("Dry run: no selection was written.")
        elif not selection.kept:
            logger.warning("No sample is left; a run cannot train on this selection.")
        else:
            logger.info(f"Next: vlm train … --data {quoted(self.shards)} --selection {quoted(self.out)}")
