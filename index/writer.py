"""Changes of an index folder: each makes one new generation, whole or not at all, while readers go on.

Order of a change: files of new names; the catalogue's transaction, whose rows no reader of the old generation sees;
the manifest, which is the commit; then the files nobody names any more are unlinked. Killed in between, the next
writer takes back what the manifest does not know (`recovery.py`).
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np

from vlm.console import say
from vlm.errors import UsageError
from vlm.index.catalogue_writing import change_catalogue, copy_catalogue, last_row
from vlm.index.changes import Change, NewRows
from vlm.index.commit import Draft, commit, draft_next, searched_with
from vlm.index.generations import open_generation
from vlm.index.kinds import Tuning, choose_kind
from vlm.index.layout import Details, WritePoint, catalogue_file, unhindered
from vlm.index.lock import WriterLock
from vlm.index.merging import absorbed, living_blocks
from vlm.index.parts import Origin
from vlm.index.recovery import recover, sweep
from vlm.index.segments import Written, write_segment
from vlm.manifest import read_manifest
from vlm.tensors import Array, Float, Int64

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
