"""Write a model for other tools, after trying there that it gives the same embeddings.

open-clip is a folder for open_clip.create_model_and_transforms("local-dir:OUT").
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.console import show_fields, show_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm export`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, model folder, checkpoint, or open_clip NAME:WEIGHTS."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write."""

    to: Literal["open-clip"] = "open-clip"
    """Tool the model is for."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Load the model, export it, say how it is opened there."""
    from vlm.files import check_not_exists
    from vlm.models.export import export_open_clip
    from vlm.models.load import load_network

    check_not_exists(arguments.out)
    export = export_open_clip(load_network(arguments.model, device="cpu"), arguments.out)
    if not export.has_tokenizer:
        logger.info(
            "open_clip cannot make this model's tokens from text: give it those of "
            f'vlm.data.tokenizers.open_tokenizer("{arguments.out}").'
        )
    if arguments.json:
        show_json(asdict(export))
        return
    # a difference of 1e-7 would be shown as 0.0000
    show_fields(
        {name.replace("_", " "): value for name, value in asdict(export).items()}
        | {"largest difference": f"{export.largest_difference:.1e}"}
    )
    logger.info(f'Next: open_clip.create_model_and_transforms("local-dir:{arguments.out}")')
