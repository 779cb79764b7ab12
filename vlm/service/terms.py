"""The terms of a question as vectors, and their mixture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.encoder import Encoder
from vlm.index.generations import Generation
from vlm.tensors import Array, Float32

# two opposite unit vectors computed in float32 leave about 1e-7; a mixture this short has no direction
_SHORTEST_MIXTURE = 1e-5


def embed_pictures(model: Encoder, images: Sequence[Path | bytes]) -> list[Float32[Array, " D"]]:
    """A unit vector for each picture.

    Raises:
        UsageError: a file cannot be read. VlmError: it is no picture.
    """
    pixels = np.stack([_view_picture(model, image) for image in images])
    return list(model.embed_images(torch.from_numpy(pixels)).numpy())


def item_vectors(generation: Generation, uids: Sequence[str]) -> Float32[Array, "N D"]:
    """The stored vector of each item.

    Raises:
        UsageError: there is no such item.
    """
    rows = generation.catalogue.rows_of(uids)
    for uid in uids:
        if uid not in rows:
            raise UsageError(f"{generation.folder} has no item {uid!r}; take the uid from an answer.")
    return generation.vectors(np.array([rows[uid] for uid in uids], np.int64))


def mix_terms(terms: Float32[Array, "T D"], weights: Float32[Array, " T"]) -> Float32[Array, " D"]:
    """The weighted sum of unit vectors, brought to unit length.

    Raises:
        UsageError: the terms cancel each other out.
    """
    mixture = weights @ terms
    length = float(np.linalg.norm(mixture))
    if not length > _SHORTEST_MIXTURE * float(np.abs(weights).sum()):
        raise UsageError("The terms of the question cancel each other out; change the minus terms or the weights.")
    return mixture / np.float32(length)


def _view_picture(model: Encoder, image: Path | bytes) -> np.ndarray:
    name = "the picture" if isinstance(image, bytes) else str(image)
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
    except (OSError, ValueError) as error:  # no file has NUL or half a surrogate pair in its name
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a file"
        raise UsageError(f"{name} cannot be read: {reason or error}.") from error
    try:
        return model.view(data)
    except BadSample as error:
        raise VlmError(f"{name} cannot be used as a question: {error}.") from error
