"""Other places than metrics.jsonl that a run's metrics go to on request: TensorBoard, Weights & Biases, Trackio.

Each is an extra of this package and imported when it is used. They show what metrics.jsonl holds, which stays the
record of a run: an interrupted run that is resumed may have sent steps to them that it then repeats.
"""

import contextlib
import io
import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlm.config import flatten_config
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.train.run_config import TrainConfig

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID = "wandb-id.txt"
"""File of a run's folder with its id at Weights & Biases, so that a resumed run continues there."""


@runtime_checkable
class MetricsSink(Protocol):
    """Takes the metrics of steps."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The values of one step, of which numbers are shown."""
        ...

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


class TensorBoardLog:
    """Event files in `folder`; what an interrupted run wrote after `resumed_step` is no longer shown.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "--tensorboard") from error
        # TensorBoard hides events of an interrupted run after this step; the files stay
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values of one step, and make them visible."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases in a project; its files are in `folder`/wandb. $WANDB_MODE offline keeps it there.

    Raises:
        UsageError: the package wandb is not installed, or it cannot be logged to, e.g. for want of a login.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
            from wandb.errors import Error
        except ImportError as error:
            raise _missing("wandb", "--wandb") from error
        id_file = folder / WANDB_ID
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else secrets.token_hex(6)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=dict(config),
                # it would write to the terminal, and read what others write there
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (Error, OSError) as error:
            raise UsageError(
                f"--wandb {project}: {error} Set WANDB_MODE=offline to keep the run in {folder}, for wandb sync later; "
                "or leave the flag out: metrics.jsonl and curves.png hold the same."
            ) from error
        write_text(id_file, f"{run_id}\n")
        # its own counter of steps must only rise, and a run that rolls back counts them again
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values of one step."""
        self._run.log(numbers(values) | {"step": step})

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


class TrackioLog:
    """A run of a Trackio project on this machine ($TRACKIO_DIR), shown by `trackio show --project PROJECT`.

    Raises:
        UsageError: the package trackio is not installed, or refuses the name of the project.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("trackio", "--trackio") from error
        self._trackio: Any = trackio
        # it prints to stdout, where --json is
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                trackio.init(
                    project=project,
                    name=folder.resolve().name,
                    config=dict(config),
                    resume="allow",
                    embed=False,
                    auto_log_cpu=False,
                    auto_log_gpu=False,
                )
            except (ValueError, OSError) as error:
                raise UsageError(f"--trackio {project}: {error}") from error
        logger.info(f"Trackio: trackio show --project {project}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values of one step."""
        self._trackio.log(numbers(values), step=step)

    def close(self) -> None:
        """Finish the run there."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


def open_sinks(config: TrainConfig, folder: Path, *, resumed_step: int) -> list[MetricsSink]:
    """The sinks that are configured, for a run in `folder` that starts or resumes after a step.

    Raises:
        UsageError: a package is missing, or a service refuses.
    """
    settings = flatten_config(asdict(config))
    sinks: list[MetricsSink] = []
    if config.tensorboard:
        sinks.append(TensorBoardLog(folder / TENSORBOARD_FOLDER, resumed_step=resumed_step))
    if config.wandb:
        sinks.append(WandbLog(config.wandb, folder, settings))
    if config.trackio:
        sinks.append(TrackioLog(config.trackio, folder, settings))
    return sinks


def numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers among the values.

    >>> numbers({"loss": 1.5, "samples": "1a2b"})
    {'loss': 1.5}
    """
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _missing(package: str, flag: str) -> UsageError:
    return UsageError(
        f"{flag} needs the package {package}: pip install {package}, or leave the flag out; "
        "metrics.jsonl and curves.png hold the same."
    )
