"""What this room asks of a model, and the check of what it gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from vlm.data.views import FixedView
from vlm.errors import VlmError
from vlm.models.prefix import SIGN, split_spec
from vlm.tensors import Array, Float32, Tensor, UInt8

# unit vectors rounded to bfloat16 after their normalisation are off by up to 2^-8; more is a fault of the model
_LENGTH_TOLERANCE = 0.01


@runtime_checkable
class Encoder(Protocol):
    """Pictures and texts to unit vectors on the CPU; `fingerprint` is the identity of their space."""

    @property
    def view(self) -> FixedView:
        """From an encoded picture to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same vectors."""
        ...

    @property
    def embedding_size(self) -> int:
        """D."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Pictures as `view` gives them."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Texts as people write them."""
        ...


def check_unit_vectors(vectors: Float32[Array, "N D"], names: Sequence[str]) -> None:
    """Refuse what cannot be compared by cosine.

    Raises:
        VlmError: a vector is not finite, zero, or not of length 1; `names` says whose it is.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE))
    if len(wrong):
        first = int(wrong[0])
        raise VlmError(
            f"The model gave a vector of length {lengths[first]:.4g} for {names[first]!r} ({len(wrong)} such of "
            f"{len(vectors)} in this batch); 1 was expected. Its weights are damaged or its training diverged: "
            "use another checkpoint."
        )


def absolute_spec(spec: str) -> str:
    """A model's folder as an absolute path, so that it is found from anywhere; a name as it is."""
    model, kept = split_spec(spec)
    if Path(model).exists():
        model = str(Path(model).resolve())
    return model if kept is None else f"{model}{SIGN}{kept}"
