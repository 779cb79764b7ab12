"""`vlm curate`: shards to a selection, with the concepts (`vlm concepts`) and scores (`vlm score`) that it goes by."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.options import EngineOption, JsonOption, RayAddressOption, ShardsArgument, WorkersOption, call_options
from vlm.console import quoted, show_fields, show_json, show_table, spaced_names

if TYPE_CHECKING:
    from vlm.api.curation import CurationSummary
    from vlm.index.curation_scores import ScoreColumn

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
        from vlm.api.curation import curate

        summary = curate(**call_options(self))
        if self.json:
            show_json(summary)
        else:
            self._show(summary)

    def _show(self, summary: "CurationSummary") -> None:
        from vlm.data.curation.pipeline import step_rows

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


@dataclass(frozen=True, kw_only=True)
class BuildConcepts:
    """Write a list of concepts for `vlm curate --filter balance:concepts=OUT`, built as MetaCLIP builds its own.

    Frequent words of a corpus, pairs of words of high pointwise mutual information, titles, and WordNet's synsets.
    """

    corpus: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """Shards, whose captions are read, or a text file ending in .txt with a text a line."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.json")]
    """JSON list to write."""

    min_count: int = 100
    """Minimum number of occurrences of a word or a pair; MetaCLIP's 100 is for all of Wikipedia."""

    min_pmi: float = 5.0
    """Minimum pointwise mutual information of a pair, in bits."""

    max_bigrams: int = 0
    """Maximum number of pairs, those of the highest information; 0 takes all."""

    titles: Path | None = None
    """File of titles, one a line, e.g. of Wikipedia."""

    wordnet: Path | None = None
    """Folder of WordNet's database (data.noun, …)."""

    case: Literal["fold", "keep"] = "fold"
    """fold: lower-case everything; keep: leave it as it is written."""

    languages: tuple[str, ...] = ()
    """Caption languages to read; empty uses all."""

    json: JsonOption = False

    def run(self) -> None:
        """Build, show."""
        from vlm.api.curation import build_concepts

        summary = build_concepts(**call_options(self))
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        logger.info(f"Next: vlm curate SHARDS OUT.selection --filter balance:concepts={quoted(self.out)},cap=CAP")


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
        from vlm.api.index_building import score

        scores = score(**call_options(self))
        if self.json:
            show_json(scores.to_json())
            return
        show_table(["score", "rows", "min", "median", "max", "details"], list(map(_row, scores)))
        logger.info(f"Next: vlm curate SHARDS OUT.selection --columns {quoted(self.embeddings / 'signals')} --filter …")


def _row(score: "ScoreColumn") -> list[object]:
    summary = [score.facts.get(name, "") for name in _SUMMARY]
    details = [f"{name} {value}" for name, value in score.facts.items() if name not in _SUMMARY]
    return [score.name, score.rows, *summary, ", ".join(details)]
