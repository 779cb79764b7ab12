"""Embeddings to an index, to what fits or reranks its searches, to scores, and from and to other tools:
`vlm.build_index`, `vlm.fit_head`, `vlm.upgrade_index`, `vlm.fit_reranker`, `vlm.score`, `vlm.import_embeddings`,
`vlm.export_index`, `vlm.check_index`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.errors import UsageError, os_errors_explained
from vlm.files import check_not_exists
from vlm.results import Result, json_values

# imported where they are used: they need FAISS's training
if TYPE_CHECKING:
    from vlm.evaluation.retrieval_metrics import RetrievalResult
    from vlm.index.ann.index_types import TuningParams
    from vlm.index.autotune.trial import TuningTarget
    from vlm.index.backward_compat import RidgeChoice, UpgradeSummary
    from vlm.index.build import AutotunedBuild, BuildSummary
    from vlm.index.curation_scores import ScoreColumn
    from vlm.index.interop.exporter import ExportSummary
    from vlm.index.interop.importer import ImportSummary
    from vlm.index.reranker_fit import RerankerSummary
    from vlm.index.verify import CheckReport


@os_errors_explained()
def build_index(
    embeddings: str | Path,
    out: str | Path,
    *,
    index_type: str = "auto",
    engine: Literal["faiss", "milvus"] = "faiss",
    address: str = "",
    uid_column: str | None = None,
    recall: float | None = None,
    recall_at: int = 10,
    latency_ms: float | None = None,
    memory: str | None = None,
    prefer: Literal["balanced", "speed", "memory"] | None = None,
    texts: str | Path | None = None,
    images: str | Path | None = None,
    tune_rows: int = 50_000,
    seed: int = 0,
    on_plan: Callable[[Any], None] | None = None,
    **tuning: int | None,
) -> "BuildSummary | AutotunedBuild":
    """Build an index of embeddings, as `vlm index build` does.

    With a target (`recall`, `latency_ms`, `memory`, `prefer`) or queries (`texts`, `images`), index type and search
    parameters are autotuned on a sample of the rows.

    Args:
        embeddings: a folder of `vlm.embed`, or of `vlm index import`.
        index_type: flat (exact), ivf, ivfsq, ivfpq, rabitq, sq8, hnsw, or auto.
        engine: what holds the rows: faiss, in the index folder; or milvus, in a collection of its own, where the types
            are flat, ivf, ivfsq and hnsw, and targets cannot be given.
        address: of Milvus: http(s)://HOST:PORT of a server, whose token is in the environment as VLM_MILVUS_TOKEN, or
            a local file that ends in .db, for milvus-lite; by default such a file in the index folder.
        uid_column: the metadata column whose values are the uids, `key` for the keys of the samples; None uses `file`
            where each row has one of its own, as images packed from a folder have, else the uids of the embeddings.
        recall, recall_at, latency_ms, memory: targets: least recall of so many results against exact search; most
            milliseconds of one query on one thread (p95); most memory, as "4GB".
        prefer: which index is taken of those that meet the targets: speed, the fastest, mostly a graph of whole rows
            where they fit `memory`; memory, the smallest; balanced, the smallest of those within 10% of the fastest.
        texts, images: embeddings to query with while tuning; the graph of hnsw links the answers of the others.
        on_plan: called with the plan before a tuned index is built.
        tuning: parameters of the index type: nlist, nprobe, hnsw_m, ef_construction, ef_search, refine_factor.

    Raises:
        UsageError: `out` exists, the embeddings are unfinished, or the index type, a target or the engine does not fit
            them.
        VlmError: the embeddings are damaged, the disk is full, or Milvus does not answer.
    """
    from vlm.index.build import build_autotuned
    from vlm.index.build import build_index as build_plain

    for name in tuning:
        # a mistake of the caller's code, so it is Python's own error
        if name not in TUNING_PARAMETERS:
            raise TypeError(f"build_index() got an unexpected keyword argument {name!r}")
    targets = (recall, latency_ms, memory, prefer, texts, images)
    # any of them asks for a search over configurations, and nothing else does
    is_autotuned = any(value is not None for value in targets)
    # an address without --engine milvus is refused, not ignored
    if engine != "faiss" or address:
        _check_engine(engine, address, is_autotuned)
        return _build_in_milvus(embeddings, out, index_type, _tuning(tuning, seed), address, uid_column)
    if not is_autotuned:
        return build_plain(
            Path(embeddings), Path(out), kind=index_type, tuning=_tuning(tuning, seed), uid_column=uid_column
        )
    for name, value in tuning.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} is chosen by autotuning; omit it, or omit the targets.")
    return build_autotuned(
        Path(embeddings),
        Path(out),
        _target(recall, recall_at, latency_ms, memory, prefer or "balanced"),
        texts=Path(texts) if texts else None,
        images=Path(images) if images else None,
        kind=index_type,
        max_rows=tune_rows,
        seed=seed,
        uid_column=uid_column,
        on_plan=on_plan,
    )


TUNING_PARAMETERS = {
    "nlist": "nlist",
    "nprobe": "nprobe",
    "hnsw_m": "links",
    "ef_construction": "ef_construction",
    "ef_search": "ef_search",
    "refine_factor": "rerank",
}
"""The parameters that autotuning chooses, with the field of `TuningParams` that each sets."""


def _tuning(tuning: dict[str, int | None], seed: int) -> "TuningParams":
    from vlm.index.ann.index_types import TuningParams

    # None stays None: the index type fills in its defaults, by the number of rows
    numbers: dict[str, Any] = {TUNING_PARAMETERS[name]: value for name, value in tuning.items()}
    return TuningParams(seed=seed, **numbers)


def _target(
    recall: float | None,
    recall_at: int,
    latency_ms: float | None,
    memory: str | None,
    prefer: Literal["balanced", "speed", "memory"],
) -> "TuningTarget":
    from vlm.index.autotune.trial import TuningTarget, parse_bytes

    if prefer not in ("balanced", "speed", "memory"):
        raise UsageError(f"prefer = {prefer!r}; give balanced, speed or memory.")
    return TuningTarget(
        recall=0.95 if recall is None else recall,
        at=recall_at,
        latency_ms=latency_ms,
        memory_bytes=None if memory is None else parse_bytes(memory),
        prefer=prefer,
    )


def _check_engine(engine: str, address: str, is_autotuned: bool) -> None:
    if engine not in ("faiss", "milvus"):
        raise UsageError(f"engine = {engine!r}; give faiss or milvus.")
    if engine == "faiss":
        raise UsageError(f"--address {address} is where Milvus has the rows: add --engine milvus, or leave it out.")
    if is_autotuned:
        raise UsageError(
            "Targets (--recall, --latency-ms, --memory, --prefer, --texts, --images) are met by trying FAISS indexes "
            "in this process; with --engine milvus name the --index-type and its parameters."
        )


def _build_in_milvus(
    embeddings: str | Path,
    out: str | Path,
    index_type: str,
    tuning: "TuningParams",
    address: str,
    uid_column: str | None,
) -> "BuildSummary":
    from vlm.index.milvus.milvus_writer import build_milvus_index

    return build_milvus_index(
        Path(embeddings), Path(out), address=address, kind=index_type, tuning=tuning, uid_column=uid_column
    )


@os_errors_explained()
def fit_reranker(embeddings: str | Path, out: str | Path, *, model: str = "", **options: Any) -> "RerankerSummary":
    """Fit a poly-encoder that reranks searches by the single words of a query, as `vlm index fit-reranker` does.

    `vlm.open_index(INDEX, rerank_model=out)` uses it; no image is read for that.

    Args:
        embeddings: image embeddings with captions, by the model of the index. out: folder to write.
        model: the MODEL that made the embeddings, if it was moved.
        options: codes, candidates, epochs, learning_rate, weight_decay, held_out, max_images, language, seed.

    Raises:
        UsageError: `out` exists, an option is out of range, or the embeddings are of texts or of another model.
    """
    from vlm.index.embeddings_folder import Embeddings
    from vlm.index.reranker_fit import FitOptions
    from vlm.index.reranker_fit import fit_reranker as fit
    from vlm.models.load import load_model

    known = [attribute.name for attribute in fields(FitOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"fit_reranker() got an unexpected keyword argument {name!r}")
    settings = FitOptions(**options)
    # before the embeddings are opened and the model is loaded
    settings.check()
    folder = Embeddings.open(Path(embeddings))
    return fit(load_model(model or folder.space.model), folder, Path(out), settings)


@dataclass(frozen=True, kw_only=True)
class HeadSummary(Result):
    """A head that was fitted: its folder and identity, how it was chosen, and its recall on the held-out images.

    recall: by the model of the queries and that of the rows, as "new → old".
    """

    head: str
    fingerprint: str
    choice: "RidgeChoice"
    recall: "dict[str, RetrievalResult]"
    held_out_images: int

    @property
    def evidence(self) -> dict[str, Any]:
        """How it was chosen and its recall, as the head's folder keeps them."""
        return asdict(self.choice) | {"recall": {name: result.metrics() for name, result in self.recall.items()}}

    def to_json(self) -> dict[str, Any]:
        """What `vlm index fit-head --json` prints."""
        return json_values({"head": self.head, "fingerprint": self.fingerprint} | self.evidence)


@os_errors_explained()
def fit_head(
    old: str | Path,
    new: str | Path,
    head: str | Path,
    *,
    old_texts: str | Path,
    new_texts: str | Path,
    held_out: float = 0.1,
    max_images: int = 20_000,
    seed: int = 0,
) -> HeadSummary:
    """Fit a projection with which a new model queries an index of an old one, as `vlm index fit-head` does.

    The head is a MODEL from then on: `vlm.upgrade_index` migrates an index to it, `vlm.embed` adds rows with it.

    Args:
        old, new: embeddings of the same images by the old model (or an older head) and by the new one.
        head: folder to write.
        old_texts, new_texts: embeddings of the captions of these images by both.
        held_out: fraction of the images held out to measure recall.
        max_images: most images that are used, sampled evenly.

    Raises:
        UsageError: `head` exists, a number is out of range, or the embeddings are not of the same samples
            by two models.
    """
    from vlm.index.backward_compat import fit_head as fit
    from vlm.index.backward_compat import measure_head, read_pairs
    from vlm.models.variants import save_projection

    if not 0 < held_out < 1:
        raise UsageError(f"held_out = {held_out} is out of range: give a fraction between 0 and 1.")
    if max_images < 1:
        raise UsageError(f"max_images = {max_images} is out of range: give at least 1.")
    # before the fit, whose result would be lost
    check_not_exists(Path(head))
    folders = map(Path, (old, new, old_texts, new_texts))
    fitting, measured = read_pairs(*folders, max_images=max_images, seed=seed).split(held_out, seed=seed)
    fitted = fit(fitting, seed=seed)
    summary = HeadSummary(
        head=str(head),
        fingerprint=fitted.head.fingerprint,
        choice=fitted.choice,
        recall=measure_head(measured, fitted.head, seed=seed),
        held_out_images=len(measured),
    )
    # the keys of heads saved before max_images had that name
    configuration = {"held_out": held_out, "pictures": max_images, "seed": seed}
    save_projection(Path(head), fitted.head, configuration=configuration, details={"evidence": summary.evidence})
    return summary


@os_errors_explained()
def upgrade_index(index: str | Path, out: str | Path, *, head: str | Path) -> "UpgradeSummary":
    """Migrate an index to a new model without embedding anything again, as `vlm index upgrade` does.

    Args:
        index: folder, which is not changed. out: folder for the new index.
        head: of `vlm.fit_head`, for the index's model and the new one.

    Raises:
        UsageError: `out` exists, or the head is for rows of another model. VlmError: the index is damaged.
    """
    from vlm.index.backward_compat import upgrade_index as upgrade
    from vlm.models.variants import read_projection

    return upgrade(Path(index), Path(out), read_projection(Path(head)), head_spec=str(head))


@os_errors_explained()
def import_embeddings(
    source: str | Path,
    out: str | Path,
    *,
    model: str = "",
    modality: Literal["image", "text"] | None = None,
    metadata: str | Path | None = None,
    uid_column: str = "",
    caption_column: str = "",
    embedding_column: str = "",
) -> "ImportSummary":
    """Embeddings of other tools as an embeddings folder, as `vlm index import` makes it.

    Args:
        source: output folder of clip-retrieval; a folder of .npy, Parquet or one FAISS file, with their metadata; such
            a file; or the output of `vlm.export_index`.
        model: MODEL that made the vectors, or unknown; an export of this project names it itself.
        modality: what was embedded; None is image.
        metadata: Parquet file or folder, if it is not next to the vectors; row i describes vector i.
        uid_column, caption_column, embedding_column: by default those with the usual names.

    Raises:
        UsageError: `out` exists, files do not belong together, a column is missing, or the model has another dimension.
        VlmError: a file is damaged, or no row can be used.
    """
    from vlm.index.interop.import_layouts import ColumnChoice
    from vlm.index.interop.importer import import_embeddings as import_rows
    from vlm.service.query import load_encoder

    return import_rows(
        Path(source),
        Path(out),
        model_spec=model,
        load=load_encoder,
        modality=modality,
        metadata=Path(metadata) if metadata else None,
        column_choice=ColumnChoice(uid=uid_column, caption=caption_column, embedding=embedding_column),
    )


@os_errors_explained()
def export_index(
    index: str | Path,
    out: str | Path,
    *,
    to: Literal["npy", "clip-retrieval", "faiss", "parquet"],
    where: str = "",
    precision: Literal["float16", "float32"] | None = None,
) -> "ExportSummary":
    """The live rows of an index for other tools, as `vlm index export` writes them.

    Args:
        out: folder for the files.
        where: export only rows that match this filter.
        precision: of the vectors; None is float16, as stored, and float32 for parquet.

    Raises:
        UsageError: `out` exists, no row is selected, or the filter is malformed. VlmError: the index is damaged.
    """
    from vlm.index.interop.exporter import export_index as export_rows

    return export_rows(Path(index), Path(out), to=to, where=where, precision=precision)


@os_errors_explained()
def check_index(index: str | Path, *, sample: int = 1000, seed: int = 0) -> "CheckReport":
    """Read all of an index, one that cannot be opened too, and list its faults, as `vlm index check` does.

    sample: rows whose metadata and distances are computed again.

    Raises:
        UsageError: there is no index. VlmError: its manifest is damaged, or its server cannot be reached.
    """
    from vlm.index.engine_base import check_index as check

    if sample < 1:
        raise UsageError(f"sample = {sample} is out of range: give at least 1.")
    return check(Path(index), sample=sample, seed=seed)


@dataclass(frozen=True)
class Scores:
    """The scores that were written."""

    scores: "tuple[ScoreColumn, ...]"

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> "Iterator[ScoreColumn]":
        return iter(self.scores)

    def to_json(self) -> list[dict[str, Any]]:
        """What `vlm score --json` prints."""
        return json_values(list(map(asdict, self.scores)))


@os_errors_explained()
def score(
    embeddings: str | Path,
    *,
    texts: str | Path | None = None,
    duplicates: float | None = None,
    clusters: int | None = None,
    near: str | Path | None = None,
    overlap: str | Path | None = None,
    seed: int = 0,
) -> Scores:
    """Score embedded images for `vlm.curate(…, columns="EMBEDDINGS/signals")`, as `vlm score` does.

    Args:
        embeddings: of images; the scores are written into its folder signals.
        texts: embeddings of the same shards' captions: write similarity, the CLIP score.
        duplicates: least cosine of duplicate images: write duplicates.
        clusters: number of k-means clusters: write cluster and centre-distance. seed: of k-means.
        near: embeddings of a target set: write near.
        overlap: embeddings of an evaluation set to decontaminate from: write overlap.

    Raises:
        UsageError: nothing is asked for, a number is out of range, or embeddings are of another model or other shards.
    """
    from vlm.index.curation_scores import ScoreWriter
    from vlm.index.embeddings_folder import Embeddings

    if all(value is None for value in (texts, duplicates, clusters, near, overlap)):
        raise UsageError("Nothing to compute; give texts, duplicates, clusters, near or overlap.")
    writer = ScoreWriter(Embeddings.open(Path(embeddings)))
    scores: list[ScoreColumn] = []
    if texts is not None:
        scores.append(writer.similarity(Embeddings.open(Path(texts))))
    if duplicates is not None:
        scores.append(writer.duplicates(duplicates))
    if clusters is not None:
        scores += writer.clusters(clusters, seed=seed)
    if near is not None:
        scores.append(writer.near(Embeddings.open(Path(near))))
    if overlap is not None:
        scores.append(writer.overlap(Embeddings.open(Path(overlap))))
    return Scores(tuple(scores))
