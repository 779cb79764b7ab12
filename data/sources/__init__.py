"""Where pairs come from: one file per kind of source, one line per kind in `KINDS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlm.data.selection import read_selection
from vlm.data.shards import expand_shards
from vlm.data.sources.class_folder import ClassFolderSource, is_classified
from vlm.data.sources.drawn_scenes import SceneSource
from vlm.data.sources.files import FolderFiles, SourceFiles, TarFiles, open_files
from vlm.data.sources.foreign_shards import ShardSource, holds_samples, looks_like_shard
from vlm.data.sources.source import PairSource, SceneOptions, SourceKind, SourceOptions
from vlm.data.sources.table import TableSource, find_table
from vlm.data.sources.table_rows import TABLE_KINDS, ending_of
from vlm.data.storage.addresses import is_shard, needs_cache
from vlm.errors import UsageError

__all__ = ["KINDS", "PairSource", "SceneOptions", "SourceKind", "SourceOptions", "open_source"]

SCENES = "scenes"


@dataclass(frozen=True, kw_only=True)
class Place:
    """An address with the files found there; `files` is None if it is no folder and no tar of this machine."""

    address: str
    options: SourceOptions
    files: SourceFiles | None
    names: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of source: what it looks like in words, how to recognise it, how to open it."""

    looks: str
    fits: Callable[[Place], bool]
    open: Callable[[Place], PairSource]


def open_source(address: str, options: SourceOptions | None = None) -> PairSource:
    """The pairs at an address; what kind of source it is is found by looking, unless the options say so.

    Raises:
        UsageError: nothing is there, it is of no known kind, or it is empty.
    """
    options = options or SourceOptions()
    place = _look(address, options)
    if options.kind is None:
        kind = next((kind for kind in KINDS.values() if kind.fits(place)), None)
        if kind is None:
            raise UsageError(_nothing_found(place))
        source = kind.open(place)
    else:
        kind = KINDS[options.kind]
        source = kind.open(place)
    if options.selection and not isinstance(source, ShardSource):
        raise UsageError(f"{address!r} is no shards, so {options.selection} cannot choose among its samples.")
    if not len(source):
        raise UsageError(_nothing_found(place))
    return source


def _look(address: str, options: SourceOptions) -> Place:
    is_drawn = options.kind == SCENES or (address == SCENES and not Path(address).exists())
    is_pattern = needs_cache(address) or any(sign in address for sign in "{*") or "::" in address
    if is_drawn or is_pattern:
        return Place(address=address, options=options, files=None, names=())
    if not Path(address).exists():
        raise UsageError(f"There is no {address!r}; give a folder, a table, a tar, or the word {SCENES}.")
    if Path(address).is_file() and ending_of(address) in TABLE_KINDS:
        files: SourceFiles | None = FolderFiles(Path(address).parent / options.folder)
    else:
        files = open_files(address, options.folder, allow_damage=options.allow_damage)
    return Place(address=address, options=options, files=files, names=tuple(files.names()) if files else ())


def _nothing_found(place: Place) -> str:
    inside = f"it holds {', '.join(place.names[:3])} …" if place.names else "it is empty"
    looked = "; ".join(kind.looks for kind in KINDS.values())
    cure = "Tars that hold samples all the same are read by --kind shards."
    return f"Nothing to pack at {place.address!r} ({inside}). Looked for: {looked}. {cure}"


def _table_name(place: Place) -> str | None:
    if Path(place.address).is_file() and ending_of(place.address) in TABLE_KINDS:
        return Path(place.address).name
    return find_table(place.names)


def _open_table(place: Place) -> PairSource:
    table = _table_name(place)
    if place.files is None or table is None:
        raise UsageError(_nothing_found(place))
    options = place.options
    return TableSource(place.files, table, image_column=options.image_column, caption_column=options.caption_column)


def _open_classes(place: Place) -> PairSource:
    if place.files is None:
        raise UsageError(_nothing_found(place))
    return ClassFolderSource(place.files, template=place.options.template)


def _holds_shards(place: Place) -> bool:
    if isinstance(place.files, TarFiles):
        return looks_like_shard(place.names)
    if place.files is None:
        return place.address != SCENES
    tars = (Path(place.files.address) / name for name in place.names if "/" not in name and is_shard(name))
    return any(map(holds_samples, tars))


def _open_shards(place: Place) -> PairSource:
    chosen = place.options.selection
    return ShardSource(
        expand_shards(place.address),
        allow_damage=place.options.allow_damage,
        selection=read_selection(chosen) if chosen else None,
    )


KINDS: dict[SourceKind, Kind] = {
    "scenes": Kind(
        looks=f"the word {SCENES} (pictures drawn by rule)",
        fits=lambda place: place.address == SCENES and place.files is None,
        open=lambda place: SceneSource(place.options.scenes),
    ),
    "shards": Kind(
        looks="*.tar, *.tar.gz with key.jpg and key.txt or key.json (WebDataset, img2dataset)",
        fits=_holds_shards,
        open=_open_shards,
    ),
    "table": Kind(
        looks="captions.csv, .tsv, .jsonl or .parquet with the pictures it names (also inside one .tar)",
        fits=lambda place: _table_name(place) is not None,
        open=_open_table,
    ),
    "classes": Kind(
        looks="CLASS/picture.jpg (also inside one .tar)",
        fits=lambda place: any(map(is_classified, place.names)),
        open=_open_classes,
    ),
}
"""The kinds of sources; the first that fits is taken."""
