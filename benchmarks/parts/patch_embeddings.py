"""A million real vectors from a few thousand photos: patches of random crops, and the photos' captions as queries."""

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
    """`count` patches of random crops of the photos, as unit vectors of the joint space; each epoch crops anew."""
    model = load_network(model_spec)
    found: list[np.ndarray] = []
    total = 0
    batches = stream(shards, model=model, batch_size=_BATCH, crop_scale=_CROP_SCALE, epochs=None, seed=seed)
    with progress(total=count, what="embed patches", unit=" patches") as shown:
        for batch in batches:
            with torch.inference_mode():
                patches = run_image_tower(model.network, batch.images, with_patches=True).patches
            assert patches is not None
            rows = normalize(patches.flatten(0, 1).float(), dim=-1).numpy()[: count - total]
            found.append(rows)
            total += len(rows)
            shown.update(len(rows))
            if total == count:
                break
    return np.concatenate(found)
