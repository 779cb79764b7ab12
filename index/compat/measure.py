"""What an upgrade costs and brings: recall on pairs, by an old model, by a new one, and by the new one on old rows."""

import numpy as np
import torch

from vlm.evaluation.retrieval import Retrieval, measure_retrieval
from vlm.index.compat.pairs import Pairs
from vlm.models.compatible import Head
from vlm.tensors import Array, Float32


def measure_head(pairs: Pairs, head: Head, *, seed: int) -> dict[str, Retrieval]:
    """Recall by who asks and which rows answer; pictures asked by captions, and captions by pictures."""
    images, texts = through(head, pairs.new_images), through(head, pairs.new_texts)
    return {
        "old → old": _ask(pairs, pairs.old_images, pairs.old_texts, pairs.old_images, pairs.old_texts),
        "new → old": ask_old(pairs, head),
        "new → half new": ask_mixed(pairs, head, seed=seed),
        "new → new": _ask(pairs, images, texts, images, texts),
        "new → new, no head": _ask(pairs, pairs.new_images, pairs.new_texts, pairs.new_images, pairs.new_texts),
    }


def ask_old(pairs: Pairs, head: Head) -> Retrieval:
    """The new model asks old rows."""
    size = head.dimension
    return _ask(
        pairs,
        through(head, pairs.new_images),
        through(head, pairs.new_texts),
        padded(pairs.old_images, size),
        padded(pairs.old_texts, size),
    )


def ask_mixed(pairs: Pairs, head: Head, *, seed: int) -> Retrieval:
    """The new model asks rows of which half are its own.

    seed: of the half of the pictures that count as embedded again, with their captions.
    """
    images, texts = through(head, pairs.new_images), through(head, pairs.new_texts)
    again = np.random.default_rng(seed).permutation(len(pairs)) < len(pairs) // 2
    mixed_images = np.where(again[:, None], images, padded(pairs.old_images, head.dimension))
    mixed_texts = np.where(again[pairs.owner][:, None], texts, padded(pairs.old_texts, head.dimension))
    return _ask(pairs, images, texts, mixed_images, mixed_texts)


def through(head: Head, vectors: Float32[Array, "N D"]) -> Float32[Array, "N S"]:
    """Embeddings of the new model through the head."""
    return head(torch.from_numpy(vectors)).numpy()


def padded(vectors: Float32[Array, "N D"], dimension: int) -> Float32[Array, "N S"]:
    """Old rows as an upgraded index holds them."""
    return np.pad(vectors, ((0, 0), (0, dimension - vectors.shape[1])))


def _ask(
    pairs: Pairs,
    asking_images: Float32[Array, "N S"],
    asking_texts: Float32[Array, "T S"],
    images: Float32[Array, "N S"],
    texts: Float32[Array, "T S"],
) -> Retrieval:
    """Captions ask for `images`, pictures for `texts`."""
    captions = pairs.captions_of()
    by_texts = measure_retrieval(images, asking_texts, captions)
    by_images = measure_retrieval(asking_images, texts, captions)
    return Retrieval(
        text_to_image=by_texts.text_to_image,
        image_to_text=by_images.image_to_text,
        num_images=by_texts.num_images,
        num_texts=by_texts.num_texts,
    )
