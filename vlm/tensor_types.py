"""Shapes in signatures: the one legend of axis letters.

B batch, C channels, H W pixels, P patches, L tokens, V vocabulary, D embedding,
N images or items, T texts, K classes or results, Q queries.
"""

import sys
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Float16, Float32, Float64, Int, Int64, UInt8, UInt16, UInt64
from numpy import ndarray as Array

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float16",
    "Float32",
    "Float64",
    "Int",
    "Int64",
    "Tensor",
    "UInt8",
    "UInt16",
    "UInt64",
]

if TYPE_CHECKING:
    from torch import Tensor
else:

    class _TensorType(type):
        def __instancecheck__(cls, instance: object) -> bool:
            torch = sys.modules.get("torch")  # without it there are no tensors
            return torch is not None and isinstance(instance, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """`torch.Tensor` in signatures, of which a search without torch has many; importing it would take seconds."""
