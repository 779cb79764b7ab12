"""One generation of an index folder, open for reading: its manifest, its catalogue and the living of its segments."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.index.catalogue import Catalogue
from vlm.index.embeddings import check_files
from vlm.index.layout import CURE, Details, Segment
from vlm.index.parts import Origin
from vlm.index.search_plan import Selected
from vlm.index.segments import OpenSegment
from vlm.index.vectors import open_array
from vlm.manifest import FileRecord, Manifest, read_manifest
from vlm.tensors import Array, Float32, Int64

# how often a folder may change between reading its manifest and opening its files before that counts as a fault
_MOST_TRIES = 100

_Identity = tuple[str, tuple[tuple[str, FileRecord], ...]]
_ENTRIES_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """What the folder held when its manifest was read; later changes and removed files do not touch it.

    selected: the segments with their living positions. dead: rows of the segments that are dead, sorted.
    """

    folder: Path
    manifest: Manifest
    details: Details
    catalogue: Catalogue
    selected: tuple[Selected, ...]
    dead: Int64[Array, " N"]

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.manifest.generation

    @cached_property
    def rows(self) -> Int64[Array, " N"]:
        """All living rows, rising."""
        return np.concatenate([np.zeros(0, np.int64), *(selected.rows() for selected in self.selected)])

    def entries(self) -> Iterator[tuple[int, Origin]]:
        """Each living row with what it was made from, rising."""
        for first in range(0, len(self.rows), _ENTRIES_AT_ONCE):
            for entry in self.catalogue.entries(self.rows[first : first + _ENTRIES_AT_ONCE].tolist()):
                yield entry.row, entry

    def vectors(self, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The stored unit vectors of living or dead rows, in the order asked; all must be in its segments."""
        wanted, places = np.unique(rows, return_inverse=True)
        # segments lie in the order of their rows, which never overlap
        segments = [selected.segment for selected in self.selected]
        blocks = [segment.vectors.take(segment.positions_of(wanted)) for segment in segments]
        return np.concatenate([np.zeros((0, self.details.space.dimension), np.float32), *blocks])[places]


def open_generation(folder: Path, *, before: Generation | None = None) -> Generation:
    """Open what the manifest names now; files that `before` holds open already are not opened again.

    Raises:
        UsageError: the folder is unfinished, of another kind, or of another format.
        VlmError: a file is missing or damaged, or segments and catalogue do not have the same rows.
    """
    for _ in range(_MOST_TRIES):
        manifest = read_manifest(folder, "index")
        try:
            return _open(folder, manifest, before)
        except (VlmError, FileNotFoundError):
            # a writer may have put away what the manifest named a moment ago
            if read_manifest(folder, "index") == manifest:
                raise
    raise VlmError(f"{folder} changed {_MOST_TRIES} times while it was being opened; try again.")


def _open(folder: Path, manifest: Manifest, before: Generation | None) -> Generation:
    details = Details.from_manifest(manifest, folder)
    check_files(folder, manifest.files, verify=False, cure=CURE)
    held = _held(before)
    segments = [
        held.get(_identity(manifest.files, segment)) or OpenSegment(folder, segment, details.space.dimension)
        for segment in details.segments
    ]
    dead = _read_tombstones(folder, details, manifest)
    generation = Generation(
        folder=folder,
        manifest=manifest,
        details=details,
        catalogue=_open_catalogue(folder / details.catalogue, manifest.generation, before),
        selected=tuple(Selected(segment).without(dead) for segment in segments),
        dead=dead,
    )
    living, listed = sum(selected.count for selected in generation.selected), len(generation.catalogue)
    if not living == listed == len(generation):
        raise VlmError(
            f"{folder} does not hold together: {living:,} living rows in its segments and {listed:,} in "
            f"{details.catalogue}, {len(generation):,} were written; {CURE}."
        )
    return generation


def _held(before: Generation | None) -> Mapping[_Identity, OpenSegment]:
    if before is None:
        return {}
    open_ones = (selected.segment for selected in before.selected)
    return {_identity(before.manifest.files, segment.described): segment for segment in open_ones}


def _identity(files: Mapping[str, FileRecord], segment: Segment) -> _Identity:
    """Of files and of how they are searched."""
    return repr(segment), tuple((name, files[name]) for name in segment.files)


def _open_catalogue(path: Path, generation: int, before: Generation | None) -> Catalogue:
    if not path.is_file():
        raise VlmError(f"{path} is missing; {CURE}.")
    if before is not None and before.catalogue.path == path and before.catalogue.is_current():
        return before.catalogue.at(generation)
    return Catalogue(path, generation)


def _read_tombstones(folder: Path, details: Details, manifest: Manifest) -> Int64[Array, " N"]:
    if not details.tombstones:
        return np.zeros(0, np.int64)
    shape = (manifest.counts["dead"],)
    return np.array(open_array(folder / details.tombstones, np.dtype(np.int64), shape))
