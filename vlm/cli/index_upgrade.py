"""Carry an index over to a new model without embedding its rows again: a new folder, asked by that model's head.

Rows embedded again later (vlm embed with the head as MODEL) take their places by vlm index update, bit by bit.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_fields, show_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index upgrade`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made; it stays as it is."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the new index."""

    head: Path
    """Folder that `vlm index fit-head` made for the model of the index and the new one."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Carry over, then say how to go on."""
    from vlm.index.backward_compat import upgrade_index
    from vlm.models.variants import read_projection

    carried = upgrade_index(
        arguments.index, arguments.out, read_projection(arguments.head), head_spec=str(arguments.head)
    )
    if arguments.json:
        show_json(asdict(carried))
        return
    show_fields({name.replace("_", " "): value for name, value in asdict(carried).items()})
    logger.info(
        f'Next: vlm search {arguments.out} "what you look for"; and where rows shall be the new model\'s own:\n'
        f"vlm embed {arguments.head} SHARDS EMBEDDINGS && vlm index update {arguments.out} EMBEDDINGS"
    )
