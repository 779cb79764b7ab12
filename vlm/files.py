"""Atomic writes of files and folders, append-only logs, portable JSON, checksums and fingerprints."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from vlm.errors import UsageError


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The value as JSON; NaN and Infinity, which JSON does not have, become null.

    If a text cannot be encoded as UTF-8 (half of a surrogate pair), everything is escaped to ASCII.

    >>> json_text({"width": 4, "scores": [0.5, float("nan")]})
    '{"width": 4, "scores": [0.5, null]}'
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, default=default, allow_nan=False)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, indent=indent, default=default, allow_nan=False)
    # file names and JSON of others may hold halves of surrogate pairs, which no UTF-8 file can
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=default, allow_nan=False)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return value


_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; at the end of the block, fsync it and rename it to `path`.

    If the block raises (a full disk, a signal), `path` is unchanged and the temporary file is removed.
    """
    temporary = _temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            # on disk before the rename: else a power cut can leave an empty file under the final name
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    # KeyboardInterrupt and SystemExit too
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    write_bytes(path, text.encode())


def append_line(path: Path, line: str) -> None:
    """Append one line and fsync it, so that it is durable once this returns.

    A partial line that a crash or a full disk left at the end of the file is removed first.
    """
    with path.open("a+b") as file:
        if file.tell():
            # only the last byte is read, unless it shows a partial line
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[str]:
    """The complete lines of a file written by `append_line`, without a partial last one."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return whole.split("\n") if whole else []


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out` that is renamed to it if the block succeeds, else removed.

    Raises:
        UsageError: `out` exists.
        OSError: the disk is full or cannot be written.
    """
    check_not_exists(out)
    folder = _temporary_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        # works over an empty folder of that name, and fails over any other
        folder.rename(out)
        fsync_folder(out.parent)
    finally:
        # after the rename there is nothing left to remove
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_path(path: Path) -> Path:
    """A name next to `path`, random since process ids repeat: in threads of a process, and in containers."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")


def check_not_exists(out: Path) -> None:
    """Refuse to write a folder that exists, unless it is empty.

    Raises:
        UsageError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; name another folder or remove it.")


def check_parent_exists(out: Path) -> None:
    """Refuse a file whose folder does not exist, before the work whose result it is to hold.

    Raises:
        UsageError: there is no such folder.
    """
    if not out.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {str(out.parent)!r} for {out.name}; create it first.")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def content_digest(data: bytes | str, *, size: int = 16) -> bytes:
    """`size` bytes that tell contents apart (BLAKE2b)."""
    encoded = data.encode() if isinstance(data, str) else data
    return hashlib.blake2b(encoded, digest_size=size).digest()


def compute_fingerprint(*parts: bytes | str) -> str:
    """The first 16 hex digits of a SHA-256 over the parts, each preceded by its length.

    >>> compute_fingerprint("ab", "c") == compute_fingerprint("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        # names of files may hold bytes that are not UTF-8
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]
