"""The index of a folder of images: made by the first update, brought up to date by every later one.

An update scans the folder (`folder_scan`), reads what is new or changed (`folder_reader`), embeds the contents that no
earlier one has seen, and stores them batch by batch (`folder_state`). At the end the index is brought to what is
stored. All of it lies in a home of its own; nothing is written into the folder of images.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock, Timeout

from vlm.console import list_counts, pluralize, progress
from vlm.data.photo_formats import HAS_RAW
from vlm.data.sources.image_names import HAS_HEIF
from vlm.errors import UsageError
from vlm.files import compute_fingerprint, content_digest
from vlm.index.build import create_index
from vlm.index.embeddings_folder import EmbeddingSpace
from vlm.index.encoder import Encoder, check_unit_norm
from vlm.index.writer import IndexWriter, InsertBatch
from vlm.manifest import is_complete, read_manifest
from vlm.models.model_spec import absolute_spec
from vlm.results import Result
from vlm.service.folder.folder_reader import FileReading, FolderReader, View, pending_files
from vlm.service.folder.folder_scan import FolderScan, scan_folder
from vlm.service.folder.folder_state import ContentRecord, FolderState, KnownFile

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
"""Images that are embedded and stored at once: the most that a killed update embeds again."""

_READERS = f"Pillow {PIL.__version__}, HEIF {HAS_HEIF}, raw {HAS_RAW}"
LOCK_SECONDS = 5.0

LoadEncoder = Callable[[str], Encoder]


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


class LazyEncoder:
    """A model that is loaded by whoever first needs it, from any thread, and stays.

    fingerprint: what the model's must be; empty takes any.

    Raises:
        UsageError: on `get`, its fingerprint is another.
    """

    def __init__(self, spec: str, load: LoadEncoder, *, fingerprint: str = "") -> None:
        self.spec = spec
        self._load = load
        self._fingerprint = fingerprint
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()

    def get(self) -> Encoder:
        """The model."""
        with self._lock:
            if self._encoder is None:
                encoder = self._load(self.spec)
                if self._fingerprint not in ("", encoder.fingerprint):
                    raise UsageError(
                        f"{self.spec} is not the model that embedded this folder before (its fingerprint is "
                        f"{encoder.fingerprint}, that of the index {self._fingerprint}): name that model, or embed all "
                        "images again with --rebuild."
                    )
                self._encoder = encoder
            return self._encoder

    def view(self) -> View:
        """Its view."""
        return self.get().view


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
        self._encoder: LazyEncoder | None = None

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
            UsageError: no image of the folder can be read, no model was named, or the index is of another model or
                folder.
            VlmError: the disk is full, or what is stored is damaged.
        """
        with self._state(is_new=rebuild) as state:
            return self._update(state)

    def find_indexed(self, image: bytes) -> str | None:
        """The uid of an indexed image with these bytes, whose vector need not be computed; raises FolderBusyError."""
        with self._state() as state:
            return state.path_of(content_digest(image))

    @contextlib.contextmanager
    def _state(self, *, is_new: bool = False) -> Iterator[FolderState]:
        self.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.home / "lock", timeout=LOCK_SECONDS)
        try:
            held = lock.acquire()
        except Timeout as error:
            raise FolderBusyError(
                f"The index of {self.root} is being updated by another process; wait until it has finished, or end it: "
                "what it has embedded is kept."
            ) from error
        path = self.home / "files.sqlite"
        with held:
            if is_new:
                path.unlink(missing_ok=True)
                self._encoder = None
            with contextlib.closing(FolderState(path)) as state:
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
        state.mark_gone(gone)
        counts = _ChangeCounts(known, gone)
        num_embedded = self._read(state, scan, pending, counts) if pending else 0
        unreadable = scan.unreadable | state.unreadable()
        self._write_index(state, space, unreadable)
        return FolderUpdate(
            folder=str(self.root),
            index=str(self.index_folder),
            images=state.num_readable(),
            new=counts.new,
            changed=counts.changed,
            moved=counts.moved,
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
            spec = self._model_spec or self._default_spec
            if not spec:
                raise UsageError(f"{self.root} was never indexed, and no model is named. {NO_MODEL_HINT}")
            self._encoder = self._encoder or LazyEncoder(spec, self._load)
            encoder = self._encoder.get()
            return EmbeddingSpace(
                model=absolute_spec(spec),
                fingerprint=encoder.fingerprint,
                dimension=encoder.embedding_size,
                modality="image",
            )
        spec = absolute_spec(self._model_spec) if self._model_spec else space.model
        if self._encoder is None:
            self._encoder = LazyEncoder(spec, self._load, fingerprint=space.fingerprint)
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
                contents = self._embed(readings, known_digests)
                state.record([reading.file for reading in readings], contents)
                known_digests.update(content.digest for content in contents)
                counts.add(readings, contents)
                num_embedded += sum(content.vector is not None for content in contents)
                bar.update(len(readings))
        return num_embedded

    def _embed(self, readings: Sequence[FileReading], known_digests: set[bytes]) -> list[ContentRecord]:
        """The new contents of a batch, each once."""
        contents: dict[bytes, ContentRecord] = {}
        pixels: dict[bytes, np.ndarray] = {}
        names: list[str] = []
        for reading in readings:
            content = reading.content
            # the batch before may have embedded what was new when this one was read ahead
            if content is None or content.digest in known_digests or content.digest in contents:
                continue
            contents[content.digest] = content
            if reading.pixels is not None:
                pixels[content.digest] = reading.pixels
                names.append(reading.file.path)
        if pixels:
            # imported where images are embedded: an update without a new one takes no time for it
            import torch

            assert self._encoder is not None
            vectors = self._encoder.get().embed_images(torch.from_numpy(np.stack(list(pixels.values())))).numpy()
            check_unit_norm(vectors, names)
            for digest, vector in zip(pixels, vectors.astype(np.float16), strict=True):
                contents[digest] = replace(contents[digest], vector=vector)
        return list(contents.values())

    def _write_index(self, state: FolderState, space: EmbeddingSpace, unreadable: dict[str, str]) -> None:
        """Bring the index to what is stored."""
        if self.is_indexed and read_manifest(self.index_folder, "index").fingerprint == state.index_fingerprint:
            self._change_index(state, space)
            return
        if not state.num_readable():
            name, reason = next(iter(unreadable.items()))
            raise UsageError(
                f"None of the {pluralize(len(unreadable), 'image')} of {self.root} can be read; the first, {name}: "
                f"{reason}."
            )
        if self.is_indexed and state.index_fingerprint:
            logger.info(f"{self.index_folder} is not as it was left; it is made again from what was embedded.")
        state.forget_index()
        # beside the old one, which readers may have open
        unfinished = self.home / "index.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        create_index(unfinished, space, kind="flat")
        with IndexWriter(unfinished) as writer:
            writer.add(_new_rows(state, space))
            fingerprint = writer.snapshot.manifest.fingerprint
        shutil.rmtree(self.index_folder, ignore_errors=True)
        unfinished.rename(self.index_folder)
        state.set_indexed(fingerprint)

    def _change_index(self, state: FolderState, space: EmbeddingSpace) -> None:
        """Write the rows that differ, then delete those that are gone; repeated after a crash, it ends the same."""
        old_uids = state.old_uids()
        if not old_uids and not state.num_new_rows():
            return
        with IndexWriter(self.index_folder) as writer:
            writer.update(_new_rows(state, space))
            rows = writer.snapshot.catalogue.rows_by_uid(old_uids)
            commit = writer.delete_rows(np.sort(np.array(list(rows.values()), np.int64)))
            if commit.dead > commit.rows:
                writer.compact()
            fingerprint = writer.snapshot.manifest.fingerprint
        state.set_indexed(fingerprint)


NO_MODEL_HINT = (
    "Give --model MODEL or set VLM_MODEL: a run or model folder, or an open_clip NAME:WEIGHTS whose weights are on "
    "this machine; vlm models lists what works offline and how to fetch one."
)


class _ChangeCounts:
    """How the files of an update differ from those known before. gone: paths of those that are no longer there."""

    def __init__(self, known: dict[str, KnownFile], gone: Sequence[str]) -> None:
        self.new = 0
        self.changed = 0
        self.moved = 0
        self._known = known
        self._gone_digests = Counter(known[path].digest for path in gone)

    def add(self, readings: Sequence[FileReading], contents: Sequence[ContentRecord]) -> None:
        """Count the files of a batch; those that cannot be read are no changes."""
        bad = {content.digest for content in contents if content.vector is None}
        for reading in readings:
            file = reading.file
            before = self._known.get(file.path)
            if file.digest is None or file.digest in bad:
                continue
            if before is not None:
                self.changed += before.wanted != file.wanted
            elif self._gone_digests[file.digest]:
                self._gone_digests[file.digest] -= 1
                self.moved += 1
            else:
                self.new += 1


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
