"""Tar shards: the index of their samples, and reading samples by number.

A shard is a plain tar in the WebDataset convention, from a source nobody vouches for: whole, damaged, or made to do
harm. Its headers are read once, guarded (`TarEntries`); the offsets of every sample's members are cached as an Arrow
file next to the shard (`open_index`); from then on a sample is one positioned read (`ShardReader`).
"""

import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from vlm.data.samples import Captions, Sample, parse_npy, parse_words
from vlm.data.shard_cache import ShardCache, default_cache
from vlm.data.tar_entries import TarEntries, TarEntry
from vlm.errors import BadSample, VlmError
from vlm.files import atomic_write, compute_fingerprint
from vlm.storage import (
    FileIdentity,
    file_identity,
    has_compressed_name,
    is_compressed,
    is_remote,
    local_path,
    needs_cache,
    read_small,
    sibling_url,
    url_basename,
)

IMAGE_EXTENSIONS = frozenset(
    {
        *("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "apng"),
        # JPEGs by the names that browsers and old systems give them
        *("jfif", "jpe", "jfi", "pjpeg", "pjp"),
    }
)
_ARRAY_SUFFIX = ".npy"
_FORMAT = "7"
_MAX_INDEX_BYTES = 256 << 20
_MAX_MEMBER_BYTES = 1 << 20
_MAX_UNUSED = 20
_ROLES = ("image", "text", "json")
_ROLE_OF_EXTENSION = dict.fromkeys(IMAGE_EXTENSIONS, "image") | {"txt": "text", "json": "json"}
_ARRAYS = pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("arrays", _ARRAYS),
    ]
)
"""Of the cached index; size -1 marks a part that a sample does not have."""


class Span(NamedTuple):
    """A byte range of the tar."""

    offset: int
    size: int


_ABSENT = Span(-1, -1)
"""Of a part that a sample does not have."""


class Member(NamedTuple):
    """One sample of a tar: its key and where its parts lie; None for a part it lacks.

    arrays: the stored arrays (`key.NAME.npy`) by name.
    """

    key: str
    image: Span | None
    text: Span | None
    json: Span | None
    arrays: dict[str, Span]

    @property
    def spans(self) -> list[Span]:
        """Where all its parts lie."""
        parts = (self.image, self.text, self.json, *self.arrays.values())
        return list(filter(None, parts))


class TarIndex:
    """The samples of one tar in file order; about 60 bytes each, memory-mapped.

    A sample is a run of consecutive members sharing the name up to the first dot of the base name
    (the WebDataset convention); a member that the run has already begins another sample, of the same key. Of images
    under several extensions the first is the sample's. damage: why the tar ends early, or empty. fingerprint: of the
    keys and the sizes of all parts; moving or renaming the tar does not change it. unused: members of samples that are
    not read, by extension; the most frequent.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        metadata = table.schema.metadata or {}
        self.damage = metadata.get(b"damage", b"").decode()
        self.fingerprint = metadata[b"fingerprint"].decode()
        self.unused = _read_counts(metadata.get(b"unused", b""))
        self._keys = _Texts(table, "key")
        self._arrays = table.column("arrays")
        self._has_arrays = _has_items(self._arrays)
        # as memory views of the mapped file, which cost a third of what a number of an array costs
        self._columns: list[memoryview] = []
        for role in _ROLES:
            for what in ("offset", "size"):
                self._columns.append(_numbers(table, f"{role}_{what}").data)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> Member:
        key, *places = self.places(number)
        image, text, json = map(_span_or_none, places[::2], places[1::2])
        return Member(key, image, text, json, self.arrays_of(number))

    def places(self, number: int) -> tuple[str, int, int, int, int, int, int]:
        """The key of a sample, and offset and size of image, text and JSON; a size of -1 says that it has none.

        The fast way to what `index[number]` tells, for the loader, which asks once for every sample of a run.
        """
        # written out, since a loop takes twice as long
        a, b, c, d, e, f = self._columns
        return self._keys[number], a[number], b[number], c[number], d[number], e[number], f[number]

    def arrays_of(self, number: int) -> dict[str, Span]:
        """Where the arrays of a sample lie, by name."""
        arrays: dict[str, Span] = {}
        if self._has_arrays:  # looked at once: turning an empty list of Arrow into Python's costs as much as all else
            for stored in self._arrays[number].as_py():
                arrays[stored["name"]] = Span(stored["offset"], stored["size"])
        return arrays

    def repeated_keys(self) -> list[str]:
        """The key of each sample that begins with a member whose name the sample before it has already."""
        return [key for before, key in pairwise(self.sample_keys()) if key == before]

    def sample_keys(self) -> list[str]:
        """The keys of all samples."""
        return self.table.column("key").to_pylist()

    def image_bytes(self) -> int:
        """Sum of the image sizes, in bytes."""
        sizes = _numbers(self.table, "image_size")
        return int(sizes[sizes > 0].sum())


def _has_items(lists: pa.ChunkedArray) -> bool:
    """Whether any of the lists of a column holds something."""
    return any(len(chunk.flatten()) for chunk in lists.chunks)


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column of integers without nulls, in the memory of the table where it lies there in one piece."""
    # to_numpy would import pandas where it is installed, in every process that opens a shard
    return np.from_dlpack(_one_chunk(table, column))


def _one_chunk(table: pa.Table, column: str) -> pa.Array:
    chunks = table.column(column).chunks
    # combine_chunks copies even a single one, which would take the index from the file's shared pages into each process
    return chunks[0] if len(chunks) == 1 else table.column(column).combine_chunks()


class _Texts:
    """A column of strings without nulls, read one by one: a scalar of Arrow costs four times as much."""

    def __init__(self, table: pa.Table, column: str) -> None:
        # held, since the views below do not keep the memory that they show
        self._array = _one_chunk(table, column)
        _, ends, characters = self._array.buffers()
        first = self._array.offset
        # of no strings, Arrow may leave the buffers out
        self._ends = memoryview(ends or bytes(4)).cast("i")[first:] if len(self._array) else memoryview(b"")
        self._characters = memoryview(characters or b"")

    def __getitem__(self, number: int) -> str:
        return str(self._characters[self._ends[number] : self._ends[number + 1]], "utf-8")


def _span_or_none(offset: int, size: int) -> Span | None:
    return Span(offset, size) if size >= 0 else None


def _read_counts(data: bytes) -> dict[str, int]:
    """Counts as an index holds them; none where they are not such, since a remote index is not trusted."""
    try:
        counts = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        return {}
    return counts


def open_index(url: str, cache: ShardCache | None = None) -> TarIndex:
    """The index of a tar: from its cache if that still fits the tar, else scanned and cached.

    The cache is next to the tar if its folder is writable, else under `~/.cache/vlm`. For a remote tar an index stored
    next to it is used if it was made of a tar of the same size; else the tar is fetched and scanned.
    cache: where remote and compressed tars are kept; the default one if not given.

    Raises:
        UsageError: there is no such tar, or it is compressed without saying so by its name.
        VlmError: nothing in it can be read, or it cannot be fetched.
    """
    url = local_path(url)
    identity = file_identity(url, cache.retry_policy if cache else None)
    # a plain local tar is the same with any cache: under one key, it is opened and held once
    return _open_version(url, identity, cache if needs_cache(url) else None)


# keyed by the identity too, so that a tar that was replaced is scanned again
@lru_cache(maxsize=256)
def _open_version(url: str, identity: FileIdentity, cache: ShardCache | None) -> TarIndex:
    stamp = f"{_FORMAT}/{identity.token}".encode()
    paths = _index_paths(url, stamp)
    for path in paths:
        table = _read_index(path, stamp)
        if table is not None:
            return TarIndex(table)

    table = _read_remote_index(url, identity, stamp, cache) if is_remote(url) else None
    table = table or _scan(url, identity, stamp, cache)
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            break
        except OSError:  # a full or read-only disk costs a scan next time, no more
            continue
    return TarIndex(table)


def _index_paths(url: str, stamp: bytes) -> list[Path]:
    """Where the cached index may lie, the best place first."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    central = base / "vlm" / "shard-index" / f"{compute_fingerprint(url, stamp)}.arrow"
    if is_remote(url):
        return [central]
    path = Path(url).absolute()
    # the mode too, not os.access alone: root may write into folders that are meant to be read-only
    is_writable = path.parent.stat().st_mode & stat.S_IWUSR and os.access(path.parent, os.W_OK)
    # an index next to a gzip under a plain name would have whoever copies both read the gzip by it
    hides_gzip = is_compressed(url) and not has_compressed_name(url)
    return [path.parent / _index_name(path.name), central] if is_writable and not hides_gzip else [central]


def _index_name(name: str) -> str:
    return f".{name}.vlm-index"


def _read_index(path: Path, stamp: bytes) -> pa.Table | None:
    """The cached index, unless it is damaged or of another version of the tar."""
    if not path.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError):
        return None
    return table if (table.schema.metadata or {}).get(b"identity") == stamp else None


def _read_remote_index(url: str, identity: FileIdentity, stamp: bytes, cache: ShardCache | None) -> pa.Table | None:
    """The index stored next to a remote tar, if it is whole and of a tar of this size."""
    url_of_index = sibling_url(url, _index_name(url_basename(url)))
    data = read_small(url_of_index, max_bytes=_MAX_INDEX_BYTES, retry_policy=cache.retry_policy if cache else None)
    try:
        table = pa.ipc.open_file(pa.py_buffer(data or b"")).read_all()
        # as little trusted as the tar itself: a wrong offset inside Arrow data would read past its buffers
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    metadata = table.schema.metadata or {}
    is_ours = metadata.get(b"format") == _FORMAT.encode() and b"fingerprint" in metadata
    has_nulls = any(column.null_count for column in table.columns)
    has_columns = table.schema.remove_metadata() == _SCHEMA and not has_nulls
    if not is_ours or not has_columns or metadata.get(b"tar_size") != str(identity.size).encode():
        return None
    return table.replace_schema_metadata({**metadata, b"identity": stamp})


def _scan(url: str, identity: FileIdentity, stamp: bytes, cache: ShardCache | None) -> pa.Table:
    """The index of a tar from its headers."""
    columns = _IndexColumns()
    with open_tar(url, identity, cache) as file:
        entries = TarEntries(file, url)
        for entry in entries:
            columns.add(entry)
    damage = entries.damage
    if needs_cache(url):
        # the cached copy ends where unpacking or fetching broke off; only the cache knows why
        damage = (cache or default_cache()).damage(url, identity) or damage
    table = columns.table()
    metadata = {"format": _FORMAT, "identity": stamp, "tar_size": str(identity.size), "damage": damage}
    metadata["unused"] = json.dumps(dict(columns.unused.most_common(_MAX_UNUSED)))
    # its keys as Python's texts, before the fingerprint makes others of them
    del columns
    return table.replace_schema_metadata({**metadata, "fingerprint": _content_fingerprint(table)})


def read_members(url: str, extension: str, cache: ShardCache | None = None) -> dict[str, bytes]:
    """The members `KEY.extension` of a tar, by key: those that the index does not tell, such as `KEY.cls`."""
    url = local_path(url)
    contents: dict[str, bytes] = {}
    with open_tar(url, file_identity(url, cache.retry_policy if cache else None), cache) as file:
        for entry in TarEntries(file, url):
            key, ending = _split_name(entry.name)
            if ending == extension and entry.size <= _MAX_MEMBER_BYTES:
                file.seek(entry.offset_data)
                contents[key] = file.read(entry.size)
    return contents


def _image_spans(url: str, name: str, cache: ShardCache | None) -> dict[int, Span]:
    """Where the images `KEY.NAME.jpg` lie, of any image's extension, by the number of their samples."""
    images: dict[int, Span] = {}
    columns = _IndexColumns()
    with open_tar(url, file_identity(url, cache and cache.retry_policy), cache) as file:
        for entry in TarEntries(file, url):
            # as the index is made, so that samples have the same numbers
            columns.add(entry)
            key, ending = _split_name(entry.name)
            stem, _, extension = ending.rpartition(".")
            if stem == name and extension in IMAGE_EXTENSIONS and columns.keys and columns.keys[-1] == key:
                images.setdefault(len(columns.keys) - 1, Span(entry.offset_data, entry.size))
    return images


def _split_name(name: str) -> tuple[str, str]:
    """The key and the lower-case extension of a member: its base name is split at the first dot.

    >>> _split_name("train/v1.0/0.LEFT.jpg")
    ('train/v1.0/0', 'left.jpg')
    """
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def open_tar(url: str, identity: FileIdentity, cache: ShardCache | None) -> BinaryIO:
    """A tar as a plain file: in its place, or in the cache (the default one if not given)."""
    if not needs_cache(url):
        return open(url, "rb")
    while True:
        try:
            return (cache or default_cache()).local_path(url, identity).open("rb")
        except FileNotFoundError:  # it made room for another shard in between
            continue


class _IndexColumns:
    """The samples of a tar while their members come, as columns: an object for each sample would take a kilobyte.

    unused: members that no sample uses, by extension.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.unused: Counter[str] = Counter()
        self._offsets = {role: array("q") for role in _ROLES}
        self._sizes = {role: array("q") for role in _ROLES}
        # few samples have any
        self._arrays: dict[int, list[tuple[str, int, int]]] = {}
        self._extensions: set[str] = set()

    def add(self, entry: TarEntry) -> None:
        """Put a member to the last sample, or begin another one with it."""
        key, extension = _split_name(entry.name)
        if not extension or not key or key.endswith("/"):  # no extension, or a hidden file
            return
        # even an extension that is of no use here begins a sample: other readers of the convention count it too
        if not self.keys or self.keys[-1] != key or extension in self._extensions:
            self._begin(key)
        role = _ROLE_OF_EXTENSION.get(extension)
        if extension.endswith(_ARRAY_SUFFIX):
            arrays = self._arrays.setdefault(len(self.keys) - 1, [])
            arrays.append((extension.removesuffix(_ARRAY_SUFFIX), entry.offset_data, entry.size))
        elif role and self._sizes[role][-1] < 0:
            self._offsets[role][-1] = entry.offset_data
            self._sizes[role][-1] = entry.size
        else:
            self.unused[extension] += 1
            if not role:
                return
        self._extensions.add(extension)

    def _begin(self, key: str) -> None:
        self.keys.append(key)
        self._extensions.clear()
        for role in _ROLES:
            # a mark rather than null: columns without nulls are read as numpy arrays without a copy
            self._offsets[role].append(-1)
            self._sizes[role].append(-1)

    def table(self) -> pa.Table:
        """All of them, as they are cached."""
        columns: list[pa.Array] = [text_array(self.keys)]
        for role in _ROLES:
            columns += (_integers(self._offsets[role]), _integers(self._sizes[role]))
        columns.append(self._stored_arrays())
        return pa.Table.from_arrays(columns, schema=_SCHEMA)

    def _stored_arrays(self) -> pa.Array:
        if self._arrays:
            return pa.array([self._arrays.get(number, ()) for number in range(len(self.keys))], _ARRAYS)
        return pa.ListArray.from_arrays(
            _integers(array("i", bytes(4 * len(self.keys) + 4))), pa.nulls(0, _ARRAYS.value_type)
        )


def text_array(texts: list[str]) -> pa.Array:
    """Texts as a column of Arrow."""
    # pa.array would import pandas where it is installed, which takes half a second and 30 MB
    builder = pa.lib.StringBuilder()
    builder.append_values(texts)
    return builder.finish()


def _integers(numbers: array) -> pa.Array:
    kind = pa.int64() if numbers.itemsize == 8 else pa.int32()
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def _content_fingerprint(table: pa.Table) -> str:
    """Of keys and sizes, not of offsets: padding and folders between the members do not count."""
    sizes = [_numbers(table, f"{role}_size").astype("<i8").tobytes() for role in _ROLES]
    arrays: list[str] = []
    column = table.column("arrays")
    for number, row in enumerate(column.to_pylist() if _has_items(column) else ()):
        for stored in row:
            arrays.append(f"{number}/{stored['name']}/{stored['size']}")
    return compute_fingerprint("\n".join(table.column("key").to_pylist()), *sizes, "\n".join(arrays))


Arrays = dict[str, np.ndarray]
"""Arrays of a sample by name."""

_SHOWN_ENDINGS = 4
# names of one word: in `Track 2.0 (clean).jpg` the dot is one of the title
_NAMED_IMAGE = re.compile(rf"[^\W\d][\w-]*\.({'|'.join(sorted(IMAGE_EXTENSIONS))})")
_MAX_GAP_BYTES = 16_384
_MAX_TRIES = 100


class ShardReader:
    """One tar: its index, and samples by number in any order.

    cache: where a remote or compressed tar is kept; the default one if not given. encoding: of captions and JSON,
    where they are not UTF-8. image_name: of a sample the image is `KEY.NAME.jpg`, not `KEY.jpg`.
    """

    def __init__(self, url: str, cache: ShardCache | None = None, *, encoding: str = "", image_name: str = "") -> None:
        self.url = url
        self._encoding = encoding
        self._cache = cache
        self.index: TarIndex = open_index(url, cache)
        path = local_path(url)
        self._image_name = image_name.lower()
        self._named_images = _image_spans(path, self._image_name, cache) if image_name else None
        self._bytes = _CachedBytes(path, cache or default_cache()) if needs_cache(path) else _LocalBytes(path)

    def __len__(self) -> int:
        return len(self.index)

    def close(self) -> None:
        """Release the file."""
        self._bytes.close()

    def key_and_offset(self, number: int) -> tuple[str, int]:
        """Key of a sample and where its first part begins, in bytes from the start of the plain tar."""
        member = self.index[number]
        return member.key, min((span.offset for span in member.spans), default=0)

    def _why_no_image(self, key: str) -> tuple[str, str]:
        """The reason and its detail; members of one key that do not follow each other are samples of their own."""
        # counted only once a sample fails: all keys as Python strings cost far more than the index
        if self._num_with_key[key] > 1:
            return "parts apart", (
                f"key {key!r} comes {self._num_with_key[key]} times; the parts of a sample must follow each other. "
                "vlm pack --kind texts puts them together"
            )
        if self._image_name:
            return "no image", f"key {key!r} has no image {key}.{self._image_name}.jpg (or .png, .webp, …)"
        endings = self._endings_without_image.get(key, [])
        detail = f"key {key!r} has no image that a shard may hold (jpg, png, webp, gif, avif, bmp, tif …)"
        if endings:
            detail += f", but {', '.join(map(repr, endings[:_SHOWN_ENDINGS]))}"
        names = [ending.rpartition(".")[0] for ending in endings if _NAMED_IMAGE.fullmatch(ending)]
        if names:
            detail += f". vlm pack --image-name {names[0]} takes {key}.{names[0]}.… as the image of {key}"
        elif any("." in ending for ending in endings):
            detail += ": a key ends at the first dot of the name. vlm pack --kind texts reads names to their last dot"
        elif set(endings) - {"txt", "json"}:
            detail += ". vlm pack --kind texts converts whatever image it can decode"
        return "no image", detail

    @cached_property
    def _endings_without_image(self) -> dict[str, list[str]]:
        """What the samples without an image have instead, by key; the index has no place for members of no use."""
        table = self.index.table
        has_none = _numbers(table, "image_size") < 0
        imageless = set(table.column("key").filter(pa.array(has_none)).to_pylist())
        endings: dict[str, list[str]] = {}
        path = local_path(self.url)
        with open_tar(path, file_identity(path, self._cache and self._cache.retry_policy), self._cache) as file:
            for entry in TarEntries(file, self.url):
                key, ending = _split_name(entry.name)
                if key in imageless and ending:
                    endings.setdefault(key, []).append(ending)
        return endings

    @cached_property
    def _num_with_key(self) -> Counter[str]:
        return Counter(self.index.sample_keys())

    def read(self, number: int, *, arrays: tuple[str, ...] = ()) -> Sample:
        """Sample `number` of this tar, with its arrays (`key.NAME.npy`) of these names.

        Raises:
            BadSample: it has no image, lacks an array, is cut short, or its JSON or an array cannot be read.
            VlmError: a shard that made room in the cache cannot be fetched again.
        """
        key, image_offset, image_size, text_offset, text_size, json_offset, json_size = self.index.places(number)
        if self._named_images is not None:
            image_offset, image_size = self._named_images.get(number, _ABSENT)
        if image_size < 0:
            raise BadSample(*self._why_no_image(key))
        spans = [(image_offset, image_size), (text_offset, max(text_size, 0)), (json_offset, max(json_size, 0))]
        if arrays:
            spans += self._array_spans(number, key, arrays)
        image, text, content, *array_files = self._bytes.read(spans)
        captions, metadata = parse_words(text, content if json_size >= 0 else None, self._encoding)
        parsed_arrays: Arrays = {}
        for name, data in zip(arrays, array_files, strict=True):
            parsed_arrays[name] = parse_npy(data, f"{key}.{name}.npy")
        return Sample(key, image, captions, metadata, parsed_arrays)

    def _array_spans(self, number: int, key: str, arrays: tuple[str, ...]) -> list[Span]:
        spans = self.index.arrays_of(number)
        for name in arrays:
            if name not in spans:
                raise BadSample("no array", f"key {key!r} has no {name}.npy")
        return [spans[name] for name in arrays]

    def read_words(self, number: int) -> tuple[str, Captions, dict[str, Any]]:
        """Key, captions and metadata of sample `number`, without a look at its image; raises as `read`."""
        key, _, _, text_offset, text_size, json_offset, json_size = self.index.places(number)
        text, content = self._bytes.read([(text_offset, max(text_size, 0)), (json_offset, max(json_size, 0))])
        return key, *parse_words(text, content if json_size >= 0 else None, self._encoding)


class _LocalBytes:
    """A local tar, kept open."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._end = os.fstat(self._descriptor).st_size

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span; raises BadSample where the tar is too short."""
        return _read_spans(self._descriptor, spans, self._path, end=self._end)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        # a number alone would stay open when its owner is gone
        if hasattr(self, "_descriptor"):
            self.close()


class _CachedBytes:
    """A tar in the cache: opened for each sample, so that it takes no space once it made room for another."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._url = url
        self._cache = cache
        self._identity = file_identity(url, cache.retry_policy)

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        for _ in range(_MAX_TRIES):
            try:
                descriptor = os.open(self._cache.local_path(self._url, self._identity), os.O_RDONLY)
            except FileNotFoundError:  # it made room for another shard just now
                continue
            try:
                return _read_spans(descriptor, spans, self._url, end=os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        raise VlmError(
            f"{self._url} left the cache at {self._cache.folder} {_MAX_TRIES} times before it could be read: too many "
            f"shards are read at once for its {self._cache.max_bytes:,} bytes; allow more by VLM_CACHE_GB."
        )

    def close(self) -> None:
        """Nothing is held."""


def _read_spans(descriptor: int, spans: Sequence[tuple[int, int]], url: str, *, end: int) -> list[bytes]:
    """The bytes of each span; a single read if they are close together, as those of a sample are."""
    first = end
    last = 0
    num_bytes = 0
    for offset, size in spans:
        if not size:
            continue
        stop = offset + size
        if offset < 0 or size < 0 or stop > end:  # checked first: a header may promise more than there is memory
            raise BadSample("cut short", f"{size:,} bytes at {offset:,} of {url}, which ends at {end:,}")
        # not min and max: this runs for each part of each sample, and a call costs as much as all the rest
        if offset < first:
            first = offset
        if stop > last:
            last = stop
        num_bytes += size
    # parts are adjacent but for headers and padding; a wide gap holds arrays or files nobody asked for
    if last - first - num_bytes > _MAX_GAP_BYTES:
        return [_read_span(descriptor, span, url) for span in spans]
    joined = _read_span(descriptor, (first, max(last - first, 0)), url)
    return [joined[offset - first : offset - first + size] for offset, size in spans]


def _read_span(descriptor: int, span: tuple[int, int], url: str) -> bytes:
    offset, size = span
    # positioned: forked workers share the file offset of an inherited descriptor
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise BadSample("cut short", f"{size:,} bytes at {offset:,} of {url}, {len(data):,} are there")
    return data
