"""Captions in one JSON file next to folders of images: COCO's `captions_*.json` and Karpathy's `dataset_*.json`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from vlm.data.json_columns import Words
from vlm.data.samples import UNNAMED, Pair
from vlm.data.sources.delimited import decode_text
from vlm.data.sources.image_names import ImageFinder
from vlm.data.sources.source import SourceFiles, SourceOptions, folder_of, readable_text
from vlm.data.sources.table import unique_image_keys
from vlm.errors import BadSample
from vlm.files import compute_fingerprint

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
        raw = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
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
        return Pair(key=self._keys[number], image=file, captions=captions, metadata=metadata)

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
