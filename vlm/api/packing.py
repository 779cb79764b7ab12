"""`vlm.pack`: pairs to shards; apart from what reads shards, because packing needs no torch, which is slow to load."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm.config import text_list
from vlm.data.pack import PackConfig, PackSummary
from vlm.data.pack import pack as pack_source
from vlm.data.sources.source import SceneOptions, SourceKind, SourceOptions
from vlm.data.sources.source_registry import recognise_source
from vlm.errors import os_errors_explained

logger = logging.getLogger(__name__)


@os_errors_explained()
def pack(
    source: str | Path,
    out: str | Path,
    *,
    kind: SourceKind | None = None,
    folder: str = "",
    split: Sequence[str] = (),
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
    captions: str = "",
    caption_lines: bool = False,
    encoding: str = "",
    image_name: str = "",
    template: str = "a photo of a {}.",
    languages: Sequence[str] = (),
    samples_per_shard: int = 1000,
    hold_out: int = 0,
    seed: int = 0,
    max_bad: float = 0.01,
    verify: bool = True,
    allow_damage: bool = False,
    selection: str | Path | None = None,
    scenes: SceneOptions | None = None,
) -> PackSummary:
    """Pack image-text pairs into WebDataset shards, as `vlm pack` does; repeat the call to resume it.

    What the source is taken for, and what of it looks wrong, is logged and in the result.

    Args:
        source: a table that names its images, images with a text file each, class folders, the output of img2dataset,
            WebDataset tars, or `scenes` for synthetic shapes (docs/data.md).
        out: folder for the shards.
        kind: how to read the source; None detects it. Of a table, `image_column`, `caption_column` and `key_column`
            name the columns.
        split: pack only pairs whose annotations or table rows name one of these splits.
        captions: the file that holds the captions, `none`, or `optional` to pack also images that have none.
        image_name: of shards with several images a sample, the one to pack: `left` for KEY.left.jpg.
        template: the caption of a class, with {} for its name.
        hold_out: at least so many samples go to val-*.tar, the rest to train-*.tar.
        max_bad: largest fraction of unusable pairs.
        verify: decode every image, so that damaged ones are left out.

    Raises:
        UsageError: the source is none, or not one, of these, or `out` holds something else.
        VlmError: too many pairs are unusable.
    """
    options = SourceOptions(
        kind=kind,
        folder=folder,
        split=tuple(split),
        image_column=image_column,
        caption_column=caption_column,
        key_column=key_column,
        captions=captions,
        caption_lines=caption_lines,
        encoding=encoding,
        image_name=image_name,
        template=template,
        allow_damage=allow_damage,
        selection=None if selection is None else Path(selection),
        scenes=scenes or SceneOptions(),
    )
    config = PackConfig(
        samples_per_shard=samples_per_shard,
        hold_out=hold_out,
        seed=seed,
        max_bad_share=max_bad,
        languages=tuple(text_list(languages, "languages")),
        verify=verify,
    )
    opened, recognition = recognise_source(str(source), options)
    # what the source was taken for comes before the work, so that a wrong reading costs no hours
    for line in recognition.lines():
        logger.info(line)
    summary = pack_source(opened, Path(out), config)
    for warning in summary.warnings:
        logger.warning(warning)
    return replace(summary, recognised=recognition)
