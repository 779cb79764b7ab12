"""Many real vectors from a few thousand photos: the patches of random crops of them."""

import numpy as np
import torch
from torch.nn.functional import normalize

from vlm.api.data import stream
from vlm.console import progress
from vlm.models.load import load_network
from vlm.models.patch_features import run_image_tower
from vlm.tensor_types import Array, Float32

_BATCH = 64
_CROP_SCALE = (0.2, 1.0)


def embed_patches(model_spec: str, shards: str, count: int, *, seed: int) -> Float32[Array, "N D"]:
    """`count` patches of random crops of the photos, as unit vectors of the joint space; each epoch crops anew.

    Raises:
        UsageError: the image tower has no patches.
    """
    model = load_network(model_spec, device="cpu")
    found = np.empty((count, model.embedding_size), np.float32)
    filled = 0
    batches = stream(shards, model=model, batch_size=_BATCH, crop_scale=_CROP_SCALE, epochs=None, seed=seed)
    with progress(total=count, what="embed patches", unit=" patches") as shown:
        for batch in batches:
            with torch.inference_mode():
                patches = run_image_tower(model.network, batch.images, with_patches=True).patches
            assert patches is not None
            rows = normalize(patches.flatten(0, 1), dim=-1).numpy()[: count - filled]
            found[filled : filled + len(rows)] = rows
            filled += len(rows)
            shown.update(len(rows))
            if filled == count:
                break
    return found
