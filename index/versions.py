"""Versions of an index folder: how the next one is prepared and committed, what is rolled back, and what is kept.

A commit keeps the version before: its manifest as `versions/G.json`, and the files it names, until the next commit.
`rollback` brings its rows back as a new version, so that readers only ever move forward.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm import __version__
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write, compute_fingerprint, write_bytes
from vlm.index.ann.index_types import search_params_dict
from vlm.index.catalog import has_uncommitted_changes, roll_back_catalogue
from vlm.index.embeddings_folder import check_files, sorted_checksums
from vlm.index.index_files import (
    MAPS,
    SEGMENTS,
    TOMBSTONES,
    VERSIONS,
    FailPoint,
    IndexDetails,
    MapRecord,
    catalogue_file,
    no_failpoint,
    read_previous,
    tombstones_file,
    version_file,
)
from vlm.index.reader import IndexSnapshot
from vlm.index.segments import SegmentReader, WrittenSegment
from vlm.manifest import MANIFEST, FileRecord, Manifest, read_manifest, record_file, write_manifest
from vlm.tensor_types import Array, Int64


def drop_dead_segments(
    segments: Iterable[SegmentReader], dead: Int64[Array, " N"]
) -> tuple[list[SegmentReader], Int64[Array, " M"]]:
    """The segments that hold a live row, and the deleted rows (sorted) that these hold."""
    live_segments = []
    remaining_dead = [np.zeros(0, np.int64)]
    for segment in segments:
        positions = segment.positions_of(dead)
        # one without a live row would only be opened and skipped
        if len(positions) < len(segment):
            live_segments.append(segment)
            remaining_dead.append(segment.rows[positions])
    return live_segments, np.concatenate(remaining_dead)


def roll_back_unfinished(folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
    """Roll a folder back to its manifest's version; only for the holder of the writer's lock.

    It may be killed and repeated. Readers notice nothing, for no manifest names what is removed.

    Raises:
        VlmError: the catalogue is damaged or the disk is full.
    """
    manifest = read_manifest(folder, "index")
    details = IndexDetails.from_manifest(manifest, folder)
    if has_uncommitted_changes(folder / details.catalogue, generation=manifest.generation):
        failpoint("rolling back the catalogue")
        roll_back_catalogue(folder / details.catalogue, generation=manifest.generation)
    remove_orphans(folder, manifest, details, failpoint=failpoint)


def remove_orphans(
    folder: Path, manifest: Manifest, details: IndexDetails, *, failpoint: FailPoint = no_failpoint
) -> None:
    """Remove the strays; a reader that has one open keeps it."""
    for path in strays(folder, manifest, details):
        failpoint(f"removing {path.name}")
        path.unlink(missing_ok=True)


def discard_previous(folder: Path, manifest: Manifest, details: IndexDetails, *, failpoint: FailPoint) -> None:
    """Remove the version before, which cannot be rolled back to then."""
    failpoint("discarding the version before")
    # first: without it the files are strays, which the next writer removes if this one is killed
    (folder / version_file(manifest.generation - 1)).unlink(missing_ok=True)
    remove_orphans(folder, manifest, details, failpoint=failpoint)


def strays(folder: Path, manifest: Manifest, details: IndexDetails) -> list[Path]:
    """Files that neither the manifest nor the version before names: older ones, and those that were not committed."""
    # SQLite needs the journal of the current catalogue to roll it back
    known = {folder / name for name in (*manifest.files, details.catalogue, f"{details.catalogue}-journal")}
    # a damaged record of the version before cannot be rolled back to, so what it names is of no use
    with suppress(VlmError):
        if previous := read_previous(folder, manifest):
            names = (*previous.files, previous.details["catalogue"], version_file(previous.generation))
            known.update(map(folder.joinpath, names))
    patterns = (
        f"{SEGMENTS}/*",
        f"{TOMBSTONES}/*",
        f"{VERSIONS}/*",
        f"{MAPS}/*",
        "catalogue-*",
        ".manifest.json.*.part",
    )
    matches: set[Path] = set()
    for pattern in patterns:
        matches.update(folder.glob(pattern))
    return sorted(matches - known)


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingVersion:
    """The next version, before its commit.

    manifest: complete but for the record of the tombstones' file. dead: deleted rows its segments hold, sorted.
    """

    manifest: Manifest
    details: IndexDetails
    dead: Int64[Array, " N"]

    @property
    def number(self) -> int:
        """The version's number."""
        return self.manifest.generation


def prepare_version(
    snapshot: IndexSnapshot,
    *,
    what: str,
    keep: int,
    written: WrittenSegment | None,
    deleted_rows: Int64[Array, " N"],
    **details: Any,
) -> PendingVersion:
    """The version after a snapshot.

    Args:
        what: the kind of change, part of the fingerprint.
        keep: how many of the first segments stay; the others were merged into the new one, or are gone.
        written: the new segment, which comes last.
        deleted_rows: rows that this change deletes, sorted.
        details: what else of the index's details changes.
    """
    kept_segments, dead = drop_dead_segments(
        [view.segment for view in snapshot.views[:keep]], np.union1d(snapshot.dead, deleted_rows)
    )
    segments = [segment.meta for segment in kept_segments]
    files: dict[str, FileRecord] = {}
    for segment in segments:
        for name in segment.files:
            files[name] = snapshot.manifest.files[name]
    next_segment = snapshot.details.next_segment
    if written:
        segments.append(written.segment)
        files |= written.files
        next_segment = written.segment.number + 1
    # rows keep their numbers, so the map fits every later version; a row that it lacks is placed when it is read
    if current_map := snapshot.details.map:
        files[current_map.file] = snapshot.manifest.files[current_map.file]

    number = snapshot.number + 1
    # tombstones are rewritten each time: a reader of the old version still has the old file
    changed = replace(
        snapshot.details,
        segments=tuple(segments),
        next_segment=next_segment,
        tombstones=tombstones_file(number) if len(dead) else "",
        **details,
    )
    # the fingerprint chains all changes since the build, so equal fingerprints mean equal contents
    manifest = replace(
        snapshot.manifest,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, what, dead.tobytes(), *sorted_checksums(files)),
        generation=number,
        counts={"rows": sum(segment.rows for segment in segments) - len(dead), "dead": len(dead)},
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        # empty ones are filled in as the manifest is written
        made_at="",
        command="",
    )
    return PendingVersion(manifest=manifest, details=changed, dead=dead)


def with_search_params(pending: PendingVersion, *, effort: int | None, rerank: int) -> PendingVersion:
    """The same with other search parameters of its largest segment, which a compaction will use too."""
    segments = list(pending.details.segments)
    number = max(range(len(segments)), key=lambda number: segments[number].rows)
    largest = segments[number]
    search_params = search_params_dict(largest.kind, effort=effort, rerank=rerank)
    segments[number] = replace(largest, parameters=largest.parameters | search_params, rerank=rerank)
    changed = replace(pending.details, segments=tuple(segments), tuning=pending.details.tuning | search_params)
    return replace(pending, details=changed, manifest=replace(pending.manifest, details=asdict(changed)))


def with_map(pending: PendingVersion, record: MapRecord, file: FileRecord) -> PendingVersion:
    """The same with another map, or its first."""
    files = {name: other for name, other in pending.manifest.files.items() if not name.startswith(f"{MAPS}/")}
    changed = replace(pending.details, map=record)
    manifest = replace(
        pending.manifest,
        fingerprint=compute_fingerprint(pending.manifest.fingerprint, file.sha256),
        files=files | {record.file: file},
        details=asdict(changed),
    )
    return replace(pending, details=changed, manifest=manifest)


def version_to_restore(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of the version before, whose files are checked.

    Raises:
        UsageError: it was not kept. VlmError: it is damaged.
    """
    previous = read_previous(folder, manifest)
    if previous is None:
        why = "nothing has changed since it was built" if manifest.generation == 1 else "its last change kept none"
        raise UsageError(f"{folder} has no version before {manifest.generation} to roll back to: {why}.")
    check_files(folder, previous.files, verify=True, cure="that version cannot be restored")
    if not (folder / previous.details["catalogue"]).is_file():
        raise VlmError(f"{folder / previous.details['catalogue']} is missing; that version cannot be restored.")
    return previous


def restored_version(snapshot: IndexSnapshot, previous: Manifest, *, next_row: int) -> PendingVersion:
    """The version after a snapshot, with the rows of an earlier one; its catalogue is still to be written.

    next_row: a row number that was never used.
    """
    number = snapshot.number + 1
    earlier = IndexDetails.from_manifest(previous, snapshot.folder)
    dead = np.zeros(0, np.int64)
    files = dict(previous.files)
    # under the name of the new version, as each version has its own
    if earlier.tombstones:
        dead = np.load(snapshot.folder / earlier.tombstones, allow_pickle=False)
        del files[earlier.tombstones]
    changed = replace(
        earlier,
        catalogue=catalogue_file(number),
        tombstones=tombstones_file(number) if len(dead) else "",
        next_row=next_row,
        # goes on counting: the version that is undone is kept, and its files lie under their numbers
        next_segment=snapshot.details.next_segment,
    )
    manifest = replace(
        previous,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, "rollback", previous.fingerprint),
        generation=number,
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    return PendingVersion(manifest=manifest, details=changed, dead=dead)


def commit(
    folder: Path,
    pending: PendingVersion,
    update_catalogue: Callable[[], None],
    *,
    keep_previous: bool = True,
    failpoint: FailPoint,
) -> None:
    """Write the tombstones, change the catalogue, and replace the manifest: only the last of these commits.

    keep_previous: keep the version before for a rollback, until the next commit.
    """
    files = dict(pending.manifest.files)
    # an orphan until the manifest names it: a crash before that leaves nothing to undo
    if len(pending.dead):
        path = folder / pending.details.tombstones
        path.parent.mkdir(exist_ok=True)
        failpoint("tombstones")
        with atomic_write(path) as file:
            np.save(file, pending.dead, allow_pickle=False)
            failpoint("tombstones before their rename")
        files[pending.details.tombstones] = record_file(path)
    failpoint("catalogue")
    update_catalogue()
    # a stray until the new manifest is there, because it is not of the version before the present one
    if keep_previous:
        path = folder / version_file(pending.number - 1)
        path.parent.mkdir(exist_ok=True)
        failpoint("record of the version before")
        write_bytes(path, (folder / MANIFEST).read_bytes())
    # from here on the change counts
    failpoint("manifest")
    write_manifest(folder, replace(pending.manifest, files=files))
    failpoint("manifest written")
