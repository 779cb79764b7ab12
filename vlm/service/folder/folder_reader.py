"""Reading the new and changed files of a folder: bytes to digest, fields, captions, and the pixels of a model."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.photo_formats import read_photo
from vlm.data.samples import Captions, without_captions
from vlm.data.sources.image_folder import captions_beside, has_words_beside, metadata_beside
from vlm.errors import BadSample
from vlm.files import content_digest
from vlm.service.folder.folder_scan import UNSETTLED, FileStamp, FolderScan, is_unsettled
from vlm.service.folder.folder_state import ContentRecord, FileRecord, KnownFile

# more wait for one disk, and hold more decoded images
_MAX_THREADS = 8

View = Callable[[bytes], np.ndarray]
"""From an encoded image to the pixels that a model sees; raises BadSample."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileReading:
    """A file as it was read. content: what its bytes gave, if they are new. pixels: of a new, readable content."""

    file: FileRecord
    content: ContentRecord | None = None
    pixels: np.ndarray | None = None


def pending_files(scan: FolderScan, known: Mapping[str, KnownFile], gone: Sequence[str]) -> dict[str, bytes | None]:
    """The files that differ from what is known, in the order of their names.

    Each with its digest where that is known without reading it: the file only has another name now, or only the words
    next to it have changed.
    """
    # a renamed file keeps all that its stamp says
    moved: dict[FileStamp, bytes] = {}
    for path in gone:
        file = known[path]
        if file.digest is not None and file.stamp.mtime_ns != UNSETTLED:
            moved[file.stamp] = file.digest
    pending: dict[str, bytes | None] = {}
    for path, stamp in scan.stamps.items():
        file = known.get(path)
        if file is None:
            pending[path] = moved.get(stamp)
        elif file.stamp != stamp or stamp.mtime_ns == UNSETTLED or file.digest is None:
            # one that could not be opened is tried again: mended permissions leave no trace in a stamp
            pending[path] = None
        elif file.beside != scan.beside.get(path, "") or is_unsettled(file.beside):
            pending[path] = file.digest
    return pending


FOLDER_FIELDS = frozenset(
    (
        *("file", "folder", "width", "height", "taken", "year", "month", "camera", "latitude", "longitude"),
        *("caption", "language"),
    )
)
"""The fields that rows of a folder's index have where the images say so."""


class FolderReader:
    """Reads files of a folder in batches, a batch ahead of whoever takes them.

    view: gives the view of the model, and is called only for contents that are not among the known ones.
    known_digests: contents that need no decoding; it may grow meanwhile.
    """

    def __init__(
        self, root: Path, scan: FolderScan, *, view: Callable[[], View], known_digests: Container[bytes]
    ) -> None:
        self._root = root
        self._scan = scan
        self._view = view
        self._known_digests = known_digests

    def batches(self, pending: Mapping[str, bytes | None], size: int) -> Iterator[list[FileReading]]:
        """The pending files in their order, `size` of them at once."""
        paths = list(pending)
        # Pillow loads its readers with the first image, which threads must not do at once
        Image.init()
        pool = ThreadPoolExecutor(min(_MAX_THREADS, cpu_count() or 1))

        def submit(first: int) -> list[Future[FileReading]]:
            return [pool.submit(self._read, path, pending[path]) for path in paths[first : first + size]]

        try:
            # the next batch is read while the model embeds this one; more ahead would only hold more images
            ahead = submit(0)
            for first in range(0, len(paths), size):
                current = ahead
                ahead = submit(first + size)
                yield [future.result() for future in current]
        finally:
            # an error or an interrupt must not wait for a batch that nobody will take
            pool.shutdown(cancel_futures=True)

    def _read(self, path: str, digest: bytes | None) -> FileReading:
        file = FileRecord(
            path=path, stamp=self._scan.stamps[path], beside=self._scan.beside.get(path, ""), digest=digest
        )
        captions, metadata = self._words_beside(path)
        file = replace(file, captions=captions, metadata=metadata)
        # of a file that was moved, or whose words alone changed, not even the bytes are read
        if digest is not None and digest in self._known_digests:
            return FileReading(file=file)
        try:
            data = (self._root / path).read_bytes()
        except OSError as error:
            # without a digest the next update tries it again
            return FileReading(file=replace(file, digest=None, error=error.strerror or str(error)))
        file = replace(file, digest=content_digest(data))
        assert file.digest is not None
        if file.digest in self._known_digests:
            return FileReading(file=file)
        fields: dict[str, Any] = {}
        try:
            photo = read_photo(data, path)
            fields = photo.fields
            pixels = self._view()(photo.data)
        except BadSample as error:
            return FileReading(file=file, content=_content(file.digest, fields, str(error)))
        return FileReading(file=file, content=_content(file.digest, fields), pixels=pixels)

    def _words_beside(self, path: str) -> tuple[Captions, dict[str, Any]]:
        """The captions and the metadata next to an image; none where they cannot be read, for the image still can."""
        if path not in self._scan.beside:
            return {}, {}
        files = self._scan.files
        names = self._scan.names
        try:
            metadata = metadata_beside(files, path, names)
            has_words = has_words_beside(files, path, names)
            captions = captions_beside(files, path, names, metadata) if has_words else {}
        except BadSample as error:
            return {}, {"unreadable_words": str(error)}
        return captions, without_captions(metadata)


def _content(digest: bytes, fields: dict[str, Any], error: str = "") -> ContentRecord:
    return ContentRecord(digest=digest, vector=None, fields=fields, error=error)
