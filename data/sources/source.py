"""What a source of pairs is, and what can be said about how to read it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from vlm.data.samples import Pair

SourceKind = Literal["scenes", "shards", "table", "classes"]


@runtime_checkable
class PairSource(Protocol):
    """Pictures with captions, each by number, so that packing can go on anywhere.

    captions_are_labels: whether a caption says no more than a class, so that equal captions do not make two
        samples the same thing.
    """

    captions_are_labels: bool

    def __len__(self) -> int: ...

    def read(self, number: int) -> Pair:
        """Pair `number`; its key is unlike all others.

        Raises:
            BadSample: it cannot be used.
        """
        ...

    def fingerprint(self) -> str:
        """Identity of the content, from names and sizes; the same wherever the source lies."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is and how it is read, as plain values for the manifest."""
        ...


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Which drawn scenes: number of them, width in pixels; `is_distinct`: no scene comes twice."""

    split: Literal["train", "val"] = "train"
    number: int = 10_000
    seed: int = 0
    pixels: int = 64
    is_distinct: bool = False


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How to read a source.

    kind: found by looking if not given.
    folder: read only what lies under this folder of the source (such as `train`).
    image_column, caption_column: of a table; found by name if not given.
    template: the caption of a class folder, with {} for the class.
    allow_damage: read what is whole of a shard that was cut short.
    selection: of the samples of shards, only those of this file, each as often as it says.
    scenes: for `vlm pack scenes`.
    """

    kind: SourceKind | None = None
    folder: str = ""
    image_column: str | None = None
    caption_column: str | None = None
    template: str = "a photo of a {}."
    allow_damage: bool = False
    selection: Path | None = None
    scenes: SceneOptions = field(default_factory=SceneOptions)
