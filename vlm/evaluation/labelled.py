"""Pictures with a true class: from shards with a label in their metadata, or from class folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import nearest
from vlm.data.shards import expand_shards
from vlm.data.sources import SourceOptions, open_source
from vlm.data.views import FixedView
from vlm.errors import BadSample, UsageError
from vlm.evaluation.retrieval import IMAGES_AT_ONCE, read_items
from vlm.tensors import Array, UInt8

LabelledBatch = tuple[UInt8[Array, "B 3 H W"], list[str]]


def read_labelled(address: str, label: str, view: FixedView, *, workers: int = 0) -> Iterator[LabelledBatch]:
    """Pictures with their class names, in batches; what cannot be used is left out.

    address: shards, whose `label` is read from each sample's metadata, or a folder of CLASS/picture.

    Raises:
        UsageError: the metadata has no such label, or the folder has no classes.
    """
    path = Path(address)
    if path.is_dir() and not list(path.glob("*.tar")):
        yield from _from_folder(address, view)
        return
    for batch in read_items(expand_shards(address), view, workers=workers):
        if batch.items:
            yield batch.images.numpy(), [label_of(item.metadata, label, item.key) for item in batch.items]


def label_of(metadata: dict[str, Any], label: str, key: str) -> str:
    """The class name of a sample; a dotted label looks inside nested metadata (`scene.shape`).

    Raises:
        UsageError: it has none; the nearest field is named.
    """
    value: Any = metadata
    for part in label.split("."):
        if not isinstance(value, dict) or part not in value:
            known = sorted(value) if isinstance(value, dict) else []
            raise UsageError(f"Sample {key!r} has no metadata {label!r}; {nearest(part, known)} (--label FIELD)")
        value = value[part]
    return str(value)


def _from_folder(address: str, view: FixedView) -> Iterator[LabelledBatch]:
    source = open_source(address, SourceOptions(kind="classes"))
    images: list[np.ndarray] = []
    labels: list[str] = []
    for number in range(len(source)):
        try:
            pair = source.read(number)
            images.append(view(pair.image))
            labels.append(str(pair.metadata["label"]))
        except BadSample:
            continue
        if len(images) == IMAGES_AT_ONCE:
            yield np.stack(images), labels
            images, labels = [], []
    if images:
        yield np.stack(images), labels
