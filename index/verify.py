"""Verify an index folder: checksums, row joins between segments and catalogue, metadata fields, and distances."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.files import sha256_file
from vlm.index.ann.faiss_search import to_float32
from vlm.index.catalog import Catalogue
from vlm.index.embeddings_folder import find_non_unit_rows, normalize_rows
from vlm.index.index_files import IndexDetails
from vlm.index.metadata import metadata_fields
from vlm.index.reader import IndexSnapshot, check_counts, open_snapshot
from vlm.index.row_map import read_map
from vlm.index.segments import SegmentReader
from vlm.index.writer import strays
from vlm.manifest import Manifest, read_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Int64

_ROWS_AT_ONCE = 65_536
# FAISS sums float32 products in another order than numpy
_SCORE_TOLERANCE = 1e-4
_NEIGHBOURS = 10
# codes lose rows at random; an index with the wrong rows finds none
_MIN_SELF_RECALL = 0.5
_MAX_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, and in which part: files, catalogue, joins, vectors, facts, bitmaps, map, distances."""

    part: str
    what: str


@dataclass(frozen=True, kw_only=True)
class CheckReport(Result):
    """What was checked, and its faults. strays: files that the manifest does not name; the next change removes them."""

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
    """Read and check a whole index folder; nothing is changed, and a writer may work meanwhile.

    sample: number of rows whose metadata fields and distances to their neighbours are computed again.

    Raises:
        UsageError: it is not an index of this layout.
        VlmError: its manifest is damaged.
    """
    for _ in range(_MAX_TRIES):
        manifest = read_manifest(folder, "index")
        report = _check(folder, manifest, sample=sample, seed=seed)
        # a change may have removed what was being read
        if not report.faults or read_manifest(folder, "index") == manifest:
            return report
    raise VlmError(f"{folder} changed {_MAX_TRIES} times while it was checked; check it while there is no writer.")


def _check(folder: Path, manifest: Manifest, *, sample: int, seed: int) -> CheckReport:
    details = IndexDetails.from_manifest(manifest, folder)
    faults = _faults("files", _file_faults(folder, manifest))
    faults += _faults("catalogue", _catalogue_faults(folder / details.catalogue))
    num_compared = 0
    # contents are compared only if they can be read
    if not faults:
        try:
            snapshot = open_snapshot(folder)
            check_counts(snapshot)
        except VlmError as error:
            faults.append(Fault(part="joins", what=str(error)))
        else:
            num_compared = min(sample, sum(len(view.segment) for view in snapshot.views))
            faults += _content_faults(snapshot, np.random.default_rng(seed), sample)
            snapshot.catalogue.close()
    return CheckReport(
        folder=str(folder),
        generation=manifest.generation,
        files=len(manifest.files) + 1,  # and the manifest
        rows=manifest.counts["rows"],
        dead=manifest.counts["dead"],
        segments=len(details.segments),
        distances=num_compared,
        strays=tuple(str(path.relative_to(folder)) for path in strays(folder, manifest, details)),
        faults=tuple(faults),
    )


def _faults(part: str, messages: Iterable[str]) -> list[Fault]:
    return [Fault(part=part, what=message) for message in messages]


def _file_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != record.bytes:
            yield f"{name} has {size:,} bytes, {record.bytes:,} were written"
        elif sha256_file(path) != record.sha256:
            yield f"{name} has a different checksum than it was written with"


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
    faults = _faults("joins", _join_faults(snapshot))
    faults += _faults("facts", _metadata_faults(snapshot, rng, sample))
    faults += _faults("bitmaps", snapshot.catalogue.bitmap_faults())
    faults += _faults("map", _map_faults(snapshot))
    num_stored = sum(len(view.segment) for view in snapshot.views)
    for view in snapshot.views:
        segment = view.segment
        faults += _faults("vectors", _vector_faults(segment))
        num_sampled = max(1, round(sample * len(segment) / num_stored))
        positions = np.sort(rng.permutation(len(segment))[:num_sampled])
        faults += _faults("distances", _distance_faults(segment, positions))
    return faults


def _join_faults(snapshot: IndexSnapshot) -> Iterator[str]:
    stored = np.concatenate([np.zeros(0, np.int64), *(view.segment.rows for view in snapshot.views)])
    if not (np.diff(stored) > 0).all():
        yield "the rows of the segments do not ascend: two segments may have the same row"
    if len(np.setdiff1d(snapshot.dead, stored)):
        yield "a tombstone is for a row that no segment has"
    listed = snapshot.catalogue.rows()
    not_listed = np.setdiff1d(snapshot.rows, listed)
    if len(not_listed):
        yield f"row {not_listed[0]:,} ({len(not_listed):,} such) is in a segment, but not in the catalogue"
    not_stored = np.setdiff1d(listed, snapshot.rows)
    if len(not_stored):
        yield f"row {not_stored[0]:,} ({len(not_stored):,} such) is in the catalogue, but in no segment"
    if len(stored) and stored.max() >= snapshot.details.next_row:
        yield f"row {stored.max():,} exists and would be used again: the next is {snapshot.details.next_row:,}"


def _metadata_faults(snapshot: IndexSnapshot, rng: np.random.Generator, sample: int) -> Iterator[str]:
    rows = np.sort(rng.permutation(snapshot.rows)[:sample]).tolist()
    fields = snapshot.catalogue.metadata_fields(rows)
    for entry in snapshot.catalogue.entries(rows):
        if fields[entry.row] != set(metadata_fields(entry)):
            yield f"the facts of row {entry.row:,} ({entry.uid}) are not those of its metadata"


def _map_faults(snapshot: IndexSnapshot) -> Iterator[str]:
    record = snapshot.details.map
    if record is None:
        return
    try:
        rows, places = read_map(snapshot.folder, record)
    except VlmError as error:
        yield str(error)
        return
    if not (np.diff(rows) > 0).all():
        yield f"{record.file}: the rows do not ascend"
    if len(rows) and rows.max() >= snapshot.details.next_row:
        yield f"{record.file}: row {rows.max():,} has a place, but no such row was ever inserted"
    if not np.isfinite(places).all():
        yield f"{record.file}: a place is not a finite number"


def _vector_faults(segment: SegmentReader) -> Iterator[str]:
    for first in range(0, len(segment), _ROWS_AT_ONCE):
        wrong, lengths = find_non_unit_rows(to_float32(segment.vectors.stored[first : first + _ROWS_AT_ONCE]))
        if len(wrong):
            yield f"{segment.meta.vectors_file}: row {first + wrong[0]:,} has length {lengths[0]:.4g}"


def _distance_faults(segment: SegmentReader, positions: Int64[Array, " N"]) -> Iterator[str]:
    """FAISS's scores against the cosines of the stored rows; of codes only whether a row finds itself."""
    meta = segment.meta
    queries = normalize_rows(segment.vectors.stored[positions])
    top = min(len(segment), _NEIGHBOURS * max(1, meta.rerank))
    scores, neighbours = segment.faiss_search(queries, top)
    # scores of codes are approximate, but a row should be among the nearest to itself
    if meta.rerank:
        share = float((neighbours == positions[:, None]).any(axis=1).mean())
        if share < _MIN_SELF_RECALL:
            yield f"{meta.index_file}: only {share:.0%} of {len(positions):,} rows find themselves"
        return
    for number, query in enumerate(queries):
        is_found = neighbours[number] >= 0
        cosines = segment.vectors.take(neighbours[number, is_found]) @ query
        error = np.abs(cosines - scores[number, is_found]).max(initial=0.0)
        if error > _SCORE_TOLERANCE:
            row = segment.rows[positions[number]]
            yield f"{meta.index_file}: a score of row {row:,} is off by {error:.2g} from the cosine of its vectors"
            return
