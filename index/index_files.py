"""The files of an index folder, and the typed form of its manifest's details."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write
from vlm.index.embeddings_folder import EmbeddingSpace
from vlm.manifest import MANIFEST, FileRecord, Manifest, damage_as_error, read_manifest, record_file
from vlm.tensor_types import Array, Float, Float16

LAYOUT = 2
SEGMENTS = "segments"
TOMBSTONES = "tombstones"
VERSIONS = "versions"
MAPS = "maps"
LINK_QUERIES = "link-queries.npy"
_NPY_HEADER_BYTES = 128
METRIC = "inner product of unit vectors"
FIRST_VERSION = 1
REBUILD_HINT = "build the index again with vlm index build"

FailPoint = Callable[[str], None]
"""Called before each step that changes a folder, with its name; tests hand in one that ends the process there."""


def no_failpoint(point: str) -> None:
    """The failpoint of ordinary work, which does nothing."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows that were indexed together and never change; position p of its FAISS file is the p-th of its rows.

    kind, parameters: of its FAISS index. rows: their number, deleted ones included.
    rerank: 0 if the scores of FAISS are exact; else FAISS gives `rerank` times the results, and the stored rows decide.
    duplicates: how many of the rows are equal to others of them.
    """

    number: int
    kind: str
    parameters: dict[str, int]
    rows: int
    rerank: int = 0
    duplicates: int = 0

    @property
    def index_file(self) -> str:
        """The FAISS index."""
        return segment_file(self.number, "faiss")

    @property
    def vectors_file(self) -> str:
        """The rows as float16."""
        return segment_file(self.number, "npy")

    @property
    def rows_file(self) -> str:
        """The catalogue's row of each position, int64, ascending."""
        return segment_file(self.number, "rows.npy")

    @property
    def duplicates_file(self) -> str:
        """The positions of equal rows (`find_duplicate_rows`), if there are any."""
        return segment_file(self.number, "duplicates.npy")

    @property
    def files(self) -> tuple[str, ...]:
        """All of them."""
        files = (self.index_file, self.vectors_file, self.rows_file)
        return (*files, self.duplicates_file) if self.duplicates else files


@dataclass(frozen=True, kw_only=True)
class MapRecord:
    """The map of an index: a place in two dimensions for each row there was when it was made.

    file: the places (`vlm.index.reader`). rows: their number. fitted: how many of them `method` laid out; the others
    lie among those. seed: of the layout.
    """

    file: str
    rows: int
    fitted: int
    method: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class EngineDetails:
    """What the manifest of an index says, whichever engine has its rows.

    next_row: the next unused number; none is ever used twice.
    shards, sources: addresses of all tars, and fingerprints of all embeddings, that were ever inserted.
    """

    space: EmbeddingSpace
    next_row: int
    shards: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class IndexDetails(EngineDetails):
    """The details of an index's manifest.

    catalogue: the SQLite file. tombstones: the file of the deleted rows, empty if there are none.
    segments: in the order of their rows, which never overlap.
    next_segment: the next unused number of a segment.
    kind, tuning: as they were asked for, for `compact`. evidence: the plan of the autotuner, if there was one.
    map: None until one is made.
    """

    catalogue: str
    segments: tuple[Segment, ...]
    next_segment: int
    kind: str
    tuning: dict[str, Any]
    tombstones: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    map: MapRecord | None = None
    metric: str = METRIC
    layout: int = LAYOUT

    @classmethod
    def from_manifest(cls, manifest: Manifest, folder: Path) -> "IndexDetails":
        """From the plain values of the manifest of `folder`.

        Raises:
            UsageError: an older or newer version of the program wrote them. VlmError: they are damaged.
        """
        with damage_as_error(folder / MANIFEST):
            details = manifest.details
            if details.get("engine", "faiss") != "faiss":
                raise UsageError(
                    f"The rows of {folder} are kept by the engine {details['engine']}, and this needs those of a FAISS "
                    "index: build one of the same embeddings with vlm index build."
                )
            # the first layout was not numbered
            layout = details.get("layout", 1)
            if layout != LAYOUT:
                raise UsageError(
                    f"{folder} has the index layout {layout}, this version reads {LAYOUT}; {REBUILD_HINT}."
                )
            values = details | {
                "space": EmbeddingSpace(**details["space"]),
                "segments": tuple(Segment(**segment) for segment in details["segments"]),
                "shards": tuple(details["shards"]),
                "sources": tuple(details["sources"]),
                # indexes of before maps have no such key
                "map": MapRecord(**details["map"]) if details.get("map") else None,
            }
            # others read these without a check, so a manifest that lacks one is refused as damaged here
            for name, values_of in (
                ("rows", manifest.counts),
                ("dead", manifest.counts),
                ("embeddings", manifest.inputs),
            ):
                if name not in values_of:
                    raise KeyError(name)
            return cls(**values)


def segment_file(number: int, suffix: str) -> str:
    """The path of a file of segment `number` in an index folder.

    >>> segment_file(3, "rows.npy")
    'segments/segment-00003.rows.npy'
    """
    return f"{SEGMENTS}/segment-{number:05d}.{suffix}"


def catalogue_file(generation: int) -> str:
    """The name of a catalogue that was begun by a version.

    >>> catalogue_file(1)
    'catalogue-00001.sqlite'
    """
    return f"catalogue-{generation:05d}.sqlite"


def tombstones_file(generation: int) -> str:
    """The path of the file with the deleted rows of a version.

    >>> tombstones_file(2)
    'tombstones/00002.npy'
    """
    return f"{TOMBSTONES}/{generation:05d}.npy"


def map_file(generation: int) -> str:
    """The path of the map that a version brought.

    >>> map_file(2)
    'maps/00002.npy'
    """
    return f"{MAPS}/{generation:05d}.npy"


def version_file(generation: int) -> str:
    """The path of the manifest of the version before, kept for a rollback.

    >>> version_file(1)
    'versions/00001.json'
    """
    return f"{VERSIONS}/{generation:05d}.json"


def open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a .npy file, memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        VlmError: it cannot be read, or has another type or shape.
    """
    # the system refuses to map zero bytes
    mode = "r" if np.prod(shape) else None
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} is damaged ({error}); {REBUILD_HINT}.") from error
    if array.dtype != dtype or array.shape != shape:
        raise VlmError(
            f"{path} is damaged: it holds {array.dtype} of shape {array.shape}, {dtype} of {shape} were written; "
            f"{REBUILD_HINT}."
        )
    # as a plain array: each operation on np.memmap runs Python code, which costs microseconds
    return np.asarray(array)


def write_link_queries(folder: Path, queries: Float[Array, "Q D"]) -> dict[str, FileRecord]:
    """Keep the queries whose answers a graph links, as float16; gives the file's record by its name."""
    with atomic_write(folder / LINK_QUERIES) as file:
        np.save(file, queries.astype(np.float16), allow_pickle=False)
    return {LINK_QUERIES: record_file(folder / LINK_QUERIES)}


def read_link_queries(folder: Path, manifest: Manifest, dimension: int) -> Float16[Array, "Q D"] | None:
    """The queries whose answers the graph of this index links, whichever its type is now; None: there are none.

    Raises:
        VlmError: they are damaged.
    """
    if LINK_QUERIES not in manifest.files:
        return None
    # numpy's header of a matrix
    count = (manifest.files[LINK_QUERIES].bytes - _NPY_HEADER_BYTES) // (2 * dimension)
    return open_array(folder / LINK_QUERIES, np.dtype(np.float16), (count, dimension))


def read_previous(folder: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of the version before, if it was kept.

    Raises:
        VlmError: it is damaged.
    """
    name = version_file(manifest.generation - 1)
    if not (folder / name).is_file():
        return None
    previous = read_manifest(folder, "index", name=name)
    # read for its checks alone: a version of another layout cannot be rolled back to
    IndexDetails.from_manifest(previous, folder)
    return previous
