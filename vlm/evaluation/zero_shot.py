"""Zero-shot classification: prompts of the class names act as the classifier (CLIP §3.1.2)."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.shards import expand_shards
from vlm.data.sources.source import PairSource, SourceOptions
from vlm.data.sources.source_registry import holds_shards, open_source
from vlm.data.tar import read_members
from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError
from vlm.evaluation.class_prompts import (
    DEFAULT_TEMPLATES,
    class_list_beside,
    class_of,
    class_vectors,
    fill_template,
    templates_beside,
    unique_names,
)
from vlm.evaluation.evaluation_set import CLS_LABEL, label_of
from vlm.evaluation.rank_metrics import rank_candidates
from vlm.evaluation.retrieval import IMAGES_AT_ONCE, iter_sample_batches
from vlm.tensor_types import Array, Float32, Tensor, UInt8

logger = logging.getLogger(__name__)

LabelledBatch = tuple[UInt8[Array, "B 3 H W"], list[str]]


def read_labelled(
    url: str, label: str, view: EvalTransform, *, class_list: Sequence[str] = (), workers: int = 0
) -> Iterator[LabelledBatch]:
    """Images with their class names, in batches; unusable ones are skipped.

    url: shards, whose `label` is read from each sample's metadata, or for `cls` from its KEY.cls; or anything
        `vlm pack` reads: class folders, also inside a tar, or a table with the label in a column.
    class_list: names by number, for KEY.cls that holds numbers.

    Raises:
        UsageError: the metadata has no such label, the folder has no classes, or a number has no name.
    """
    if not holds_shards(url):
        yield from _from_source(url, label, view)
        return
    if label != CLS_LABEL:
        for batch in iter_sample_batches(expand_shards(url), view, workers=workers):
            if batch.decoded:
                yield batch.images.numpy(), [label_of(item.metadata, label, item.key) for item in batch.decoded]
        return
    # shard by shard, since keys are unique within one shard only
    for shard in expand_shards(url):
        contents = read_members(shard, CLS_LABEL)
        for batch in iter_sample_batches([shard], view, workers=workers):
            if batch.decoded:
                labels = [class_of(contents.get(item.key), item.key, class_list) for item in batch.decoded]
                yield batch.images.numpy(), labels


def _labelled_source(url: str) -> PairSource:
    """A table as it is; anything else by its class folders."""
    with contextlib.suppress(UsageError):
        source = open_source(url)
        if source.describe()["kind"] == "table":
            return source
    return open_source(url, SourceOptions(kind="classes"))


def _from_source(url: str, label: str, view: EvalTransform) -> Iterator[LabelledBatch]:
    source = _labelled_source(url)
    described = source.describe()
    images: list[np.ndarray] = []
    labels: list[str] = []
    for number in range(len(source)):
        try:
            pair = source.read(number)
            images.append(view(pair.image))
            # the column of labels may have been taken for the captions
            texts = next(iter(pair.captions.values()), ())
            metadata = {str(described.get("caption_column")): texts[0] if texts else ""} | pair.metadata
            labels.append(
                label_of(metadata, label, pair.key) if described["kind"] == "table" else str(pair.metadata["label"])
            )
        except BadSample:
            continue
        if len(images) == IMAGES_AT_ONCE:
            yield np.stack(images), labels
            images, labels = [], []
    if images:
        yield np.stack(images), labels


@runtime_checkable
class TextEncoder(Protocol):
    """What a zero-shot classifier needs of a model."""

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        ...


@runtime_checkable
class ZeroShotClassifier(TextEncoder, Protocol):
    """What classifying images needs of a model."""

    @property
    def view(self) -> EvalTransform:
        """The transform of its images."""
        ...

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of images."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class: its images, and the fraction of them classified correctly."""

    name: str
    num_images: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracies in [0, 1]. mean_per_class weighs all classes present equally; majority is the share of the largest."""

    top1: float
    top5: float
    mean_per_class: float
    majority: float
    num_images: int
    num_classes: int
    classes: tuple[ClassScore, ...]


def class_embeddings(
    model: TextEncoder, names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> Float32[Array, "K D"]:
    """A unit vector per class: the mean over the templates of the unit vectors of its sentences.

    Raises:
        UsageError: a template has no {} for the name.
    """
    sentences: list[str] = []
    for name in names:
        sentences += [fill_template(template, name) for template in templates]
    # the mean of unit vectors instead of the vector of one prompt: +3.5 points on ImageNet (CLIP §3.1.4)
    return class_vectors(model.embed_texts(sentences).numpy(), [len(templates)] * len(names))


def measure_zero_shot(
    batches: Iterable[tuple[Float32[Array, "B D"], Sequence[str]]],
    classifier: Float32[Array, "K D"],
    names: Sequence[str],
) -> ZeroShot:
    """Accuracy of nearest-class classification of embedded images with their true class names.

    Raises:
        UsageError: there is no image, or a true class is not among the names.
    """
    class_index = {name: number for number, name in enumerate(names)}
    top1: list[np.ndarray] = []
    top5: list[np.ndarray] = []
    truths: list[int] = []
    for images, labels in batches:
        unknown = set(labels) - set(class_index)
        if unknown:
            raise UsageError(f"{len(unknown)} classes of the images are not among the names: {sorted(unknown)[:5]}")
        # one positive a query: an image's rank is that of its class
        truth = [class_index[label] for label in labels]
        ranks = rank_candidates(images, classifier, [[number] for number in truth])
        top1.append(ranks.hits(1))
        top5.append(ranks.hits(5))
        truths += truth
    if not truths:
        raise UsageError("There is no image with a class to evaluate on.")
    return _summary(np.concatenate(top1), np.concatenate(top5), np.asarray(truths), names)


def evaluate_zero_shot(
    model: "ZeroShotClassifier",
    url: str,
    *,
    label: str = "label",
    names: Sequence[str] = (),
    templates: Sequence[str] = (),
    workers: int = 0,
) -> ZeroShot:
    """Zero-shot accuracy on labelled images.

    url, label: as of `read_labelled`. names: candidate classes, by number for KEY.cls; a name given twice is one
    class. Empty uses `classnames.txt` next to shards with KEY.cls, or one folder up, else those of the images.
    templates: as of `class_embeddings`; empty uses CLIP_benchmark's file of them in these places, else three of ours.

    Raises: as of `read_labelled`, `class_embeddings` and `measure_zero_shot`.
    """
    # vectors of all images are kept: without names, the classes are known only once all labels have been read
    batches: list[tuple[np.ndarray, list[str]]] = []
    if label == CLS_LABEL:
        names = names or class_list_beside(url)
        templates = templates or templates_beside(url)
    for images, labels in read_labelled(url, label, model.view, class_list=names, workers=workers):
        batches.append((model.embed_images(torch.from_numpy(images)).numpy(), labels))
    # sorted, so that the number of a class does not depend on the order of the images
    names = unique_names(names) or sorted(set[str]().union(*(labels for _, labels in batches)))
    if label == CLS_LABEL and names and all(map(str.isdecimal, names)):
        logger.warning(
            f"The classes have numbers for names ({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), and the "
            "prompts are made of these; give their names by --class-names FILE, one per line in order of the numbers."
        )
    return measure_zero_shot(batches, class_embeddings(model, names, templates or DEFAULT_TEMPLATES), names)


def _summary(top1: np.ndarray, top5: np.ndarray, truths: np.ndarray, names: Sequence[str]) -> ZeroShot:
    totals = np.bincount(truths, minlength=len(names))
    right = np.bincount(truths, weights=top1, minlength=len(names))
    classes: list[ClassScore] = []
    for name, total, hits in zip(names, totals, right, strict=True):
        # a class without images has no accuracy, and none may enter the mean per class
        if total:
            classes.append(ClassScore(name=name, num_images=int(total), accuracy=float(hits / total)))
    return ZeroShot(
        top1=float(top1.mean()),
        top5=float(top5.mean()),
        mean_per_class=float(np.mean([score.accuracy for score in classes])),
        majority=float(totals.max() / len(truths)),
        num_images=len(truths),
        num_classes=len(names),
        classes=tuple(classes),
    )
