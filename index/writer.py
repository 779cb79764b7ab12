"""Changes of an index folder: each makes one new generation, whole or not at all, while readers go on.

Order of a change: files of new names; the catalogue's transaction, whose rows no reader of the old generation sees;
the manifest, which is the commit; then the files nobody names any more are unlinked. Killed in between, the next
writer takes back what the manifest does not know (`recovery.py`).

One writer at a time: a lock on a file of the index folder, which ends with the process that holds it.

What a change of an index brings, and what it did.

Which segments are written anew, and what of the others is dead.

What a killed writer left behind is taken back or removed, so that the folder is again what its manifest says.

The step from one generation to the next: drafted from the one before, then committed by its manifest.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, compress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlm import __version__
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write, compute_fingerprint
from vlm.index.ann.index_type import TuningParams
from vlm.index.ann.index_types import resolve_index_type, search_params_dict
from vlm.index.catalog import copy_catalogue, has_uncommitted_changes, max_row, roll_back_catalogue, update_catalogue
from vlm.index.embeddings import Embeddings, EmbeddingSpace, Origin
from vlm.index.layout import (
    SEGMENTS,
    TOMBSTONES,
    FailPoint,
    IndexDetails,
    catalogue_file,
    no_failpoint,
    tombstones_file,
)
from vlm.index.reader import IndexSnapshot, open_snapshot
from vlm.index.segments import SegmentReader, SegmentView, WrittenSegment, iter_stored_blocks, write_segment
from vlm.manifest import Manifest, read_manifest, record_file, write_manifest
from vlm.tensors import Array, Bool, Float, Int64

logger = logging.getLogger(__name__)

LOCK = "writer.lock"


class WriterLock:
    """Held from its making until `release`.

    Raises:
        UsageError: another writer holds it; its process is named.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise UsageError(
                f"{folder} is being changed by another process ({holder or 'unknown'}); wait until it has finished, "
                "or end it: what it had not finished is then taken back."
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others write; the file stays."""
        os.close(self._descriptor)


@dataclass(frozen=True, kw_only=True)
class InsertBatch:
    """Rows to come in: as many vectors as origins, in the same order; both can be asked for several times.

    source: fingerprint of where they are from. shards: addresses of their tars.
    """

    space: EmbeddingSpace
    count: int
    source: str
    shards: tuple[str, ...]
    blocks: Callable[[], Iterable[Float[Array, "_ D"]]]
    origins: Callable[[], Iterable[Origin]]

    @classmethod
    def from_folder(cls, folder: Path) -> "InsertBatch":
        """The rows of a finished embeddings folder, whose checksums are verified.

        Raises:
            UsageError: it is unfinished or of another kind.
            VlmError: it is damaged.
        """
        source = Embeddings.open(folder, verify=True)
        return cls(
            space=source.space,
            count=len(source),
            source=source.manifest.fingerprint,
            shards=tuple(source.manifest.details["shards"]),
            blocks=lambda: iter_stored_blocks(source),
            origins=source.origins,
        )

    def uids(self) -> Iterator[str]:
        """The name of each row.

        Raises:
            VlmError: two rows have the same.
        """
        seen: set[str] = set()
        for origin in self.origins():
            if origin.uid in seen:
                raise VlmError(f"Two of the new rows have the same uid {origin.uid!r}; embed again with distinct keys.")
            seen.add(origin.uid)
            yield origin.uid

    def select(self, uids: Container[str]) -> "InsertBatch":
        """Those of these names."""
        keep = np.fromiter((origin.uid in uids for origin in self.origins()), bool, self.count)
        return replace(
            self,
            count=int(keep.sum()),
            blocks=lambda: _filter_blocks(self.blocks(), keep),
            origins=lambda: compress(self.origins(), keep),
        )

    def check_compatible_space(self, space: EmbeddingSpace, folder: Path) -> None:
        """Refuse rows that cannot be compared with those of an index.

        Raises:
            UsageError: they are of another model, modality or dimension.
        """
        if self.space.fingerprint != space.fingerprint:
            raise UsageError(
                f"{folder} was embedded by {space.model} (fingerprint {space.fingerprint}), the new rows by "
                f"{self.space.model} (fingerprint {self.space.fingerprint}), and their vectors cannot be compared. "
                f"Embed the new shards with {space.model}."
            )
        if (self.space.modality, self.space.dimension) != (space.modality, space.dimension):
            raise UsageError(
                f"{folder} holds {space.modality} embeddings of {space.dimension} dimensions, the new rows are "
                f"{self.space.modality} embeddings of {self.space.dimension}; make an index of their own of them."
            )


def _filter_blocks(blocks: Iterable[Float[Array, "_ D"]], keep: Bool[Array, " N"]) -> Iterator[Float[Array, "_ D"]]:
    """The rows to keep, block by block."""
    first = 0
    for block in blocks:
        yield block[keep[first : first + len(block)]]
        first += len(block)


@dataclass(frozen=True, kw_only=True)
class CommitInfo:
    """What a change did: the generation it made, and how many rows there are now.

    added: rows that were not there. replaced: those whose uid was there. removed: those deleted.
    left_out: new rows whose uid no row has that an update's filter chooses.
    dead: rows that searches leave out until `compact`.
    """

    generation: int
    rows: int
    segments: int
    dead: int
    added: int = 0
    replaced: int = 0
    removed: int = 0
    left_out: int = 0
    seconds: float = 0.0


_ROWS_AT_ONCE = 65_536


def num_segments_to_merge(views: Sequence[SegmentView], new_rows: int) -> int:
    """How many of the last segments are merged with new rows: the flat ones that are no larger than what has come
    together behind them.

    A row is so written about log2(N) times in all, and about log2(N) segments are ever open, as in a binary counter
    (O'Neil et al. 1996, the log-structured merge tree, with a factor of 2).
    """
    number, gathered = 0, new_rows
    for last in reversed(views):
        if last.segment.meta.kind != "flat" or last.count > gathered:
            break
        number, gathered = number + 1, gathered + last.count
    return number


def iter_live_blocks(view: SegmentView) -> Iterator[Float[Array, "_ D"]]:
    """The chosen rows of a segment as they are stored, float16."""
    for first in range(0, view.count, _ROWS_AT_ONCE):
        yield view.segment.vectors.stored[view.positions[first : first + _ROWS_AT_ONCE]]


def drop_dead_segments(
    segments: Iterable[SegmentReader], dead: Int64[Array, " N"]
) -> tuple[list[SegmentReader], Int64[Array, " M"]]:
    """The segments in which something lives, and those of the dead rows (sorted) that lie in them."""
    kept, remaining = [], [np.zeros(0, np.int64)]
    for segment in segments:
        positions = segment.positions_of(dead)
        if len(positions) < len(segment):
            kept.append(segment)
            remaining.append(segment.rows[positions])
    return kept, np.concatenate(remaining)


def roll_back_unfinished(folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
    """Bring a folder back to its manifest's generation; only for the one who holds the writer's lock.

    May be killed and repeated. Readers notice nothing: what is removed no newer manifest names.

    Raises:
        VlmError: the catalogue is damaged or the disk is full.
    """
    manifest = read_manifest(folder, "index")
    details = IndexDetails.from_manifest(manifest, folder)
    if has_uncommitted_changes(folder / details.catalogue, generation=manifest.generation):
        failpoint("taking back the catalogue")
        roll_back_catalogue(folder / details.catalogue, generation=manifest.generation)
    remove_orphans(folder, manifest, details, failpoint=failpoint)


def remove_orphans(
    folder: Path, manifest: Manifest, details: IndexDetails, *, failpoint: FailPoint = no_failpoint
) -> None:
    """Unlink the strays; who has one of them open keeps it."""
    for path in strays(folder, manifest, details):
        failpoint(f"removing {path.name}")
        path.unlink(missing_ok=True)


def strays(folder: Path, manifest: Manifest, details: IndexDetails) -> list[Path]:
    """Files of the index that its manifest does not name: of an older generation, or of one that was never finished."""
    named = {folder / name for name in (*manifest.files, details.catalogue)}
    journal = folder / f"{details.catalogue}-journal"
    inside = [path for name in (SEGMENTS, TOMBSTONES) if (folder / name).is_dir() for path in (folder / name).iterdir()]
    beside = [path for pattern in ("catalogue-*", ".manifest.json.*.part") for path in folder.glob(pattern)]
    return sorted(path for path in (*inside, *beside) if path not in named and path != journal)


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingVersion:
    """The next generation.

    manifest: all but the line of its tombstones' file. dead: rows of its segments that are dead, sorted.
    """

    manifest: Manifest
    details: IndexDetails
    dead: Int64[Array, " N"]

    @property
    def number(self) -> int:
        """The generation's number."""
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
    """The generation after `now`.

    Args:
        what: the kind of change, part of the fingerprint.
        keep: how many of the first segments stay; all others were written anew, or are gone.
        written: the new segment, after those kept.
        dying: rows that die, sorted.
        details: what else changes in them.
    """
    dead = np.union1d(snapshot.dead, deleted_rows)
    kept, dead = drop_dead_segments([view.segment for view in snapshot.views[:keep]], dead)
    segments = [segment.meta for segment in kept] + ([written.segment] if written else [])
    files = {name: snapshot.manifest.files[name] for segment in kept for name in segment.meta.files}
    files |= written.files if written else {}
    number = snapshot.number + 1
    changed = replace(
        snapshot.details,
        segments=tuple(segments),
        next_segment=written.segment.number + 1 if written else snapshot.details.next_segment,
        tombstones=tombstones_file(number) if len(dead) else "",
        **details,
    )
    checksums = [files[name].sha256 for name in sorted(files)]
    manifest = replace(
        snapshot.manifest,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, what, dead.tobytes(), *checksums),
        generation=number,
        counts={"rows": sum(segment.rows for segment in segments) - len(dead), "dead": len(dead)},
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    return PendingVersion(manifest=manifest, details=changed, dead=dead)


def with_search_params(pending: PendingVersion, *, effort: int | None, rerank: int) -> PendingVersion:
    """The same, with another effort and re-ranking of its largest segment, also when it is compacted."""
    largest = max(pending.details.segments, key=lambda segment: segment.rows)
    told = search_params_dict(largest.kind, effort=effort, rerank=rerank)
    changed = replace(
        pending.details,
        segments=tuple(
            replace(segment, parameters=segment.parameters | told, rerank=rerank) if segment is largest else segment
            for segment in pending.details.segments
        ),
        tuning=pending.details.tuning | told,
    )
    return replace(pending, details=changed, manifest=replace(pending.manifest, details=asdict(changed)))


def commit(
    folder: Path, pending: PendingVersion, update_catalogue: Callable[[], None], *, failpoint: FailPoint
) -> None:
    """Write the tombstones, change the catalogue, and replace the manifest: only the last of these counts."""
    files = dict(pending.manifest.files)
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
    failpoint("manifest")
    write_manifest(folder, replace(pending.manifest, files=files))
    failpoint("manifest written")


_NO_ROWS = np.zeros(0, np.int64)


class IndexWriter:
    """The one writer of an index folder, until `close`; what an earlier one left unfinished is taken back first.

    reached: is told before each step that changes the folder.

    Raises:
        UsageError: there is another writer, or no index of this layout.
        VlmError: the index is damaged.
    """

    def __init__(self, folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
        IndexDetails.from_manifest(read_manifest(folder, "index"), folder)
        self.folder, self._failpoint, self._needs_rollback = folder, failpoint, False
        self._lock = WriterLock(folder)
        try:
            roll_back_unfinished(folder, failpoint=failpoint)
            self.snapshot = open_snapshot(folder)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and the files."""
        self.snapshot.catalogue.close()
        self._lock.release()

    def add(self, batch: InsertBatch) -> CommitInfo:
        """Rows that were not there, as a flat segment; small flat ones before it are merged with it.

        Raises:
            UsageError: they are of another model, or a uid is there already.
            VlmError: two of them have the same uid, or a vector is not of unit length.
        """
        return self._insert(batch, is_upsert=False)

    def update(self, batch: InsertBatch, *, allowed_rows: Int64[Array, " N"] | None = None) -> CommitInfo:
        """As `add`, but a row whose uid is there takes the place of the one that has it.

        among: only these rows (as `Catalogue.where` gives them) are replaced; new rows of other uids are left out.
        """
        return self._insert(batch, is_upsert=True, allowed_rows=allowed_rows)

    def delete(self, uids: Sequence[str]) -> CommitInfo:
        """The rows of these uids die.

        Raises:
            UsageError: one of them is not there; nothing is deleted.
        """
        rows = self.snapshot.catalogue.rows_by_uid(uids)
        unknown = [uid for uid in uids if uid not in rows]
        if unknown:
            raise UsageError(
                f"{self.folder} has no {unknown[0]!r} ({len(unknown):,} of {len(uids):,} uids are not there); nothing "
                "was deleted: leave them out."
            )
        return self.delete_rows(np.unique(np.array(list(rows.values()), np.int64)))

    def delete_rows(self, rows: Int64[Array, " N"]) -> CommitInfo:
        """The living of these rows (sorted, as `Catalogue.where` gives them) die; nothing changes if there is none."""
        started, snapshot = time.perf_counter(), self.snapshot
        deleted_rows = np.intersect1d(rows, snapshot.rows, assume_unique=True)
        if len(deleted_rows):
            with self._rolling_back_on_error():
                pending = prepare_version(
                    snapshot, what="delete", keep=len(snapshot.views), written=None, deleted_rows=deleted_rows
                )
                self._commit(pending, lambda: self._change_catalogue(pending, deleted_rows))
        return self._commit_info(started, removed=len(deleted_rows))

    def compact(self, *, kind: str = "", tuning: TuningParams | None = None) -> CommitInfo:
        """All living rows into one segment, trained anew, and into a catalogue without the dead.

        kind, tuning: as for `build_index`; left out, those the index was built with, or flat where they no longer fit.

        Raises:
            UsageError: there is no such kind, or it does not fit the rows.
        """
        started, snapshot = time.perf_counter(), self.snapshot
        if not kind and tuning is None and self._is_compact():
            return self._commit_info(started)
        wishes = {
            "kind": kind or snapshot.details.kind,
            "tuning": asdict(tuning) if tuning else snapshot.details.tuning,
        }
        with self._rolling_back_on_error():
            written = (
                self._write_compacted(kind, tuning or TuningParams(**snapshot.details.tuning))
                if len(snapshot)
                else None
            )
            catalogue = catalogue_file(snapshot.number + 1)
            next_row = max(snapshot.details.next_row, max_row(snapshot.catalogue.path) + 1)
            details = wishes | {"catalogue": catalogue, "next_row": next_row}
            pending = prepare_version(
                snapshot, what="compact", keep=0, written=written, deleted_rows=_NO_ROWS, **details
            )
            self._commit(pending, lambda: self._rewrite_catalogue(pending))
        return self._commit_info(started)

    def set_search_params(self, *, effort: int | None, rerank: int) -> CommitInfo:
        """The largest segment is searched with another effort (nprobe, ef_search) and re-ranking from now on."""
        started, snapshot = time.perf_counter(), self.snapshot
        with self._rolling_back_on_error():
            pending = prepare_version(
                snapshot, what="search", keep=len(snapshot.views), written=None, deleted_rows=_NO_ROWS
            )
            pending = with_search_params(pending, effort=effort, rerank=rerank)
            self._commit(pending, lambda: self._change_catalogue(pending, _NO_ROWS))
        return self._commit_info(started)

    def _is_compact(self) -> bool:
        """One segment of the kind wished for, or none, and nothing dead in it or in the catalogue."""
        snapshot = self.snapshot
        kinds = {view.segment.meta.kind for view in snapshot.views}
        is_one = len(snapshot.views) <= 1 and kinds <= {resolve_index_type(snapshot.details.kind, len(snapshot))}
        return is_one and not len(snapshot.dead) and not snapshot.catalogue.count_hidden()

    def _insert(
        self, batch: InsertBatch, *, is_upsert: bool, allowed_rows: Int64[Array, " N"] | None = None
    ) -> CommitInfo:
        started, snapshot, given = time.perf_counter(), self.snapshot, batch.count
        batch.check_compatible_space(snapshot.details.space, self.folder)
        old = snapshot.catalogue.rows_by_uid(batch.uids())
        if allowed_rows is not None:
            chosen = set(allowed_rows.tolist())
            old = {uid: row for uid, row in old.items() if row in chosen}
            batch = batch.select(old)
        if old and not is_upsert:
            raise UsageError(
                f"{self.folder} has {next(iter(old))!r} already ({len(old):,} of the {batch.count:,} new rows are "
                "there); nothing was added: vlm index update replaces them."
            )
        if not batch.count:
            return self._commit_info(started, left_out=given)
        deleted_rows = np.sort(np.array(list(old.values()), np.int64))
        with self._rolling_back_on_error():
            first = max(snapshot.details.next_row, max_row(snapshot.catalogue.path) + 1)
            keep = len(snapshot.views) - num_segments_to_merge(snapshot.views, batch.count)
            written = self._write_merged(batch, keep, deleted_rows, first)
            details = {
                "next_row": first + batch.count,
                "shards": tuple(dict.fromkeys((*snapshot.details.shards, *batch.shards))),
                "sources": tuple(dict.fromkeys((*snapshot.details.sources, batch.source))),
            }
            what = "update" if is_upsert else "add"
            pending = prepare_version(
                snapshot, what=what, keep=keep, written=written, deleted_rows=deleted_rows, **details
            )
            self._commit(
                pending, lambda: self._change_catalogue(pending, deleted_rows, enumerate(batch.origins(), first))
            )
        left_out = given - batch.count
        return self._commit_info(started, added=batch.count - len(old), replaced=len(old), left_out=left_out)

    def _write_merged(
        self, batch: InsertBatch, keep: int, deleted_rows: Int64[Array, " N"], first: int
    ) -> WrittenSegment:
        """The segment of new rows, with what lives of the segments from `keep` on."""
        merged = [view.excluding(deleted_rows) for view in self.snapshot.views[keep:]]
        rows = [*(view.rows() for view in merged), np.arange(first, first + batch.count)]
        blocks = chain(chain.from_iterable(map(iter_live_blocks, merged)), batch.blocks())
        return self._write_segment(blocks, np.concatenate(rows), "flat", TuningParams())

    def _write_compacted(self, kind: str, tuning: TuningParams) -> WrittenSegment:
        """The segment of all living rows."""
        snapshot = self.snapshot

        def write(kind: str, tuning: TuningParams) -> WrittenSegment:
            blocks = chain.from_iterable(map(iter_live_blocks, snapshot.views))
            return self._write_segment(blocks, snapshot.rows, kind, tuning)

        try:
            return write(resolve_index_type(kind or snapshot.details.kind, len(snapshot)), tuning)
        except UsageError as error:
            if kind:
                raise
            logger.info(f"The kind {snapshot.details.kind} no longer fits, a flat segment is made: {error}")
            return write("flat", TuningParams())

    def _write_segment(
        self, blocks: Iterable[Float[Array, "_ D"]], rows: Int64[Array, " N"], kind: str, tuning: TuningParams
    ) -> WrittenSegment:
        details = self.snapshot.details
        dimension, number = details.space.dimension, details.next_segment
        return write_segment(
            self.folder, number, blocks, rows, dimension=dimension, kind=kind, tuning=tuning, failpoint=self._failpoint
        )

    def _change_catalogue(
        self, pending: PendingVersion, deleted_rows: Int64[Array, " N"], inserted: Iterable[tuple[int, Origin]] = ()
    ) -> None:
        path = self.folder / pending.details.catalogue
        update_catalogue(
            path, generation=pending.number, inserted=inserted, deleted=deleted_rows, failpoint=self._failpoint
        )

    def _rewrite_catalogue(self, pending: PendingVersion) -> None:
        snapshot, path = self.snapshot, self.folder / pending.details.catalogue
        copy_catalogue(snapshot.catalogue.path, path, snapshot.rows, seen=snapshot.number, generation=pending.number)

    def _commit(self, pending: PendingVersion, change: Callable[[], None]) -> None:
        commit(self.folder, pending, change, failpoint=self._failpoint)
        self.snapshot = open_snapshot(self.folder, before=self.snapshot)
        remove_orphans(self.folder, self.snapshot.manifest, self.snapshot.details, failpoint=self._failpoint)

    @contextlib.contextmanager
    def _rolling_back_on_error(self) -> Iterator[None]:
        """If the block fails, what it did is taken back; what cannot be now, before the next change."""
        if self._needs_rollback:
            self._roll_back()
        try:
            yield
        except BaseException:
            self._needs_rollback = True
            with contextlib.suppress(Exception):
                self._roll_back()
            raise

    def _roll_back(self) -> None:
        roll_back_unfinished(self.folder, failpoint=self._failpoint)
        self.snapshot = open_snapshot(self.folder, before=self.snapshot)
        self._needs_rollback = False

    def _commit_info(
        self, started: float, *, added: int = 0, replaced: int = 0, removed: int = 0, left_out: int = 0
    ) -> CommitInfo:
        snapshot = self.snapshot
        return CommitInfo(
            generation=snapshot.number,
            rows=len(snapshot),
            segments=len(snapshot.views),
            dead=len(snapshot.dead),
            added=added,
            replaced=replaced,
            removed=removed,
            left_out=left_out,
            seconds=time.perf_counter() - started,
        )
