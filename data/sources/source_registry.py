"""Pictures sorted into a folder per class: the class is the caption, through a template.

Drawn scenes as pairs: data that needs no download.

Where pairs come from: one file per kind of source, one line per kind in `KINDS`.
"""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlm.data.samples import UNNAMED, Pair
from vlm.data.selection import read_selection
from vlm.data.shards import expand_shards
from vlm.data.sources.source import (
    PICTURE_SUFFIXES,
    FolderFiles,
    PairSource,
    SceneOptions,
    SourceFiles,
    SourceKind,
    SourceOptions,
    TarFiles,
    open_files,
)
from vlm.data.sources.table import TABLE_KINDS, TableSource, ending_of, find_table, unique_keys
from vlm.data.sources.webdataset import ShardSource, holds_samples, looks_like_shard
from vlm.data.synthetic.shape_captions import LANGUAGES, describe
from vlm.data.synthetic.shapes import SPLITS, draw_scene, sample_scenes, shape_colour_class
from vlm.errors import UsageError
from vlm.files import fingerprint_of
from vlm.storage.urls import is_shard, needs_cache


class ClassFolderSource:
    """`CLASS/picture.jpg`, below any other folders; metadata `label` and `file`.

    Pictures come in the order of their own names, not of their classes, so that a shard holds many classes.
    """

    captions_are_labels = True

    def __init__(self, files: SourceFiles, *, template: str) -> None:
        if "{}" not in template:
            raise UsageError(f"The template {template!r} has no {{}} for the class; an example: 'a photo of a {{}}.'")
        self._files, self._template = files, template
        self._names = sorted(filter(is_classified, files.names()), key=lambda name: (PurePosixPath(name).name, name))
        self._keys = unique_keys([(None, name) for name in self._names])

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> Pair:
        """The picture with its class said through the template."""
        name = self._names[number]
        label = PurePosixPath(name).parent.name
        caption = self._template.replace("{}", label.replace("_", " "))
        metadata = {"label": label, "file": name}
        return Pair(
            key=self._keys[number], image=self._files.read(name), captions={UNNAMED: (caption,)}, metadata=metadata
        )

    def fingerprint(self) -> str:
        """Names and sizes of all files, and the template."""
        return fingerprint_of(self._files.fingerprint(), self._template)

    def describe(self) -> dict[str, Any]:
        """The template and the classes found."""
        classes = sorted({PurePosixPath(name).parent.name for name in self._names})
        return {"kind": "classes", "address": self._files.address, "template": self._template, "classes": classes}


def is_classified(name: str) -> bool:
    """Whether a name is that of a picture inside a folder."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and len(path.parts) > 1


# measured at 64 pixels: JPEG 0.10 ms to decode and 0.07 to encode, PNG 0.11 and 0.75, WebP 0.09 and 0.37;
# whole chroma, because colour is one of the facts
_JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}
_DRAWING = "2"


class SceneSource:
    """The first `number` scenes of a split, with captions in all languages; metadata `scene` holds the facts."""

    captions_are_labels = False

    def __init__(self, options: SceneOptions) -> None:
        self._options = options
        try:
            scenes = sample_scenes(options.split, options.number, seed=options.seed, is_distinct=options.is_distinct)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._scenes = list(scenes)

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, number: int) -> Pair:
        """The scene drawn and described; chance depends on (seed, split, number) alone."""
        key, scene = self._scenes[number]
        options = self._options
        rng = np.random.default_rng([options.seed, SPLITS.index(options.split), number, 1])
        file = io.BytesIO()
        draw_scene(scene, pixels=options.pixels, rng=rng).save(file, **_JPEG)
        captions = {language: describe(scene, language) for language in LANGUAGES}
        return Pair(
            key=key,
            image=file.getvalue(),
            captions=captions,
            metadata={"label": shape_colour_class(scene), "scene": asdict(scene)},
        )

    def fingerprint(self) -> str:
        """The options and the version of the drawing."""
        return fingerprint_of(_DRAWING, repr(self._options))

    def describe(self) -> dict[str, Any]:
        """The options."""
        return {"kind": "scenes"} | asdict(self._options)


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
