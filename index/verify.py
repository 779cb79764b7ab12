"""Whether an index folder is as it was written and holds together: files, joins, counts, facts and distances."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.files import sha256_file
from vlm.index.ann.faiss_search import to_float32
from vlm.index.catalog import Catalogue
from vlm.index.embeddings import find_non_unit_rows, normalize_rows
from vlm.index.layout import IndexDetails
from vlm.index.metadata import metadata_fields
from vlm.index.reader import IndexSnapshot, open_snapshot
from vlm.index.segments import SegmentReader
from vlm.index.writer import strays
from vlm.manifest import Manifest, read_manifest
from vlm.tensors import Array, Int64

_ROWS_AT_ONCE = 65_536
# FAISS sums float32 products in another order than numpy
_SCORE_TOLERANCE = 1e-4
_NEIGHBOURS = 10
# codes lose rows at random; an index whose rows are exchanged finds none
_LEAST_FOUND = 0.5
_MAX_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, and where it was found: files, catalogue, joins, vectors, facts or distances."""

    part: str
    what: str


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was looked at and what was found; strays are files that no manifest names (the next change removes them)."""

    folder: str
    generation: int
    files: int
    rows: int
    dead: int
    segments: int
    distances: int
    strays: tuple[str, ...]
    faults: tuple[Fault, ...]


def check_index(folder: Path, *, sample: int = 1000, seed: int = 0) -> CheckReport:
    """Read all of an index folder and compare; nothing is changed, and a writer may go on meanwhile.

    sample: of how many rows the facts are made again and the distances to their neighbours computed anew.

    Raises:
        UsageError: it is no index of this layout.
        VlmError: its manifest is damaged.
    """
    for _ in range(_MAX_TRIES):
        manifest = read_manifest(folder, "index")
        report = _check(folder, manifest, sample=sample, seed=seed)
        # a change may have put away what was being read
        if not report.faults or read_manifest(folder, "index") == manifest:
            return report
    raise VlmError(f"{folder} changed {_MAX_TRIES} times while it was checked; check it while nobody writes.")


def _check(folder: Path, manifest: Manifest, *, sample: int, seed: int) -> CheckReport:
    details = IndexDetails.from_manifest(manifest, folder)
    faults = [Fault(part="files", what=what) for what in _file_faults(folder, manifest)]
    faults += [Fault(part="catalogue", what=what) for what in _catalogue_faults(folder / details.catalogue)]
    num_compared = 0
    if not faults:
        try:
            snapshot = open_snapshot(folder)
        except VlmError as error:
            faults.append(Fault(part="joins", what=str(error)))
        else:
            num_compared = min(sample, sum(len(view.segment) for view in snapshot.views))
            faults += _content_faults(snapshot, np.random.default_rng(seed), sample)
            snapshot.catalogue.close()
    return CheckReport(
        folder=str(folder),
        generation=manifest.generation,
        files=len(manifest.files) + 1,
        rows=manifest.counts["rows"],
        dead=manifest.counts["dead"],
        segments=len(details.segments),
        distances=num_compared,
        strays=tuple(str(path.relative_to(folder)) for path in strays(folder, manifest, details)),
        faults=tuple(faults),
    )


def _file_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != record.bytes:
            yield f"{name} has {size:,} bytes, {record.bytes:,} were written"
        elif sha256_file(path) != record.sha256:
            yield f"{name} has another checksum than it was written with"


def _catalogue_faults(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} is missing"
        return
    try:
        catalogue = Catalogue(path)
        yield from catalogue.faults()
        catalogue.close()
    except VlmError as error:
        yield str(error)


def _content_faults(snapshot: IndexSnapshot, rng: np.random.Generator, sample: int) -> list[Fault]:
    faults = [Fault(part="joins", what=what) for what in _join_faults(snapshot)]
    faults += [Fault(part="facts", what=what) for what in _metadata_faults(snapshot, rng, sample)]
    stored = sum(len(view.segment) for view in snapshot.views)
    for view in snapshot.views:
        segment = view.segment
        faults += [Fault(part="vectors", what=what) for what in _vector_faults(segment)]
        drawn = rng.permutation(len(segment))[: max(1, round(sample * len(segment) / stored))]
        faults += [Fault(part="distances", what=what) for what in _distance_faults(segment, np.sort(drawn))]
    return faults


def _join_faults(snapshot: IndexSnapshot) -> Iterator[str]:
    stored = np.concatenate([np.zeros(0, np.int64), *(view.segment.rows for view in snapshot.views)])
    if not (np.diff(stored) > 0).all():
        yield "the rows of the segments do not rise: two segments may have the same row"
    if len(np.setdiff1d(snapshot.dead, stored)):
        yield "a tombstone is for a row that no segment has"
    listed = snapshot.catalogue.rows()
    for what, rows in (
        ("is in a segment, but not in the catalogue", np.setdiff1d(snapshot.rows, listed)),
        ("is in the catalogue, but in no segment", np.setdiff1d(listed, snapshot.rows)),
    ):
        if len(rows):
            yield f"row {rows[0]:,} ({len(rows):,} such) {what}"
    if len(stored) and stored.max() >= snapshot.details.next_row:
        yield f"row {stored.max():,} is there, and would be given again: the next is {snapshot.details.next_row:,}"


def _metadata_faults(snapshot: IndexSnapshot, rng: np.random.Generator, sample: int) -> Iterator[str]:
    drawn = np.sort(rng.permutation(snapshot.rows)[:sample]).tolist()
    kept = snapshot.catalogue.metadata_fields(drawn)
    for entry in snapshot.catalogue.entries(drawn):
        if kept[entry.row] != set(metadata_fields(entry)):
            yield f"the facts of row {entry.row:,} ({entry.uid}) are not those of its metadata"


def _vector_faults(segment: SegmentReader) -> Iterator[str]:
    for first in range(0, len(segment), _ROWS_AT_ONCE):
        wrong, lengths = find_non_unit_rows(to_float32(segment.vectors.stored[first : first + _ROWS_AT_ONCE]))
        if len(wrong):
            yield f"{segment.meta.vectors_file}: row {first + wrong[0]:,} has length {lengths[0]:.4g}"


def _distance_faults(segment: SegmentReader, positions: Int64[Array, " N"]) -> Iterator[str]:
    """FAISS's scores against the cosines of the stored rows; codes are only asked whether a row finds itself."""
    meta = segment.meta
    queries = normalize_rows(segment.vectors.stored[positions])
    top = min(len(segment), _NEIGHBOURS * max(1, meta.rerank))
    scores, found = segment.index.search(queries, top)
    if meta.rerank:
        share = float((found == positions[:, None]).any(axis=1).mean())
        if share < _LEAST_FOUND:
            yield f"{meta.index_file}: only {share:.0%} of {len(positions):,} rows find themselves"
        return
    for number, query in enumerate(queries):
        there = found[number] >= 0
        cosines = segment.vectors.take(found[number, there]) @ query
        off = np.abs(cosines - scores[number, there]).max(initial=0.0)
        if off > _SCORE_TOLERANCE:
            row = segment.rows[positions[number]]
            yield f"{meta.index_file}: a score of row {row:,} is off by {off:.2g} from the cosine of its vectors"
            return
