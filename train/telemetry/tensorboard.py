"""Metrics as TensorBoard shows them, on request."""

from pathlib import Path
from typing import Any

from vlm.errors import UsageError

FOLDER = "tensorboard"


class TensorBoardLog:
    """Event files in `folder`; what an interrupted run wrote after `resumed_step` is no longer shown.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs the package tensorboard: pip install 'vlm[tensorboard]', or leave it out; "
                "metrics.jsonl and curves.png hold the same."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add the numbers among the values of one step, and make them visible."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """No more will come."""
        self._writer.close()
