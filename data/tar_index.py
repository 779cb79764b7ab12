"""The per-shard index: where each sample's members lie in a plain tar, built on first read and cached."""

import os
import stat
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import pyarrow as pa

from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of, replacing

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "avif", "gif"})
_ARRAY = ".npy"
_FORMAT = "4"
_ROLES = ("image", "text", "json")
_ARRAY_TYPE = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])


class Span(NamedTuple):
    """A byte range of the tar."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """One sample of a tar: its key and where its parts lie; None for a part it lacks.

    arrays: the stored arrays (`key.NAME.npy`) by name.
    """

    key: str
    image: Span | None
    text: Span | None
    json: Span | None
    arrays: dict[str, Span]


class TarIndex:
    """The samples of one tar in file order; about 60 bytes each, memory-mapped.

    A sample is a run of consecutive members sharing the name up to the first dot of the base name
    (the WebDataset convention). damage: why the tar ends early, or empty. fingerprint: of the keys and the
    sizes of all parts; moving or renaming the tar does not change it.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        described = table.schema.metadata or {}
        self.damage = described.get(b"damage", b"").decode()
        self.fingerprint = described[b"fingerprint"].decode()
        self._arrays = table.column("arrays")
        self._keys = table.column("key")
        self._spans = {
            role: (
                table.column(f"{role}_offset").to_numpy(zero_copy_only=False),
                table.column(f"{role}_size").to_numpy(zero_copy_only=False),
            )
            for role in _ROLES
        }

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> Member:
        spans: dict[str, Any] = {}
        for role, (offsets, sizes) in self._spans.items():
            size = int(sizes[number])
            spans[role] = Span(int(offsets[number]), size) if size >= 0 else None
        arrays = {name: Span(offset, size) for name, offset, size in map(dict.values, self._arrays[number].as_py())}
        return Member(key=self._keys[number].as_py(), arrays=arrays, **spans)

    def sample_keys(self) -> list[str]:
        """The keys of all samples."""
        return self._keys.to_pylist()

    def image_bytes(self) -> int:
        """Sum of the picture sizes, in bytes."""
        sizes = self._spans["image"][1]
        return int(sizes[sizes > 0].sum())


def open_index(address: str) -> TarIndex:
    """The index of a tar: from its cache if that still fits the tar, else scanned and cached.

    The cache lies beside the tar where its folder may be written, else under `~/.cache/vlm`.

    Raises:
        UsageError: there is no such tar, or it is compressed.
        VlmError: nothing in it can be read.
    """
    return _open_version(address, _identity(address))


@lru_cache(maxsize=256)
def _open_version(address: str, identity: bytes) -> TarIndex:
    for cache in _cache_paths(address, identity):
        table = _read_cache(cache, identity)
        if table is not None:
            return TarIndex(table)
    table = _scan(address, identity)
    for cache in _cache_paths(address, identity):
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cache) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            break
        except OSError:
            continue
    return TarIndex(table)


def _identity(address: str) -> bytes:
    """What tells one version of a tar from another: its size and time of change."""
    try:
        if "://" not in address:
            status = os.stat(address)
            return f"{_FORMAT}/{status.st_size}/{status.st_mtime_ns}".encode()
        system, path = fsspec.core.url_to_fs(address)
        info = system.info(path)
    except FileNotFoundError as error:
        raise UsageError(f"There is no shard {address!r}.") from error
    changed = info.get("ETag") or info.get("LastModified") or info.get("mtime") or ""
    return f"{_FORMAT}/{info['size']}/{changed}".encode()


def _cache_paths(address: str, identity: bytes) -> list[Path]:
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    central = base / "vlm" / "shard-index" / f"{fingerprint_of(address, identity)}.arrow"
    if "://" in address:
        return [central]
    path = Path(address).absolute()
    # the mode is asked, not os.access: root may write into folders that are meant to be read-only
    is_writable = path.parent.stat().st_mode & stat.S_IWUSR and os.access(path.parent, os.W_OK)
    return [path.parent / f".{path.name}.vlm-index", central] if is_writable else [central]


def _read_cache(cache: Path, identity: bytes) -> pa.Table | None:
    if not cache.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(cache))).read_all()
    except (pa.ArrowInvalid, OSError):
        return None
    return table if (table.schema.metadata or {}).get(b"identity") == identity else None


def _scan(address: str, identity: bytes) -> pa.Table:
    with cast(BinaryIO, cast(fsspec.core.OpenFile, fsspec.open(address, "rb")).open()) as file:
        entries, damage = read_entries(file, address)
    rows: list[_Row] = []
    for entry in entries:
        _place(rows, entry)
    table = _table(rows)
    return table.replace_schema_metadata(
        {"identity": identity, "damage": damage, "fingerprint": _content_fingerprint(table)}
    )


@dataclass
class _Row:
    key: str
    parts: dict[str, Span] = field(default_factory=dict)
    arrays: dict[str, Span] = field(default_factory=dict)


def _table(rows: list[_Row]) -> pa.Table:
    columns: dict[str, Any] = {"key": pa.array([row.key for row in rows], pa.string())}
    absent = Span(-1, -1)
    for role in _ROLES:
        spans = [row.parts.get(role, absent) for row in rows]
        columns[f"{role}_offset"] = pa.array([span.offset for span in spans], pa.int64())
        columns[f"{role}_size"] = pa.array([span.size for span in spans], pa.int64())
    arrays = [[(name, *span) for name, span in row.arrays.items()] for row in rows]
    columns["arrays"] = pa.array(arrays, pa.list_(_ARRAY_TYPE))
    return pa.table(columns)


def _content_fingerprint(table: pa.Table) -> str:
    sizes = [table.column(f"{role}_size").to_numpy().astype("<i8").tobytes() for role in _ROLES]
    arrays = [
        f"{number}/{name}/{size}"
        for number, row in enumerate(table.column("arrays").to_pylist())
        for name, _, size in map(dict.values, row)
    ]
    return fingerprint_of("\n".join(table.column("key").to_pylist()), *sizes, "\n".join(arrays))


def read_entries(file: BinaryIO, address: str) -> tuple[list[tarfile.TarInfo], str]:
    """The regular files of a plain tar, and why it ends early, or an empty string.

    Raises:
        UsageError: it is compressed.
        VlmError: not even its first header can be read.
    """
    if file.read(2) == b"\x1f\x8b":
        raise UsageError(f"{address} is compressed; tars are read by position: unpack it with gunzip first.")
    file.seek(0)
    entries: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.size < 0:  # would send tarfile backwards, for ever
                    return entries, f"a negative size at byte {entry.offset:,}"
                if entry.isreg():
                    entries.append(entry)
            damage = _missing_end(file, tar.offset)
    except tarfile.TarError as error:
        if not entries:
            raise VlmError(f"{address} is not a tar, or is damaged from the start: {error}.") from error
        last = entries[-1]
        damage = f"{error} after byte {last.offset_data:,} ({last.name})"
    return entries, damage


def _missing_end(file: BinaryIO, offset: int) -> str:
    """Why reading stopped at `offset`; empty at the block of zeros that closes a whole tar.

    tarfile itself takes a cut between two members, or an unreadable header, for the end.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return ""
    is_cut = len(block) < tarfile.BLOCKSIZE
    return f"cut short at byte {offset:,}, without its end mark" if is_cut else f"unreadable header at byte {offset:,}"


def _place(rows: list[_Row], entry: tarfile.TarInfo) -> None:
    folder, _, name = entry.name.rpartition("/")
    stem, _, extension = name.partition(".")
    extension = extension.lower()
    if not stem or not extension:
        return
    key = f"{folder}/{stem}" if folder else stem
    if not rows or rows[-1].key != key:
        rows.append(_Row(key))
    span = Span(entry.offset_data, entry.size)
    role = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text", "json": "json"}.get(extension)
    if role:
        rows[-1].parts[role] = span
    elif extension.endswith(_ARRAY):
        rows[-1].arrays[extension.removesuffix(_ARRAY)] = span
