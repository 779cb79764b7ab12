"""Filter, deduplicate, balance: write a selection that training applies while it streams; nothing is re-packed.

Rules apply in the order given, each on what the earlier ones left; then --and, --minus, --plus, --weight.

--rule NAME:PARAMETER=VALUE,… with several values of one parameter joined by +. The rules are:

usable, size:min=,max=, aspect:max=, words:min=,max=,languages=,of=, characters:…, language:any=en+de,script=,
repeated-caption:max=, exact-duplicates, near-duplicates:distance=, decontaminate:against=SHARDS,distance=,similarity=,
balance:concepts=FILE,cap=,languages=, sample:share=, weight:times=; and from stored columns: embedding-duplicates,
similarity:min=,top=, near:min=,top=, typical:k=,share=, atypical:k=,share=, cluster-balance:cap=.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.console import show_json, show_table

if TYPE_CHECKING:
    from vlm.data.curation.pipeline import CurationResult
    from vlm.data.selection import Selection

logger = logging.getLogger(__name__)

_SUFFIX = ".selection"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm curate`."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to curate."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.selection")]
    """File for the selection."""

    rule: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A rule, as size:min=200; may be given again."""

    and_: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="and")] = ()
    """Keep only what this selection keeps too; times multiply."""

    minus: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Leave out what this selection keeps."""

    plus: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Add the times of this selection."""

    weight: float = 1.0
    """See every sample so many times as often."""

    columns: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A stored column, or a folder of them, as vlm signals writes them."""

    seed: int = 0
    """Of all that is drawn."""

    workers: int = 1
    """Processes that read and decode."""

    allow_damage: bool = False
    """Curate the whole samples of shards that are cut short."""

    dry_run: bool = False
    """Write no selection."""

    html: Path | None = None
    """Write a page with kept and dropped pictures of each rule here."""

    report: Path | None = None
    """Write the steps, and the counts of each concept or cluster that was balanced, as JSON here."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Curate, compose, write, and show the steps."""
    validate_arguments(arguments)
    from vlm.data.curation.curation_report import render_curation_report
    from vlm.data.curation.filter import parse_filter
    from vlm.data.curation.pipeline import FILTERS, curate
    from vlm.data.curation.score_columns import ScoreColumns
    from vlm.data.selection import read_selection, write_selection
    from vlm.data.shards import expand_shards
    from vlm.files import write_text

    filters = [parse_filter(text, FILTERS) for text in arguments.rule]
    others = {path: read_selection(path) for path in (*arguments.and_, *arguments.minus, *arguments.plus)}
    curated = curate(
        expand_shards(arguments.shards),
        filters,
        columns=ScoreColumns(arguments.columns),
        seed=arguments.seed,
        workers=arguments.workers,
        allow_damage=arguments.allow_damage,
    )
    selection = compose(curated.selection, arguments, others)
    if arguments.html:
        write_text(arguments.html, render_curation_report(curated, title=f"vlm curate {arguments.shards}"))
        logger.info(f"Page: {arguments.html}")
    if arguments.report:
        write_report(arguments.report, curated, selection)
    if not arguments.dry_run:
        write_selection(arguments.out, selection)
    show(curated, selection, arguments)


def validate_arguments(arguments: Arguments) -> None:
    """Refuse, before the long scan, places where the results cannot go and numbers that cannot work.

    Raises:
        UsageError: OUT lacks the suffix or is there already, a folder is not there, or a number is out of range.
    """
    from vlm.errors import UsageError
    from vlm.files import check_parent_exists

    for name in ("seed", "workers", "weight"):
        if not 0 <= (value := getattr(arguments, name)) < math.inf:
            raise UsageError(f"{name} = {value} is outside its range; give a number from 0 on.")
    for page in (arguments.html, arguments.report):
        if page is not None:
            check_parent_exists(page)
    out = arguments.out
    if out.suffix != _SUFFIX:
        raise UsageError(f"{str(out)!r} is no name for a selection; end it in {_SUFFIX}: {out.with_suffix(_SUFFIX)}")
    if arguments.dry_run:
        return
    if out.exists():
        raise UsageError(f"{out} is already there, and runs may rest on it; remove it or choose another name.")
    check_parent_exists(out)


def compose(selection: "Selection", arguments: Arguments, others: dict[Path, "Selection"]) -> "Selection":
    """The selection with those given by --and, --minus, --plus, and the weight."""
    from vlm.data.selection import add, intersect_selections, reweight, subtract_selection

    for paths, operation in (
        (arguments.and_, intersect_selections),
        (arguments.minus, subtract_selection),
        (arguments.plus, add),
    ):
        for path in paths:
            selection = operation(selection, others[path])
    return selection if arguments.weight == 1 else reweight(selection, arguments.weight, seed=arguments.seed)


def write_report(path: Path, curated: "CurationResult", selection: "Selection") -> None:
    """The lineage, and the curve of each rule that balances, as JSON."""
    from json import dumps

    from vlm.files import write_text

    curves = [
        {"rule": step.configured.name, "place": position, "curve": list(step.result.curve)}
        for position, step in enumerate(curated.steps)
        if step.result.curve
    ]
    report: dict[str, Any] = {**summarize(curated, selection), "lineage": list(selection.lineage), "curves": curves}
    write_text(path, dumps(report, ensure_ascii=False, indent=1) + "\n")
    logger.info(f"Report: {path}")


def summarize(curated: "CurationResult", selection: "Selection") -> dict[str, Any]:
    """What came out, in numbers."""
    return {
        "samples": selection.samples,
        "kept": selection.kept,
        "visits": selection.visits,
        "corrupt": curated.corrupt,
        "fingerprint": selection.fingerprint,
    }


def show(curated: "CurationResult", selection: "Selection", arguments: Arguments) -> None:
    """The table of steps and what to do next, or all of it as JSON."""
    from vlm.data.curation.curation_report import step_rows

    if arguments.json:
        written = {} if arguments.dry_run else {"out": str(arguments.out)}
        show_json({**written, **summarize(curated, selection), "lineage": list(selection.lineage)})
        return
    columns, rows = step_rows(curated)
    if arguments.and_ or arguments.minus or arguments.plus or arguments.weight != 1:
        before = curated.selection
        rows.append(["composed", before.kept, selection.kept, before.kept - selection.kept, selection.visits])
    show_table(columns, rows)
    if arguments.dry_run:
        logger.info("Dry run: no selection was written.")
    elif not selection.kept:
        logger.info("Nothing is left; nothing can be trained on this selection.")
    else:
        logger.info(f"Next: vlm train … --data {arguments.shards} --selection {arguments.out}")
