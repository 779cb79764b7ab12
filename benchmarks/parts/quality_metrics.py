"""Metrics of a trained model on the val split, the same for both sides: those of `vlm eval`, with intervals."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from parts.quality_data import DataSet
from parts.quality_intervals import bootstrap_interval
from parts.quality_settings import LABELS

from vlm.data.collate import iter_sample_batches
from vlm.data.samples import select_languages
from vlm.data.shards import expand_shards
from vlm.evaluation.retrieval_metrics import measure_retrieval, rank_candidates
from vlm.evaluation.zero_shot import evaluate_zero_shot
from vlm.models.model import VisionLanguageModel

_BOOTSTRAP_SEED = 0
_AT = 10


@dataclass(frozen=True, kw_only=True)
class Figures:
    """metrics: recall in [0, 1] and median rank by name. query_interval: 95% of text→image recall@10 over queries.

    zero_shot: top-1 among the classes of val, from bare class names; None if the data set has no labels.
    """

    metrics: dict[str, float]
    query_interval: tuple[float, float]
    zero_shot: float | None
    parameters: int


def measure(model: VisionLanguageModel, data: DataSet) -> Figures:
    """Recall in both directions with all captions of the first language, and zero-shot accuracy."""
    embedded: list[torch.Tensor] = []
    captions: list[list[str]] = []
    for batch in iter_sample_batches(expand_shards(data.val), model.view, workers=1):
        embedded.append(model.embed_images(batch.images))
        captions += [
            [text for of_one in select_languages(item.captions, ()).values() for text in of_one]
            for item in batch.decoded
        ]
    images = torch.cat(embedded).numpy()
    texts = model.embed_texts([text for of_image in captions for text in of_image]).numpy()
    label = LABELS.get(data.name)
    return Figures(
        metrics=measure_retrieval(images, texts, captions).metrics(),
        query_interval=_query_interval(images, texts, captions),
        zero_shot=evaluate_zero_shot(model, data.val, label=label, templates=("{}",), workers=1).top1
        if label
        else None,
        parameters=sum(parameter.numel() for parameter in model.network.parameters()),
    )


def _query_interval(images: np.ndarray, texts: np.ndarray, captions: list[list[str]]) -> tuple[float, float]:
    """Groups for resampling: images with the same first caption, and all captions of an image."""
    images_of: dict[str, set[int]] = defaultdict(set)
    for number, of_image in enumerate(captions):
        for text in of_image:
            images_of[text].add(number)
    right = [sorted(images_of[text]) for of_image in captions for text in of_image]
    groups = [of_image[0] for of_image in captions for _ in of_image]
    hits = rank_candidates(texts, images, right).hits(_AT)
    return bootstrap_interval(hits, groups, np.random.default_rng(_BOOTSTRAP_SEED))
