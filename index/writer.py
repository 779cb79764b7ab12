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
from vlm.console import say
from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of, replacing
from vlm.index.ann.index_type import Tuning
from vlm.index.ann.index_types import choose_kind, settings_of
from vlm.index.catalog import change_catalogue, copy_catalogue, is_ahead, last_row, restore_catalogue
from vlm.index.embeddings import Embeddings, Origin, Space
from vlm.index.layout import SEGMENTS, TOMBSTONES, Details, WritePoint, catalogue_file, tombstones_file, unhindered
from vlm.index.reader import Generation, open_generation
from vlm.index.segments import OpenSegment, Selected, Written, stored_blocks, write_segment
from vlm.manifest import Manifest, read_manifest, record_file, write_manifest
from vlm.tensors import Array, Bool, Float, Int64

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


_UNIT_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows to come in: as many vectors as origins, in the same order; both can be asked for several times.

    source: fingerprint of where they are from. shards: addresses of their tars.
    """

    space: Space
    count: int
    source: str
    shards: tuple[str, ...]
    blocks: Callable[[], Iterable[Float[Array, "_ D"]]]
    origins: Callable[[], Iterable[Origin]]

    @classmethod
    def of_folder(cls, folder: Path) -> "NewRows":
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
            blocks=lambda: stored_blocks(source),
            origins=source.origins,
        )

    @classmethod
    def of_arrays(cls, vectors: Float[Array, "N D"], origins: Sequence[Origin], space: Space) -> "NewRows":
        """Rows at hand; they are brought to unit length, and stored as they are if they have it.

        Raises:
            UsageError: a vector is zero or not finite, or there are not as many as origins.
        """
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(wrong):
            raise UsageError(f"Vector {wrong[0]} has length {lengths[wrong[0]]}: it must be finite and not zero.")
        if len(vectors) != len(origins):
            raise UsageError(f"{len(vectors):,} vectors and {len(origins):,} origins were given: one each is needed.")
        # scaled by a rounding error, a number may round to float16's other neighbour than where it was embedded
        scales = np.where(np.abs(lengths - 1) < _UNIT_TOLERANCE, 1, lengths)
        rows = (vectors / scales[:, None]).astype(np.float16)
        shards = tuple(dict.fromkeys(origin.shard for origin in origins))
        return cls(
            space=space, count=len(rows), source="", shards=shards, blocks=lambda: [rows], origins=lambda: origins
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

    def only(self, uids: Container[str]) -> "NewRows":
        """Those of these names."""
        keep = np.fromiter((origin.uid in uids for origin in self.origins()), bool, self.count)
        return replace(
            self,
            count=int(keep.sum()),
            blocks=lambda: _kept(self.blocks(), keep),
            origins=lambda: compress(self.origins(), keep),
        )

    def require_space(self, space: Space, folder: Path) -> None:
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


def _kept(blocks: Iterable[Float[Array, "_ D"]], keep: Bool[Array, " N"]) -> Iterator[Float[Array, "_ D"]]:
    """The rows to keep, block by block."""
    first = 0
    for block in blocks:
        yield block[keep[first : first + len(block)]]
        first += len(block)


@dataclass(frozen=True, kw_only=True)
class Change:
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


def absorbed(selected: Sequence[Selected], new_rows: int) -> int:
    """How many of the last segments are merged with new rows: the flat ones that are no larger than what has come
    together behind them.

    A row is so written about log2(N) times in all, and about log2(N) segments are ever open, as in a binary counter
    (O'Neil et al. 1996, the log-structured merge tree, with a factor of 2).
    """
    number, gathered = 0, new_rows
    for last in reversed(selected):
        if last.segment.described.kind != "flat" or last.count > gathered:
            break
        number, gathered = number + 1, gathered + last.count
    return number


def living_blocks(selected: Selected) -> Iterator[Float[Array, "_ D"]]:
    """The chosen rows of a segment as they are stored, float16."""
    for first in range(0, selected.count, _ROWS_AT_ONCE):
        yield selected.segment.vectors.stored[selected.positions[first : first + _ROWS_AT_ONCE]]


def settle(segments: Iterable[OpenSegment], dead: Int64[Array, " N"]) -> tuple[list[OpenSegment], Int64[Array, " M"]]:
    """The segments in which something lives, and those of the dead rows (sorted) that lie in them."""
    kept, remaining = [], [np.zeros(0, np.int64)]
    for segment in segments:
        positions = segment.positions_of(dead)
        if len(positions) < len(segment):
            kept.append(segment)
            remaining.append(segment.rows[positions])
    return kept, np.concatenate(remaining)


def recover(folder: Path, *, reached: WritePoint = unhindered) -> None:
    """Bring a folder back to its manifest's generation; only for the one who holds the writer's lock.

    May be killed and repeated. Readers notice nothing: what is removed no newer manifest names.

    Raises:
        VlmError: the catalogue is damaged or the disk is full.
    """
    manifest = read_manifest(folder, "index")
    details = Details.from_manifest(manifest, folder)
    if is_ahead(folder / details.catalogue, generation=manifest.generation):
        reached("taking back the catalogue")
        restore_catalogue(folder / details.catalogue, generation=manifest.generation)
    sweep(folder, manifest, details, reached=reached)


def sweep(folder: Path, manifest: Manifest, details: Details, *, reached: WritePoint = unhindered) -> None:
    """Unlink the strays; who has one of them open keeps it."""
    for path in strays(folder, manifest, details):
        reached(f"removing {path.name}")
        path.unlink(missing_ok=True)


def strays(folder: Path, manifest: Manifest, details: Details) -> list[Path]:
    """Files of the index that its manifest does not name: of an older generation, or of one that was never finished."""
    named = {folder / name for name in (*manifest.files, details.catalogue)}
    journal = folder / f"{details.catalogue}-journal"
    inside = [path for name in (SEGMENTS, TOMBSTONES) if (folder / name).is_dir() for path in (folder / name).iterdir()]
    beside = [path for pattern in ("catalogue-*", ".manifest.json.*.part") for path in folder.glob(pattern)]
    return sorted(path for path in (*inside, *beside) if path not in named and path != journal)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """The next generation.

    manifest: all but the line of its tombstones' file. dead: rows of its segments that are dead, sorted.
    """

    manifest: Manifest
    details: Details
    dead: Int64[Array, " N"]

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.manifest.generation


def draft_next(
    now: Generation, *, what: str, keep: int, written: Written | None, dying: Int64[Array, " N"], **details: Any
) -> Draft:
    """The generation after `now`.

    Args:
        what: the kind of change, part of the fingerprint.
        keep: how many of the first segments stay; all others were written anew, or are gone.
        written: the new segment, after those kept.
        dying: rows that die, sorted.
        details: what else changes in them.
    """
    dead = np.union1d(now.dead, dying)
    kept, dead = settle([selected.segment for selected in now.selected[:keep]], dead)
    segments = [segment.described for segment in kept] + ([written.segment] if written else [])
    files = {name: now.manifest.files[name] for segment in kept for name in segment.described.files}
    files |= written.files if written else {}
    number = now.number + 1
    changed = replace(
        now.details,
        segments=tuple(segments),
        next_segment=written.segment.number + 1 if written else now.details.next_segment,
        tombstones=tombstones_file(number) if len(dead) else "",
        **details,
    )
    checksums = [files[name].sha256 for name in sorted(files)]
    manifest = replace(
        now.manifest,
        fingerprint=fingerprint_of(now.manifest.fingerprint, what, dead.tobytes(), *checksums),
        generation=number,
        counts={"rows": sum(segment.rows for segment in segments) - len(dead), "dead": len(dead)},
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    return Draft(manifest=manifest, details=changed, dead=dead)


def searched_with(draft: Draft, *, effort: int | None, rerank: int) -> Draft:
    """The same, with another effort and re-ranking of its largest segment, also when it is compacted."""
    largest = max(draft.details.segments, key=lambda segment: segment.rows)
    told = settings_of(largest.kind, effort=effort, rerank=rerank)
    changed = replace(
        draft.details,
        segments=tuple(
            replace(segment, parameters=segment.parameters | told, rerank=rerank) if segment is largest else segment
            for segment in draft.details.segments
        ),
        tuning=draft.details.tuning | told,
    )
    return replace(draft, details=changed, manifest=replace(draft.manifest, details=asdict(changed)))


def commit(folder: Path, draft: Draft, change_catalogue: Callable[[], None], *, reached: WritePoint) -> None:
    """Write the tombstones, change the catalogue, and replace the manifest: only the last of these counts."""
    files = dict(draft.manifest.files)
    if len(draft.dead):
        path = folder / draft.details.tombstones
        path.parent.mkdir(exist_ok=True)
        reached("tombstones")
        with replacing(path) as file:
            np.save(file, draft.dead, allow_pickle=False)
            reached("tombstones before their rename")
        files[draft.details.tombstones] = record_file(path)
    reached("catalogue")
    change_catalogue()
    reached("manifest")
    write_manifest(folder, replace(draft.manifest, files=files))
    reached("manifest written")


_NOBODY = np.zeros(0, np.int64)


class IndexWriter:
    """The one writer of an index folder, until `close`; what an earlier one left unfinished is taken back first.

    reached: is told before each step that changes the folder.

    Raises:
        UsageError: there is another writer, or no index of this layout.
        VlmError: the index is damaged.
    """

    def __init__(self, folder: Path, *, reached: WritePoint = unhindered) -> None:
        Details.from_manifest(read_manifest(folder, "index"), folder)
        self.folder, self._reached, self._is_unsettled = folder, reached, False
        self._lock = WriterLock(folder)
        try:
            recover(folder, reached=reached)
            self.generation = open_generation(folder)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and the files."""
        self.generation.catalogue.close()
        self._lock.release()

    def add(self, new: NewRows) -> Change:
        """Rows that were not there, as a flat segment; small flat ones before it are merged with it.

        Raises:
            UsageError: they are of another model, or a uid is there already.
            VlmError: two of them have the same uid, or a vector is not of unit length.
        """
        return self._bring(new, replaces=False)

    def update(self, new: NewRows, *, among: Int64[Array, " N"] | None = None) -> Change:
        """As `add`, but a row whose uid is there takes the place of the one that has it.

        among: only these rows (as `Catalogue.where` gives them) are replaced; new rows of other uids are left out.
        """
        return self._bring(new, replaces=True, among=among)

    def delete(self, uids: Sequence[str]) -> Change:
        """The rows of these uids die.

        Raises:
            UsageError: one of them is not there; nothing is deleted.
        """
        rows = self.generation.catalogue.rows_of(uids)
        unknown = [uid for uid in uids if uid not in rows]
        if unknown:
            raise UsageError(
                f"{self.folder} has no {unknown[0]!r} ({len(unknown):,} of {len(uids):,} uids are not there); nothing "
                "was deleted: leave them out."
            )
        return self.delete_rows(np.unique(np.array(list(rows.values()), np.int64)))

    def delete_rows(self, rows: Int64[Array, " N"]) -> Change:
        """The living of these rows (sorted, as `Catalogue.where` gives them) die; nothing changes if there is none."""
        started, now = time.perf_counter(), self.generation
        dying = np.intersect1d(rows, now.rows, assume_unique=True)
        if len(dying):
            with self._changing():
                draft = draft_next(now, what="delete", keep=len(now.selected), written=None, dying=dying)
                self._commit(draft, lambda: self._change_catalogue(draft, dying))
        return self._done(started, removed=len(dying))

    def compact(self, *, kind: str = "", tuning: Tuning | None = None) -> Change:
        """All living rows into one segment, trained anew, and into a catalogue without the dead.

        kind, tuning: as for `build_index`; left out, those the index was built with, or flat where they no longer fit.

        Raises:
            UsageError: there is no such kind, or it does not fit the rows.
        """
        started, now = time.perf_counter(), self.generation
        if not kind and tuning is None and self._is_compact():
            return self._done(started)
        wishes = {"kind": kind or now.details.kind, "tuning": asdict(tuning) if tuning else now.details.tuning}
        with self._changing():
            written = self._write_all(kind, tuning or Tuning(**now.details.tuning)) if len(now) else None
            catalogue = catalogue_file(now.number + 1)
            next_row = max(now.details.next_row, last_row(now.catalogue.path) + 1)
            details = wishes | {"catalogue": catalogue, "next_row": next_row}
            draft = draft_next(now, what="compact", keep=0, written=written, dying=_NOBODY, **details)
            self._commit(draft, lambda: self._rewrite_catalogue(draft))
        return self._done(started)

    def set_search(self, *, effort: int | None, rerank: int) -> Change:
        """The largest segment is searched with another effort (nprobe, ef_search) and re-ranking from now on."""
        started, now = time.perf_counter(), self.generation
        with self._changing():
            draft = draft_next(now, what="search", keep=len(now.selected), written=None, dying=_NOBODY)
            draft = searched_with(draft, effort=effort, rerank=rerank)
            self._commit(draft, lambda: self._change_catalogue(draft, _NOBODY))
        return self._done(started)

    def _is_compact(self) -> bool:
        """One segment of the kind wished for, or none, and nothing dead in it or in the catalogue."""
        now = self.generation
        kinds = {selected.segment.described.kind for selected in now.selected}
        is_one = len(now.selected) <= 1 and kinds <= {choose_kind(now.details.kind, len(now))}
        return is_one and not len(now.dead) and not now.catalogue.count_hidden()

    def _bring(self, new: NewRows, *, replaces: bool, among: Int64[Array, " N"] | None = None) -> Change:
        started, now, given = time.perf_counter(), self.generation, new.count
        new.require_space(now.details.space, self.folder)
        old = now.catalogue.rows_of(new.uids())
        if among is not None:
            chosen = set(among.tolist())
            old = {uid: row for uid, row in old.items() if row in chosen}
            new = new.only(old)
        if old and not replaces:
            raise UsageError(
                f"{self.folder} has {next(iter(old))!r} already ({len(old):,} of the {new.count:,} new rows are "
                "there); nothing was added: vlm index update replaces them."
            )
        if not new.count:
            return self._done(started, left_out=given)
        dying = np.sort(np.array(list(old.values()), np.int64))
        with self._changing():
            first = max(now.details.next_row, last_row(now.catalogue.path) + 1)
            keep = len(now.selected) - absorbed(now.selected, new.count)
            written = self._write_behind(new, keep, dying, first)
            details = {
                "next_row": first + new.count,
                "shards": tuple(dict.fromkeys((*now.details.shards, *new.shards))),
                "sources": tuple(dict.fromkeys((*now.details.sources, new.source))),
            }
            what = "update" if replaces else "add"
            draft = draft_next(now, what=what, keep=keep, written=written, dying=dying, **details)
            self._commit(draft, lambda: self._change_catalogue(draft, dying, enumerate(new.origins(), first)))
        left_out = given - new.count
        return self._done(started, added=new.count - len(old), replaced=len(old), left_out=left_out)

    def _write_behind(self, new: NewRows, keep: int, dying: Int64[Array, " N"], first: int) -> Written:
        """The segment of new rows, with what lives of the segments from `keep` on."""
        merged = [selected.without(dying) for selected in self.generation.selected[keep:]]
        rows = [*(selected.rows() for selected in merged), np.arange(first, first + new.count)]
        blocks = chain(chain.from_iterable(map(living_blocks, merged)), new.blocks())
        return self._write_segment(blocks, np.concatenate(rows), "flat", Tuning())

    def _write_all(self, kind: str, tuning: Tuning) -> Written:
        """The segment of all living rows."""
        now = self.generation

        def write(kind: str, tuning: Tuning) -> Written:
            blocks = chain.from_iterable(map(living_blocks, now.selected))
            return self._write_segment(blocks, now.rows, kind, tuning)

        try:
            return write(choose_kind(kind or now.details.kind, len(now)), tuning)
        except UsageError as error:
            if kind:
                raise
            say(f"The kind {now.details.kind} no longer fits, a flat segment is made: {error}")
            return write("flat", Tuning())

    def _write_segment(
        self, blocks: Iterable[Float[Array, "_ D"]], rows: Int64[Array, " N"], kind: str, tuning: Tuning
    ) -> Written:
        details = self.generation.details
        dimension, number = details.space.dimension, details.next_segment
        return write_segment(
            self.folder, number, blocks, rows, dimension=dimension, kind=kind, tuning=tuning, reached=self._reached
        )

    def _change_catalogue(
        self, draft: Draft, dying: Int64[Array, " N"], born: Iterable[tuple[int, Origin]] = ()
    ) -> None:
        path = self.folder / draft.details.catalogue
        change_catalogue(path, generation=draft.number, born=born, died=dying, reached=self._reached)

    def _rewrite_catalogue(self, draft: Draft) -> None:
        now, path = self.generation, self.folder / draft.details.catalogue
        copy_catalogue(now.catalogue.path, path, now.rows, seen=now.number, generation=draft.number)

    def _commit(self, draft: Draft, change: Callable[[], None]) -> None:
        commit(self.folder, draft, change, reached=self._reached)
        self.generation = open_generation(self.folder, before=self.generation)
        sweep(self.folder, self.generation.manifest, self.generation.details, reached=self._reached)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """If the block fails, what it did is taken back; what cannot be now, before the next change."""
        if self._is_unsettled:
            self._settle()
        try:
            yield
        except BaseException:
            self._is_unsettled = True
            with contextlib.suppress(Exception):
                self._settle()
            raise

    def _settle(self) -> None:
        recover(self.folder, reached=self._reached)
        self.generation = open_generation(self.folder, before=self.generation)
        self._is_unsettled = False

    def _done(
        self, started: float, *, added: int = 0, replaced: int = 0, removed: int = 0, left_out: int = 0
    ) -> Change:
        now = self.generation
        return Change(
            generation=now.number,
            rows=len(now),
            segments=len(now.selected),
            dead=len(now.dead),
            added=added,
            replaced=replaced,
            removed=removed,
            left_out=left_out,
            seconds=time.perf_counter() - started,
        )
