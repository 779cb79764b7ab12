"""What is known of a folder of images, in one SQLite file: its files, what they hold, and what its index has of them.

`contents` has a row for each distinct content, by its digest: the vector, and the fields read from the image, or why it
cannot be read. `files` says which content lies where. An image that is moved, copied, or put back is thereby never
embedded twice, and the index can be made again from here alone. Each batch is one transaction, so a process killed at
any moment loses no more than the batch it was in.

A file's `wanted` is the digest of its row as the index should have it, `indexed` of the row that it has.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm.data.samples import Captions
from vlm.errors import UsageError, VlmError
from vlm.files import content_digest, json_text
from vlm.index.embeddings_folder import EmbeddingSpace, Origin, captions_from_json
from vlm.service.folder.folder_scan import FileStamp
from vlm.tensor_types import Array, Float

FORMAT = 1
_ROWS_AT_ONCE = 4096
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE contents (
    digest BLOB PRIMARY KEY,
    vector BLOB,
    fields TEXT NOT NULL,
    error TEXT NOT NULL
);
CREATE TABLE files (
    path TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    beside TEXT NOT NULL,
    digest BLOB,
    captions TEXT NOT NULL,
    metadata TEXT NOT NULL,
    error TEXT NOT NULL,
    is_gone INTEGER NOT NULL DEFAULT 0,
    wanted BLOB,
    indexed BLOB
);
"""
_PUT_FILE = """
INSERT INTO files (path, size, mtime_ns, inode, beside, digest, captions, metadata, error, wanted)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, inode = excluded.inode,
    beside = excluded.beside, digest = excluded.digest, captions = excluded.captions, metadata = excluded.metadata,
    error = excluded.error, wanted = excluded.wanted, is_gone = 0
"""
_READABLE = "FROM files JOIN contents USING (digest) WHERE vector IS NOT NULL AND NOT is_gone"
_NEW_ROWS = f"{_READABLE} AND indexed IS NOT wanted"
_OLD_ROWS = f"FROM files WHERE indexed IS NOT NULL AND path NOT IN (SELECT path {_READABLE})"


class KnownFile(NamedTuple):
    """A file as it was when it was last read; digest None: it could not be. wanted: as of `FileRecord`."""

    stamp: FileStamp
    beside: str
    digest: bytes | None
    wanted: bytes | None


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was read. captions, metadata: of the texts and the JSON next to it. error: why it has no digest."""

    path: str
    stamp: FileStamp
    beside: str
    digest: bytes | None
    captions: Captions = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def wanted(self) -> bytes | None:
        """The digest of all that the file's row in the index depends on; None: it has none."""
        if self.digest is None:
            return None
        # not the time: a file that was only touched keeps its row
        parts = (self.path, self.stamp.size, self.digest.hex(), self.captions, self.metadata)
        return content_digest(json.dumps(parts))


@dataclass(frozen=True, kw_only=True, eq=False)
class ContentRecord:
    """What the bytes of an image gave: a vector and the fields of `vlm.data.photo_formats.Photo`, or an error."""

    digest: bytes
    vector: Float[Array, " D"] | None
    fields: dict[str, Any]
    error: str = ""


class FolderState:
    """The open file; for one process at a time, which holds the folder's lock.

    Raises:
        UsageError: another version of this package wrote it. VlmError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors_as_ours():
            # transactions are begun by hand: Python's own begin with the first change, after what was read for it
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            # readers of files on a network cannot share memory, which the write-ahead log needs
            self._database.execute("PRAGMA journal_mode = TRUNCATE")
            with self._transaction():
                is_new = not self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
                for statement in filter(str.strip, _SCHEMA.split(";") if is_new else ()):
                    self._database.execute(statement)
                if is_new:
                    self._set("format", FORMAT)
            if self._get("format") != FORMAT:
                raise UsageError(
                    f"{path} has format {self._get('format')}, this version reads {FORMAT}; embed the folder again "
                    "with --rebuild."
                )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @property
    def root(self) -> str:
        """The folder; empty before the first `begin`."""
        return self._get("root") or ""

    @property
    def space(self) -> EmbeddingSpace | None:
        """The model of all vectors; None before the first `begin`."""
        values = self._get("space")
        return None if values is None else EmbeddingSpace(**values)

    @property
    def model(self) -> str:
        """The model that the first update was told to use; empty if it has not got so far."""
        return self._get("model") or ""

    def keep_model(self, spec: str) -> None:
        """Note the model before it is loaded, which may take long and be killed; empty forgets it."""
        with self._errors_as_ours(), self._transaction():
            self._set("model", spec)

    def begin(self, root: str, space: EmbeddingSpace, readers: str) -> None:
        """Set the folder, the model and what identifies the installed readers of images.

        Where the readers have changed, images that could not be read are tried again; where the folder was moved, all
        rows of the index are written again.
        """
        with self._errors_as_ours(), self._transaction():
            # a reader of HEIC, say, was installed since
            if self._get("readers") not in (None, readers):
                self._database.execute(
                    "UPDATE files SET digest = NULL WHERE digest IN (SELECT digest FROM contents WHERE vector IS NULL)"
                )
                self._database.execute("DELETE FROM contents WHERE vector IS NULL")
            # rows hold the whole path of their image; x'00' equals no digest, so that all of them count as new
            if self.root not in ("", root):
                self._database.execute("UPDATE files SET indexed = x'00' WHERE indexed IS NOT NULL")
            self._set("root", root)
            self._set("space", asdict(space))
            self._set("readers", readers)

    def files(self) -> dict[str, KnownFile]:
        """The files by their paths, without those that are gone."""
        query = "SELECT path, size, mtime_ns, inode, beside, digest, wanted FROM files WHERE NOT is_gone"
        files: dict[str, KnownFile] = {}
        with self._errors_as_ours():
            for path, size, mtime_ns, inode, beside, digest, wanted in self._database.execute(query):
                stamp = FileStamp(size, mtime_ns, inode)
                files[path] = KnownFile(stamp=stamp, beside=beside, digest=digest, wanted=wanted)
        return files

    def digests(self) -> set[bytes]:
        """Of every content that was read."""
        with self._errors_as_ours():
            return set(map(itemgetter(0), self._database.execute("SELECT digest FROM contents")))

    def unreadable_digests(self) -> set[bytes]:
        """Of the contents that cannot be read."""
        query = "SELECT digest FROM contents WHERE vector IS NULL"
        with self._errors_as_ours():
            return set(map(itemgetter(0), self._database.execute(query)))

    def unreadable(self) -> dict[str, str]:
        """The files that cannot be read, with the reason."""
        query = (
            "SELECT path, iif(files.digest IS NULL, files.error, contents.error) FROM files LEFT JOIN contents"
            " USING (digest) WHERE vector IS NULL AND NOT is_gone ORDER BY path"
        )
        with self._errors_as_ours():
            return dict(self._database.execute(query).fetchall())

    def path_of(self, digest: bytes) -> str | None:
        """An indexed file of this content, the first by name."""
        query = f"SELECT path {_READABLE} AND digest = ? AND indexed IS NOT NULL ORDER BY path LIMIT 1"
        with self._errors_as_ours():
            row = self._database.execute(query, (digest,)).fetchone()
        return row[0] if row else None

    def mark_gone(self, paths: Iterable[str]) -> None:
        """These files are no longer there; they stay known until `set_indexed`, for the index has their rows."""
        with self._errors_as_ours(), self._transaction():
            self._database.executemany("UPDATE files SET is_gone = 1 WHERE path = ?", ((path,) for path in paths))

    def record(self, files: Sequence[FileRecord], contents: Sequence[ContentRecord]) -> None:
        """Store what a batch of files gave, all or nothing."""
        # rows are made before the transaction begins, so that it is as short as can be
        content_rows: list[tuple[Any, ...]] = []
        for content in contents:
            vector = None if content.vector is None else content.vector.tobytes()
            content_rows.append((content.digest, vector, json_text(content.fields), content.error))
        file_rows: list[tuple[Any, ...]] = []
        for file in files:
            words = (json_text(file.captions), json_text(file.metadata))
            file_rows.append((file.path, *file.stamp, file.beside, file.digest, *words, file.error, file.wanted))
        with self._errors_as_ours(), self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", content_rows)
            self._database.executemany(_PUT_FILE, file_rows)

    @property
    def index_fingerprint(self) -> str:
        """Of the index as `set_indexed` last knew it; empty if there was none."""
        return self._get("index_fingerprint") or ""

    def forget_index(self) -> None:
        """The index has no rows."""
        with self._errors_as_ours(), self._transaction():
            self._database.execute("DELETE FROM files WHERE is_gone")
            self._database.execute("UPDATE files SET indexed = NULL")
            self._set("index_fingerprint", "")

    def set_indexed(self, fingerprint: str) -> None:
        """The index of this fingerprint has all rows as they are wanted, and no other."""
        with self._errors_as_ours(), self._transaction():
            self._database.execute("DELETE FROM files WHERE is_gone")
            # files that cannot be read have lost their rows, too
            self._database.execute(f"UPDATE files SET indexed = NULL WHERE path NOT IN (SELECT path {_READABLE})")
            self._database.execute(f"UPDATE files SET indexed = wanted WHERE path IN (SELECT path {_NEW_ROWS})")
            self._set("index_fingerprint", fingerprint)
            # contents without a file may come back, as a file moved in two steps does, but not without end
            unused = "FROM contents WHERE digest NOT IN (SELECT digest FROM files WHERE digest IS NOT NULL)"
            if 2 * self._count(unused) > self._count("FROM contents"):
                self._database.execute(f"DELETE {unused}")

    def num_readable(self) -> int:
        """Number of rows that the index should have."""
        with self._errors_as_ours():
            return self._count(_READABLE)

    def num_new_rows(self) -> int:
        """Number of rows that the index lacks or has otherwise."""
        with self._errors_as_ours():
            return self._count(_NEW_ROWS)

    def old_uids(self) -> list[str]:
        """The uids of rows that the index should no longer have."""
        with self._errors_as_ours():
            return list(map(itemgetter(0), self._database.execute(f"SELECT path {_OLD_ROWS} ORDER BY path")))

    def new_origins(self) -> Iterator[Origin]:
        """The rows that the index lacks or has otherwise, by path; an image is a shard of its own."""
        root = self.root
        query = f"SELECT path, size, captions, metadata, fields {_NEW_ROWS} ORDER BY path"
        for path, size, captions, metadata, fields in self._rows(query):
            folder = path.rpartition("/")[0]
            # what somebody wrote next to an image has the last word
            described = {"file": path, "folder": folder} | json.loads(fields) | json.loads(metadata)
            yield Origin(
                uid=path,
                key=path,
                shard=f"{root}/{path}",
                number=0,
                image_offset=0,
                image_size=size,
                caption_number=None,
                captions=captions_from_json(captions),
                metadata=described,
            )

    def new_vectors(self) -> Iterator[Float[Array, "N D"]]:
        """The vectors of `new_origins`, in blocks."""
        block: list[bytes] = []
        for (vector,) in self._rows(f"SELECT vector {_NEW_ROWS} ORDER BY path"):
            block.append(vector)
            if len(block) == _ROWS_AT_ONCE:
                yield _matrix(block)
                block = []
        if block:
            yield _matrix(block)

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        with self._errors_as_ours():
            yield from self._database.execute(query)

    def _count(self, source: str) -> int:
        return self._database.execute(f"SELECT count(*) {source}").fetchone()[0]

    def _get(self, name: str) -> Any:
        with self._errors_as_ours():
            row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def _set(self, name: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json_text(value)))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # after an interrupt as well: SQLite begins no transaction within another
            self._database.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _errors_as_ours(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            raise VlmError(
                f"{self.path} cannot be read or written ({error}); make room if the disk is full, else embed the "
                "folder again with --rebuild."
            ) from error


def _matrix(vectors: Sequence[bytes]) -> Float[Array, "N D"]:
    return np.frombuffer(b"".join(vectors), np.float16).reshape(len(vectors), -1)
