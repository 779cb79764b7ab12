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
    IMAGE_SUFFIXES,
    FolderFiles,
    PairSource,
    SceneOptions,
    SourceFiles,
    SourceKind,
    SourceOptions,
    TarFiles,
    open_files,
)
from vlm.data.sources.table import TABLE_KINDS, TableSource, file_extension, find_table, unique_keys
from vlm.data.sources.webdataset import ShardSource, contains_samples, looks_like_shard
from vlm.data.synthetic.shape_captions import LANGUAGES, describe
from vlm.data.synthetic.shapes import SPLITS, render_scene, sample_scenes, shape_colour_class
from vlm.errors import UsageError
from vlm.files import compute_fingerprint
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
        self._names = sorted(
            filter(is_in_class_folder, files.names()), key=lambda name: (PurePosixPath(name).name, name)
        )
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
        return compute_fingerprint(self._files.fingerprint(), self._template)

    def describe(self) -> dict[str, Any]:
        """The template and the classes found."""
        classes = sorted({PurePosixPath(name).parent.name for name in self._names})
        return {"kind": "classes", "address": self._files.url, "template": self._template, "classes": classes}


def is_in_class_folder(name: str) -> bool:
    """Whether a name is that of a picture inside a folder."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and len(path.parts) > 1


# measured at 64 pixels: JPEG 0.10 ms to decode and 0.07 to encode, PNG 0.11 and 0.75, WebP 0.09 and 0.37;
# whole chroma, because colour is one of the facts
_JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}
_RENDERER_VERSION = "2"


class SyntheticShapesSource:
    """The first `number` scenes of a split, with captions in all languages; metadata `scene` holds the facts."""

    captions_are_labels = False

    def __init__(self, options: SceneOptions) -> None:
        self._options = options
        try:
            scenes = sample_scenes(options.split, options.number, seed=options.seed, is_distinct=options.is_distinct)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._labelled_scenes = list(scenes)

    def __len__(self) -> int:
        return len(self._labelled_scenes)

    def read(self, number: int) -> Pair:
        """The scene drawn and described; chance depends on (seed, split, number) alone."""
        key, scene = self._labelled_scenes[number]
        options = self._options
        rng = np.random.default_rng([options.seed, SPLITS.index(options.split), number, 1])
        file = io.BytesIO()
        render_scene(scene, pixels=options.pixels, rng=rng).save(file, **_JPEG)
        captions = {language: describe(scene, language) for language in LANGUAGES}
        return Pair(
            key=key,
            image=file.getvalue(),
            captions=captions,
            metadata={"label": shape_colour_class(scene), "scene": asdict(scene)},
        )

    def fingerprint(self) -> str:
        """The options and the version of the drawing."""
        return compute_fingerprint(_RENDERER_VERSION, repr(self._options))

    def describe(self) -> dict[str, Any]:
        """The options."""
        return {"kind": "scenes"} | asdict(self._options)


SCENES = "scenes"


@dataclass(frozen=True, kw_only=True)
class SourceLocation:
    """An address with the files found there; `files` is None if it is no folder and no tar of this machine."""

    url: str
    options: SourceOptions
    files: SourceFiles | None
    names: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class SourceType:
    """One kind of source: what it looks like in words, how to recognise it, how to open it."""

    description: str
    matches: Callable[[SourceLocation], bool]
    open: Callable[[SourceLocation], PairSource]


def open_source(url: str, options: SourceOptions | None = None) -> PairSource:
    """The pairs at an address; what kind of source it is is found by looking, unless the options say so.

    Raises:
        UsageError: nothing is there, it is of no known kind, or it is empty.
    """
    options = options or SourceOptions()
    location = _probe(url, options)
    if options.kind is None:
        kind = next((kind for kind in KINDS.values() if kind.matches(location)), None)
        if kind is None:
            raise UsageError(_nothing_found(location))
        source = kind.open(location)
    else:
        kind = KINDS[options.kind]
        source = kind.open(location)
    if options.selection and not isinstance(source, ShardSource):
        raise UsageError(f"{url!r} is no shards, so {options.selection} cannot choose among its samples.")
    if not len(source):
        raise UsageError(_nothing_found(location))
    return source


def _probe(url: str, options: SourceOptions) -> SourceLocation:
    is_drawn = options.kind == SCENES or (url == SCENES and not Path(url).exists())
    is_pattern = needs_cache(url) or any(sign in url for sign in "{*") or "::" in url
    if is_drawn or is_pattern:
        return SourceLocation(url=url, options=options, files=None, names=())
    if not Path(url).exists():
        raise UsageError(f"There is no {url!r}; give a folder, a table, a tar, or the word {SCENES}.")
    if Path(url).is_file() and file_extension(url) in TABLE_KINDS:
        files: SourceFiles | None = FolderFiles(Path(url).parent / options.folder)
    else:
        files = open_files(url, options.folder, allow_damage=options.allow_damage)
    return SourceLocation(url=url, options=options, files=files, names=tuple(files.names()) if files else ())


def _nothing_found(location: SourceLocation) -> str:
    inside = f"it holds {', '.join(location.names[:3])} …" if location.names else "it is empty"
    looked = "; ".join(kind.description for kind in KINDS.values())
    cure = "Tars that hold samples all the same are read by --kind shards."
    return f"Nothing to pack at {location.url!r} ({inside}). Looked for: {looked}. {cure}"


def _table_name(location: SourceLocation) -> str | None:
    if Path(location.url).is_file() and file_extension(location.url) in TABLE_KINDS:
        return Path(location.url).name
    return find_table(location.names)


def _open_table(location: SourceLocation) -> PairSource:
    table = _table_name(location)
    if location.files is None or table is None:
        raise UsageError(_nothing_found(location))
    options = location.options
    return TableSource(location.files, table, image_column=options.image_column, caption_column=options.caption_column)


def _open_classes(location: SourceLocation) -> PairSource:
    if location.files is None:
        raise UsageError(_nothing_found(location))
    return ClassFolderSource(location.files, template=location.options.template)


def _contains_shards(location: SourceLocation) -> bool:
    if isinstance(location.files, TarFiles):
        return looks_like_shard(location.names)
    if location.files is None:
        return location.url != SCENES
    tars = (Path(location.files.url) / name for name in location.names if "/" not in name and is_shard(name))
    return any(map(contains_samples, tars))


def _open_shards(location: SourceLocation) -> PairSource:
    chosen = location.options.selection
    return ShardSource(
        expand_shards(location.url),
        allow_damage=location.options.allow_damage,
        selection=read_selection(chosen) if chosen else None,
    )


KINDS: dict[SourceKind, SourceType] = {
    "scenes": SourceType(
        description=f"the word {SCENES} (pictures drawn by rule)",
        matches=lambda location: location.url == SCENES and location.files is None,
        open=lambda location: SyntheticShapesSource(location.options.scenes),
    ),
    "shards": SourceType(
        description="*.tar, *.tar.gz with key.jpg and key.txt or key.json (WebDataset, img2dataset)",
        matches=_contains_shards,
        open=_open_shards,
    ),
    "table": SourceType(
        description="captions.csv, .tsv, .jsonl or .parquet with the pictures it names (also inside one .tar)",
        matches=lambda location: _table_name(location) is not None,
        open=_open_table,
    ),
    "classes": SourceType(
        description="CLASS/picture.jpg (also inside one .tar)",
        matches=lambda location: any(map(is_in_class_folder, location.names)),
        open=_open_classes,
    ),
}
"""The kinds of sources; the first that fits is taken."""
