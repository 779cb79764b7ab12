"""The stored vectors of chosen rows, out of whichever segments have them."""

import numpy as np

from vlm.index.generations import Generation
from vlm.tensors import Array, Float32, Int64


def stored_vectors(generation: Generation, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
    """The unit vectors of living or dead rows of a generation, in the order asked; all must be in its segments."""
    wanted, places = np.unique(rows, return_inverse=True)
    # segments lie in the order of their rows, which never overlap
    segments = [selected.segment for selected in generation.selected]
    blocks = [segment.vectors.take(segment.positions_of(wanted)) for segment in segments]
    dimension = generation.details.space.dimension
    return np.concatenate([np.zeros((0, dimension), np.float32), *blocks])[places]
