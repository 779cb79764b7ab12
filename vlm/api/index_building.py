"""`vlm.build_index`, `vlm.fit_reranker`: embeddings to an index, and to what reranks searches of it."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.errors import UsageError, os_errors_explained

# imported where they are used: they need FAISS's training
if TYPE_CHECKING:
    from vlm.index.ann.index_types import TuningParams
    from vlm.index.build import AutotunedBuild, BuildSummary
    from vlm.index.reranker_fit import RerankerSummary


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
    texts: str | Path | None = None,
    images: str | Path | None = None,
    tune_rows: int = 50_000,
    seed: int = 0,
    on_plan: Callable[[Any], None] | None = None,
    **tuning: int | None,
) -> "BuildSummary | AutotunedBuild":
    """Build an index of embeddings, as `vlm index build` does.

    With a target (`recall`, `latency_ms`, `memory`) or queries (`texts`, `images`), index type and search parameters
    are autotuned on a sample of the rows.

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
        texts, images: embeddings to query with while tuning.
        on_plan: called with the plan before a tuned index is built.
        tuning: parameters of the index type: nlist, nprobe, hnsw_m, ef_construction, ef_search, refine_factor.

    Raises:
        UsageError: `out` exists, the embeddings are unfinished, or the index type, a target or the engine does not fit
            them.
        VlmError: the embeddings are damaged, the disk is full, or Milvus does not answer.
    """
    from vlm.index.autotune.trial import TuningTarget, parse_bytes
    from vlm.index.build import build_autotuned
    from vlm.index.build import build_index as build_plain

    for name in tuning:
        if name not in TUNING_PARAMETERS:
            raise TypeError(f"build_index() got an unexpected keyword argument {name!r}")
    targets = (recall, latency_ms, memory, texts, images)
    # any of them asks for a search over configurations, and nothing else does
    is_autotuned = any(value is not None for value in targets)
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
    target = TuningTarget(
        recall=0.95 if recall is None else recall,
        at=recall_at,
        latency_ms=latency_ms,
        memory_bytes=None if memory is None else parse_bytes(memory),
    )
    return build_autotuned(
        Path(embeddings),
        Path(out),
        target,
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


def _check_engine(engine: str, address: str, is_autotuned: bool) -> None:
    if engine not in ("faiss", "milvus"):
        raise UsageError(f"engine = {engine!r}; give faiss or milvus.")
    if engine == "faiss":
        raise UsageError(f"--address {address} is where Milvus has the rows: add --engine milvus, or leave it out.")
    if is_autotuned:
        raise UsageError(
            "Targets (--recall, --latency-ms, --memory, --texts, --images) are met by trying FAISS indexes in this "
            "process; with --engine milvus name the --index-type and its parameters."
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
    settings.check()
    folder = Embeddings.open(Path(embeddings))
    return fit(load_model(model or folder.space.model), folder, Path(out), settings)
