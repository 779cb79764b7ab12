"""Picture files given by a person, as a model sees them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vlm.data.views import FixedView
from vlm.errors import BadSample, UsageError
from vlm.tensors import Tensor, UInt8


def view_files(paths: Sequence[Path], view: FixedView) -> UInt8[Tensor, "B 3 H W"]:
    """Read, decode and fit each file.

    Raises:
        UsageError: none is given, or one does not exist or is no picture.
    """
    if not paths:
        raise UsageError("No picture was given.")
    views: list[np.ndarray] = []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"There is no picture {str(path)!r}.")
        try:
            views.append(view(path.read_bytes()))
        except BadSample as error:
            raise UsageError(f"{path} cannot be used: {error}") from error
    return torch.from_numpy(np.stack(views))
