"""The compiled filter of `antialias.c`."""

from typing import Any

import numpy as np

def vector_bits() -> int:
    """Bits of the widest vectors that can resize here: 512, 256, or 0."""

def axis(starts: np.ndarray, taps: np.ndarray, size: int, precision: int, bits: int) -> Any:
    """Arrange the taps of one direction; None where there are too many.

    starts: int32 [size_out]. taps: int16 [size_out, taps], times 2^precision. size: pixels of the image. bits: of the
    vectors that are to resize.
    """

def resize(pixels: np.ndarray, out: np.ndarray, across: Any, down: Any) -> bool:
    """Write uint8 [H, W, 3] to uint8 [height, width, 3] by two axes; False where it cannot be done here."""
