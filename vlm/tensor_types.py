"""Shapes in signatures: the one legend of axis letters.

B batch, C channels, H W pixels, P patches, L tokens, V vocabulary, D embedding,
N images or items, T texts, K classes or results, Q queries.
"""

from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, UInt8, UInt16
from numpy import ndarray as Array
from torch import Tensor

__all__ = ["Array", "Bool", "Float", "Float32", "Float64", "Int", "Int64", "Tensor", "UInt8", "UInt16"]
