"""What a source of pairs is, and what can be said about how to read it.

Files by relative name, from a folder or from inside a plain tar.
"""

import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

from vlm.data.samples import Pair
from vlm.data.tar import Span, read_entries
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.storage.urls import is_shard

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
    """The synthetic shapes dataset of SOURCE scenes."""

    split: Literal["train", "val"] = "train"
    """Split; combinations of shape and colour in val are absent from train."""

    number: int = 10_000
    """Number of samples."""

    seed: int = 0
    """Random seed."""

    pixels: int = 64
    """Image size in pixels."""

    is_distinct: bool = False
    """Draw no scene twice."""


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


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
_ESCAPES_ROOT = re.compile(r"[/\\]|[a-zA-Z]:[/\\]|[a-zA-Z][\w+.-]*://")


@runtime_checkable
class SourceFiles(Protocol):
    """The files of a source; names use `/` and never lead out of it."""

    url: str

    def names(self) -> Sequence[str]:
        """All names, sorted; hidden files are left out."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            BadSample: it is missing or unreadable, or its name leads out of the source.
        """
        ...

    def fingerprint(self) -> str:
        """Identity of the names and sizes."""
        ...


class FolderFiles:
    """The files under a folder."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root

    def names(self) -> list[str]:
        """Names below the folder; links to folders are not followed."""
        found: list[str] = []
        for folder, subfolders, files in os.walk(self._root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            relative = Path(folder).relative_to(self._root)
            found += [(relative / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        path = self._root / inner_name(name)
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise BadSample("missing file", str(path)) from error
        except (OSError, ValueError) as error:
            raise BadSample("unreadable file", str(error)) from error

    def fingerprint(self) -> str:
        """Names and sizes; each file is asked for its size."""
        return compute_fingerprint(*(f"{name}\n{(self._root / name).stat().st_size}" for name in self.names()))


class TarFiles:
    """The files inside a plain tar, read in place; `folder` narrows it to what lies under that folder.

    allow_damage: of a tar cut short take the files that are whole.
    """

    def __init__(self, path: Path, folder: str = "", *, allow_damage: bool = False) -> None:
        self.url = str(path)
        prefix = f"{PurePosixPath(folder)}/" if folder else ""
        with path.open("rb") as file:
            entries, damage = read_entries(file, str(path))
            end = file.seek(0, os.SEEK_END)
        if damage and not allow_damage:
            raise VlmError(f"{path} is damaged: {damage}; fetch it again, or read what is whole by --allow-damage.")
        self._spans: dict[str, Span] = {}
        for entry in entries:
            name, is_whole = entry.name.removeprefix("./"), entry.offset_data + entry.size <= end
            if is_whole and name.startswith(prefix) and not any(part.startswith(".") for part in name.split("/")):
                self._spans[name.removeprefix(prefix)] = Span(entry.offset_data, entry.size)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def names(self) -> list[str]:
        """Names of regular files in the tar; links are left out."""
        return sorted(self._spans)

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        span = self._spans.get(inner_name(name))
        if span is None:
            raise BadSample("missing file", f"{name} in {self.url}")
        return os.pread(self._descriptor, span.size, span.offset)

    def fingerprint(self) -> str:
        """Names and sizes from the headers."""
        return compute_fingerprint(*(f"{name}\n{self._spans[name].size}" for name in self.names()))


def open_files(url: str, folder: str = "", *, allow_damage: bool = False) -> SourceFiles | None:
    """The files at an address: a folder, a plain tar, or a folder that holds nothing but one plain tar.

    None if there is neither a folder nor a tar of that name on this machine. allow_damage: as of `TarFiles`.

    Raises:
        UsageError: `folder` is not in it.
    """
    if ".." in Path(folder).parts or Path(folder).is_absolute():
        raise UsageError(f"The folder {folder!r} leads out of the source; give one inside {url}.")
    path = Path(url)
    if path.is_dir():
        shown = [inner for inner in path.iterdir() if not inner.name.startswith(".")]
        is_wrapped_tar = len(shown) == 1 and shown[0].suffix.lower() == ".tar" and shown[0].is_file()
        path = shown[0] if is_wrapped_tar else path
    files: SourceFiles | None = None
    if path.is_dir():
        files = FolderFiles(path / folder)
    elif path.is_file() and is_shard(path.name):
        files = TarFiles(path, folder, allow_damage=allow_damage)
    if folder and files is not None and not files.names():
        raise UsageError(f"{url} has no folder {folder!r}, or it is empty.")
    return files


def inner_name(name: str) -> str:
    """A relative name in its plain form.

    >>> inner_name("./images//1.jpg")
    'images/1.jpg'

    Raises:
        BadSample: it leads out of the source: an absolute name, an address, or one with `..`.
    """
    plain = PurePosixPath(name.strip() if "/" in name else name.strip().replace("\\", "/"))
    if _ESCAPES_ROOT.match(name.strip()) or ".." in plain.parts:
        raise BadSample("outside the source", f"{name!r}; names are relative to the source and stay inside it")
    return str(plain)
