"""A set to evaluate on: what is said of each image, read at once, and the images themselves, read when they are needed.

Opened from whatever `vlm pack` reads (shards, class folders, tables, also inside a tar), or as CLIP_benchmark lays its
sets out: shards with KEY.cls, `classnames.txt` and `zeroshot_classification_templates.txt`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from vlm.config import suggest
from vlm.data.decode import open_image, to_rgb
from vlm.data.sampler import SequentialBatches
from vlm.data.samples import Captions, SampleIndex, WordedSource, parse_npy, split_lines
from vlm.data.shards import (
    Pixels,
    ShardSet,
    as_pixels,
    count_samples,
    expand_shards,
    read_batches,
    shards_fingerprint,
)
from vlm.data.sources.source import NamedSource, PairSource, SourceOptions
from vlm.data.sources.source_registry import holds_shards, open_source
from vlm.data.tar import ShardReader, read_members
from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError
from vlm.evaluation.class_vectors import class_list_beside, class_of, templates_beside, unique_names
from vlm.files import compute_fingerprint
from vlm.tensor_types import Array, Int64

IMAGES_AT_ONCE = 256
CLS_LABEL = "cls"
NPY_LABEL = "npy"
# so many images are read for the identity of a set, which names and sizes alone would not tell from a newer one
_IMAGES_IN_DIGEST = 16
_NUMBERS = re.compile(r"\d+")
# several class numbers, as of a multi-label data set
_SEVERAL_NUMBERS = re.compile(r"\[?\s*\d+(\s*[,;\s]\s*\d+)*\s*\]?")

Alteration = Callable[[Image.Image, str], Image.Image]
"""What is done to an image (upright, RGB, of its full size) before the model's view; the text is its key."""


@dataclass(frozen=True, kw_only=True)
class SetImages:
    """Where the images of a set lie: in shards, or in a source of pairs; numbers of the images among all of them."""

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    numbers: Int64[Array, " N"]
    source: PairSource | None = None
    alterations: tuple[Alteration, ...] = ()

    @cached_property
    def ends(self) -> Int64[Array, " S"]:
        """The number behind the last one of each shard."""
        return np.cumsum(self.counts, dtype=np.int64)

    def plan(self, batch_size: int) -> SequentialBatches:
        """The batches of these images in their order; the number of a sample index is that in its shard."""
        # a selection as times of each sample: 1 reads it, 0 leaves it out
        mask = np.zeros(sum(self.counts), np.uint8)
        mask[self.numbers] = 1
        return SequentialBatches(counts=self.counts, batch_size=batch_size, times=np.split(mask, self.ends[:-1]))

    def row_of(self, index: SampleIndex) -> int:
        """The row of a sample."""
        number = int(self.ends[index.shard]) - self.counts[index.shard] + index.number
        return int(np.searchsorted(self.numbers, number))

    def index_of(self, row: int) -> SampleIndex:
        """The sample of a row."""
        number = int(self.numbers[row])
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return SampleIndex(0, shard, number - int(self.ends[shard]) + self.counts[shard])

    def file(self, index: SampleIndex, shards: ShardSet) -> bytes:
        """The file of an image, unaltered; raises BadSample where there is none."""
        return shards.read(index).image if self.source is None else self.source.read(index.number).image

    def altered(self, data: bytes, key: str) -> Image.Image:
        """An image decoded, with all that is changed of it; raises BadSample where it cannot be."""
        image = to_rgb(open_image(data))
        for alter in self.alterations:
            image = alter(image, key)
        return image


@dataclass(frozen=True, kw_only=True)
class SetBatch:
    """Images as a model sees them. rows: theirs in the set. failures: why others of the batch have none, by row."""

    images: Pixels
    rows: tuple[int, ...]
    failures: dict[int, str] = field(default_factory=dict)

    def with_images(self, images: Pixels) -> "SetBatch":
        """The same batch with other images."""
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class _SetCollator:
    images: SetImages
    view: EvalTransform
    keys: tuple[str, ...]
    as_arrays: bool

    @property
    def image_bytes(self) -> int:
        return 3 * self.view.size**2

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> SetBatch:
        views: list[np.ndarray] = []
        rows: list[int] = []
        failures: dict[int, str] = {}
        for index in sample_indices:
            row = self.images.row_of(index)
            try:
                views.append(self._view(self.images.file(index, shards), self.keys[row]))
                rows.append(row)
            except BadSample as error:
                failures[row] = str(error)
        # in memory that workers share with the main process, so that a batch is not copied through a pipe
        pixels = shards.allocate_images((len(views), 3, self.view.size, self.view.size))
        if views:
            np.stack(views, out=pixels)
        return SetBatch(images=as_pixels(pixels, as_arrays=self.as_arrays), rows=tuple(rows), failures=failures)

    def _view(self, data: bytes, key: str) -> np.ndarray:
        # without alterations the view decodes by itself, no larger than it needs
        return self.view.of_image(self.images.altered(data, key)) if self.images.alterations else self.view(data)


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Images with what is known of each, a row each; all sequences are parallel.

    digest: identity of the images: sets of the same digest have the same features, whatever their labels are.
    keys: unlike each other. captions: by language. labels: the true classes of each, by name; None if there are none.
    class_names: the candidate classes by number, in the order of CLIP_benchmark's list where there is one; an empty
    name stands for a number without one. templates: prompts that came with the set. num_bad: samples left out.
    """

    name: str
    digest: str
    keys: tuple[str, ...]
    captions: tuple[Captions, ...]
    metadata: tuple[dict[str, Any], ...]
    images: SetImages
    labels: tuple[tuple[str, ...], ...] | None = None
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    num_bad: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def rows_by_key(self) -> dict[str, int]:
        """The row of each key."""
        return {key: row for row, key in enumerate(self.keys)}

    @property
    def candidates(self) -> list[str]:
        """The names of the classes an image may be of: those that came with the set, else those of its images.

        Raises:
            UsageError: the images have no labels.
        """
        # sorted, so that the number of a class does not depend on the order of the images
        return unique_names(self.class_names) or sorted(set[str]().union(*self.true_labels))

    @property
    def true_labels(self) -> tuple[tuple[str, ...], ...]:
        """The labels of each image.

        Raises:
            UsageError: there are none.
        """
        if self.labels is None:
            raise UsageError(
                f"The images of {self.name} have no labels; name the metadata field of their class (--label FIELD)."
            )
        return self.labels

    def select(self, rows: Sequence[int] | Int64[Array, " M"]) -> "EvaluationSet":
        """Only these rows, which are given in rising order."""
        chosen = np.asarray(rows, dtype=np.int64)
        # rising rows, so as many as there are means all of them: the digest and the cached features stay
        if len(chosen) == len(self):
            return self
        return replace(
            self,
            digest=compute_fingerprint(self.digest, chosen.tobytes()),
            keys=tuple(self.keys[row] for row in chosen),
            captions=tuple(self.captions[row] for row in chosen),
            metadata=tuple(self.metadata[row] for row in chosen),
            labels=None if self.labels is None else tuple(self.labels[row] for row in chosen),
            images=replace(self.images, numbers=self.images.numbers[chosen]),
        )

    def altered(self, name: str, alter: Alteration) -> "EvaluationSet":
        """The same set with every image changed.

        name: says what is done, with all its parameters: it is part of the identity of the images.
        """
        return replace(
            self,
            digest=compute_fingerprint(self.digest, name),
            images=replace(self.images, alterations=(*self.images.alterations, alter)),
        )

    def iter_images(
        self, view: EvalTransform, *, workers: int = 0, share: tuple[int, int] = (0, 1), as_arrays: bool = False
    ) -> Iterable[SetBatch]:
        """All images in batches, in the order of the rows, as a model sees them.

        workers: processes that read and decode; 0 does it in this one.
        share: rank and number of processes, each of which gets every so many'th batch.
        as_arrays: images are arrays rather than tensors, and the workers threads, so that nothing needs torch.
        """
        plan = self.images.plan(IMAGES_AT_ONCE)
        collate = _SetCollator(images=self.images, view=view, keys=self.keys, as_arrays=as_arrays)
        rank, num_processes = share
        numbers = range(rank, len(plan), num_processes)
        # a source that is no shards has one place that its threads read at
        if as_arrays and self.images.source is not None:
            workers = min(workers, 1)
        shards = self.images.shards
        return read_batches(plan, shards, collate, numbers=numbers, workers=workers, as_arrays=as_arrays)

    def image_file(self, row: int) -> bytes:
        """The file of an image as it lies in the set, unaltered.

        Raises:
            BadSample: it cannot be read.
        """
        return self.images.file(self.images.index_of(row), ShardSet(self.images.shards))

    def open_image(self, row: int) -> Image.Image:
        """An image as the model's view gets it, with all that was changed of it.

        Raises:
            BadSample: it cannot be decoded.
        """
        return self.images.altered(self.image_file(row), self.keys[row])


def open_evaluation_set(
    url: str,
    *,
    name: str = "",
    label: str = "",
    class_names: Sequence[str] = (),
    options: SourceOptions | None = None,
    caption_lines: bool = False,
    limit: int = 0,
) -> EvaluationSet:
    """The set at an address: shards, or anything `vlm pack` reads.

    label: field of the metadata with the class, or a list of classes, of an image (dots select nested fields); `cls`
        for KEY.cls of shards, a number or several; `npy` for KEY.npy, a 1 for each class it is of. Class folders need
        none.
    class_names: names by number for `cls` and `npy`; empty uses `classnames.txt` next to the shards, or one folder up.
    options: how to read a source that is no shards. caption_lines: each line of a text in shards is a caption.
    limit: only the first images; 0 reads all.

    Raises:
        UsageError: there is nothing, a sample has no such label, or a number no name.
    """
    is_shards = options is None and holds_shards(url)
    if is_shards:
        opened = _open_shards(url, label, class_names, caption_lines=caption_lines)
    else:
        opened = _open_source(url, label, options or SourceOptions())
    opened = replace(opened, name=name or url)
    if not len(opened):
        raise UsageError(f"No sample of {url} can be used.")
    if 0 < limit < len(opened):
        opened = opened.select(range(limit))
    # names and counts may stay where images are replaced, so that some of their bytes are part of the identity
    return replace(opened, digest=compute_fingerprint(opened.digest, *_some_images(opened)))


@dataclass(kw_only=True)
class _Rows:
    """What is collected of each sample that can be read."""

    keys: list[str] = field(default_factory=list)
    captions: list[Captions] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    num_bad: int = 0

    def add(self, number: int, key: str, captions: Captions, metadata: dict[str, Any], labels: tuple[str, ...]) -> None:
        self.numbers.append(number)
        self.keys.append(key)
        self.captions.append(captions)
        self.metadata.append(metadata)
        self.labels.append(labels)

    def as_set(self, images: SetImages, digest: str, *, has_labels: bool) -> EvaluationSet:
        numbers = np.asarray(self.numbers, dtype=np.int64)
        return EvaluationSet(
            name="",
            digest=compute_fingerprint(digest, numbers.tobytes()),
            # keys are unique within one shard only, and a row is known by its key
            keys=tuple(_unlike(self.keys)),
            captions=tuple(self.captions),
            metadata=tuple(self.metadata),
            labels=tuple(self.labels) if has_labels else None,
            images=replace(images, numbers=numbers),
            num_bad=self.num_bad,
        )


def _open_shards(url: str, label: str, class_names: Sequence[str], *, caption_lines: bool) -> EvaluationSet:
    shards = expand_shards(url)
    counts = count_samples(shards)
    is_member = label in (CLS_LABEL, NPY_LABEL)
    class_list = list(class_names) or (class_list_beside(url) if is_member else [])
    rows = _Rows()
    first = 0
    for shard, count in zip(shards, counts, strict=True):
        contents = read_members(shard, label) if is_member else {}
        reader = ShardReader(shard)
        for number in range(count):
            try:
                key, captions, metadata = reader.read_words(number)
            except BadSample:
                rows.num_bad += 1
                continue
            labels: tuple[str, ...] = ()
            if label == CLS_LABEL:
                labels = _classes_of(contents.get(key), key, class_list)
            elif label == NPY_LABEL:
                labels = _classes_of_array(contents.get(key), key, class_list)
            elif label:
                labels = labels_of(metadata, label, key)
            # two people may write the same of an image; CLIP_benchmark asks for it twice, too
            captions = split_lines(captions, keeps_repeated=True) if caption_lines else captions
            rows.add(first + number, key, captions, metadata, labels)
        reader.close()
        first += count
    images = SetImages(shards=tuple(shards), counts=tuple(counts), numbers=np.zeros(0, np.int64))
    opened = rows.as_set(images, shards_fingerprint(shards), has_labels=bool(label))
    templates = templates_beside(url) if is_member else ()
    return replace(opened, class_names=tuple(class_list), templates=tuple(templates))


def _open_source(url: str, label: str, options: SourceOptions) -> EvaluationSet:
    source = open_source(url, options)
    described = source.describe()
    is_classes = described.get("kind") == "classes"
    rows = _Rows()
    for number in range(len(source)):
        try:
            key, captions, metadata = _words_of(source, number)
        except BadSample:
            rows.num_bad += 1
            continue
        if is_classes and not label:
            labels = (str(metadata["label"]),)
        elif label:
            # the column of labels may have been taken for the captions
            texts = next(iter(captions.values()), ())
            labels = labels_of({str(described.get("caption_column")): texts[0] if texts else ""} | metadata, label, key)
        else:
            labels = ()
        rows.add(number, key, captions, metadata, labels)
    images = SetImages(shards=(), counts=(len(source),), numbers=np.zeros(0, np.int64), source=source)
    return rows.as_set(images, source.fingerprint(), has_labels=bool(label) or is_classes)


def _words_of(source: PairSource, number: int) -> tuple[str, Captions, dict[str, Any]]:
    if isinstance(source, WordedSource):
        words = source.words(number)
        key = source.file_of(number) if isinstance(source, NamedSource) else str(number)
        return key, words.captions, words.metadata
    pair = source.read(number)
    return pair.key, pair.captions, pair.metadata


def _unlike(keys: Sequence[str]) -> Iterator[str]:
    """The keys, those that came before with a number behind them."""
    times_seen: Counter[str] = Counter()
    for key in keys:
        times_seen[key] += 1
        yield key if times_seen[key] == 1 else f"{key} ({times_seen[key]})"


def _some_images(opened: EvaluationSet) -> Iterator[bytes]:
    """Image files of rows evenly spread over the set; what cannot be read is empty."""
    rows = np.unique(np.linspace(0, len(opened) - 1, _IMAGES_IN_DIGEST).round().astype(int))
    for row in rows.tolist():
        try:
            yield opened.image_file(row)
        except BadSample:
            yield b""


def _classes_of(content: bytes | None, key: str, class_list: Sequence[str]) -> tuple[str, ...]:
    """The classes that KEY.cls names: one, or several numbers."""
    text = "" if content is None else content.decode(errors="replace").strip()
    # a class may itself be called "1, 2"
    if _SEVERAL_NUMBERS.fullmatch(text) and text not in class_list:
        return tuple(class_of(number.encode(), key, class_list) for number in _NUMBERS.findall(text))
    return (class_of(content, key, class_list),)


def _classes_of_array(content: bytes | None, key: str, class_list: Sequence[str]) -> tuple[str, ...]:
    """The classes of which KEY.npy, a number for each class, is not 0."""
    if content is None:
        raise UsageError(f"Sample {key!r} has no {key}.npy; name another label (--label FIELD).")
    try:
        numbers = np.flatnonzero(parse_npy(content, f"{key}.npy"))
    except BadSample as error:
        raise UsageError(f"The classes of sample {key!r} cannot be read: {error}.") from error
    return tuple(class_of(str(number).encode(), key, class_list) for number in numbers)


def labels_of(metadata: dict[str, Any], label: str, key: str) -> tuple[str, ...]:
    """The class names of a sample: those of a list, else the one of `label_of`."""
    value = _nested(metadata, label, key)
    # an empty list: an image of none of the classes
    if isinstance(value, list) and all(isinstance(name, str | int) for name in value):
        return tuple(map(str, value))
    return (label_of(metadata, label, key),)


def label_of(metadata: dict[str, Any], label: str, key: str) -> str:
    """The class name of a sample; a dotted label selects nested fields (`scene.shape`).

    Raises:
        UsageError: it has none (the nearest field is named), or not exactly one.
    """
    value = _nested(metadata, label, key)
    # as text, null would be a class "None", and each list a class of its own
    if value is None or isinstance(value, list | dict):
        held = "nothing" if value is None else f"several values ({str(value)[:40]})"
        raise UsageError(f"The metadata {label!r} of sample {key!r} holds {held}; a class is one text or number.")
    return str(value)


def _nested(metadata: dict[str, Any], label: str, key: str) -> Any:
    value: Any = metadata
    for part in label.split("."):
        if not isinstance(value, dict) or part not in value:
            known = sorted(value) if isinstance(value, dict) else []
            raise UsageError(f"Sample {key!r} has no metadata {label!r}; {suggest(part, known)} (--label FIELD)")
        value = value[part]
    return value
