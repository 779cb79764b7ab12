"""Short forms of unit vectors: int8 with a scale for each row, and signs as bits."""

from typing import Literal

import numpy as np

from vlm.tensors import Array, Float, Float32, Int, UInt8

Code = Literal["int8", "binary"]

CODE_FILES: dict[Code, tuple[str, ...]] = {"int8": ("int8.npy", "int8-scales.npy"), "binary": ("binary.npy",)}
"""What the files of a code are called after the name of their part."""


def encode(vectors: Float[Array, "N D"], code: Code) -> tuple[Array, ...]:
    """The arrays of a code, in the order of `CODE_FILES`."""
    return to_int8(vectors) if code == "int8" else (to_signs(vectors),)


def to_int8(vectors: Float[Array, "N D"]) -> tuple[Int[Array, "N D"], Float32[Array, " N"]]:
    """Whole numbers from -127 to 127, and what a row's are to be multiplied by.

    A number that comes back is off by half the row's scale at most, which is a 254th of the row's largest number.
    """
    wide = vectors.astype(np.float32)
    scales = np.abs(wide).max(axis=1) / np.float32(127)
    return np.rint(wide / scales[:, None]).astype(np.int8), scales


def from_int8(codes: Int[Array, "N D"], scales: Float32[Array, " N"]) -> Float32[Array, "N D"]:
    """The vectors that `to_int8` stands for."""
    return codes * scales[:, None]


def to_signs(vectors: Float[Array, "N D"]) -> UInt8[Array, "N _"]:
    """A bit for each number, 1 where it is above 0, eight to a byte with the first highest, zeros at the end.

    >>> to_signs(np.array([[0.5, -0.5, 0.0, 0.7]])).tolist()
    [[144]]
    """
    return np.packbits(vectors > 0, axis=1)
