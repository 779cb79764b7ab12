"""The embeddings folder: one part per shard, written in any order by any number of processes, read as one matrix.

A part is a matrix (.npy), a Parquet table whose row i says what row i of the matrix was made from, quantized copies of
the matrix if asked for, and a marker that is written last. `EmbeddingsWriter` adds parts to an unfinished folder, which
may be killed at any moment and resumed; the manifest comes last, and from then on `Embeddings` opens the folder.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vlm.data.samples import Captions
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write, compute_fingerprint, json_text, read_lines, sha256_file, write_text
from vlm.manifest import (
    MANIFEST,
    PROGRESS,
    FileRecord,
    Manifest,
    begin_or_resume_folder,
    check_files,
    damage_as_error,
    is_complete,
    read_manifest,
    record_file,
    sorted_checksums,
    write_manifest,
)
from vlm.tensor_types import Array, Float, Float32, Int, Int64, UInt8

# imported where they are used: an index, which reads none of the tables, opens in half the time
if TYPE_CHECKING:
    import pyarrow

Quantization = Literal["int8", "binary"]

QUANTIZED_FILES: dict[Quantization, tuple[str, ...]] = {
    "int8": ("int8.npy", "int8-scales.npy"),
    "binary": ("binary.npy",),
}
"""Suffixes of a quantized copy's files, after the name of their part."""


def quantize(vectors: Float[Array, "N D"], code: Quantization) -> tuple[Array, ...]:
    """The arrays of a quantized copy, in the order of `QUANTIZED_FILES`."""
    return quantize_int8(vectors) if code == "int8" else (quantize_binary(vectors),)


def quantize_int8(vectors: Float[Array, "N D"]) -> tuple[Int[Array, "N D"], Float32[Array, " N"]]:
    """Integers from -127 to 127, and the scale of each row: `codes * scales[:, None]` are the vectors again.

    Their error is at most half the row's scale, which is a 254th of the row's largest number.
    """
    # without a zero point: 0 stays 0, so the product of two rows' codes needs no correction
    wide = vectors.astype(np.float32)
    scales = np.abs(wide).max(axis=1) / np.float32(127)
    return np.rint(wide / scales[:, None]).astype(np.int8), scales


def quantize_binary(vectors: Float[Array, "N D"]) -> UInt8[Array, "N _"]:
    """One bit per number, 1 if it is above 0; eight to a byte with the first one highest, padded with zeros.

    >>> quantize_binary(np.array([[0.5, -0.5, 0.0, 0.7]])).tolist()
    [[144]]
    """
    return np.packbits(vectors > 0, axis=1)


PARTS = "parts"
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an embedding was made from.

    uid: unique in the folder (`ids.py`). key: of the sample.
    shard, number: the tar's address, and the sample's position in it, from 0; of an image that is a file of its own,
        the file's address.
    image_offset, image_size: the byte range of the encoded image in the tar.
    caption_number: which of the sample's captions was embedded, from 0; None for an image embedding.
    captions: all captions of an image, or the one that was embedded.
    """

    uid: str
    key: str
    shard: str
    number: int
    image_offset: int
    image_size: int
    caption_number: int | None
    captions: Captions
    metadata: dict[str, Any]

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own, whose address `shard` is."""
        # in a tar, a header precedes every member
        return self.image_size > 0 and self.image_offset == 0

    @property
    def path(self) -> str:
        """Where the image lies: a file, or `SHARD/KEY` for a member of a shard; empty for a row without an image."""
        if not self.image_size:
            return ""
        return self.shard if self.is_file else f"{self.shard}/{self.key}"


@dataclass(frozen=True, kw_only=True)
class SkippedSampleRecord:
    """A sample that has no embedding, and why: one line of `incidents.jsonl`."""

    part: str
    shard: str
    number: int
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class VectorStorage:
    """How vectors are stored. codes: quantized copies in addition."""

    store: Literal["float16", "float32"] = "float16"
    codes: tuple[Quantization, ...] = ()


FLOAT16 = VectorStorage()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One finished part: its shard, its number of rows and of skipped samples (`bad`), its files with checksums."""

    name: str
    shard: str
    rows: int
    bad: int
    files: dict[str, FileRecord]

    def to_line(self) -> str:
        """As one line of `parts.jsonl`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str) -> "Part":
        """The inverse of `to_line`."""
        return cls.from_values(json.loads(line))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Part":
        """From plain JSON values."""
        files = {name: FileRecord(**record) for name, record in values["files"].items()}
        return cls(**(values | {"files": files}))  # pyright: ignore[reportArgumentType]


class PartMarker(NamedTuple):
    """What the marker of a part says."""

    part: Part
    incidents: list[SkippedSampleRecord]


def part_name(number: int) -> str:
    """The name of the part of shard `number`.

    >>> part_name(3)
    'part-00003'
    """
    return f"part-{number:05d}"


def write_part(
    folder: Path,
    name: str,
    vectors: Float[Array, "N D"],
    origins: Sequence[Origin],
    *,
    shard: str,
    bad: int,
    storage: VectorStorage = FLOAT16,
) -> Part:
    """Write the files of a part, each atomically."""
    from pyarrow import parquet

    # codes come from the vectors as they were computed, not from their rounded copies
    stored = {"npy": vectors.astype(storage.store)}
    for code in storage.codes:
        stored |= zip(QUANTIZED_FILES[code], quantize(vectors, code), strict=True)
    # the marker that follows names all of these, so their order does not matter
    paths = {suffix: folder / PARTS / f"{name}.{suffix}" for suffix in (*stored, "parquet")}
    for suffix, array in stored.items():
        with atomic_write(paths[suffix]) as file:
            np.save(file, array, allow_pickle=False)
    with atomic_write(paths["parquet"]) as file:
        parquet.write_table(_table(origins), file, compression="zstd")
    files = {f"{PARTS}/{path.name}": record_file(path) for path in paths.values()}
    return Part(name=name, shard=shard, rows=len(origins), bad=bad, files=files)


def write_marker(folder: Path, part: Part, incidents: Sequence[SkippedSampleRecord]) -> None:
    """Write the marker of a part, after its files; from then on the part survives any crash."""
    values = asdict(part) | {"incidents": list(map(asdict, incidents))}
    write_text(_marker_path(folder, part.name), json.dumps(values, ensure_ascii=False) + "\n")


def read_marker(folder: Path, name: str, *, verify: bool = False) -> PartMarker | None:
    """The marker of a part; None if there is none, or its files differ from those it names.

    verify: compare checksums too, not only sizes.
    """
    try:
        values = json.loads(_marker_path(folder, name).read_text(encoding="utf-8"))
        incidents = [SkippedSampleRecord(**incident) for incident in values.pop("incidents")]
        part = Part.from_values(values)
    # whatever JSON a damaged file may hold, the part is made again
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for file, record in part.files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != record.bytes:
            return None
        if verify and sha256_file(path) != record.sha256:
            return None
    return PartMarker(part, incidents)


def open_vectors(folder: Path, part: Part) -> Float[Array, "N D"]:
    """The matrix of a part in its stored precision, memory-mapped.

    Raises:
        VlmError: it is damaged or has another number of rows than its line says.
    """
    vectors = _open_array(folder, part, "npy")
    if vectors.ndim != 2:
        raise VlmError(
            f"{part.name}.npy of {folder} has shape {vectors.shape}, two axes were written; run the same vlm embed "
            "again."
        )
    return vectors


def open_quantized(folder: Path, part: Part, code: Quantization) -> tuple[Array, ...]:
    """The arrays of a quantized copy, memory-mapped, as `quantize_int8` and `quantize_binary` give them.

    Raises:
        VlmError: the folder was embedded without, or they are damaged.
    """
    return tuple(_open_array(folder, part, suffix) for suffix in QUANTIZED_FILES[code])


def _open_array(folder: Path, part: Part, suffix: str) -> Array:
    path = folder / PARTS / f"{part.name}.{suffix}"
    # the system refuses to map zero bytes
    try:
        array = np.load(path, mmap_mode="r" if part.rows else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} cannot be read ({error}); run the same vlm embed again.") from error
    if len(array) != part.rows:
        raise VlmError(f"{path} has {len(array):,} rows, {part.rows:,} were written; run the same vlm embed again.")
    return array


def _marker_path(folder: Path, name: str) -> Path:
    return folder / PARTS / f"{name}.json"


def read_origins(folder: Path, part: Part) -> Iterator[Origin]:
    """The rows of a part's table, in the order of its matrix.

    Raises:
        VlmError: it is damaged or has another number of rows than its line says.
    """
    import pyarrow
    from pyarrow import parquet

    path = folder / PARTS / f"{part.name}.parquet"
    try:
        table = parquet.ParquetFile(path)
        if table.metadata.num_rows != part.rows:
            raise VlmError(
                f"{path} has {table.metadata.num_rows:,} rows, the matrix {part.rows:,}; run the same vlm embed again."
            )
        # in batches: the captions of a whole part, as Python objects, may not fit into memory
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                row["captions"] = captions_from_json(row["captions"])
                row["metadata"] = json.loads(row["metadata"])
                yield Origin(**row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise VlmError(f"{path} cannot be read ({error}); run the same vlm embed again.") from error


def captions_from_json(text: str) -> Captions:
    """Captions as the Parquet table and the catalogue store them."""
    return {language: tuple(texts) for language, texts in json.loads(text).items()}


def _table(origins: Sequence[Origin]) -> "pyarrow.Table":
    import pyarrow

    from vlm.data.tar import text_array

    def column(name: str) -> list[Any]:
        return list(map(attrgetter(name), origins))

    shards = column("shard")
    rows_by_shard = {shard: row for row, shard in enumerate(dict.fromkeys(shards))}
    numbers = _whole_numbers([rows_by_shard[shard] for shard in shards], np.int32)
    columns: dict[str, pyarrow.Array] = {
        "uid": text_array(column("uid")),
        "key": text_array(column("key")),
        # few shards, many rows
        "shard": pyarrow.DictionaryArray.from_arrays(numbers, text_array(list(rows_by_shard))),
    }
    for name in ("number", "image_offset", "image_size"):
        columns[name] = _whole_numbers(column(name), np.int64)
    columns["caption_number"] = _whole_numbers(column("caption_number"), np.int32)
    # they have a schema of their own in every dataset, so they are stored as JSON
    for name in ("captions", "metadata"):
        columns[name] = text_array(list(map(json_text, column(name))))
    return pyarrow.table(columns)


def _whole_numbers(values: Sequence[int | None], kind: type[np.signedinteger]) -> "pyarrow.Array":
    """A column of numbers, of which None is null."""
    import pyarrow

    is_there = np.array([value is not None for value in values], bool)
    numbers = np.array([value or 0 for value in values], kind)
    validity = None if is_there.all() else pyarrow.py_buffer(np.packbits(is_there, bitorder="little"))
    buffers = [validity, pyarrow.py_buffer(numbers)]
    return pyarrow.Array.from_buffers(pyarrow.from_numpy_dtype(kind), len(numbers), buffers)


_LOCK = ".lock"
_BATCH_SIZE = ".batch-size"
# another process may take so long to begin; what is older was left by a killed one
_BEGIN_SECONDS = 5.0


def begin_or_resume(folder: Path, identity: dict[str, Any], *, kind: str = "embeddings") -> None:
    """Open a folder for embeddings, new or unfinished, while other processes may do the same or were killed at it.

    kind: what its manifest will say, for other work that is stored in such parts.

    Raises:
        UsageError: it is finished, holds something else, or was begun with another identity; nothing is changed.
    """
    while True:
        was_begun = _is_begun(folder)
        try:
            begin_or_resume_folder(folder, kind=kind, configuration=identity)
            break
        except UsageError:
            # in this order: between the two checks another process may have finished writing its marker
            if was_begun or not (_abandoned_marker(folder) or _is_begun(folder)):
                raise
        for path in _abandoned_marker(folder):
            with contextlib.suppress(FileNotFoundError):
                # a younger one is of a process that is about to rename it
                if time.time() - path.stat().st_mtime > _BEGIN_SECONDS:
                    path.unlink()
        time.sleep(0.02)
    (folder / PARTS).mkdir(exist_ok=True)


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """No other process is in such a block of this folder meanwhile; a killed process frees it."""
    from filelock import FileLock

    # the system's lock, not the file's existence: it ends with the process, however that ends
    with FileLock(folder / _LOCK):
        yield


def saved_batch_size(folder: Path) -> int | None:
    """The batch size that the work was begun with; None if none was chosen."""
    try:
        return int((folder / _BATCH_SIZE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def save_batch_size(folder: Path, batch_size: int) -> None:
    """Store the batch size for whoever resumes the work."""
    write_text(folder / _BATCH_SIZE, f"{batch_size}\n")


def remove_leftovers(folder: Path) -> None:
    """Remove from a complete folder what served to make it, and what killed processes left."""
    half_written = [*folder.glob(".*.part"), *(folder / PARTS).glob(".*.part")]
    for path in (folder / PROGRESS, folder / _LOCK, folder / _BATCH_SIZE, *half_written):
        path.unlink(missing_ok=True)


def _is_begun(folder: Path) -> bool:
    return (folder / PROGRESS).is_file() or is_complete(folder)


def _abandoned_marker(folder: Path) -> list[Path]:
    """The half-written marker, if the folder holds nothing else."""
    # one listing: between two of them another process may write the marker
    paths = list(folder.iterdir()) if folder.is_dir() else []
    is_half_written = [fnmatch(path.name, f".{PROGRESS}.*.part") for path in paths]
    return paths if all(is_half_written) else []


Modality = Literal["image", "text"]

PARTS_JSONL = "parts.jsonl"
SKIPPED_JSONL = "incidents.jsonl"


UNKNOWN = "unknown"
"""The model of vectors whose origin nobody knows, and its fingerprint."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpace:
    """The model and modality of a folder's vectors: only vectors of one space can be compared.

    model: as `load_model` takes it. fingerprint: of the model. dimension: D.
    """

    model: str
    fingerprint: str
    dimension: int
    modality: Modality


class EmbeddingsWriter:
    """Writes parts, each whole or absent, in any order and from any number of processes.

    Opened again after a crash, it still has the parts that were added.

    identity: what the rows depend on (model, shards, modality); unfinished work of another identity is refused with a
        UsageError.
    """

    def __init__(
        self, folder: Path, *, space: EmbeddingSpace, identity: dict[str, Any], storage: VectorStorage = FLOAT16
    ) -> None:
        begin_or_resume(folder, identity)
        self.folder = folder
        self.space = space
        self.identity = identity
        self.storage = storage
        self._next: int | None = None

    @property
    def parts(self) -> list[Part]:
        """The finished parts, in order, up to the first that is missing."""
        return [marker.part for marker in self._markers()]

    def part(self, number: int, *, verify: bool = False) -> Part | None:
        """A part if it is finished; with `verify`, its checksums are compared too."""
        marker = read_marker(self.folder, part_name(number), verify=verify)
        return marker.part if marker else None

    def add(
        self,
        shard: str,
        vectors: Float[Array, "N D"],
        origins: Sequence[Origin],
        incidents: Sequence[SkippedSampleRecord] = (),
        *,
        number: int | None = None,
    ) -> Part:
        """Write a part; once this returns, it survives any crash.

        number: left out, parts are numbered on from those that existed at the first such call.
        """
        if number is None:
            # counted from the second call on: to read all markers for each part would take quadratic time
            number = len(self.parts) if self._next is None else self._next
            self._next = number + 1
        part = write_part(
            self.folder,
            part_name(number),
            vectors,
            origins,
            shard=shard,
            bad=len(incidents),
            storage=self.storage,
        )
        write_marker(self.folder, part, incidents)
        return part

    def finish(self, *, inputs: dict[str, str], details: dict[str, Any]) -> Manifest:
        """Write the manifest, which completes the folder; if another process did so already, return that one.

        Raises:
            VlmError: there is not one row.
        """
        with exclusive_lock(self.folder):
            self.end(inputs=inputs, details=details)
        return read_manifest(self.folder, "embeddings")

    def end(self, *, inputs: dict[str, str], details: dict[str, Any]) -> bool:
        """As `finish`, for the holder of the lock; whether the manifest was still to be written."""
        # several processes may find all parts finished; the first of them writes
        is_first = not is_complete(self.folder)
        if is_first:
            self._write_manifest(inputs, details)
        remove_leftovers(self.folder)
        return is_first

    def _write_manifest(self, inputs: dict[str, str], details: dict[str, Any]) -> None:
        parts: list[Part] = []
        incidents: list[SkippedSampleRecord] = []
        files: dict[str, FileRecord] = {}
        rows = 0
        bad = 0
        # in the order of the shards, whichever process wrote them and when
        for marker in self._markers():
            parts.append(marker.part)
            incidents += marker.incidents
            files |= marker.part.files
            rows += marker.part.rows
            bad += marker.part.bad
        # before the refusal below, which sends its reader to the list
        _write_lines(self.folder / PARTS_JSONL, map(Part.to_line, parts))
        _write_lines(
            self.folder / SKIPPED_JSONL,
            (json.dumps(asdict(incident), ensure_ascii=False) for incident in incidents),
        )
        reasons = Counter(incident.reason for incident in incidents)
        if not rows:
            first = f"{incidents[0].key} {incidents[0].reason} {incidents[0].detail}" if incidents else "none existed"
            raise VlmError(
                f"Not one of {bad:,} samples could be embedded; the first: {first}. "
                f"All are in {self.folder / SKIPPED_JSONL}."
            )

        for name in (PARTS_JSONL, SKIPPED_JSONL):
            files[name] = record_file(self.folder / name)
        manifest = Manifest(
            kind="embeddings",
            fingerprint=compute_fingerprint(self.space.fingerprint, *sorted_checksums(files)),
            counts={"rows": rows, "bad": bad, "parts": len(parts)},
            configuration=self.identity,
            inputs=inputs,
            files=files,
            details=details
            | {"space": asdict(self.space), **asdict(self.storage), "incidents": dict(sorted(reasons.items()))},
        )
        write_manifest(self.folder, manifest)

    def _markers(self) -> Iterator[PartMarker]:
        number = 0
        while (marker := read_marker(self.folder, part_name(number))) is not None:
            yield marker
            number += 1


class Embeddings:
    """A finished embeddings folder: rows in the order of the shards, each a unit vector with its origin."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        with damage_as_error(folder / MANIFEST):
            self.space = EmbeddingSpace(**manifest.details["space"])
        with damage_as_error(folder / PARTS_JSONL):
            self.parts = list(map(Part.from_line, read_lines(folder / PARTS_JSONL)))

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "Embeddings":
        """Open a finished folder; with `verify`, every file is read and its checksum compared.

        Raises:
            UsageError: it is unfinished, of another kind, or of another format.
            VlmError: a file is missing or not as it was written.
        """
        manifest = read_manifest(folder, "embeddings")
        # imported rows cannot be embedded again, only imported
        was_imported = "source" in manifest.configuration
        cure = "import the rows again" if was_imported else "run the same vlm embed again"
        check_files(folder, manifest.files, verify=verify, cure=cure)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.space.dimension

    def origins(self) -> Iterator[Origin]:
        """What each row was made from, in row order."""
        for part in self.parts:
            yield from read_origins(self.folder, part)

    def blocks(self, rows_at_once: int = 65_536) -> Iterator[Float32[Array, "N D"]]:
        """All rows in order, float32, normalised again because their storage rounded them."""
        for part in self.parts:
            vectors = open_vectors(self.folder, part)
            for first in range(0, part.rows, rows_at_once):
                yield normalize_rows(vectors[first : first + rows_at_once])

    def codes(self, code: Quantization) -> Iterator[tuple[Array, ...]]:
        """The arrays of a quantized copy, part by part (`open_quantized`).

        Raises:
            UsageError: the folder was embedded without.
        """
        if code not in self.manifest.details.get("codes", ()):
            raise UsageError(f"{self.folder} has no {code} codes; embed again with --quantize {code}.")
        for part in self.parts:
            yield open_quantized(self.folder, part, code)

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """`count` distinct rows (all of them if there are fewer), sampled uniformly, in row order."""
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def take(self, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The rows of these numbers, which must ascend."""
        starts = np.cumsum([0, *(part.rows for part in self.parts)])
        # cuts[p]:cuts[p + 1] are the rows that lie in part p
        cuts = np.searchsorted(rows, starts)
        blocks: list[Float[Array, "N D"]] = []
        for number, part in enumerate(self.parts):
            in_part = rows[cuts[number] : cuts[number + 1]] - starts[number]
            blocks.append(open_vectors(self.folder, part)[in_part])
        return normalize_rows(np.concatenate(blocks))


def normalize_rows(vectors: Float[Array, "N D"]) -> Float32[Array, "N D"]:
    """The rows as float32 of length 1; rows must not be zero."""
    # in float32, because the squares of float16 are rounded too coarsely
    wide = vectors.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


# float16 holds a unit vector's length to about 1e-3, bfloat16 to 2^-8; a larger error was never normalised
_LENGTH_TOLERANCE = 0.01


def find_non_unit_rows(vectors: Float32[Array, "N D"]) -> tuple[Int64[Array, " M"], Float32[Array, " M"]]:
    """Positions and lengths of the rows that are not of length 1 up to rounding, NaN included."""
    lengths = np.linalg.norm(vectors, axis=1)
    # negated, because every comparison with NaN is false
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE))
    return wrong, lengths[wrong]


def check_unit_norm(vectors: Float32[Array, "N D"], names: Sequence[str]) -> None:
    """Refuse vectors that cannot be compared by cosine.

    Raises:
        VlmError: a vector is not finite or not of length 1; `names` says whose it is.
    """
    wrong, lengths = find_non_unit_rows(vectors)
    if len(wrong):
        raise VlmError(
            f"The model gave a vector of length {lengths[0]:.4g} for {names[wrong[0]]!r} ({len(wrong)} such of "
            f"{len(vectors)} in this batch); 1 was expected. Its weights are damaged or its training diverged: "
            "use another checkpoint."
        )


def check_compatible(folder: Path, identity: dict[str, Any], *, kind: str = "embeddings") -> Manifest:
    """The manifest of a finished folder, checked to be made from this model and these shards.

    Raises:
        UsageError: it was made from something else; the first difference is named.
    """
    manifest = read_manifest(folder, kind)
    # through JSON, because a manifest read back has lists for tuples
    for name, value in json.loads(json.dumps(identity)).items():
        # before backends were noted there was torch alone
        made_with = manifest.configuration.get(name, "torch" if name == "backend" else "")
        if made_with != value:
            raise UsageError(
                f"{folder} is complete, but was made with another {name} ({_brief(made_with)} instead of "
                f"{_brief(value)}); name another folder or remove it."
            )
    return manifest


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(line + "\n" for line in lines))


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
