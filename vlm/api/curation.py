"""Shards looked at and chosen from, without torch: `vlm.inspect`, `vlm.curate`, `vlm.build_concepts`."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.config import text_list
from vlm.data.curation.caption_filters import ConceptLimits, ConceptSummary, TextLines
from vlm.data.curation.caption_filters import build_concepts as write_concepts
from vlm.data.pack import shards_at
from vlm.data.selection import Selection, read_selection, write_selection
from vlm.data.shards import Shards, expand_shards, join_shards
from vlm.errors import UsageError, os_errors_explained
from vlm.files import check_parent_exists, json_text, write_text
from vlm.ray_engine import Engine, RayCluster, check_engine
from vlm.results import Result, json_values

# imported where they are used: mistakes are answered before the rest is loaded
if TYPE_CHECKING:
    from vlm.data.curation.pipeline import CurationResult
    from vlm.data.inspection.findings import Inspection

logger = logging.getLogger(__name__)

TEXT_SUFFIX = ".txt"
SELECTION_SUFFIX = ".selection"

Paths = str | Path | Sequence[str | Path]
"""A file or several."""


@os_errors_explained()
def inspect(
    shards: Shards,
    *,
    sample: int | None = None,
    selection: str | Path | None = None,
    tokenizer: str | Path = "",
    context_length: int | None = None,
    near_limit: int = 100_000,
    workers: int = 0,
    html: str | Path | None = None,
) -> "Inspection":
    """What shards hold, with all that is corrupt, damaged or there twice, as `vlm inspect` finds it.

    Args:
        sample: inspect at most so many samples, evenly spread. selection: only those of a file of `vlm.curate`.
        tokenizer: count tokens, too: clip, a SentencePiece .model file, or a tokenizer folder.
        context_length: report captions with more tokens; None uses that of the tokenizer.
        near_limit: search for near-duplicate images among at most so many samples.
        html: write a page with histograms and images to this file.

    Raises:
        UsageError: nothing is there, a number is out of range, or the folder of `html` does not exist.
        VlmError: none of the shards can be read.
    """
    from vlm.data.inspection.findings import contact_sheet
    from vlm.data.inspection.inspection import inspect_shards
    from vlm.pages import Provenance

    # before the scan, whose result would be lost
    if html:
        check_parent_exists(Path(html))
    address = join_shards(shards)
    inspection = inspect_shards(
        shards_at(address),
        sample=sample,
        workers=workers,
        selection=read_selection(Path(selection)) if selection else None,
        tokenizer=str(tokenizer),
        context_length=context_length,
        near_limit=near_limit,
    )
    if html:
        write_text(Path(html), contact_sheet(inspection, title=address, provenance=Provenance.current()))
        logger.info(f"Page: {html}")
    return inspection


@dataclass(frozen=True, kw_only=True)
class CurationSummary(Result):
    """A selection that was made.

    out: its file, None of a dry run. kept: distinct samples; visits: of an epoch. corrupt: samples that cannot be used,
    by reason. lineage: each step with its counts. curated: the filters as they were applied, before other selections.
    """

    out: str | None
    samples: int
    kept: int
    visits: int
    corrupt: dict[str, int]
    fingerprint: str
    lineage: tuple[dict[str, Any], ...]
    curated: "CurationResult" = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What `vlm curate --json` prints; a dry run has no `out`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "curated"}
        if self.out is None:
            del values["out"]
        return json_values(values)


@os_errors_explained()
def curate(
    shards: Shards,
    out: str | Path,
    *,
    filter: str | Sequence[str] = (),
    and_: Paths = (),
    minus: Paths = (),
    plus: Paths = (),
    weight: float = 1.0,
    columns: Paths = (),
    seed: int = 0,
    workers: int = 1,
    engine: Engine = "local",
    ray_address: str | None = None,
    allow_damage: bool = False,
    dry_run: bool = False,
    html: str | Path | None = None,
    report: str | Path | None = None,
) -> CurationSummary:
    """Filter, deduplicate and balance samples into a selection, as `vlm curate` does; the shards stay unchanged.

    Args:
        out: file to write, ending in .selection, for `vlm.train(…, selection=out)` and `vlm.stream`.
        filter: filters in their order, each as `size:min=200` (docs/cli.md has all).
        and_: then intersect with these selections, whose repeat counts multiply. minus: subtract these.
        plus: add the repeat counts of these. weight: multiply all repeat counts by this.
        columns: score files, or folders of them, of `vlm.score`.
        engine, ray_address: as of `vlm.embed`; a Ray cluster scans with `workers` processes.
        allow_damage: curate the intact samples of truncated shards.
        dry_run: write no selection.
        html: write a page with kept and dropped images of each filter to this file.
        report: write the steps, and the counts of each balanced concept or cluster, as JSON to this file.

    Raises:
        UsageError: `out` exists or has another suffix, a filter does not exist or lacks its scores, or a number is out
            of range.
        VlmError: a shard is damaged.
    """
    from vlm.data.curation.filter import parse_filter
    from vlm.data.curation.pipeline import FILTERS, compose_selections
    from vlm.data.curation.pipeline import curate as apply_filters
    from vlm.data.curation.score_columns import ScoreColumns

    _check_curation({"seed": seed, "workers": workers, "weight": weight}, Path(out), (html, report), dry_run=dry_run)
    filters = [parse_filter(text, FILTERS) for text in text_list(filter, "filter")]
    # read before the long scan, which a selection that cannot be read would waste
    intersect = list(map(read_selection, _paths(and_)))
    subtract = list(map(read_selection, _paths(minus)))
    added = list(map(read_selection, _paths(plus)))
    check_engine(engine, ray_address)
    address = join_shards(shards)
    # a process more at least, where locally 0 scans in this one
    cluster = RayCluster(processes=max(workers, 1), address=ray_address, uses_gpus=False)
    curated = apply_filters(
        expand_shards(address),
        filters,
        columns=ScoreColumns(_paths(columns)),
        seed=seed,
        workers=workers,
        allow_damage=allow_damage,
        cluster=cluster if engine == "ray" else None,
    )
    selection = compose_selections(
        curated.selection,
        intersect=intersect,
        subtract=subtract,
        plus=added,
        weight=weight,
        seed=seed,
    )
    _write_curation_pages(curated, selection, f"Curation of {address}", html, report)
    if not dry_run:
        write_selection(Path(out), selection)
    counts = curated.summary(selection)
    return CurationSummary(out=None if dry_run else str(out), **counts, lineage=selection.lineage, curated=curated)


def _paths(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else list(map(Path, paths))


def _check_curation(numbers: dict[str, float], out: Path, pages: Sequence[str | Path | None], *, dry_run: bool) -> None:
    """Refuse, before the long scan, outputs that cannot be written and numbers out of range."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} = {value} is outside its range; give a number from 0 on.")
    for page in pages:
        if page:
            check_parent_exists(Path(page))
    if out.suffix != SELECTION_SUFFIX:
        raise UsageError(f"{str(out)!r} must end in {SELECTION_SUFFIX}, e.g. {out.with_suffix(SELECTION_SUFFIX)}")
    if dry_run:
        return
    if out.exists():
        raise UsageError(f"{out} exists already, and runs may depend on it; remove it or choose another name.")
    check_parent_exists(out)


def _write_curation_pages(
    curated: "CurationResult", selection: Selection, title: str, html: str | Path | None, report: str | Path | None
) -> None:
    from vlm.data.curation.pipeline import render_curation_report
    from vlm.pages import Provenance

    if html:
        write_text(Path(html), render_curation_report(curated, title=title, provenance=Provenance.current()))
        logger.info(f"Page: {html}")
    if report:
        write_text(Path(report), json_text(curated.report(selection), indent=1) + "\n")
        logger.info(f"Report: {report}")


@os_errors_explained()
def build_concepts(
    corpus: Shards,
    out: str | Path,
    *,
    min_count: int = 100,
    min_pmi: float = 5.0,
    max_bigrams: int = 0,
    titles: str | Path | None = None,
    wordnet: str | Path | None = None,
    case: Literal["fold", "keep"] = "fold",
    languages: Sequence[str] = (),
) -> ConceptSummary:
    """Write a list of concepts for the filter `balance` of `vlm curate`, as `vlm concepts` does.

    Args:
        corpus: shards, whose captions are read, or a text file ending in .txt, a text a line.
        out: JSON list to write. min_count: least occurrences of a word or a pair of words. min_pmi: least pointwise
            mutual information of a pair in bits. max_bigrams: most pairs, 0 for all.
        titles: a file of titles, one a line. wordnet: a folder of WordNet's database.
        case: `fold` lower-cases everything. languages: of the captions; empty takes all.

    Raises:
        UsageError: `out` exists, a number is out of range, a source cannot be read, or no concept is left.
    """
    # here, since it loads torch
    from vlm.data.tokenizer_training import read_captions

    if case not in ("fold", "keep"):
        raise UsageError(f"case = {case!r} is unknown; give fold or keep.")
    limits = ConceptLimits(min_count=min_count, min_pmi=min_pmi, max_bigrams=max_bigrams, folds_case=case == "fold")
    address = join_shards(corpus)
    if address.endswith(TEXT_SUFFIX):
        if not Path(address).is_file():
            raise UsageError(f"There is no text file {address}.")
        texts = TextLines(Path(address))
    else:
        texts = read_captions(shards_at(address), tuple(text_list(languages, "languages")))
    return write_concepts(
        texts,
        Path(out),
        limits,
        titles=Path(titles) if titles else None,
        wordnet=Path(wordnet) if wordnet else None,
    )
