"""What a source of pairs is, the options that say how to read it, and its files: of a folder or inside a plain tar.

Also which of the files are images, and which of them a table means by a name (`ImageFinder`).
"""

import importlib.util
import io
import os
import re
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from vlm.config import suggest
from vlm.data.samples import Pair, WordedSource, Words
from vlm.data.tar_entries import TarEntries
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.storage import is_compressed, is_shard

SourceKind = Literal["scenes", "shards", "table", "annotations", "texts", "classes", "images"]

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None

HEIC_ENDINGS = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
        # JPEGs by the names that browsers and old systems give them
        *(".jfif", ".jpe", ".jfi", ".pjpeg", ".pjp"),
        *(".apng", ".dib", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".qoi"),
        *(HEIC_ENDINGS if HAS_HEIF else ()),
    }
)

# TIFF inside, of which Pillow would read the preview; and what is no image whatever it begins with
_NEVER_IMAGES = frozenset(
    {
        *(".dng", ".nef", ".nrw", ".cr2", ".arw", ".orf", ".rw2", ".pef", ".raf", ".srw", ".3fr"),
        *(".txt", ".caption", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar", ".gz", ".tgz", ".zip"),
        *(".npy", ".npz", ".md", ".html", ".py", ".xml", ".yaml", ".yml", ".log", ".token", ".pdf", ".svg"),
        *(".mp4", ".mov", ".avi", ".webm", ".mp3", ".wav"),
    }
)
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"qoif")
_SIGNATURE_BYTES = 16


@runtime_checkable
class PairSource(Protocol):
    """Images with captions, each by number, so that packing can resume anywhere.

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


@runtime_checkable
class NamedSource(Protocol):
    """A source that can name a pair without reading it, for what is said of those that are rejected."""

    def file_of(self, number: int) -> str:
        """The image's file, or whatever else a person finds it by."""
        ...


@runtime_checkable
class ForkableSource(Protocol):
    """A source that says whether processes forked from this one may read it, each for itself."""

    @property
    def is_fork_safe(self) -> bool:
        """Whether nothing that it has open has a position, a connection or threads that they would share."""
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
    split: read only the pairs whose metadata name one of these splits; empty reads all.
    image_column, caption_column, key_column: of a table; the first two found by name if not given, the third `key`.
    captions: `none` reads images without captions, `optional` also the images that have none; else the file
        that holds the captions, where looking leaves several.
    caption_lines: each line of a text next to an image is a caption.
    encoding: of tables, and of texts and JSON beside images or in shards, that are not UTF-8.
    image_name: of shards with several images a sample, the one that is packed: `left` for `KEY.left.jpg`.
    template: the caption of a class, with {} for its name.
    allow_damage: read what is whole of a shard that was cut short.
    selection: of the samples of shards, only those of this file, each as often as it says.
    scenes: for `vlm pack scenes`.
    """

    kind: SourceKind | None = None
    folder: str = ""
    split: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    captions: str = ""
    caption_lines: bool = False
    encoding: str = ""
    image_name: str = ""
    template: str = "a photo of a {}."
    allow_damage: bool = False
    selection: Path | None = None
    scenes: SceneOptions = field(default_factory=SceneOptions)

    def __post_init__(self) -> None:
        if self.image_name and self.kind not in (None, "shards"):
            raise UsageError(f"image_name = {self.image_name!r} is of samples of shards, not of the kind {self.kind}.")
        try:
            # not empty, or no codec is looked up; not all can decode these very bytes, and need not
            with suppress(UnicodeError):
                b"abcd".decode(self.encoding or "utf-8")
        except LookupError as error:
            raise UsageError(
                f"encoding = {self.encoding!r} is not a text encoding that Python knows; name one such as latin-1, "
                "cp1252, gb18030 or shift_jis."
            ) from error


# what nearly all names are: no part of it begins with a dot, and nothing in it may mean something else
_PLAIN_NAME = re.compile(r"(?:[^/\\:\s.][^/\\:\s]*/)*[^/\\:\s.][^/\\:\s]*")
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

    def read_beginning(self, name: str, size: int) -> bytes:
        """The first bytes of a file; raises as `read`."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A file to read from anywhere in it; raises as `read`."""
        ...

    def fingerprint(self) -> str:
        """Identity of the names and sizes."""
        ...


class FolderFiles:
    """The files under a folder. Links are followed, each folder once, so that a circle of links ends.

    skipped: what is neither file nor folder, or a folder that may not be read, with the reason.
    """

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.skipped: dict[str, str] = {}
        self._root = root
        # a text joined to a text takes a tenth of the time of a path, and of the current folder it is empty
        self._beginning = str(root / "_")[:-1]

    def names(self) -> list[str]:
        """Names below the folder; dead links are among them, for whoever reads them to say so."""
        return list(self._names)

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = []
        # a stack rather than recursion: nesting is as deep as the disk has it
        pending = [""]
        links: list[str] = []
        visited = {_identity(os.stat(self._root))} if self._root.is_dir() else set()
        # folders by link come after the real ones, so that a folder that exists itself keeps its own name
        while pending or links:
            if not pending:
                link = links.pop(0)
                identity = _identity(os.stat(self._root / link))
                if identity in visited:
                    self.skipped[link] = "a link to a folder that is read already"
                    continue
                visited.add(identity)
                pending.append(link)
            folder = pending.pop()
            for entry in self._entries(folder):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    # real folders are never visited twice, but a link may lead to one of them
                    visited.add(_identity(entry.stat(follow_symlinks=False)))
                    pending.append(name)
                elif entry.is_symlink():
                    (links if _is_folder(entry) else names).append(name)
                elif entry.is_file():
                    names.append(name)
                else:
                    self.skipped[name] = "neither a file nor a folder"
            links.sort()
        return sorted(names)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._root / folder) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            self.skipped[folder] = error.strerror or str(error)
            return []

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        with self.open(name) as file:
            return file.read()

    def read_beginning(self, name: str, size: int) -> bytes:
        """The first bytes of a file."""
        with self.open(name) as file:
            return file.read(size)

    def open(self, name: str) -> BinaryIO:
        """The file."""
        path = f"{self._beginning}{inner_name(name)}"
        try:
            return open(path, "rb")
        except FileNotFoundError as error:
            if os.path.islink(path):
                raise BadSample("dead link", f"{readable_text(path)} leads to {os.readlink(path)}") from error
            raise BadSample("missing file", readable_text(path)) from error
        except (OSError, ValueError) as error:
            raise BadSample("unreadable file", readable_text(str(error))) from error

    def fingerprint(self) -> str:
        """Names and sizes; each file is asked for its size, and a dead link has none."""
        return compute_fingerprint(*(f"{name}\n{self._size(name)}" for name in self._names))

    def _size(self, name: str) -> int:
        try:
            return os.stat(f"{self._beginning}{name}").st_size
        except OSError:
            return -1


# device and inode: two paths to one folder, by whatever links, have these in common
def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a link to itself
        return False


class TarFiles:
    """The files inside a plain tar, read in place; `folder` narrows it to what lies under that folder.

    allow_damage: of a tar cut short take the files that are whole.
    """

    def __init__(self, path: Path, folder: str = "", *, allow_damage: bool = False) -> None:
        self.url = str(path)
        prefix = f"{PurePosixPath(folder)}/" if folder else ""
        # a number for each name, and columns: a pair of numbers for each would take as much again
        self._numbers: dict[str, int] = {}
        self._offsets = array("q")
        self._sizes = array("q")
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            entries = TarEntries(file, str(path))
            for entry in entries:
                # tar -C FOLDER . puts ./ before every name
                name = entry.name.removeprefix("./")
                is_whole = entry.offset_data + entry.size <= end
                is_hidden = "/." in f"/{name}"
                if is_whole and name.startswith(prefix) and not is_hidden:
                    self._numbers[name.removeprefix(prefix)] = len(self._sizes)
                    self._offsets.append(entry.offset_data)
                    self._sizes.append(entry.size)
        if entries.damage and not allow_damage:
            raise VlmError(
                f"{path} is damaged: {entries.damage}; fetch it again, or read what is whole by --allow-damage."
            )
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def names(self) -> list[str]:
        """Names of regular files in the tar; links are left out."""
        return sorted(self._numbers)

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        number = self._numbers.get(inner_name(name))
        if number is None:
            raise BadSample("missing file", f"{name} in {self.url}")
        # pread has no position that workers forked from this process would share
        return os.pread(self._descriptor, self._sizes[number], self._offsets[number])

    def read_beginning(self, name: str, size: int) -> bytes:
        """The first bytes of a member."""
        return self.read(name)[:size]

    def open(self, name: str) -> BinaryIO:
        """A member, in memory."""
        return io.BytesIO(self.read(name))

    def fingerprint(self) -> str:
        """Names and sizes from the headers."""
        return compute_fingerprint(*(f"{name}\n{self._sizes[self._numbers[name]]}" for name in self.names()))


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
        is_wrapped_tar = is_wrapped_tar and not is_compressed(str(shown[0]))
        # downloads often come as one tar in a folder of its own
        path = shown[0] if is_wrapped_tar else path
    files: SourceFiles | None = None
    if path.is_dir():
        files = FolderFiles(path / folder)
    elif path.is_file() and is_shard(path.name):
        files = TarFiles(path, folder, allow_damage=allow_damage)
    if folder and files is not None and not files.names():
        raise UsageError(f"{url} has no folder {folder!r}, or it is empty.")
    return files


def folder_of(name: str) -> str:
    """The folder of a file by its name in a source; empty at the top."""
    parent = str(PurePosixPath(name).parent)
    return "" if parent == "." else parent


def readable_text(name: str) -> str:
    """A name with the bytes that are not UTF-8 written as %XX, as text and JSON can hold it.

    >>> readable_text("caf\\udce9.jpg")
    'caf%E9.jpg'
    """
    if name.isascii():
        return name
    readable: list[str] = []
    for sign in name:
        # Python decodes a byte 0x80 to 0xFF that is not UTF-8 as U+DC80 to U+DCFF (PEP 383)
        is_byte = "\udc80" <= sign <= "\udcff"
        readable.append(f"%{ord(sign) - 0xDC00:02X}" if is_byte else sign)
    return "".join(readable)


def inner_name(name: str) -> str:
    """A relative name in its plain form.

    >>> inner_name("./images//1.jpg")
    'images/1.jpg'

    Raises:
        BadSample: it leads out of the source: an absolute name, an address, or one with `..`.
    """
    if _PLAIN_NAME.fullmatch(name):
        return name
    # a backslash separates only where no slash does: it may be part of a name, and comes from tables made on Windows
    plain = PurePosixPath(name.strip() if "/" in name else name.strip().replace("\\", "/"))
    if _ESCAPES_ROOT.match(name.strip()) or ".." in plain.parts:
        raise BadSample("outside the source", f"{name!r}; names are relative to the source and stay inside it")
    return str(plain)


SPLIT = "split"
# so many pairs tell which splits there are, wherever they lie
_PAIRS_SEEN = 500


def named_splits(source: PairSource) -> list[str]:
    """The splits that the metadata of pairs spread over the source name, sorted; empty if there are none."""
    step = max(1, len(source) // _PAIRS_SEEN)
    splits = set(_splits(source, range(0, len(source), step)))
    return sorted(splits - {""})


def _splits(source: PairSource, numbers: Iterable[int]) -> Iterable[str]:
    """The split of each pair; empty where it has none, or cannot be read."""
    if not isinstance(source, WordedSource):
        return
    for number in numbers:
        try:
            split = source.words(number).metadata.get(SPLIT)
        except BadSample:
            split = ""
        yield split if isinstance(split, str) else ""


class SplitFilter:
    """The pairs of some splits of a source, in its order. Pairs that cannot be read stay, to be rejected by reason."""

    def __init__(self, source: PairSource, splits: Sequence[str]) -> None:
        self._source = source
        self._splits = tuple(dict.fromkeys(splits))
        self.captions_are_labels = source.captions_are_labels
        self.is_fork_safe = isinstance(source, ForkableSource) and source.is_fork_safe
        split_of = list(_splits(source, range(len(source))))
        known = sorted(set(split_of) - {""})
        for split in self._splits:
            if split not in known:
                reason = suggest(split, known) if known else "it names no splits"
                raise UsageError(f"--split {split}: no pair of the source is of this split; {reason}")
        self._numbers: list[int] = []
        for number, split in enumerate(split_of):
            if split in self._splits or not split:
                self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Pair:
        """Pair `number` of those chosen."""
        return self._source.read(self._numbers[number])

    def words(self, number: int) -> Words:
        """Its captions and metadata."""
        assert isinstance(self._source, WordedSource)
        return self._source.words(self._numbers[number])

    def file_of(self, number: int) -> str:
        """Its image as the source names it."""
        name: Any = getattr(self._source, "file_of", None)
        return name(self._numbers[number]) if name else f"pair {self._numbers[number]}"

    def used_files(self) -> set[str]:
        """The files of all splits: those of the others are left out by choice, not overlooked."""
        files: Any = getattr(self._source, "used_files", set)
        return files()

    def fingerprint(self) -> str:
        """The source and the splits."""
        return compute_fingerprint(self._source.fingerprint(), SPLIT, *self._splits)

    def describe(self) -> dict[str, Any]:
        """The source, and the splits."""
        return self._source.describe() | {"split": list(self._splits)}


def is_image_name(name: str) -> bool:
    """Whether the ending is that of an image which the installed decoders read."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def image_names(files: SourceFiles) -> list[str]:
    """The images among the files: by their endings, and by their first bytes where an ending says nothing."""
    images: list[str] = []
    for name in files.names():
        # by the ending first: to look at the bytes opens the file
        if is_image_name(name) or _is_unnamed_image(files, name):
            images.append(name)
    return images


def image_paths(paths: Sequence[Path]) -> list[Path]:
    """Image files unchanged, and all images inside folders."""
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            images += map(path.joinpath, image_names(FolderFiles(path)))
        else:
            images.append(path)
    return images


def _is_unnamed_image(files: SourceFiles, name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _NEVER_IMAGES:
        return False
    try:
        beginning = files.read_beginning(name, _SIGNATURE_BYTES)
    except BadSample:
        return False
    # both are containers: the bytes before the name of the format are its length
    is_webp = beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP"
    brand = beginning[8:12] if beginning[4:8] == b"ftyp" else b""
    is_known_brand = brand in (b"avif", b"avis") or (HAS_HEIF and brand in (b"heic", b"heix", b"mif1"))
    return beginning.startswith(_SIGNATURES) or is_webp or is_known_brand


def is_web_address(name: str) -> bool:
    """Whether a table names an image by where it lies on the web."""
    return name.lower().startswith(("http://", "https://", "ftp://"))


class ImageFinder:
    """The files that tables name: by a path below the source or the table, a full path, a file name, or a stem."""

    def __init__(self, files: SourceFiles) -> None:
        self._files = files

    @cached_property
    def names(self) -> frozenset[str]:
        """All files of the source."""
        return frozenset(self._files.names())

    def find(self, name: str, *folders: str) -> str:
        """The file that is meant; the name itself where there is none, for whoever reads it to say so.

        folders: tried before any other, such as that of the table.

        Raises:
            BadSample: it is an address on the web, or several files have this name.
        """
        stripped = name.strip()
        if stripped in self.names and not any(folders):
            return stripped
        if is_web_address(stripped):
            detail = f"{stripped!r} is an address; download the images first, as with img2dataset, and pack its output"
            raise BadSample("not downloaded", detail)
        # tables made on the machine of the images often name them in full
        relative = self._below_root(stripped)
        try:
            plain = inner_name(relative)
        except BadSample:
            return name
        for folder in dict.fromkeys((*folders, "")):
            candidate = f"{folder}/{plain}" if folder else plain
            if candidate in self.names:
                return candidate
        return self._elsewhere(plain) or (f"{folders[0]}/{plain}" if folders and folders[0] else name)

    def _below_root(self, name: str) -> str:
        """A full path inside the source as a name below it; any other name as it is."""
        if not name.startswith("/"):
            return name
        for root in dict.fromkeys((self._files.url, str(Path(self._files.url).absolute()))):
            if name.startswith(f"{root.rstrip('/')}/"):
                return name.removeprefix(f"{root.rstrip('/')}/")
        # the path may go through a link where the source's own does not, or the other way round
        real = Path(self._files.url).resolve()
        path = Path(name)
        return path.relative_to(real).as_posix() if path.is_relative_to(real) else name

    def _elsewhere(self, plain: str) -> str | None:
        """The only file whose path ends so; or, of a name without an ending, the only image of that stem."""
        path = PurePosixPath(plain)
        matches: list[str] = []
        for name in self._by_name.get(path.name, ()):
            # from a slash on, so that `b/1.jpg` does not stand for `ab/1.jpg`
            if f"/{name}".endswith(f"/{plain}"):
                matches.append(name)
        # folders of another machine: the file name alone has to do
        if not matches and len(path.parts) > 1:
            matches = self._by_name.get(path.name, [])
        # tables of products list ids, without an ending
        if not matches and path.suffix.lower() not in IMAGE_SUFFIXES:
            matches = self._by_stem.get(path.name, [])
        if len(matches) > 1:
            raise BadSample("ambiguous name", f"{plain!r} may be {', '.join(sorted(matches)[:3])}")
        return matches[0] if matches else None

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(PurePosixPath(name).name, []).append(name)
        return groups

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in self.names:
            if is_image_name(name):
                groups.setdefault(PurePosixPath(name).stem, []).append(name)
        return groups


def endings(names: Iterable[str]) -> Iterator[str]:
    """The ending of each name in lower case, or its whole name where it has none."""
    for name in names:
        path = PurePosixPath(name)
        yield path.suffix.lower() or path.name
