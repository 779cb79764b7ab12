"""From an embeddings folder to an index folder: FAISS segment, catalogue, manifest; whole or absent."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.console import say
from vlm.errors import VlmError
from vlm.files import atomic_folder, check_not_exists, compute_fingerprint
from vlm.index.ann.index_type import TuningParams
from vlm.index.ann.index_types import resolve_index_type
from vlm.index.catalog import write_catalogue
from vlm.index.embeddings import Embeddings
from vlm.index.layout import IndexDetails, catalogue_file
from vlm.index.segments import WrittenSegment, iter_stored_blocks, write_segment
from vlm.manifest import Manifest, write_manifest

_FIRST_GENERATION = 1


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """The index that was built, and how long it took."""

    folder: str
    kind: str
    parameters: dict[str, int]
    rows: int
    dimension: int
    bytes: int
    seconds: float


def build_index(
    embeddings: Path,
    out: Path,
    *,
    kind: str = "auto",
    tuning: TuningParams | None = None,
    evidence: dict[str, Any] | None = None,
) -> BuildSummary:
    """Build an index of a finished embeddings folder, whose checksums are verified on the way.

    kind: one of `kinds.KINDS`, or auto (`kinds.choose_kind`). evidence: why this kind, kept in the manifest as plain
    values. The work is done beside `out` and renamed at the end.

    Raises:
        UsageError: `out` exists, the embeddings are unfinished, or the kind does not fit them.
        VlmError: the embeddings are damaged, or the disk is full or cannot be written.
    """
    started = time.perf_counter()
    check_not_exists(out)
    source, wishes = Embeddings.open(embeddings, verify=True), tuning or TuningParams()
    chosen = resolve_index_type(kind, len(source))
    if kind != chosen:
        say(f"{len(source):,} rows: a {chosen} index.")
    try:
        with atomic_folder(out) as folder:
            written = _fill(folder, source, chosen, wishes, wanted=kind, evidence=evidence or {})
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise VlmError(f"{out} cannot be written: {error}; nothing of it was kept.") from error
    return BuildSummary(
        folder=str(out),
        kind=chosen,
        parameters=written.segment.parameters,
        rows=len(source),
        dimension=source.dimension,
        bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


def _fill(
    folder: Path, source: Embeddings, chosen: str, wishes: TuningParams, *, wanted: str, evidence: dict[str, Any]
) -> WrittenSegment:
    """Write all there is to an index of its first generation; the manifest last."""
    rows, catalogue = np.arange(len(source)), catalogue_file(_FIRST_GENERATION)
    written = write_segment(
        folder, 0, iter_stored_blocks(source), rows, dimension=source.dimension, kind=chosen, tuning=wishes
    )
    write_catalogue(folder / catalogue, enumerate(source.origins()), generation=_FIRST_GENERATION)
    details = IndexDetails(
        space=source.space,
        catalogue=catalogue,
        segments=(written.segment,),
        next_row=len(source),
        next_segment=1,
        kind=wanted,
        tuning=asdict(wishes),
        shards=tuple(source.manifest.details["shards"]),
        sources=(source.manifest.fingerprint,),
        evidence=evidence,
    )
    write_manifest(folder, _manifest(source, written, details))
    return written


def _manifest(source: Embeddings, written: WrittenSegment, details: IndexDetails) -> Manifest:
    segment = written.segment
    return Manifest(
        kind="index",
        fingerprint=compute_fingerprint(
            source.manifest.fingerprint, segment.kind, repr(sorted(segment.parameters.items()))
        ),
        generation=_FIRST_GENERATION,
        counts={"rows": segment.rows, "dead": 0},
        configuration={"embeddings": str(source.folder.absolute()), "kind": segment.kind, **segment.parameters},
        inputs={"model": source.space.fingerprint, "embeddings": source.manifest.fingerprint},
        files=written.files,
        details=asdict(details),
    )
