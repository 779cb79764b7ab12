"""The files of an index folder and the typed form of its manifest's details."""

from dataclasses import dataclass
from typing import Any

from vlm.index.embeddings import Space

CATALOGUE = "catalogue.sqlite"
METRIC = "inner product of unit vectors"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One FAISS file: position p in it is row first_row + p of the catalogue."""

    file: str
    kind: str
    parameters: dict[str, int]
    first_row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Details:
    """What the manifest of an index says besides its counts: whose vectors, in which segments, from which shards."""

    space: Space
    segments: tuple[Segment, ...]
    shards: tuple[str, ...]
    metric: str = METRIC

    @classmethod
    def from_manifest(cls, details: dict[str, Any]) -> "Details":
        """From the plain values of a manifest."""
        return cls(
            space=Space(**details["space"]),
            segments=tuple(Segment(**segment) for segment in details["segments"]),
            shards=tuple(details["shards"]),
            metric=details["metric"],
        )


def segment_file(number: int) -> str:
    """Where segment `number` lies in an index folder.

    >>> segment_file(0)
    'segments/segment-00000.faiss'
    """
    return f"segments/segment-{number:05d}.faiss"
