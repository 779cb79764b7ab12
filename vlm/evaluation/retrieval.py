"""Recall of pictures by captions and of captions by pictures, with several captions a picture."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.batches import AssembleItems, ItemBatch
from vlm.data.loader import stream_batches
from vlm.data.plan import ShardPlan
from vlm.data.samples import Captions, select_languages
from vlm.data.shards import count_samples
from vlm.data.views import FixedView
from vlm.errors import UsageError
from vlm.evaluation.ranks import Ranks, rank_answers
from vlm.tensors import Array, Float32, Tensor, UInt8

RECALL_AT = (1, 5, 10)
IMAGES_AT_ONCE = 256


@runtime_checkable
class DualEncoder(Protocol):
    """What retrieval needs of a model."""

    @property
    def view(self) -> FixedView:
        """How a picture is fitted."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of pictures."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction of retrieval: recall in [0, 1] by cut-off, median rank from 1, number of queries."""

    recall: dict[int, float]
    median_rank: float
    num_queries: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Both directions over the same pictures, and how many samples could not be used."""

    text_to_image: Direction
    image_to_text: Direction
    num_images: int
    num_texts: int
    num_bad: int = 0

    def metrics(self) -> dict[str, float]:
        """Flat names to values, as logs want them."""
        flat: dict[str, float] = {}
        for name, direction in (("text_to_image", self.text_to_image), ("image_to_text", self.image_to_text)):
            flat |= {f"{name}_recall@{k}": value for k, value in direction.recall.items()}
            flat[f"{name}_median_rank"] = direction.median_rank
        return flat


def read_items(shards: Sequence[str], view: FixedView | None, *, workers: int) -> Iterable[ItemBatch]:
    """Every sample of the shards once, in file order, ready for a model."""
    plan = ShardPlan(counts=count_samples(list(shards)), batch_size=IMAGES_AT_ONCE)
    return stream_batches(plan, shards, AssembleItems(view=view), numbers=range(len(plan)), workers=workers)


def evaluate_retrieval(
    model: DualEncoder,
    shards: Sequence[str],
    *,
    languages: tuple[str, ...] = (),
    captions_each: int = 0,
    workers: int = 0,
) -> Retrieval:
    """Embed all pictures and all their captions, then rank each against the whole other side.

    captions_each: only the first so many captions of a picture in each language are used; 0 uses all.

    Raises:
        UsageError: no sample can be used.
    """
    images: list[Tensor] = []
    captions: list[tuple[str, ...]] = []
    num_bad = 0
    for batch in read_items(shards, model.view, workers=workers):
        num_bad += len(batch.incidents)
        if batch.items:
            images.append(model.embed_images(batch.images))
            captions += [_texts(item.captions, languages, captions_each) for item in batch.items]
    if not images or not any(captions):
        raise UsageError(f"No picture with a caption in {languages or 'any language'} can be used in {shards[0]} …")
    texts = [text for of_image in captions for text in of_image]
    return measure_retrieval(torch.cat(images).numpy(), model.embed_texts(texts).numpy(), captions, num_bad=num_bad)


def measure_retrieval(
    images: Float32[Array, "N D"], texts: Float32[Array, "T D"], captions: Sequence[Sequence[str]], *, num_bad: int = 0
) -> Retrieval:
    """Recall and median rank in both directions.

    captions: those of each picture, in the order of `texts`. Every caption is a query; a picture is a right answer
    when it carries the same caption text, so that two pictures with equal captions are no error of the model.
    Pictures without captions are answers but no queries.
    """
    flat = [text for of_image in captions for text in of_image]
    images_of: dict[str, set[int]] = defaultdict(set)
    for number, of_image in enumerate(captions):
        for text in of_image:
            images_of[text].add(number)
    texts_of: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(flat):
        texts_of[text].append(number)
    asked = [number for number, of_image in enumerate(captions) if of_image]
    right_texts = [sorted({place for text in captions[number] for place in texts_of[text]}) for number in asked]
    return Retrieval(
        text_to_image=_direction(rank_answers(texts, images, [sorted(images_of[text]) for text in flat])),
        image_to_text=_direction(rank_answers(images[np.asarray(asked, dtype=np.int64)], texts, right_texts)),
        num_images=len(images),
        num_texts=len(flat),
        num_bad=num_bad,
    )


def _texts(captions: Captions, languages: tuple[str, ...], captions_each: int) -> tuple[str, ...]:
    if not captions:
        return ()
    chosen = select_languages(captions, languages).values()
    return tuple(text for texts in chosen for text in texts[: captions_each or None])


def _direction(ranks: Ranks) -> Direction:
    return Direction(
        recall={k: ranks.recall(k) for k in RECALL_AT},
        median_rank=ranks.median(),
        num_queries=len(ranks.above),
    )
