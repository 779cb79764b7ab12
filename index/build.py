"""Build an index from an embeddings folder: FAISS segment, catalogue and manifest, whole or absent.

`build_index` builds a given index type; `build_autotuned` finds the type and its parameters by target;
`create_index` makes one without rows.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, check_not_exists, compute_fingerprint, json_text
from vlm.index.ann.faiss_search import to_float32
from vlm.index.ann.index_types import INDEX_TYPES, TuningParams, resolve_index_type, search_params_dict
from vlm.index.autotune.autotune_report import PLOT, draw_plan
from vlm.index.autotune.autotuner import MAX_ROWS, Plan, VerificationResult, autotune, retune, verify_plan
from vlm.index.autotune.search_params import SearchParams
from vlm.index.autotune.trial import TuningTarget
from vlm.index.catalog import write_catalogue
from vlm.index.embeddings_folder import Embeddings, EmbeddingSpace, find_non_unit_rows
from vlm.index.ids import UID_COLUMN, choose_uid_column, with_uid_of
from vlm.index.index_files import FIRST_VERSION, IndexDetails, catalogue_file, write_link_queries
from vlm.index.reader import Index
from vlm.index.segments import WrittenSegment, iter_stored_blocks, write_segment
from vlm.manifest import FileRecord, Manifest, write_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Float

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildSummary(Result):
    """The index that was built, and how long it took."""

    folder: str
    kind: str
    parameters: dict[str, int]
    rows: int
    dimension: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AutotunedBuild(Result):
    """The index that was built for a target, the plan behind it and what the finished index has.

    search_params: set on the finished index; None if the index type has none, or they were left as planned.
    """

    summary: BuildSummary
    plan: Plan
    search_params: SearchParams | None
    verification: VerificationResult

    @property
    def folder(self) -> str:
        """The index folder."""
        return self.summary.folder

    def to_json(self) -> dict[str, Any]:
        """Plain values: what `vlm index build --json` prints."""
        measured = {
            "plan": self.plan.evidence,
            "setting": self.search_params and asdict(self.search_params),
            "confirmed": asdict(self.verification),
        }
        return self.summary.to_json() | json.loads(json_text(measured, default=str))

    def check_target(self) -> None:
        """Raise VlmError if the finished index misses its target; the folder stays."""
        if self.verification.breaks:
            raise VlmError(
                f"{self.summary.folder} is complete but misses its target: {' and '.join(self.verification.breaks)}. "
                "The sample was not representative: remove the folder and build with more --tune-rows, or lower the "
                "target."
            )


def build_index(
    embeddings: Path,
    out: Path,
    *,
    kind: str = "auto",
    tuning: TuningParams | None = None,
    link_queries: Float[Array, "Q D"] | None = None,
    uid_column: str | None = None,
    evidence: dict[str, Any] | None = None,
) -> BuildSummary:
    """Build an index of a finished embeddings folder, whose checksums are verified.

    kind: one of `INDEX_TYPES`, or auto (`resolve_index_type`). evidence: why this type, plain values for the manifest.
    link_queries: as of `write_segment`; the index of a graph keeps them for later compactions.
    uid_column: as of `choose_uid_column`.
    The folder is written under another name and renamed at the end.

    Raises:
        UsageError: `out` exists, the embeddings are unfinished, or the index type or link queries do not fit them.
        VlmError: the embeddings are damaged, or the disk is full or cannot be written.
    """
    started = time.perf_counter()
    check_not_exists(out)
    # checksums now: a damaged part found in the middle would waste the training before it
    source = Embeddings.open(embeddings, verify=True)
    resolved_kind = resolve_index_type(kind, len(source))
    if kind != resolved_kind:
        logger.info(f"{len(source):,} rows: a {resolved_kind} index.")
    if link_queries is not None:
        _check_link_queries(link_queries, source.dimension)
        # as they are kept, so that a compaction finds the same links
        link_queries = link_queries.astype(np.float16)
    column = choose_uid_column(source.origins, uid_column)
    if column and uid_column is None:
        logger.info(f"Uids are the names of the image files ({column}); another column: --uid-column.")
    try:
        with atomic_folder(out) as folder:
            written = _write_index(
                folder,
                source,
                resolved_kind,
                tuning or TuningParams(),
                link_queries=link_queries,
                requested_kind=kind,
                uid_column=column,
                evidence=evidence or {},
            )
            # counted before the rename, so that a failure leaves no folder under the final name
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise VlmError(f"{out} cannot be written: {error}; nothing was kept.") from error
    return BuildSummary(
        folder=str(out),
        kind=resolved_kind,
        parameters=written.segment.parameters,
        rows=len(source),
        dimension=source.dimension,
        bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


def _check_link_queries(queries: Float[Array, "..."], dimension: int) -> None:
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise UsageError(f"link_queries has the shape {queries.shape}; (queries, {dimension}) is needed.")
    wrong, lengths = find_non_unit_rows(to_float32(queries))
    if len(wrong):
        raise UsageError(f"link_queries[{wrong[0]}] has length {lengths[0]:.4g}; normalise all of them to 1.")


def create_index(out: Path, space: EmbeddingSpace, *, kind: str = "auto") -> None:
    """An index without rows, for `IndexWriter.add` to fill. kind: as of `build_index`, for a later compaction.

    Raises:
        UsageError: `out` exists. VlmError: the disk is full or cannot be written.
    """
    catalogue = catalogue_file(FIRST_VERSION)
    details = IndexDetails(
        space=space,
        catalogue=catalogue,
        segments=(),
        next_row=0,
        next_segment=0,
        kind=kind,
        tuning=asdict(TuningParams()),
        shards=(),
        sources=(),
    )
    manifest = Manifest(
        kind="index",
        fingerprint=compute_fingerprint(space.fingerprint, space.modality),
        generation=FIRST_VERSION,
        counts={"rows": 0, "dead": 0},
        configuration={"kind": kind},
        inputs={"model": space.fingerprint, "embeddings": ""},
        details=asdict(details),
    )
    try:
        with atomic_folder(out) as folder:
            write_catalogue(folder / catalogue, (), generation=FIRST_VERSION)
            write_manifest(folder, manifest)
    except OSError as error:
        raise VlmError(f"{out} cannot be written: {error}; nothing was kept.") from error


def build_autotuned(
    embeddings: Path,
    out: Path,
    target: TuningTarget,
    *,
    texts: Path | None = None,
    images: Path | None = None,
    kind: str = "auto",
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    uid_column: str | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> AutotunedBuild:
    """Autotune on a sample, build the index type that won, then retune and verify it on all rows.

    The recall-latency plot is written into the index folder. A finished index that misses its target is kept:
    `AutotunedBuild.check_target` raises.

    texts, images: embeddings to query with, see `autotune`; a graph gets links from those of them that recall is not
        measured with. kind: the only index type to try, or auto for all of them.
    max_rows: rows of the sample. uid_column: as of `choose_uid_column`. on_plan: called with the plan before the index
        is built, which may take long.

    Raises:
        UsageError: `out` exists, no index type meets the target, or the embeddings do not fit each other.
        VlmError: the embeddings are damaged, or the disk is full or cannot be written.
    """
    # before the trials, which may take minutes
    check_not_exists(out)
    # without checksums, which `build_index` compares before it reads all rows
    source = Embeddings.open(embeddings)
    kinds: Sequence[str] = () if kind == "auto" else (kind,)
    plan = autotune(
        source,
        Embeddings.open(texts) if texts else None,
        target,
        images=Embeddings.open(images) if images else None,
        kinds=kinds,
        max_rows=max_rows,
        seed=seed,
    )
    if on_plan is not None:
        on_plan(plan)
    summary = build_index(
        embeddings,
        out,
        kind=plan.kind,
        tuning=plan.tuning,
        link_queries=plan.link_queries,
        uid_column=uid_column,
        evidence=plan.evidence,
    )
    # not named by the manifest: no search needs it, and nobody misses it in a check
    draw_plan(plan, out / PLOT)
    # a sample misjudges effort, so it is set again on all rows
    search_params = retune(out, source, plan)
    if search_params is not None:
        retuned = search_params_dict(plan.kind, effort=search_params.effort, rerank=search_params.rerank)
        summary = replace(summary, parameters=summary.parameters | retuned)
    # opened anew, as a search would: what was written is verified, not what is in memory
    index = Index.open(out)
    try:
        verification = verify_plan(index, source, plan)
    finally:
        index.close()
    return AutotunedBuild(summary=summary, plan=plan, search_params=search_params, verification=verification)


def _write_index(
    folder: Path,
    source: Embeddings,
    kind: str,
    tuning: TuningParams,
    *,
    link_queries: Float[Array, "Q D"] | None,
    requested_kind: str,
    uid_column: str,
    evidence: dict[str, Any],
) -> WrittenSegment:
    """Write the first version of an index: segment, catalogue, and the manifest last."""
    rows = np.arange(len(source))
    catalogue = catalogue_file(FIRST_VERSION)
    files: dict[str, FileRecord] = {}
    if link_queries is not None and len(link_queries) and INDEX_TYPES[kind].is_graph:
        files = write_link_queries(folder, link_queries)
    written = write_segment(
        folder,
        0,
        iter_stored_blocks(source),
        rows,
        dimension=source.dimension,
        kind=kind,
        tuning=tuning,
        link_queries=link_queries,
    )
    written = replace(written, files=written.files | files)
    # a generator: the origins of all rows need not be in memory together
    origins = (with_uid_of(origin, uid_column) for origin in source.origins())
    write_catalogue(folder / catalogue, enumerate(origins), generation=FIRST_VERSION)
    details = IndexDetails(
        space=source.space,
        catalogue=catalogue,
        segments=(written.segment,),
        next_row=len(source),
        next_segment=1,
        kind=requested_kind,
        tuning=asdict(tuning),
        shards=tuple(source.manifest.details["shards"]),
        sources=(source.manifest.fingerprint,),
        evidence=evidence,
    )
    # last, because a folder with a manifest is complete
    write_manifest(folder, _manifest(source, written, details, uid_column))
    return written


def _manifest(source: Embeddings, written: WrittenSegment, details: IndexDetails, uid_column: str) -> Manifest:
    segment = written.segment
    return Manifest(
        kind="index",
        fingerprint=compute_fingerprint(
            source.manifest.fingerprint, segment.kind, repr(sorted(segment.parameters.items()))
        ),
        generation=FIRST_VERSION,
        counts={"rows": segment.rows, "dead": 0},
        configuration={
            "embeddings": str(source.folder.absolute()),
            "kind": segment.kind,
            UID_COLUMN: uid_column,
            **segment.parameters,
        },
        inputs={"model": source.space.fingerprint, "embeddings": source.manifest.fingerprint},
        files=written.files,
        details=asdict(details),
    )
