"""Folders of images: a text next to each, a folder for each class, or no captions at all."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from vlm.data.samples import UNNAMED, Captions, Pair, Words, parse_captions, split_lines, without_captions
from vlm.data.sources.source import SourceFiles, SourceOptions, image_names, readable_text
from vlm.data.sources.table import CAPTION_COLUMNS, unique_image_keys
from vlm.data.sources.table_rows import decode_text
from vlm.errors import BadSample, UsageError
from vlm.files import compute_fingerprint

TEXT_SUFFIXES = (".txt", ".caption", ".cap")
JSON_SUFFIX = ".json"
# folders that sort images by their use, and say nothing about them
_PLAIN_FOLDERS = re.compile(
    r"(images?|imgs?|pictures?|pics?|photos?|photographs?|jpe?gs?|pngs?|files?|data(set)?s?|raw|all|media|uploads?"
    r"|train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval|unlabell?ed|downloads?|samples?|frames?)[\W_]*\d*"
    # fewer digits may be classes, as those of MNIST are
    r"|\d{4,}",
    re.IGNORECASE,
)
_COLLECTION = re.compile(r".*[\W_](images?|imgs?|pictures?|photos?|data(set)?)", re.IGNORECASE)
# lines of numbers next to an image are boxes (YOLO), not captions
_NUMBERS = re.compile(r"[\s\d.eE+-]*")


class ClassFolderSource:
    """`CLASS/image.jpg`, below any other folders; metadata `label` and `file`.

    Images come in the order of their own names, not of their classes, so that a shard holds many classes.
    """

    captions_are_labels = True
    is_fork_safe = True

    def __init__(self, files: SourceFiles, *, template: str) -> None:
        if "{}" not in template:
            raise UsageError(f"The template {template!r} has no {{}} for the class; an example: 'a photo of a {{}}.'")
        self._files = files
        self._template = template
        inside: list[str] = []
        for name in image_names(files):
            # an image outside all folders has no class
            if "/" in name:
                inside.append(name)
        self._names = sorted(inside, key=lambda name: (PurePosixPath(name).name, name))
        self._keys = unique_image_keys(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> Pair:
        """The image with its class said through the template."""
        captions, metadata, _ = self.words(number)
        image = self._files.read(self._names[number])
        return Pair(key=self._keys[number].as_py(), image=image, captions=captions, metadata=metadata)

    def words(self, number: int) -> Words:
        """The class, said through the template."""
        name = self._names[number]
        label = readable_text(PurePosixPath(name).parent.name)
        caption = self._template.replace("{}", label.replace("_", " "))
        return Words({UNNAMED: (caption,)}, {"label": label, "file": readable_text(name)})

    def file_of(self, number: int) -> str:
        """The image's name."""
        return readable_text(self._names[number])

    def used_files(self) -> set[str]:
        """All images inside folders."""
        return set(self._names)

    def classes(self) -> list[str]:
        """The names of the classes."""
        return sorted(set(map(readable_text, label_folders(self._names))))

    def fingerprint(self) -> str:
        """Names and sizes of all files, and the template."""
        return compute_fingerprint(self._files.fingerprint(), self._template)

    def describe(self) -> dict[str, Any]:
        """The template and the classes found."""
        return {
            "kind": "classes",
            "address": self._files.url,
            "template": self._template,
            "classes": self.classes(),
        }


class ImageFolderSource:
    """Images with a text next to each: `a.txt`, `a.caption` or `a.json`; or without, if the options say so.

    The JSON is metadata, whose captions count as in shards; of texts and JSON both may be there.
    """

    captions_are_labels = False
    is_fork_safe = True

    def __init__(self, files: SourceFiles, options: SourceOptions) -> None:
        self._files = files
        self._options = options
        self._names = image_names(files)
        self._keys = unique_image_keys(self._names)
        self._all = frozenset(files.names())

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> Pair:
        """The image with the captions next to it."""
        captions, metadata, _ = self.words(number)
        image = self._files.read(self._names[number])
        return Pair(key=self._keys[number].as_py(), image=image, captions=captions, metadata=metadata)

    def words(self, number: int) -> Words:
        """The captions and the JSON next to the image."""
        name = self._names[number]
        options = self._options
        metadata = metadata_beside(self._files, name, self._all, encoding=options.encoding)
        # img2dataset's files keep the JSON of a failed download, with its status
        status = metadata.get("status") or "success"
        if status != "success":
            raise BadSample("not downloaded", f"status {status!r}: {metadata.get('error_message')}")
        captions: Captions = {}
        if options.captions != "none":
            captions = captions_beside(
                self._files,
                name,
                self._all,
                metadata,
                encoding=options.encoding,
                caption_lines=options.caption_lines,
            )
            if not captions and options.captions != "optional":
                raise BadSample("no caption", f"{readable_text(name)} has no text file next to it")
        # metadata of the same name has the last word
        return Words(captions, {"file": readable_text(name)} | without_captions(metadata))

    def file_of(self, number: int) -> str:
        """The image's name."""
        return readable_text(self._names[number])

    def used_files(self) -> set[str]:
        """The images, and the texts next to them."""
        used = set(self._names)
        if self._options.captions != "none":
            for name in self._names:
                used.update(files_beside(name, self._all))
        return used

    def fingerprint(self) -> str:
        """Names and sizes of all files, and how they are read."""
        return compute_fingerprint(
            self._files.fingerprint(), self._options.captions, str(self._options.caption_lines), self._options.encoding
        )

    def describe(self) -> dict[str, Any]:
        """How the words are found."""
        kind = "images" if self._options.captions == "none" else "texts"
        return {"kind": kind, "address": self._files.url, "captions": self._options.captions or "next to each image"}


def metadata_beside(files: SourceFiles, name: str, names: frozenset[str], *, encoding: str = "") -> dict[str, Any]:
    """What the JSON next to an image says; nothing where there is none. names: all files.

    Raises:
        BadSample: it is not a JSON object.
    """
    json_name = next((file for file in files_beside(name, names) if file.endswith(JSON_SUFFIX)), None)
    if json_name is None:
        return {}
    try:
        content = json.loads(decode_text(files.read(json_name), encoding))
        # half a surrogate pair is JSON, but no text
        content = json.loads(json.dumps(content, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable json", f"{readable_text(json_name)}: {error}") from error
    if not isinstance(content, dict):
        raise BadSample("unreadable json", f"{readable_text(json_name)} is not an object")
    return content


def captions_beside(
    files: SourceFiles,
    name: str,
    names: frozenset[str],
    metadata: dict[str, Any],
    *,
    encoding: str = "",
    caption_lines: bool = False,
) -> Captions:
    """The captions in the text next to an image, or in its metadata. names: all files.

    Raises:
        BadSample: the text is not of this encoding.
    """
    text: str | list[str] | None = None
    text_name = next((file for file in files_beside(name, names) if not file.endswith(JSON_SUFFIX)), None)
    if text_name is not None:
        text = _decoded(files.read(text_name), text_name, encoding)
    # the names that shards use come first; the usual columns of tables count where none of those is there
    captions = parse_captions(text, metadata)
    if captions or not metadata:
        return split_lines(captions) if caption_lines else captions
    return parse_captions(None, {"captions": _first_caption(metadata)})


def _decoded(data: bytes, name: str, encoding: str) -> str:
    try:
        text = decode_text(data, encoding)
        # bad bytes were decoded to halves of surrogates, which do not encode
        text.encode()
    except UnicodeError as error:
        hint = f"not {encoding or 'UTF-8'}; name its encoding, as in --encoding latin-1"
        raise BadSample("unreadable text", f"{readable_text(name)} is {hint}") from error
    return text


def files_beside(image: str, names: frozenset[str]) -> list[str]:
    """The texts and the JSON that belong to an image: `a.txt` or `a.jpg.txt`."""
    stem = image.removesuffix(PurePosixPath(image).suffix)
    present: list[str] = []
    # readers take the first of a kind, so that the order of endings decides between a.txt and a.caption
    for suffix in (*TEXT_SUFFIXES, JSON_SUFFIX):
        for base in (stem, image):
            if f"{base}{suffix}" in names:
                present.append(f"{base}{suffix}")
    return present


def has_words_beside(files: SourceFiles, image: str, names: frozenset[str]) -> bool:
    """Whether a text next to an image holds a caption, and not the numbers of boxes."""
    for name in files_beside(image, names):
        try:
            text = decode_text(files.read(name)).strip()
        except (BadSample, UnicodeError):
            continue
        if name.endswith(JSON_SUFFIX):
            if _has_json_caption(text):
                return True
        elif text and not _NUMBERS.fullmatch(text):
            return True
    return False


def _has_json_caption(text: str) -> bool:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and _first_caption(content) is not None


def _first_caption(values: dict[str, Any]) -> Any:
    """The content of the first usual column that has one."""
    for column in CAPTION_COLUMNS:
        if values.get(column):
            return values[column]
    return None


def are_no_classes(folders: set[str]) -> bool:
    """Whether no folder has the name of a class, but of a use or a part: images, train, 00012.

    >>> [are_no_classes(names) for names in ({"Images"}, {"train2017", "val2017"}, {"00000", "00001"}, {"my_images"})]
    [True, True, True, True]
    >>> [are_no_classes(names) for names in ({"cat"}, {"0", "1"}, {"train", "cat"}, {"cat_images", "dog_images"})]
    [False, False, False, False]
    """
    is_one_collection = len(folders) == 1 and all(map(_COLLECTION.fullmatch, folders))
    return is_one_collection or all(map(_PLAIN_FOLDERS.fullmatch, folders))


def label_folders(names: Sequence[str]) -> set[str]:
    """The folders that would be classes."""
    return {PurePosixPath(name).parent.name for name in names if "/" in name}
