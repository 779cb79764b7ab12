"""The files at an address, listed once: its images, the captions next to them, and the tables that name them.

`AnnotationSource` reads captions in one JSON file: COCO's `captions_*.json` and Karpathy's `dataset_*.json`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.data.samples import UNNAMED, Pair, Words
from vlm.data.sources.image_folder import has_words_beside
from vlm.data.sources.source import (
    FolderFiles,
    ImageFinder,
    SourceFiles,
    SourceOptions,
    folder_of,
    image_names,
    open_files,
    readable_text,
)
from vlm.data.sources.table import Table, has_columns, names_files, names_only_addresses, read_table, unique_image_keys
from vlm.data.sources.table_rows import TABLE_READERS, decode_text, file_extension, is_table
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.storage import needs_cache

# COCO's own are 90 MB at most; boxes and masks of the same images are several times that, and no captions
_MAX_BYTES = 1 << 30
_BEGINNING = 1 << 16
# COCO's files of other tasks, by the names that it gives them
_NO_CAPTIONS = re.compile(r"(instances|person_keypoints|stuff|panoptic|image_info)_")
_FIRST_KEYS = re.compile(rb'"(images|annotations|info)"')


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its captions. folders: where its file may lie, the likeliest first."""

    file: str
    captions: tuple[str, ...]
    folders: tuple[str, ...]
    metadata: dict[str, Any] = field(repr=False)


def read_annotations(files: SourceFiles, name: str) -> list[AnnotatedImage] | None:
    """The images of an annotation file; None if it is not such a file or holds no captions.

    Raises:
        BadSample: there is no such file.
    """
    # one byte over the limit tells that a file is too large: sources have no call for the size of a file
    data = files.read(name) if len(files.read_beginning(name, _MAX_BYTES + 1)) <= _MAX_BYTES else b""
    try:
        content = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        return None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        return None
    if isinstance(content.get("annotations"), list):
        return _coco(images, content["annotations"], name)
    return _karpathy(images, name)


def may_be_annotations(files: SourceFiles, name: str) -> bool:
    """Whether a JSON file begins like one of annotations: an object that names images or annotations early on."""
    path = PurePosixPath(name)
    if path.suffix.lower() != ".json" or _NO_CAPTIONS.match(path.name):
        return False
    beginning = files.read_beginning(name, _BEGINNING).lstrip(b"\xef\xbb\xbf \t\r\n")
    return beginning.startswith(b"{") and _FIRST_KEYS.search(beginning) is not None


def _coco(images: list[dict[str, Any]], annotations: list[Any], name: str) -> list[AnnotatedImage] | None:
    """COCO: captions point to images by id. `captions_train2017.json` belongs to the folder `train2017`."""
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    if not captions:
        return None
    split = PurePosixPath(name).stem.removeprefix("captions_")
    folders = (split, f"images/{split}", folder_of(name))
    annotated: list[AnnotatedImage] = []
    for image in images:
        metadata = dict(image)
        # a number in the file's own list of licences says nothing outside of it
        metadata.pop("license", None)
        annotated.append(
            AnnotatedImage(
                file=str(image.get("file_name") or image.get("id")),
                captions=_texts(captions.get(image.get("id"), [])),
                folders=folders,
                metadata=metadata,
            )
        )
    return annotated


def _karpathy(images: list[dict[str, Any]], name: str) -> list[AnnotatedImage] | None:
    """Karpathy's splits: sentences within each image, with the split it belongs to."""
    if not any(isinstance(image.get("sentences"), list) for image in images):
        return None
    annotated: list[AnnotatedImage] = []
    for image in images:
        metadata = dict(image)
        sentences = metadata.pop("sentences", None) or []
        # ids of the sentences, of no use without them
        metadata.pop("sentids", None)
        raw: list[Any] = []
        for sentence in sentences:
            if isinstance(sentence, dict):
                raw.append(sentence.get("raw"))
        # dataset_coco.json says train2014 or val2014; Flickr's have no folder
        folder = str(image.get("filepath") or "")
        annotated.append(
            AnnotatedImage(
                file=str(image.get("filename")),
                captions=_texts(raw),
                folders=(folder, f"images/{folder}", "images", folder_of(name)),
                metadata=metadata,
            )
        )
    return annotated


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    """The texts among the values, each once, in order."""
    texts: dict[str, None] = {}
    for value in values:
        text = value.strip() if isinstance(value, str) else ""
        if text:
            texts[text] = None
    return tuple(texts)


class AnnotationSource:
    """The images of annotation files, each with all its captions; metadata is what the file says of the image."""

    captions_are_labels = False
    is_fork_safe = True

    def __init__(
        self, files: SourceFiles, annotations: dict[str, list[AnnotatedImage]], options: SourceOptions
    ) -> None:
        self._files = files
        self._annotations = tuple(annotations)
        self._options = options
        self._finder = ImageFinder(files)
        self._images = list(chain.from_iterable(annotations.values()))
        self._keys = unique_image_keys([image.file for image in self._images])

    def __len__(self) -> int:
        return len(self._images)

    def read(self, number: int) -> Pair:
        """The image with its captions."""
        captions, metadata, _ = self.words(number)
        image = self._images[number]
        file = self._files.read(self._finder.find(image.file, *image.folders))
        return Pair(key=self._keys[number].as_py(), image=file, captions=captions, metadata=metadata)

    def words(self, number: int) -> Words:
        """The captions, and what the file says of the image."""
        image = self._images[number]
        has_captions = bool(image.captions) and self._options.captions != "none"
        if not image.captions and self._options.captions not in ("none", "optional"):
            raise BadSample("no caption", f"no annotation has a caption of {image.file}")
        return Words({UNNAMED: image.captions} if has_captions else {}, image.metadata)

    def file_of(self, number: int) -> str:
        """The image as the annotations name it."""
        return readable_text(self._images[number].file)

    def used_files(self) -> set[str]:
        """The annotation files, and the images they name."""
        used = set(self._annotations)
        for image in self._images:
            try:
                used.add(self._finder.find(image.file, *image.folders))
            except BadSample:
                continue
        return used

    def fingerprint(self) -> str:
        """The annotation files, and names and sizes of all files."""
        contents = map(self._files.read, self._annotations)
        # only options that change what is read: the fingerprint of older packs stays theirs
        chosen = [self._options.captions] if self._options.captions in ("none", "optional") else []
        return compute_fingerprint(*contents, self._files.fingerprint(), *chosen)

    def describe(self) -> dict[str, Any]:
        """The annotation files."""
        return {"kind": "annotations", "address": self._files.url, "annotations": list(self._annotations)}


def has_images(files: SourceFiles, images: Sequence[AnnotatedImage], *, tries: int = 50) -> bool:
    """Whether some of the annotated images are there."""
    finder = ImageFinder(files)
    # evenly spread, since one folder of several may be missing
    step = max(1, len(images) // tries)
    for image in images[::step]:
        try:
            if finder.find(image.file, *image.folders) in finder.names:
                return True
        except BadSample:
            # an ambiguous name or a web address: these are the annotations, and reading reports what is wrong
            return True
    return False


SCENES = "scenes"
_CAPTION_STEMS = ("captions", "metadata")
# files looked into, at most, for captions that lie apart from the images
_MAX_CANDIDATES = 40
_CHECKED_IMAGES = 200
_PART_NUMBER = re.compile(r"\d+")
_LOOKS_LIKE_CAPTIONS = re.compile(r"(.*[\W_])?(captions?|annotations?|metadata|token)([\W_\d].*)?", re.IGNORECASE)
_IMG2DATASET_STATS = re.compile(r"(.*/)?\d{5,}_stats\.json")


@dataclass(frozen=True)
class SourceLocation:
    """An address with the files found there; `files` is None if it is neither a folder nor a tar of this machine."""

    url: str
    options: SourceOptions
    files: SourceFiles | None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All files."""
        return tuple(self.files.names()) if self.files else ()

    @cached_property
    def all_names(self) -> frozenset[str]:
        """All files, to ask for one."""
        return frozenset(self.names)

    @cached_property
    def images(self) -> list[str]:
        """The images among the files."""
        return image_names(self.files) if self.files else []

    @cached_property
    def image_stems(self) -> frozenset[str]:
        """The images, and their names without the extension, to find the texts next to one."""
        stems = {name.removesuffix(PurePosixPath(name).suffix) for name in self.images}
        return frozenset(stems.union(self.images))

    @cached_property
    def folders(self) -> frozenset[str]:
        """The folders that hold files."""
        return frozenset(name.rpartition("/")[0] for name in self.names)

    @cached_property
    def with_words(self) -> tuple[int, int]:
        """The number of images checked, evenly spread, and how many of them have captions next to them."""
        assert self.files is not None
        # not the first ones: they are often of one folder, whose images may all have words or none
        step = max(1, len(self.images) // _CHECKED_IMAGES)
        checked = self.images[::step]
        num_with_words = sum(has_words_beside(self.files, image, self.all_names) for image in checked)
        return len(checked), num_with_words

    @cached_property
    def tables(self) -> list[Table]:
        """The table to read, or those that are parts of one; empty where there is none.

        Raises:
            UsageError: several are possible.
        """
        return _find_tables(self)

    @cached_property
    def annotations(self) -> dict[str, list[AnnotatedImage]]:
        """The annotation files whose images are there, by name."""
        return _find_annotations(self)


def open_location(url: str, options: SourceOptions) -> SourceLocation:
    """Look what lies at an address.

    Raises:
        UsageError: nothing does.
    """
    exists = Path(url).exists()
    has_wildcards = "{" in url or "*" in url or "::" in url
    # a file of that very name comes first: names may hold braces and stars, and a folder may be called scenes
    is_drawn = options.kind == SCENES or (url == SCENES and not exists)
    is_pattern = not exists and (needs_cache(url) or has_wildcards)
    if is_drawn or is_pattern or (needs_cache(url) and not Path(url).is_dir()):
        return SourceLocation(url=url, options=options, files=None)
    path = Path(url).expanduser()
    if not path.exists():
        raise UsageError(f"There is no {url!r}; give a folder, a table, a tar, or the word {SCENES}.")
    if is_table_file(url):
        files: SourceFiles | None = FolderFiles(path.parent / options.folder)
    else:
        files = open_files(str(path), options.folder, allow_damage=options.allow_damage)
    return SourceLocation(url=url, options=options, files=files)


def is_table_file(url: str) -> bool:
    """Whether an address is a table itself, and not what holds one."""
    return Path(url).expanduser().is_file() and file_extension(url) in TABLE_READERS


def _find_tables(location: SourceLocation) -> list[Table]:
    """The tables to read: the one named, the one at the top, or those of one name in the folders of the images."""
    options = location.options
    if location.files is None:
        return []
    # what the user names is read or refused, never passed over
    if is_table_file(location.url):
        return _checked(location, [Path(location.url).name])
    if options.captions not in ("", "none", "optional"):
        return _checked(location, [options.captions])
    at_top: list[str] = []
    for name in location.names:
        if "/" not in name and is_table(name) and not is_bookkeeping(location, name):
            at_top.append(name)
    preferred = at_top
    # the last round wins, so that the first stem does
    for stem in reversed(_CAPTION_STEMS):
        preferred = [name for name in at_top if PurePosixPath(name).stem == stem] or preferred
    if len(preferred) == 1 or _are_parts(preferred):
        tables = _checked(location, preferred)
        if has_columns(tables[0], options):
            return tables
    # a table at the top that holds no captions (a list of licences) must not hide those below
    candidates = _captions_apart(location)
    if not candidates and len(preferred) > 1 and not _are_parts(preferred):
        _refuse_several(preferred)
    names: list[str] = []
    stems: set[str] = set()
    folders: set[str] = set()
    for table in candidates:
        names.append(table.name)
        stems.add(PurePosixPath(table.name).stem.lower())
        folders.add(table.folder)
    # Hugging Face's ImageFolder: train/metadata.csv, test/metadata.csv
    is_one_each = len(folders) == len(candidates) and len(stems) <= 1
    if len(candidates) > 1 and not is_one_each and not _are_parts(names):
        _refuse_several(names)
    return candidates


def _checked(location: SourceLocation, names: Sequence[str]) -> list[Table]:
    """The tables named, each read.

    Raises:
        UsageError: there is no such file, or its images are still on the web.
    """
    assert location.files is not None
    for name in names:
        if name not in location.all_names:
            raise UsageError(
                f"There is no file {name!r} of captions in {location.url}; name it from there (--captions)."
            )
    tables = [read_table(location.files, name, location.options.encoding) for name in names]
    if names_only_addresses(tables[0], location.options):
        raise UsageError(
            f"{tables[0].name} names its images by their addresses on the web. Download them first, as with "
            "img2dataset (--output_format webdataset), and pack what it leaves."
        )
    return tables


def _captions_apart(location: SourceLocation) -> list[Table]:
    """Tables anywhere in the source, and texts and JSON that read as one, whose images are there."""
    files = location.files
    assert files is not None
    candidates: list[str] = []
    for name in location.names:
        is_readable = file_extension(name) in TABLE_READERS
        if is_readable and not is_beside_image(location, name) and not is_bookkeeping(location, name):
            candidates.append(name)
    # names decide only among many: a table of any name is found where there are few files
    if len(candidates) > _MAX_CANDIDATES:
        candidates = [name for name in candidates if _LOOKS_LIKE_CAPTIONS.fullmatch(PurePosixPath(name).stem)]
    tables: list[Table] = []
    for name in candidates[:_MAX_CANDIDATES]:
        # parsed as annotations later, and not twice: COCO's files are large
        if may_be_annotations(files, name):
            continue
        try:
            table = read_table(files, name, location.options.encoding)
        except VlmError:
            continue
        if has_columns(table, location.options) and names_files(table, files, location.options):
            tables.append(table)
    return tables


def is_bookkeeping(location: SourceLocation, name: str) -> bool:
    """Whether a file describes a part of img2dataset's output next to it: its rows or its counts."""
    path = PurePosixPath(name)
    part = str(path.with_suffix("")).removesuffix("_stats")
    if f"{part}_stats.json" not in location.all_names:
        return False
    # .tar of its webdataset output, a folder of its files output; the JSON is a count wherever it lies
    return f"{part}.tar" in location.all_names or part in location.folders or path.suffix == ".json"


def _are_parts(names: Sequence[str]) -> bool:
    """Whether names differ in their numbers alone: `train-00000-of-00002.parquet`."""
    return len(names) > 1 and len({_PART_NUMBER.sub("#", name) for name in names}) == 1


def _refuse_several(names: Sequence[str]) -> None:
    listing = ", ".join(map(readable_text, names))
    raise UsageError(f"Several tables: {listing}; name the one to read as the source itself, or by --captions FILE.")


def _find_annotations(location: SourceLocation) -> dict[str, list[AnnotatedImage]]:
    files, options = location.files, location.options
    if files is None:
        return {}
    is_named = options.captions not in ("", "none", "optional")
    annotations: dict[str, list[AnnotatedImage]] = {}
    for name in [options.captions] if is_named else location.names:
        if file_extension(name) != "json" or name not in location.all_names or is_beside_image(location, name):
            continue
        if not may_be_annotations(files, name):
            continue
        images = read_annotations(files, name)
        if images and (is_named or has_images(files, images)):
            annotations[name] = images
    return annotations


def is_beside_image(location: SourceLocation, name: str) -> bool:
    """Whether a text belongs to one image, by its name."""
    return name.removesuffix(PurePosixPath(name).suffix) in location.image_stems


def unread_captions(location: SourceLocation) -> list[str]:
    """Tables, and files whose name says captions, that no reading has taken."""
    unread: list[str] = []
    for name in location.names:
        stem = PurePosixPath(name).stem
        is_text = file_extension(name) in TABLE_READERS
        if not is_text or is_bookkeeping(location, name):
            continue
        if _LOOKS_LIKE_CAPTIONS.fullmatch(stem) or (is_table(name) and "/" not in name):
            unread.append(name)
    return unread
