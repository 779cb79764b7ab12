"""Build a FAISS index with its catalogue from embeddings."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import say, show_facts, show_json


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index build`."""

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder that `vlm embed` made."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the index."""

    kind: str = "auto"
    """flat (exact), ivf (approximate, faster), or auto: flat for small ones."""

    nlist: int | None = None
    """Lists of an ivf index; by rule if not given."""

    nprobe: int | None = None
    """Lists that a search reads; by rule if not given."""

    seed: int = 0
    """Of the training sample and of k-means."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Build, then say what to ask."""
    from vlm.index.build import build_index
    from vlm.index.kinds import Tuning

    tuning = Tuning(nlist=arguments.nlist, nprobe=arguments.nprobe, seed=arguments.seed)
    summary = build_index(arguments.embeddings, arguments.out, kind=arguments.kind, tuning=tuning)
    if arguments.json:
        show_json(asdict(summary))
        return
    show_facts(asdict(summary))
    say(f'Next: vlm search {arguments.out} "what you look for"')
