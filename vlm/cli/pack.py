"""`vlm pack`: image-text pairs to shards."""

import logging
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.options import JsonOption, call_options
from vlm.console import quoted, show_fields, show_json, spaced_names
from vlm.data.sources.source import SceneOptions, SourceKind

logger = logging.getLogger(__name__)

_CAPTIONS_HELP = (
    "Location of the captions, if ambiguous: a FILE inside SOURCE; none packs images without captions; optional also "
    "packs the images that have none among others that do."
)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Pack image-text pairs into WebDataset shards.

    SOURCE is a table that names its images or holds them (captions.csv, .tsv, .jsonl, .parquet; metadata.csv in any
    folder; captions.txt), images with a text file each, COCO's or Karpathy's annotations, folders of classes such as
    CLASS/image.jpg, the output of img2dataset or any WebDataset tars, one tar that holds any of these, or the word
    scenes for a dataset of synthetic shapes. The detected kind of SOURCE is logged first; docs/data.md shows each
    layout.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Location of the pairs."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the shards; to resume an interrupted pack, rerun the same command."""

    kind: SourceKind | None = None
    """Kind of SOURCE; None detects it."""

    folder: str = ""
    """Read only pairs in this folder of the source."""

    split: tuple[str, ...] = ()
    """Splits to pack, by the field `split` of annotations (Karpathy's) or of a table; empty packs all."""

    image_column: str | None = None
    """Column of a table with the image files."""

    caption_column: str | None = None
    """Column of a table with the captions: a text, a list, or a {language: text} mapping."""

    key_column: str | None = None
    """Column of a table with the sample keys; None uses the column key, or the names of the images."""

    captions: Annotated[str, tyro.conf.arg(help=_CAPTIONS_HELP)] = ""

    caption_lines: Annotated[
        bool, tyro.conf.arg(help="Treat each line of KEY.txt, or of an image's text file, as a caption of its own.")
    ] = False

    encoding: str = ""
    """Encoding of tables, texts and captions of shards that are not UTF-8, such as latin-1 or gb18030."""

    image_name: str = ""
    """If the samples of SOURCE's shards have several images: the one to pack, such as left for KEY.left.jpg."""

    template: str = "a photo of a {}."
    """Caption template for class folders."""

    languages: tuple[str, ...] = ()
    """Caption languages to keep, the first one first; empty keeps all."""

    samples_per_shard: int = 1000
    """Samples per shard."""

    hold_out: int = 0
    """Minimum number of samples for a val split, val-*.tar; equal captions or images are never split."""

    seed: int = 0
    """Random seed of the train/val split."""

    max_bad: float = 0.01
    """Abort when more than this fraction of the pairs is unusable."""

    # tyro makes --no-verify of it, whose help is the opposite of the field's
    verify: Annotated[
        bool,
        tyro.conf.arg(
            help="Skip decoding every image; damaged ones are then packed, too.", help_behavior_hint="(default: False)"
        ),
    ] = True
    """Decode every image once, to skip damaged ones."""

    allow_damage: Annotated[bool, tyro.conf.arg(help="Read the intact samples of truncated source tars.")] = False

    selection: Path | None = None
    """If SOURCE is shards: pack only samples of this selection file of vlm curate."""

    json: JsonOption = False

    scenes: SceneOptions = field(default_factory=SceneOptions)

    def run(self) -> None:
        """Pack, show the counts."""
        from vlm.api.packing import pack

        summary = pack(**call_options(self))
        if self.json:
            show_json(summary)
            return
        # fields without content, such as the splits where nothing is held out, are noise in a table
        shown = {name: value for name, value in asdict(summary).items() if value not in ({}, None, ())}
        del shown["recognised"]
        show_fields(spaced_names(shown))
        inspect = shlex.join(["vlm", "inspect", str(self.out), "--html", f"{self.out}.html"])
        logger.info(f"Next: {inspect}   or   vlm train tiny --data {quoted(self.out)} …")
