"""The verbs of an index that do not change its rows: build, import, export, fit-head, upgrade, check, info."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.options import IndexArgument, JsonOption, call_options
from vlm.console import percent, quoted, show_fields, show_json, show_table, spaced_names
from vlm.errors import VlmError

if TYPE_CHECKING:
    from vlm.evaluation.retrieval_metrics import RetrievalResult
    from vlm.index.build import AutotunedBuild, BuildSummary
    from vlm.index.interop.importer import ImportSummary

logger = logging.getLogger(__name__)

_TEXTS_HELP = (
    "Text embeddings by the same model (vlm embed --modality text), as queries for autotuning. If omitted, held-out "
    "rows serve as queries. With 1,000 or more, the reverse direction (image→text) is evaluated too. "
    "The graph of hnsw links the answers of those that recall is not measured with: searches by text are faster."
)
_PREFER_HELP = (
    "Target: which index is taken of those that meet the others. speed: the fastest, mostly a graph of whole rows "
    "where they fit --memory. memory: the smallest. balanced (default): the smallest of those within 10% of the "
    "fastest."
)
_SOURCE_HELP = (
    "Output folder of clip-retrieval (img_emb, text_emb, metadata); folder of .npy with Parquet files of the same "
    "names or numbers, of .npy alone, of Parquet with a column of vectors, or with one FAISS file (knn.index, "
    "image.index) and Parquet files next to it or in metadata; one such file; or the output of vlm index export."
)
_SOURCE_MODEL_HELP = (
    "Model that made the vectors: run folder, model folder, or open_clip NAME:WEIGHTS. With unknown, queries can only "
    "be stored items or vectors. Exports of vlm name it themselves."
)
_FORMAT_HELP = (
    "npy: embeddings.npy with metadata.parquet. clip-retrieval: its folders img_emb (or text_emb) and metadata, which "
    "autofaiss reads too. faiss: index.faiss, whose ids are the rows of metadata.parquet. parquet: embeddings.parquet, "
    "with a column of vectors."
)
_ENGINE_HELP = (
    "What holds the rows. faiss: files of the index folder. milvus: a collection, for more rows than a machine holds "
    "(extra milvus); types flat, ivf, ivfsq and hnsw, no targets. Every later command finds the engine by the folder."
)
_ADDRESS_HELP = (
    "Where Milvus is: http(s)://HOST:PORT of a server, its token in the environment as VLM_MILVUS_TOKEN, or a local "
    "file ending in .db for milvus-lite; by default such a file in the index folder."
)
_UID_COLUMN_HELP = (
    "Metadata column whose values become the uids, or key for the keys of the samples; by default file, the name of an "
    "image in its folder, where each row has one of its own, else the uids of the embeddings."
)


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """Build an index with its metadata catalog from embeddings: of FAISS, in a folder, or in Milvus.

    With a target (--recall, --latency-ms, --memory, --prefer) or queries (--texts, --images), index type and search
    parameters are autotuned on a sample of the rows.
    """

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Embeddings folder, made by vlm embed or vlm index import."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the index."""

    index_type: str = "auto"
    """flat (exact), ivf, ivfsq, ivfpq, rabitq, sq8, hnsw, or auto: flat for few rows, ivf for many, or autotuned."""

    engine: Annotated[Literal["faiss", "milvus"], tyro.conf.arg(help=_ENGINE_HELP)] = "faiss"

    address: Annotated[str, tyro.conf.arg(help=_ADDRESS_HELP)] = ""

    recall: float | None = None
    """Target: minimum recall against exact search; 0.95 if only another target is given."""

    recall_at: int = 10
    """Target: cut-off K of the recall."""

    latency_ms: float | None = None
    """Target: maximum p95 latency of one query on one thread."""

    memory: str | None = None
    """Target: maximum memory of the FAISS index, e.g. 4GB or 512MiB."""

    prefer: Annotated[Literal["balanced", "speed", "memory"] | None, tyro.conf.arg(help=_PREFER_HELP)] = None

    texts: Annotated[Path | None, tyro.conf.arg(help=_TEXTS_HELP)] = None

    images: Path | None = None
    """Image embeddings to use as queries when tuning an index of texts."""

    tune_rows: int = 50_000
    """Rows of the sample that candidate configurations are tried on."""

    nlist: int | None = None
    """Inverted lists of ivf, ivfsq, ivfpq and rabitq; None chooses by the number of rows."""

    nprobe: int | None = None
    """Lists probed by a search; None chooses by nlist."""

    hnsw_m: int | None = None
    """M of hnsw: edges per node; None uses the default of the index type."""

    ef_construction: int | None = None
    """efConstruction of hnsw; None uses the default of the index type."""

    ef_search: int | None = None
    """efSearch of hnsw; None uses the default of the index type."""

    refine_factor: int | None = None
    """ivfsq, ivfpq, rabitq, sq8: candidates rescored with full vectors per result; None uses the type's default."""

    seed: int = 0
    """Random seed for sampling and k-means."""

    uid_column: Annotated[str | None, tyro.conf.arg(help=_UID_COLUMN_HELP)] = None

    json: JsonOption = False

    def run(self) -> None:
        """Build, autotuned if there is a target or are queries, and show; a missed target fails at the end."""
        from vlm.api.index_building import build_index
        from vlm.index.autotune.autotune_report import show_plan
        from vlm.index.build import AutotunedBuild

        build = build_index(**call_options(self), on_plan=None if self.json else show_plan)
        if self.json:
            show_json(build)
        else:
            self._show(build)
        # last: an index that misses its target is finished and shown, and scripts see the exit code
        if isinstance(build, AutotunedBuild):
            build.check_target()

    def _show(self, build: "BuildSummary | AutotunedBuild") -> None:
        from vlm.index.build import AutotunedBuild

        summary = build.summary if isinstance(build, AutotunedBuild) else build
        if isinstance(build, AutotunedBuild):
            verification = asdict(build.verification)
            del verification["breaks"]
            for name in ("recall", "bound"):
                verification[name] = percent(verification[name])
            show_fields(verification, title=f"The finished index, queried {build.plan.direction}")
        show_fields(asdict(summary))
        logger.info(f'Next: vlm search {quoted(self.out)} "your query"')


@dataclass(frozen=True, kw_only=True)
class ImportEmbeddings:
    """Import embeddings of clip-retrieval, autofaiss or other tools, for vlm index build and vlm index add."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help=_SOURCE_HELP)]

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the embeddings."""

    model: Annotated[str, tyro.conf.arg(help=_SOURCE_MODEL_HELP)] = ""

    modality: Literal["image", "text"] | None = None
    """What was embedded; default: image."""

    metadata: Path | None = None
    """Parquet file or folder with the metadata, if not next to the vectors; row i describes vector i."""

    uid_column: str = ""
    """Column of the uids; default: uid, key or image_path, else row numbers."""

    caption_column: str = ""
    """Column of the captions, a text or a list; default: caption, captions or text."""

    embedding_column: str = ""
    """Column of the vectors in a Parquet source; default: embedding, or the only column of such lists."""

    json: JsonOption = False

    def run(self) -> None:
        """Import, and log what was changed or skipped."""
        from vlm.api.index_building import import_embeddings

        summary = import_embeddings(**call_options(self))
        # before the table: whatever differs from the source should be seen even with --json
        self._log_changes(summary)
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        logger.info(f"Next: vlm index build {quoted(self.out)} INDEX")

    def _log_changes(self, summary: "ImportSummary") -> None:
        from vlm.index.embeddings_folder import UNKNOWN

        if summary.bad:
            incidents = self.out / "incidents.jsonl"
            logger.info(f"{summary.bad:,} vectors are zero or not finite and were skipped: {incidents}")
        if summary.scaled:
            logger.info(
                f"{summary.scaled:,} vectors were not of unit length and were normalised for cosine similarity."
            )
        if summary.approximate:
            logger.info(
                f"The FAISS file ({summary.approximate}) stores quantized vectors: the rows are approximations. Import "
                "the original vectors if they still exist."
            )
        if summary.renamed:
            logger.info(
                f"{summary.renamed:,} rows share their {summary.uid_column}; file and row were added to their uids."
            )
        if summary.left_out:
            names = ", ".join(name or "one without a name" for name in summary.left_out)
            logger.info(f"Columns that cannot be metadata were skipped: {names}")
        if summary.model == UNKNOWN:
            logger.info("The model is unknown: query with vlm search --like UID, and add only rows of the same model.")


@dataclass(frozen=True, kw_only=True)
class ExportIndex:
    """Export the live rows of an index for other tools: npy, clip-retrieval's folders, a FAISS file, Parquet."""

    index: IndexArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the files."""

    to: Annotated[Literal["npy", "clip-retrieval", "faiss", "parquet"], tyro.conf.arg(help=_FORMAT_HELP)]

    where: str = ""
    """Export only rows that match this filter, as for vlm search."""

    precision: Literal["float16", "float32"] | None = None
    """Precision of the vectors; default: float16, as stored, or float32 for parquet."""

    json: JsonOption = False

    def run(self) -> None:
        """Export, then list the files."""
        from vlm.api.index_building import export_index

        summary = export_index(**call_options(self))
        if self.json:
            show_json(summary)
        else:
            show_fields(asdict(summary))


@dataclass(frozen=True, kw_only=True)
class FitHead:
    """Fit a projection (head) with which a new model queries an index of an old one.

    It is fitted on embeddings of the same samples by both models. The head is a MODEL from then on: vlm index upgrade
    migrates an index to it, vlm embed adds rows with it; rows embedded by it are searched exactly as with the new model
    alone. Recall is measured on a held-out part. Prefer samples neither model was trained on, since they reflect how
    both embed unseen data.
    """

    old: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OLD-EMBEDDINGS")]
    """Image embeddings by the old model (or by an older head)."""

    new: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NEW-EMBEDDINGS")]
    """Embeddings of the same images by the new model."""

    head: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HEAD")]
    """Folder for the head."""

    old_texts: Path
    """Embeddings of the images' captions by the old model (vlm embed --modality text)."""

    new_texts: Path
    """Embeddings of the same captions by the new model."""

    held_out: float = 0.1
    """Fraction of the images held out to measure recall."""

    max_images: int = 20_000
    """Maximum number of images used, sampled evenly."""

    seed: int = 0
    """Random seed for sampling and the held-out split."""

    json: JsonOption = False

    def run(self) -> None:
        """Fit, measure, save, show."""
        from vlm.api.index_building import fit_head

        summary = fit_head(**call_options(self))
        if self.json:
            show_json(summary)
            return
        show_fields(asdict(summary.choice))
        show_recall(summary.recall, title=f"{summary.held_out_images:,} held-out images")
        logger.info(f"Next: vlm index upgrade INDEX OUT --head {quoted(self.head)}")


@dataclass(frozen=True, kw_only=True)
class FitReranker:
    """Fit a poly-encoder that reranks text searches of an index by the single words of the query.

    It is fitted on an embeddings folder of images with captions; the model stays unchanged, and no image is read. The
    weights best on a held-out part are kept. Use it by vlm search INDEX "words" --rerank RERANKER. Prefer samples the
    model was not trained on: among its own training samples nearly all captions find their image already.
    """

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Image embeddings by the model of the index."""

    reranker: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RERANKER")]
    """Folder for the reranker."""

    model: str = ""
    """The MODEL that made the embeddings, if it was moved."""

    codes: int = 16
    """Number of learned codes: views of a query."""

    candidates: int = 50
    """Nearest images among which a caption is to find its own."""

    epochs: int = 10
    """Epochs over the captions."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""

    held_out: float = 0.1
    """Fraction of the images held out to choose the epoch and to measure."""

    max_images: int = 50_000
    """Maximum number of images used, sampled evenly."""

    language: str = ""
    """Language of the captions; empty uses the first of each image."""

    seed: int = 0
    """Random seed."""

    json: JsonOption = False

    def run(self) -> None:
        """Fit, show."""
        from vlm.api.index_building import fit_reranker

        options = call_options(self)
        summary = fit_reranker(out=options.pop("reranker"), **options)
        if self.json:
            show_json(summary)
            return
        rows = [["by cosine", *summary.before.values()], ["reranked", *summary.after.values()]]
        show_table(["", *summary.before], rows, title=f"{summary.held_out_images:,} held-out images")
        if not summary.epoch:
            logger.warning("No epoch was better than the cosine on the held-out images: the reranker adds nothing.")
        logger.info(f'Next: vlm search INDEX "a query" --rerank {quoted(self.reranker)}')


def show_recall(recall: "dict[str, RetrievalResult]", *, title: str) -> None:
    """A row for each combination of query model and index model."""
    # all combinations are measured with the same cutoffs
    cutoffs = next(iter(recall.values())).text_to_image.recall
    columns = ["query → rows"]
    for direction in ("text→image", "image→text"):
        columns += [f"{direction} R@{k}" for k in cutoffs]
    rows: list[list[object]] = []
    for name, retrieval in recall.items():
        recalls = (*retrieval.text_to_image.recall.values(), *retrieval.image_to_text.recall.values())
        rows.append([name, *map(percent, recalls)])
    show_table(columns, rows, title=title)


@dataclass(frozen=True, kw_only=True)
class UpgradeIndex:
    """Migrate an index to a new model without recomputing its embeddings.

    The new index is queried through the head of vlm index fit-head. Rows embedded later by the new model (vlm embed
    with the head as MODEL) replace the migrated ones by vlm index update, bit by bit.
    """

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Index folder, made by vlm index build; it is not changed."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the new index."""

    head: Path
    """Head folder, made by vlm index fit-head for the index's model and the new one."""

    json: JsonOption = False

    def run(self) -> None:
        """Migrate, then log the next steps."""
        from vlm.api.index_building import upgrade_index

        summary = upgrade_index(**call_options(self))
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        head = quoted(self.head)
        out = quoted(self.out)
        logger.info(
            f'Next: vlm search {out} "your query"; to replace migrated rows by the new model\'s own:\n'
            f"vlm embed {head} SHARDS EMBEDDINGS && vlm index update {out} EMBEDDINGS"
        )


@dataclass(frozen=True, kw_only=True)
class CheckIndex:
    """Verify an index: checksums, referential integrity, counts and distances."""

    index: IndexArgument

    sample: int = 1000
    """Rows whose metadata and distances are recomputed."""

    seed: int = 0
    """Random seed for this sample."""

    json: JsonOption = False

    def run(self) -> None:
        """Check; a fault makes the command fail."""
        from vlm.api.index_building import check_index

        report = check_index(**call_options(self))
        if self.json:
            show_json(report)
        else:
            # the numbers of strays and faults in place of the lists, at the end
            counts = asdict(report)
            del counts["faults"], counts["strays"]
            show_fields(counts | {"strays": len(report.strays), "faults": len(report.faults)})
            if report.faults:
                show_table(["part", "fault"], [[fault.part, fault.what] for fault in report.faults])
        if report.faults:
            # an error rather than a line: scripts check an index before they publish it
            raise VlmError(
                f"{self.index} has {len(report.faults)} faults; rebuild it with vlm index build, or restore the "
                "damaged files from a copy."
            )


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """Show what an index holds and what it was made from."""

    index: IndexArgument

    json: JsonOption = False

    def run(self) -> None:
        """Show the fields, and a row for each segment."""
        from vlm.api.index import open_index

        with open_index(self.index) as index:
            summary = index.info()
        if self.json:
            show_json(summary)
            return
        info = asdict(summary)
        if info["engine"] == "faiss":
            del info["address"], info["collection"]
        # nested values, shown as tables of their own
        segments = info.pop("segments")
        evidence = info.pop("evidence")
        show_fields(spaced_names(info))
        if segments:
            show_table(list(segments[0]), [list(segment.values()) for segment in segments], title="segments")
        if "why" in evidence:
            show_fields({"why this index type": evidence["why"]})
