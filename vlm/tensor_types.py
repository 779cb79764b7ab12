"""Shapes in signatures: the one legend of axis letters.

B batch, C channels, H W pixels, P patches, L tokens, V vocabulary, D embedding,
N images or items, T texts, K classes or results, Q queries.

jaxtyping checks them where it was imported before (`pytest --jaxtyping-packages`). Otherwise an annotation is the type
of the array alone: the library and its several hundred types would take a third of the time in which a search starts.
"""

import sys
from operator import itemgetter
from typing import TYPE_CHECKING

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
    "Num",
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


if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float16, Float32, Float64, Int, Int64, Num, UInt8, UInt16, UInt64
else:

    class Num:
        """`Num[Array, "H W"]` is `Array`."""

        # there are hundreds when a search starts, so that it is no function of Python's
        __class_getitem__ = itemgetter(0)

    Bool = Float = Float16 = Float32 = Float64 = Int = Int64 = UInt8 = UInt16 = UInt64 = Num
