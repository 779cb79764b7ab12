"""Which files of a source are images, and which one a table means by a name."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from vlm.data.sources.source import FolderFiles, SourceFiles, inner_name
from vlm.errors import BadSample

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
