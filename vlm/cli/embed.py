"""Embed the pictures, or the captions, of shards. Killed and repeated, it goes on where it was."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.console import say, show_facts, show_json


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm embed`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, model folder, or open_clip NAME:WEIGHTS."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to embed."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the embeddings."""

    modality: Literal["image", "text"] = "image"
    """Embed each picture, or each caption."""

    batch_size: int = 256
    """Pictures at once."""

    workers: int = 1
    """Processes that read and decode."""

    allow_damage: bool = False
    """Embed the whole samples of shards that are cut short."""

    selection: Path | None = None
    """Embed only what this file of vlm curate selects."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Load the model, embed, say what to do next."""
    from vlm.data.selection import read_selection
    from vlm.data.shards import expand_shards
    from vlm.index.embed import embed_shards
    from vlm.models.loading import load_model

    shards = expand_shards(arguments.shards)
    summary = embed_shards(
        load_model(arguments.model, device=arguments.device, precision=arguments.precision),
        shards,
        arguments.out,
        model_spec=arguments.model,
        modality=arguments.modality,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        allow_damage=arguments.allow_damage,
        selection=read_selection(arguments.selection) if arguments.selection else None,
    )
    if arguments.json:
        show_json(asdict(summary))
        return
    show_facts({name.replace("_", " "): value for name, value in asdict(summary).items()})
    say(f"Next: vlm index build {arguments.out} INDEX")
