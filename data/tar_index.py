"""The per-shard index: where each sample's members lie in a plain tar, built on first read and cached."""

import os
import stat
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from vlm.data.storage.addresses import base_name, is_remote, local_path, needs_cache, neighbour
from vlm.data.storage.cache import ShardCache, default_cache
from vlm.data.storage.remote import Identity, identity_of, read_small
from vlm.data.tar_scan import read_entries
from vlm.files import fingerprint_of, replacing

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "avif", "gif"})
_ARRAY = ".npy"
_FORMAT = "6"
_MAX_INDEX_BYTES = 256 << 20
_ROLES = ("image", "text", "json")
_ROLE_OF = dict.fromkeys(IMAGE_EXTENSIONS, "image") | {"txt": "text", "json": "json"}
_ARRAYS = pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        *((f"{role}_{what}", pa.int64()) for role in _ROLES for what in ("offset", "size")),
        ("arrays", _ARRAYS),
    ]
)


class Span(NamedTuple):
    """A byte range of the tar."""

    offset: int
    size: int


class Member(NamedTuple):
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
    (the WebDataset convention); a member that the run has already begins another sample, of the same key. Of pictures
    under several extensions the first is the sample's. damage: why the tar ends early, or empty. fingerprint: of the
    keys and the sizes of all parts; moving or renaming the tar does not change it.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        described = table.schema.metadata or {}
        self.damage = described.get(b"damage", b"").decode()
        self.fingerprint = described[b"fingerprint"].decode()
        self._arrays = table.column("arrays")
        self._has_arrays = any(len(chunk.flatten()) for chunk in self._arrays.chunks)
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
        spans: list[Span | None] = []
        for offsets, sizes in self._spans.values():
            size = sizes.item(number)
            spans.append(Span(offsets.item(number), size) if size >= 0 else None)
        arrays: dict[str, Span] = {}
        if self._has_arrays:
            stored = map(dict.values, self._arrays[number].as_py())
            arrays = {name: Span(offset, size) for name, offset, size in stored}
        image, text, json = spans
        return Member(self._keys[number].as_py(), image, text, json, arrays)

    def sample_keys(self) -> list[str]:
        """The keys of all samples."""
        return self._keys.to_pylist()

    def image_bytes(self) -> int:
        """Sum of the picture sizes, in bytes."""
        sizes = self._spans["image"][1]
        return int(sizes[sizes > 0].sum())


def open_index(address: str, cache: ShardCache | None = None) -> TarIndex:
    """The index of a tar: from its cache if that still fits the tar, else scanned and cached.

    The cache lies beside the tar where its folder may be written, else under `~/.cache/vlm`. For a remote tar an index
    that lies beside it there is taken if it was made of a tar of the same size; else the tar is fetched and scanned.
    cache: where remote and compressed tars are kept; the default one if not given.

    Raises:
        UsageError: there is no such tar, or it is compressed without saying so by its name.
        VlmError: nothing in it can be read, or it cannot be fetched.
    """
    address = local_path(address)
    return _open_version(address, identity_of(address, cache.patience if cache else None), cache)


@lru_cache(maxsize=256)
def _open_version(address: str, identity: Identity, cache: ShardCache | None) -> TarIndex:
    stamp = f"{_FORMAT}/{identity.token}".encode()
    for path in _cache_paths(address, stamp):
        table = _read_cache(path, stamp)
        if table is not None:
            return TarIndex(table)
    table = _beside_remote(address, identity, stamp, cache) if is_remote(address) else None
    table = table or _scan(address, identity, stamp, cache)
    for path in _cache_paths(address, stamp):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            break
        except OSError:
            continue
    return TarIndex(table)


def _cache_paths(address: str, stamp: bytes) -> list[Path]:
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    central = base / "vlm" / "shard-index" / f"{fingerprint_of(address, stamp)}.arrow"
    if is_remote(address):
        return [central]
    path = Path(address).absolute()
    # the mode is asked, not os.access: root may write into folders that are meant to be read-only
    is_writable = path.parent.stat().st_mode & stat.S_IWUSR and os.access(path.parent, os.W_OK)
    return [path.parent / _index_name(path.name), central] if is_writable else [central]


def _index_name(name: str) -> str:
    return f".{name}.vlm-index"


def _read_cache(cache: Path, stamp: bytes) -> pa.Table | None:
    if not cache.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(cache))).read_all()
    except (pa.ArrowInvalid, OSError):
        return None
    return table if (table.schema.metadata or {}).get(b"identity") == stamp else None


def _beside_remote(address: str, identity: Identity, stamp: bytes, cache: ShardCache | None) -> pa.Table | None:
    """The index that lies beside a remote tar, if it is whole and of a tar of this size."""
    beside = neighbour(address, _index_name(base_name(address)))
    data = read_small(beside, max_bytes=_MAX_INDEX_BYTES, patience=cache.patience if cache else None)
    try:
        table = pa.ipc.open_file(pa.py_buffer(data or b"")).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    facts = table.schema.metadata or {}
    is_ours = facts.get(b"format") == _FORMAT.encode() and b"fingerprint" in facts
    has_columns = table.schema.remove_metadata() == _SCHEMA and not any(column.null_count for column in table.columns)
    if not is_ours or not has_columns or facts.get(b"tar_size") != str(identity.size).encode():
        return None
    return table.replace_schema_metadata({**facts, b"identity": stamp})


def _scan(address: str, identity: Identity, stamp: bytes, cache: ShardCache | None) -> pa.Table:
    rows: list[_Row] = []
    with _open_plain(address, identity, cache) as file:
        entries, damage = read_entries(file, address)
    if needs_cache(address):
        damage = (cache or default_cache()).damage(address, identity) or damage
    for entry in entries:
        _place(rows, entry)
    table = _table(rows)
    facts = {"format": _FORMAT, "identity": stamp, "tar_size": str(identity.size), "damage": damage}
    return table.replace_schema_metadata({**facts, "fingerprint": _content_fingerprint(table)})


def _open_plain(address: str, identity: Identity, cache: ShardCache | None) -> BinaryIO:
    if not needs_cache(address):
        return open(address, "rb")
    while True:
        try:
            return (cache or default_cache()).local_path(address, identity).open("rb")
        except FileNotFoundError:  # made room for another in between
            continue


@dataclass
class _Row:
    key: str
    parts: dict[str, Span] = field(default_factory=dict)
    arrays: dict[str, Span] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)


def _table(rows: list[_Row]) -> pa.Table:
    columns: dict[str, Any] = {"key": pa.array([row.key for row in rows], pa.string())}
    absent = Span(-1, -1)
    for role in _ROLES:
        spans = [row.parts.get(role, absent) for row in rows]
        columns[f"{role}_offset"] = pa.array([span.offset for span in spans], pa.int64())
        columns[f"{role}_size"] = pa.array([span.size for span in spans], pa.int64())
    arrays = [[(name, *span) for name, span in row.arrays.items()] for row in rows]
    columns["arrays"] = pa.array(arrays, _ARRAYS)
    return pa.table(columns, _SCHEMA)


def _content_fingerprint(table: pa.Table) -> str:
    sizes = [table.column(f"{role}_size").to_numpy().astype("<i8").tobytes() for role in _ROLES]
    arrays = [
        f"{number}/{name}/{size}"
        for number, row in enumerate(table.column("arrays").to_pylist())
        for name, _, size in map(dict.values, row)
    ]
    return fingerprint_of("\n".join(table.column("key").to_pylist()), *sizes, "\n".join(arrays))


def _place(rows: list[_Row], entry: tarfile.TarInfo) -> None:
    folder, _, name = entry.name.rpartition("/")
    stem, _, extension = name.partition(".")
    extension = extension.lower()
    if not stem or not extension:
        return
    role = _ROLE_OF.get(extension)
    key = f"{folder}/{stem}" if folder else stem
    if not rows or rows[-1].key != key or extension in rows[-1].extensions:
        rows.append(_Row(key))
    row, span = rows[-1], Span(entry.offset_data, entry.size)
    if role:
        row.parts.setdefault(role, span)
    elif extension.endswith(_ARRAY):
        row.arrays[extension.removesuffix(_ARRAY)] = span
    else:
        return
    row.extensions.add(extension)
