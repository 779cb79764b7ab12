#!/usr/bin/env python
"""Retrieval and zero-shot without a neural encoder: ridge CCA between 20-pixel images and bags of words.

The baseline that a trained model has to beat, evaluated by the same code on the same split as the models:

    benchmarks/run linear_baseline SHARDS/train-*.tar SHARDS/val-*.tar --label articleType

With --preset the same between the features of that preset's locked towers, which are cached in --feature-folder:

    benchmarks/run linear_baseline SHARDS/train-*.tar SHARDS/val-*.tar --preset lit-local --feature-folder features
"""

import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro

from vlm.api.evaluation import Evaluation
from vlm.cli.eval import show_evaluation
from vlm.console import show_json
from vlm.data.collate import iter_sample_batches
from vlm.data.shards import expand_shards
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import label_of
from vlm.evaluation.retrieval_metrics import measure_retrieval
from vlm.evaluation.zero_shot import ZeroShot, measure_zero_shot
from vlm.models.model import VisionLanguageModel
from vlm.train.feature_cache import open_cached_features
from vlm.train.presets import PRESETS
from vlm.train.run_config import TrainConfig
from vlm.train.run_setup import build_model


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the linear baseline."""

    train: tyro.conf.Positional[str]
    """Shards to fit on."""

    val: tyro.conf.Positional[str]
    """Shards to evaluate on."""

    label: str = ""
    """Metadata field to classify by; empty skips zero-shot."""

    pixels: int = 20
    """Image size in pixels."""

    preset: str = ""
    """Preset whose locked towers give features in place of pixels and bags of words."""

    feature_folder: str = "features"
    """Folder of these features."""

    dimensions: int = 256
    """Number of canonical directions."""

    ridge: float = 0.05
    """Ridge added to both covariances, relative to their mean variance."""

    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pixels [N, 3·P·P] in [0, 1], captions of each image, metadata and key of each image.

    With locked towers pixels are features [N, F], and texts the features [T, F] of all captions.
    """

    pixels: np.ndarray
    captions: list[list[str]]
    metadata: list[dict]
    keys: list[str]
    texts: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class LinearModel:
    """Means and projections of both modalities, and the vocabulary of the bag-of-words vectors."""

    words: dict[str, int]
    weights: np.ndarray
    image_mean: np.ndarray
    text_mean: np.ndarray
    image_projection: np.ndarray
    text_projection: np.ndarray

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors [N, D] of images."""
        return unit((pixels - self.image_mean) @ self.image_projection)

    def embed_words(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [T, D] of texts."""
        return self.embed_rows(bag_of_words(texts, self.words) * self.weights)

    def embed_rows(self, rows: np.ndarray) -> np.ndarray:
        """The same of bags of words, or of features."""
        return unit((rows - self.text_mean) @ self.text_projection)


def main(arguments: Arguments) -> None:
    """Fit, evaluate and print the results."""
    name = f"{arguments.pixels}-pixel images and bags of words"
    if arguments.preset:
        if arguments.label:
            raise UsageError("--label names classes by words, which --preset replaces by features; leave one out.")
        network = build_model(preset_config(arguments, arguments.train), torch.device("cpu"))
        train, val = (read_features(url, arguments, network) for url in (arguments.train, arguments.val))
        name = f"the features of the towers of {arguments.preset}"
    else:
        train, val = read(arguments.train, arguments.pixels), read(arguments.val, arguments.pixels)
    model = fit(train, arguments.dimensions, arguments.ridge)
    words = [text for of_image in val.captions for text in of_image]
    texts = model.embed_words(words) if val.texts is None else model.embed_rows(val.texts)
    evaluation = Evaluation(
        model=f"CCA of {name}",
        fingerprint="",
        retrieval=measure_retrieval(model.embed_pixels(val.pixels), texts, val.captions),
        zero_shot=classify(model, val, arguments.label) if arguments.label else None,
    )
    if arguments.json:
        show_json(evaluation)
    else:
        show_evaluation(evaluation)


def read(url: str, pixels: int) -> Data:
    """Read all images and captions of the shards."""
    images, captions, metadata, keys = [], [], [], []
    for batch in iter_sample_batches(expand_shards(url), EvalTransform(size=pixels), workers=1):
        images.append(batch.images.numpy().reshape(len(batch.decoded), -1) / np.float32(255))
        captions += [list(next(iter(item.captions.values()), ())) for item in batch.decoded]
        metadata += [item.metadata for item in batch.decoded]
        keys += [item.key for item in batch.decoded]
    return Data(pixels=np.concatenate(images), captions=captions, metadata=metadata, keys=keys)


def preset_config(arguments: Arguments, url: str) -> TrainConfig:
    """The preset on these shards, with its features in the folder."""
    config = replace(PRESETS[arguments.preset][1], data=url, run=arguments.feature_folder)
    return replace(config, loader=replace(config.loader, feature_folder=arguments.feature_folder))


def read_features(url: str, arguments: Arguments, model: VisionLanguageModel) -> Data:
    """The cached features of all images and of the captions in their first language; computed where they are missing.

    Samples whose image is damaged are left out.
    """
    shards = expand_shards(url)
    cached = open_cached_features(preset_config(arguments, url), shards, model)
    images, texts, captions = [], [], []
    for shard, image_part, text_part in zip(shards, cached.image_parts, cached.text_parts, strict=True):
        image_rows, text_rows = np.load(image_part), np.load(text_part)
        for batch in iter_sample_batches([shard], None, workers=0):
            for sample in batch.samples:
                own = list(next(iter(sample.captions.values()), ()))
                number = sample.sample_index.number
                if own and np.isfinite(image_rows[number, 0]).all():
                    images.append(image_rows[number, 0])
                    texts.append(text_rows[number, : len(own)])
                    captions.append(own)
    rows = np.concatenate(texts).astype(np.float32)
    return Data(pixels=np.stack(images).astype(np.float32), captions=captions, metadata=[], keys=[], texts=rows)


def fit(data: Data, dimensions: int, ridge: float) -> LinearModel:
    """Ridge CCA: whiten both sides, then the singular vectors of their cross-covariance."""
    rows = np.repeat(np.arange(len(data.captions)), [len(texts) for texts in data.captions])
    texts = [text for of_image in data.captions for text in of_image]
    counts = Counter(word for text in texts for word in set(split(text)))
    words = {word: number for number, word in enumerate(sorted(w for w, c in counts.items() if c >= 2))}
    weights = np.log(len(texts) / np.array([counts[word] for word in words], np.float32))
    bags = bag_of_words(texts, words) * weights if data.texts is None else data.texts
    images = data.pixels[rows]
    image_mean, text_mean = images.mean(axis=0), bags.mean(axis=0)
    images, bags = images - image_mean, bags - text_mean
    image_whitener, text_whitener = whitener(images, ridge), whitener(bags, ridge)
    left, strength, right = np.linalg.svd(image_whitener.T @ (images.T @ bags / len(texts)) @ text_whitener)
    kept = slice(0, min(dimensions, len(strength)))
    return LinearModel(
        words=words,
        weights=weights,
        image_mean=image_mean,
        text_mean=text_mean,
        image_projection=image_whitener @ left[:, kept] * strength[kept],
        text_projection=text_whitener @ right[kept].T * strength[kept],
    )


def whitener(rows: np.ndarray, ridge: float) -> np.ndarray:
    """The inverse root of the rows' covariance with a ridge on its diagonal."""
    covariance = rows.T @ rows / len(rows)
    covariance[np.diag_indices_from(covariance)] += ridge * covariance.trace() / len(covariance)
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(values) @ vectors.T


def classify(model: LinearModel, data: Data, label: str) -> ZeroShot:
    """Zero-shot among the classes that occur, from bare class names."""
    labels = [label_of(metadata, label, key) for metadata, key in zip(data.metadata, data.keys, strict=True)]
    names = sorted(set(labels))
    return measure_zero_shot([(model.embed_pixels(data.pixels), labels)], model.embed_words(names), names)


def bag_of_words(texts: list[str], words: dict[str, int]) -> np.ndarray:
    """1 for each word that a text contains."""
    bags = np.zeros((len(texts), len(words)), np.float32)
    for row, text in zip(bags, texts, strict=True):
        row[[words[word] for word in split(text) if word in words]] = 1
    return bags


def split(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"\w+", text.lower())


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows normalised to unit length, float32."""
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype(np.float32)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
