"""Write a sentence for each picture, with a model that has a decoder (vlm train tiny-coca makes one)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_json, show_table


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm caption`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, model folder, or open_clip NAME:WEIGHTS (coca_…)."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Picture files."""

    prompt: str = ""
    """Words every caption begins with, such as "a picture of"."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Caption the pictures."""
    from vlm.data.transforms import load_images
    from vlm.models.load import load_model

    model = load_model(arguments.model, device=arguments.device)
    captions = model.caption_images(load_images(arguments.images, model.view), arguments.prompt)
    rows = [{"image": str(path), "caption": text} for path, text in zip(arguments.images, captions, strict=True)]
    if arguments.json:
        show_json(rows)
    else:
        show_table(["image", "caption"], [list(row.values()) for row in rows])
