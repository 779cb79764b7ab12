"""Pack image-text pairs into WebDataset shards.

SOURCE is a table (captions.csv, .tsv, .jsonl, .parquet) with its pictures, class folders (CLASS/picture.jpg), the
output of img2dataset or any WebDataset tars, one tar that holds any of these, or the word scenes for drawn ones.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_fields, show_json
from vlm.data.sources.source import SceneOptions, SourceKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm pack`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Where the pairs are."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the shards; an interrupted pack is continued by the same command."""

    kind: SourceKind | None = None
    """What SOURCE is, where looking at it is not enough."""

    folder: str = ""
    """Read only what lies under this folder of the source."""

    image_column: str | None = None
    """Column of a table that names the picture files."""

    caption_column: str | None = None
    """Column of a table that holds the captions: a text, a list, or a {language: text} mapping."""

    template: str = "a photo of a {}."
    """Caption of class folders."""

    languages: tuple[str, ...] = ()
    """Languages kept, the first one first; empty keeps all."""

    samples_per_shard: int = 1000
    """Samples in each tar."""

    hold_out: int = 0
    """Put at least so many samples into val-*.tar; equal captions and equal pictures stay on one side."""

    seed: int = 0
    """Of what is held out."""

    max_bad: float = 0.01
    """Share of unusable pairs past which packing fails."""

    verify: bool = True
    """Decode every picture once, to keep damaged ones out (--verify False skips it)."""

    allow_damage: bool = False
    """Read the whole samples of source tars that are cut short."""

    selection: Path | None = None
    """Where SOURCE is shards: pack only what this file of vlm curate selects."""

    json: bool = False
    """Print the result as JSON."""

    scenes: SceneOptions = field(default_factory=SceneOptions)


def run(arguments: Arguments) -> None:
    """Open the source, pack it, say what came out."""
    from vlm.data.pack import PackConfig, pack
    from vlm.data.sources.source import SourceOptions
    from vlm.data.sources.source_registry import open_source

    options = SourceOptions(
        kind=arguments.kind,
        folder=arguments.folder,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        template=arguments.template,
        allow_damage=arguments.allow_damage,
        selection=arguments.selection,
        scenes=arguments.scenes,
    )
    config = PackConfig(
        samples_per_shard=arguments.samples_per_shard,
        hold_out=arguments.hold_out,
        seed=arguments.seed,
        max_bad_share=arguments.max_bad,
        languages=arguments.languages,
        verify=arguments.verify,
    )
    summary = pack(open_source(arguments.source, options), arguments.out, config)
    if arguments.json:
        show_json(asdict(summary))
        return
    facts = {name: value for name, value in asdict(summary).items() if value not in ({}, None)}
    show_fields({name.replace("_", " "): value for name, value in facts.items()})
    inspect = f"vlm inspect {arguments.out} --html {arguments.out}.html"
    logger.info(f"Next: {inspect}   or   vlm train tiny --data {arguments.out} …")
