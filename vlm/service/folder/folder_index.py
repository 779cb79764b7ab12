"""The index of a folder of images: made by the first update, brought up to date by every later one.

An update scans the folder (`folder_scan`), reads what is new or changed (`folder_reader`), embeds the contents that no
earlier one has seen, and stores them batch by batch (`folder_state`). At the end the index is brought to what is
stored. All of it lies in a home of its own; nothing is written into the folder of images.
"""

import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock, Timeout

from vlm.console import list_counts, pluralize, progress
from vlm.data.photo_formats import HAS_RAW
from vlm.data.sources.source import HAS_HEIF
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, content_digest
from vlm.index.build import create_index
from vlm.index.embeddings_folder import EmbeddingSpace
from vlm.index.engine_writer import InsertBatch
from vlm.index.writer import IndexWriter
from vlm.manifest import is_complete, read_manifest
from vlm.model_spec import absolute_spec
from vlm.results import Result
from vlm.service.folder.folder_encoder import FolderEncoder, LoadEncoder
from vlm.service.folder.folder_reader import FileReading, FolderReader, pending_files
from vlm.service.folder.folder_scan import FolderScan, scan_folder
from vlm.service.folder.folder_state import ContentRecord, FolderState, KnownFile

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
"""Images that are embedded and stored at once: the most that a killed update embeds again."""

# where these differ from those of the last update, images that could not be read are tried again
_READERS = f"Pillow {PIL.__version__}, HEIF {HAS_HEIF}, raw {HAS_RAW}"
LOCK_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class FolderUpdate(Result):
    """What an update found in a folder, and what it did.

    index: the index folder. images: that can be searched now. changed: with other bytes, captions or metadata.
    gone: neither there nor moved. embedded: seen by the model in this update; images whose bytes it saw before, as
    moved and copied ones, are not among them. unreadable: names of files that cannot be used, with the reason.
    missing: number of files that an extra of this package would read, by the extra's name.
    """

    folder: str
    index: str
    images: int
    new: int
    changed: int
    moved: int
    gone: int
    embedded: int
    unreadable: dict[str, str]
    missing: dict[str, int]
    scan_seconds: float
    seconds: float

    @property
    def has_changes(self) -> bool:
        """Whether anything differs from the update before."""
        return bool(self.new or self.changed or self.moved or self.gone)

    def describe(self) -> str:
        """The update in a line.

        >>> FolderUpdate(folder="f", index="i", images=3, new=2, changed=0, moved=1, gone=0, embedded=2, unreadable={},
        ...              missing={}, scan_seconds=0.1, seconds=1.2).describe()
        '3 images: 2 new, 1 moved; 2 embedded in 1.2 s'
        """
        counts = {"new": self.new, "changed": self.changed, "moved": self.moved, "gone": self.gone}
        changes = list_counts((name, count) for name, count in counts.items() if count) or "no change"
        work = f"{self.embedded:,} embedded in " if self.embedded else ""
        return f"{pluralize(self.images, 'image')}: {changes}; {work}{self.seconds:.1f} s"


class FolderBusyError(UsageError):
    """Another process updates the index of this folder."""


class NoModelError(UsageError):
    """A folder that was never indexed needs a model, and none was named."""


class FolderIndex:
    """A folder of images, and the home of its index: `index/`, an index folder like any other, and `files.sqlite`.

    root: the folder. model_spec: the model of the first update, which later ones keep: to them it names a new location
    of the same model. default_spec: the model of the first update where that is empty. load: gives the model of a
    spec; called only when there is something to embed.
    """

    def __init__(
        self, root: Path, home: Path, *, model_spec: str = "", default_spec: str = "", load: LoadEncoder
    ) -> None:
        self.root = root.resolve()
        self.home = home
        self._model_spec = model_spec
        self._default_spec = default_spec
        self._load = load
        self._encoder: FolderEncoder | None = None

    @property
    def index_folder(self) -> Path:
        """The index."""
        return self.home / "index"

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index to search, however old."""
        return is_complete(self.index_folder)

    def update(self, *, rebuild: bool = False) -> FolderUpdate:
        """Bring the index up to what lies in the folder; after a kill at any moment the next call resumes.

        rebuild: forget everything and embed all images again, as with another model.

        Raises:
            FolderBusyError: another process is doing so.
            NoModelError: it is the first update, and no model was named.
            UsageError: no image of the folder can be read, or the index is of another model or folder.
            VlmError: the disk is full, or what is stored is damaged.
        """
        with self._state(is_new=rebuild) as state:
            return self._update(state)

    def find_indexed(self, image: bytes) -> str | None:
        """The uid of an indexed image with these bytes, whose vector need not be computed.

        Raises:
            FolderBusyError: an update runs; this does not wait for its end.
        """
        with self._state(lock_seconds=0) as state:
            return state.path_of(content_digest(image))

    @contextlib.contextmanager
    def _state(self, *, is_new: bool = False, lock_seconds: float | None = None) -> Iterator[FolderState]:
        self.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.home / "lock", timeout=LOCK_SECONDS if lock_seconds is None else lock_seconds)
        try:
            held = lock.acquire()
        except Timeout as error:
            raise FolderBusyError(
                f"The index of {self.root} is being updated by another process; wait until it has finished, or end it: "
                "what it has embedded is kept."
            ) from error
        path = self.home / "files.sqlite"
        with held:
            # under the lock, or it would take the file away from a process that writes it
            model = ""
            if is_new:
                model = _model_of(path)
                path.unlink(missing_ok=True)
                self._encoder = None
            with contextlib.closing(FolderState(path)) as state:
                if model:
                    state.keep_model(model)
                yield state

    def _update(self, state: FolderState) -> FolderUpdate:
        started = time.perf_counter()
        self._check_root(state)
        scan = scan_folder(self.root)
        self._check_not_empty(scan, state)
        scan_seconds = time.perf_counter() - started
        space = self._space(state)
        state.begin(str(self.root), space, _READERS)

        known = state.files()
        gone = [path for path in known if path not in scan.stamps]
        pending = pending_files(scan, known, gone)
        # noted before anything is read: after a kill, the next update has to delete their rows all the same
        state.mark_gone(gone)
        counts = _ChangeCounts(known, gone, state.unreadable_digests())
        num_embedded = self._read(state, scan, pending, counts) if pending else 0
        unreadable = scan.unreadable | state.unreadable()
        if not state.num_readable() and not self.is_indexed:
            name, reason = next(iter(unreadable.items()))
            number = pluralize(len(unreadable), "image")
            raise UsageError(f"None of the {number} of {self.root} can be read; the first, {name}: {reason}.")
        commit_to_index(self.index_folder, state, space)
        return FolderUpdate(
            folder=str(self.root),
            index=str(self.index_folder),
            images=state.num_readable(),
            new=counts.new,
            changed=counts.changed,
            moved=counts.moved,
            # a file that moved is gone from its old place as well
            gone=len(gone) - counts.moved,
            embedded=num_embedded,
            unreadable=dict(sorted(unreadable.items())),
            missing=scan.missing,
            scan_seconds=scan_seconds,
            seconds=time.perf_counter() - started,
        )

    def _check_root(self, state: FolderState) -> None:
        if not self.root.is_dir():
            raise UsageError(f"There is no folder {str(self.root)!r}; name a folder of images.")
        # a folder that was moved keeps its index, if the index is named
        if state.root not in ("", str(self.root)) and Path(state.root).is_dir():
            raise UsageError(f"{self.home} holds the index of {state.root}, not of {self.root}; name another folder.")

    def _check_not_empty(self, scan: FolderScan, state: FolderState) -> None:
        if scan.stamps:
            return
        # a disk that is not mounted looks like a folder whose images were all deleted
        if num_known := state.num_readable():
            raise UsageError(
                f"{self.root} holds no image now, and its index has {num_known:,}: is its disk not mounted? If they "
                f"are gone for good, remove {self.home}."
            )
        hint = "".join(f" Its {count:,} files are read with the extra {name}." for name, count in scan.missing.items())
        raise UsageError(f"{self.root} holds no image.{hint}")

    def _space(self, state: FolderState) -> EmbeddingSpace:
        """The model of the index, which is loaded only if it is a new one."""
        space = state.space
        if space is None:
            spec = self._model_spec or state.model or self._default_spec
            if not spec:
                raise NoModelError(f"{self.root} was never indexed, and no model is named. {NO_MODEL_HINT}")
            self._encoder = self._encoder or FolderEncoder(spec, self._load)
            # before it is loaded: an update that is killed meanwhile is resumed without naming the model again
            state.keep_model(absolute_spec(spec))
            try:
                encoder = self._encoder.get()
            except Exception:
                # there may be no such model, and the next update is not to ask for it again
                state.keep_model("")
                raise
            return EmbeddingSpace(
                model=absolute_spec(spec),
                fingerprint=encoder.fingerprint,
                dimension=encoder.embedding_size,
                modality="image",
            )
        spec = absolute_spec(self._model_spec) if self._model_spec else space.model
        if self._encoder is None:
            self._encoder = FolderEncoder(spec, self._load, fingerprint=space.fingerprint)
            # a new location is checked at once; a known one is loaded only if something has to be embedded
            if spec != space.model:
                self._encoder.get()
        return replace(space, model=spec)

    def _read(
        self, state: FolderState, scan: FolderScan, pending: dict[str, bytes | None], counts: "_ChangeCounts"
    ) -> int:
        """Read, embed and store the pending files; how many contents were embedded."""
        assert self._encoder is not None
        known_digests = state.digests()
        reader = FolderReader(self.root, scan, view=self._encoder.view, known_digests=known_digests)
        total = len(scan.stamps)
        num_embedded = 0
        with progress(total=total, done=total - len(pending), what="index", unit=" images") as bar:
            for readings in reader.batches(pending, BATCH_SIZE):
                contents = self._encoder.embed(readings, known_digests)
                # stored before anything else is done with them: a kill after this line embeds none of them again
                state.record([reading.file for reading in readings], contents)
                for content in contents:
                    # the reader asks this set too, so that a copy in a later batch is not decoded
                    known_digests.add(content.digest)
                    num_embedded += content.vector is not None
                counts.add(readings, contents)
                bar.update(len(readings))
        return num_embedded


def _model_of(path: Path) -> str:
    """The model of a folder's state; empty where there is none, or it cannot be read."""
    if not path.exists():
        return ""
    with contextlib.suppress(VlmError), contextlib.closing(FolderState(path)) as state:
        return state.space.model if state.space else state.model
    return ""


NO_MODEL_HINT = (
    "Give --model MODEL or set VLM_MODEL: a run or model folder, or an open_clip NAME:WEIGHTS whose weights are on "
    "this machine."
)


class _ChangeCounts:
    """How the files of an update differ from those known before.

    gone: paths of those that are no longer there. unreadable: digests of contents that give no row.
    """

    def __init__(self, known: dict[str, KnownFile], gone: Sequence[str], unreadable: set[bytes]) -> None:
        self.new = 0
        self.changed = 0
        self.moved = 0
        self._known = known
        self._unreadable = unreadable
        # counted: of several new files with the bytes of one that is gone, one was moved and the others are copies
        self._gone_digests = Counter(known[path].digest for path in gone)

    def add(self, readings: Sequence[FileReading], contents: Sequence[ContentRecord]) -> None:
        """Count the files of a batch; those that cannot be read are no changes."""
        for content in contents:
            if content.vector is None:
                self._unreadable.add(content.digest)
        for reading in readings:
            file = reading.file
            before = self._known.get(file.path)
            if file.digest is None or file.digest in self._unreadable:
                continue
            if before is not None:
                self.changed += before.wanted != file.wanted
            elif self._gone_digests[file.digest]:
                self._gone_digests[file.digest] -= 1
                self.moved += 1
            else:
                self.new += 1


def commit_to_index(index: Path, state: FolderState, space: EmbeddingSpace) -> None:
    """Bring the index to what is stored; after a kill at any moment, the next call ends the same.

    Raises:
        VlmError: the disk is full, or the index is damaged.
    """
    was_made = is_complete(index)
    # fingerprints chain all changes, so this one proves that nobody else has changed the index
    if was_made and read_manifest(index, "index").fingerprint == state.index_fingerprint:
        _change_index(index, state, space)
        return
    # killed before it could note what it did, or changed by another command
    if was_made and state.index_fingerprint:
        logger.info(f"{index} is not as it was left; it is made again from what was embedded.")
    _make_index(index, state, space)


def _change_index(index: Path, state: FolderState, space: EmbeddingSpace) -> None:
    """Write the rows that differ, then delete those that are gone."""
    old_uids = state.old_uids()
    if not old_uids and not state.num_new_rows():
        return
    with IndexWriter(index) as writer:
        # inserts before deletes: a file that moved is found under one name or both, never under none
        writer.update(_new_rows(state, space))
        # some may be gone already
        rows = writer.snapshot.catalogue.rows_by_uid(old_uids)
        commit = writer.delete_rows(np.sort(np.array(list(rows.values()), np.int64)))
        # deleted rows cost time in every search, and a compaction costs about one pass over the live ones
        if commit.dead > commit.rows:
            writer.compact()
        fingerprint = writer.snapshot.manifest.fingerprint
    state.set_indexed(fingerprint)


def _make_index(index: Path, state: FolderState, space: EmbeddingSpace) -> None:
    state.forget_index()
    # beside the old one, which readers may have open
    unfinished = index.with_name(f"{index.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    # exact, and cheap to change; a search of 100,000 rows takes some ten milliseconds
    create_index(unfinished, space, kind="flat")
    with IndexWriter(unfinished) as writer:
        writer.add(_new_rows(state, space))
        fingerprint = writer.snapshot.manifest.fingerprint
    # a kill between these two lines leaves no index, and the next update makes it again from the state
    shutil.rmtree(index, ignore_errors=True)
    unfinished.rename(index)
    state.set_indexed(fingerprint)


def _new_rows(state: FolderState, space: EmbeddingSpace) -> InsertBatch:
    return InsertBatch(
        space=space,
        count=state.num_new_rows(),
        # the same for every change of this folder: an index keeps a list of them
        source=compute_fingerprint("folder", state.root),
        shards=(state.root,),
        blocks=state.new_vectors,
        origins=state.new_origins,
    )
