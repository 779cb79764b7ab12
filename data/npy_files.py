"""Arrays as the bytes of .npy files: written, and read from sources that nobody vouches for."""

import io
import math

import numpy as np

from vlm.errors import BadSample


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as an .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def parse_npy(data: bytes, name: str) -> np.ndarray:
    """An array from the bytes of an .npy file; its header is checked before any memory is allocated."""
    try:
        file = io.BytesIO(data)
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, is_fortran, dtype = read_header(file)
        rest = memoryview(data)[file.tell() :]
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(rest):
            raise ValueError(f"{dtype} of shape {shape} in {len(rest):,} bytes")
        return np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C").copy()
    except Exception as error:  # numpy evaluates the header, and raises whatever that stumbles over
        raise BadSample("unreadable array", f"{name}: {error}") from error


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
