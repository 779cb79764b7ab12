"""What a source is, found by looking: one row for each layout in `KINDS`, of which the first that fits is used.

Where two readings are possible, or captions lie near that no reading uses, the error names the flag that decides.
`recognise_source` reports the layout, two pairs, and the files that are not used.
The synthetic shapes, which need no files, are a source of their own here.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm.console import list_counts, pluralize
from vlm.data.samples import Pair, Words
from vlm.data.selection import read_selection
from vlm.data.shards import expand_shards
from vlm.data.sources.caption_files import (
    SCENES,
    AnnotationSource,
    SourceLocation,
    is_bookkeeping,
    is_table_file,
    open_location,
    unread_captions,
)
from vlm.data.sources.image_folder import ClassFolderSource, ImageFolderSource, are_no_classes, label_folders
from vlm.data.sources.source import (
    HEIC_ENDINGS,
    FolderFiles,
    PairSource,
    SceneOptions,
    SourceKind,
    SourceOptions,
    SplitFilter,
    TarFiles,
    endings,
    is_image_name,
    named_splits,
    readable_text,
)
from vlm.data.sources.table import TableSource, read_table
from vlm.data.sources.webdataset import ShardSource, contains_samples, looks_like_shard
from vlm.data.synthetic.shape_captions import LANGUAGES, describe
from vlm.data.synthetic.shapes import SPLITS, render_scene, sample_scenes, shape_colour_class
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.storage import is_shard

# measured at 64 pixels: JPEG 0.10 ms to decode and 0.07 to encode, PNG 0.11 and 0.75, WebP 0.09 and 0.37;
# whole chroma, because colour is one of the facts
_JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}
_RENDERER_VERSION = "2"


class SyntheticShapesSource:
    """The first `number` scenes of a split, with captions in all languages; metadata `scene` holds the facts."""

    captions_are_labels = False
    is_fork_safe = True

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
        captions, metadata, _ = self.words(number)
        return Pair(key=key, image=file.getvalue(), captions=captions, metadata=metadata)

    def words(self, number: int) -> Words:
        """What is said of the scene."""
        _, scene = self._labelled_scenes[number]
        captions = {language: describe(scene, language) for language in LANGUAGES}
        return Words(captions, {"label": shape_colour_class(scene), "scene": asdict(scene)})

    def fingerprint(self) -> str:
        """The options and the version of the drawing."""
        return compute_fingerprint(_RENDERER_VERSION, repr(self._options))

    def describe(self) -> dict[str, Any]:
        """The options."""
        return {"kind": "scenes"} | asdict(self._options)


@runtime_checkable
class FileSource(Protocol):
    """A source made of files of which some may be left aside."""

    def used_files(self) -> set[str]:
        """Those that are read."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """What a source was taken for. examples: the first images with their captions. left_aside: files by ending."""

    kind: str
    summary: str
    examples: tuple[tuple[str, str], ...] = ()
    left_aside: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What is said of it before packing."""
        yield f"Taken as {self.summary} (--kind {self.kind})."
        for name, caption in self.examples:
            yield f"  {name}: {caption!r}" if caption else f"  {name}: no caption"
        if self.left_aside:
            yield f"  Not used: {list_counts(self.left_aside.items())}."
        for note in self.notes:
            yield f"  {note}"


_NUM_EXAMPLES = 2
_EXAMPLE_TRIES = 20
_EXAMPLE_CHARACTERS = 100


def _describe_recognition(source: PairSource, location: SourceLocation) -> Recognition:
    """What a source was taken for, two pairs of it, and which files no reading took."""
    described = source.describe()
    kind = str(described.get("kind", ""))
    unused = list(_unused_files(source, location))
    left_aside = Counter(endings(map(readable_text, unused)))
    return Recognition(
        kind=kind,
        summary=_summary(source, described),
        examples=tuple(_examples(source)),
        left_aside=dict(left_aside.most_common()),
        notes=(*_split_notes(source), *_notes(location, unused)),
    )


def _unused_files(source: PairSource, location: SourceLocation) -> Iterator[str]:
    """The files that no pair comes from; of shards those that are no tars at the top of a folder."""
    if isinstance(source, FileSource):
        used = source.used_files()
    elif isinstance(location.files, FolderFiles):
        used = set(_tars_at_top(location))
    else:  # one tar, all of which is read
        return
    for name in location.names:
        if name not in used:
            yield name


def _tars_at_top(location: SourceLocation) -> list[str]:
    return [name for name in location.names if "/" not in name and is_shard(name)]


def _summary(source: PairSource, described: dict[str, Any]) -> str:
    number = pluralize(len(source), "image")
    match described.get("kind"):
        case "classes":
            classes = described["classes"]
            return f"class folders: {number}, {len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
        case "table":
            columns = f"images in {described['image_column']!r}, captions in {described['caption_column']!r}"
            return f"the table {described['table']}: {pluralize(described['rows'], 'row')}, {number} ({columns})"
        case "annotations":
            return f"annotations of {', '.join(described['annotations'])}: {number}"
        case "texts":
            return f"images with a text file each: {number}"
        case "images":
            return f"images without captions: {number}"
        case "shards":
            shards = described["shards"]
            return f"shards: {pluralize(len(shards), 'tar')}, {pluralize(len(source), 'sample')}"
    return f"{described.get('kind')}: {number}"


def _examples(source: PairSource) -> Iterator[tuple[str, str]]:
    # bad pairs at the beginning are left to the packing to report
    num_found = 0
    for number in range(min(len(source), _EXAMPLE_TRIES)):
        try:
            pair = source.read(number)
        except BadSample:
            continue
        texts = list(chain.from_iterable(pair.captions.values()))
        yield pair.key, texts[0][:_EXAMPLE_CHARACTERS] if texts else ""
        num_found += 1
        if num_found == _NUM_EXAMPLES:
            return


def _split_notes(source: PairSource) -> Iterator[str]:
    splits = named_splits(source)
    # a pair of the test split among those of training would go unnoticed, and so would a recall on all of them
    if len(splits) > 1 and not isinstance(source, SplitFilter):
        yield f"Its pairs are of the splits {', '.join(splits)}, packed together: --split {splits[0]} packs that one."


def _notes(location: SourceLocation, unused: Sequence[str]) -> Iterator[str]:
    """What else a person should know of the files."""
    images = list(filter(is_image_name, unused))
    if images:
        yield f"{pluralize(len(images), 'image')} without a caption, such as {readable_text(images[0])}."
    odd_names = [name for name in location.names if readable_text(name) != name]
    if odd_names:
        yield f"{pluralize(len(odd_names), 'name')} not in UTF-8, such as {readable_text(odd_names[0])}."
    if isinstance(location.files, FolderFiles):
        for name, reason in list(location.files.skipped.items())[:5]:
            yield f"Passed over: {readable_text(name)}, {reason}."
    failed = _failed_downloads(location)
    if failed:
        yield f"Rows of img2dataset that came without an image: {list_counts(failed.most_common())}."


def _failed_downloads(location: SourceLocation) -> Counter[str]:
    """What img2dataset's tables say of rows that were not downloaded, by status."""
    failed: Counter[str] = Counter()
    for name in location.names:
        if not name.endswith(".parquet") or not is_bookkeeping(location, name):
            continue
        assert location.files is not None
        try:
            rows = read_table(location.files, name).rows
        # no pair comes from here: what cannot be read is only not counted
        except VlmError:
            continue
        if "status" in rows.columns:
            failed.update(map(str, rows.column("status")))
    # a Counter lets go of what it does not hold without an error
    del failed["success"]
    return failed


@dataclass(frozen=True, kw_only=True)
class SourceType:
    """One layout: what it looks like in words, how to recognise it, how to open it."""

    description: str
    matches: Callable[[SourceLocation], bool]
    open: Callable[[SourceLocation], PairSource]


def open_source(url: str, options: SourceOptions | None = None) -> PairSource:
    """The pairs at an address; what kind of source it is is found by looking, unless the options say so.

    Raises:
        UsageError: nothing is there, it is of no known kind, two readings are possible, or it is empty.
    """
    return _open(open_location(url, options or SourceOptions()))


def recognise_source(url: str, options: SourceOptions | None = None) -> tuple[PairSource, Recognition]:
    """`open_source` and what it was taken for, from one look at the address.

    Raises:
        UsageError: as `open_source`.
    """
    location = open_location(url, options or SourceOptions())
    source = _open(location)
    return source, _describe_recognition(source, location)


def _open(location: SourceLocation) -> PairSource:
    options = location.options
    # of other kinds of source none has several images a sample
    kind = options.kind or ("shards" if options.image_name else _recognise(location))
    source = KINDS[kind].open(location)
    if options.selection and not isinstance(source, ShardSource):
        raise UsageError(
            f"{location.url!r} is not a set of shards, so {options.selection} cannot choose among its samples."
        )
    if not len(source):
        raise UsageError(_nothing_found(location))
    return SplitFilter(source, options.split) if options.split else source


def holds_shards(url: str) -> bool:
    """Whether an address is one of shards, which every command reads unchanged.

    A pattern or a remote address is; so is a folder with tars that hold no samples, for whoever reads them to say so.

    Raises:
        UsageError: there is nothing.
    """
    if not Path(url).expanduser().exists():
        return True
    location = open_location(url, SourceOptions())
    is_folder_of_tars = isinstance(location.files, FolderFiles) and bool(_tars_at_top(location))
    return is_folder_of_tars or _contains_shards(location)


def _recognise(location: SourceLocation) -> SourceKind:
    # images alone are wanted, so that nothing near them needs to be understood
    if location.options.captions == "none" and location.images and not _contains_shards(location):
        return "table" if is_table_file(location.url) else "images"
    for kind, source_type in KINDS.items():
        if source_type.matches(location):
            return kind
    _explain_tables(location)
    raise UsageError(_nothing_found(location))


def _explain_tables(location: SourceLocation) -> None:
    """Say which columns the tables lack that lie there and could not be used.

    Raises:
        UsageError: there is such a table.
    """
    for name in unread_captions(location):
        assert location.files is not None
        table = read_table(location.files, name, location.options.encoding)
        # opening it raises the error that names the missing column
        TableSource(location.files, [table], location.options)


def _nothing_found(location: SourceLocation) -> str:
    shown = ", ".join(map(readable_text, location.names[:3]))
    inside = f"it holds {shown} …" if location.names else "it is empty"
    looked = "; ".join(kind.description for kind in KINDS.values())
    if location.images:
        number = pluralize(len(location.images), "image")
        return (
            f"No captions were found for the {number} of {location.url!r}: --captions none packs images alone; search "
            f"needs none. Where a sample of shards has several images, as in KEY.left.jpg, --image-name left packs "
            f"one. Looked for: {looked}."
        )
    if any(name.lower().endswith(HEIC_ENDINGS) for name in location.names):
        cure = "Its HEIC images are read where pillow-heif is installed: pip install pillow-heif"
    elif any("/" in name and is_shard(name) for name in location.names):
        cure = f"Its tars lie deeper; name them by a pattern: '{location.url.rstrip('/')}/**/*.tar'."
    else:
        cure = (
            "Tars that hold samples all the same are read by --kind shards; where those have several images, as in "
            "KEY.left.jpg, --image-name left packs one."
        )
    return f"Nothing to pack at {location.url!r} ({inside}). Looked for: {looked}. {cure}"


def _open_table(location: SourceLocation) -> PairSource:
    if location.files is None or not location.tables:
        raise UsageError(_nothing_found(location))
    return TableSource(location.files, location.tables, location.options)


def _open_annotations(location: SourceLocation) -> PairSource:
    if location.files is None or not location.annotations:
        raise UsageError(_nothing_found(location))
    return AnnotationSource(location.files, location.annotations, location.options)


def _open_images(location: SourceLocation) -> PairSource:
    if location.files is None:
        raise UsageError(_nothing_found(location))
    return ImageFolderSource(location.files, location.options)


def _open_classes(location: SourceLocation) -> PairSource:
    if location.files is None:
        raise UsageError(_nothing_found(location))
    return ClassFolderSource(location.files, template=location.options.template)


def _are_annotations(location: SourceLocation) -> bool:
    """Whether there are annotations, and no table of captions next to them."""
    if is_table_file(location.url) or not location.annotations:
        return False
    if location.options.captions in ("", "optional") and location.tables:
        files = [*location.annotations, *(table.name for table in location.tables)]
        raise UsageError(
            f"{location.url!r} holds captions in {', '.join(files)}; name those to read by --captions FILE."
        )
    return True


def _are_texts(location: SourceLocation) -> bool:
    """Whether images have captions next to them; if only some do and folders may be classes, the user must choose."""
    if not location.images:
        return False
    checked, with_words = location.with_words
    if not with_words:
        return False
    # a few texts among class folders are perhaps notes, which only the user can tell from captions
    may_be_classes = not are_no_classes(label_folders(location.images) or {"images"})
    if 2 * with_words < checked and may_be_classes and location.options.captions != "optional":
        raise UsageError(
            f"{location.url!r} may be read in two ways: {with_words} of {checked} images looked at have a text next to "
            "them, and all lie in folders that may be classes. Say --kind texts or --kind classes."
        )
    return True


def _are_classes(location: SourceLocation) -> bool:
    """Whether folders are classes.

    Raises:
        UsageError: captions lie near that are not read, or the folders have no names of classes.
    """
    inside = [name for name in location.images if "/" in name]
    if not inside:
        return False
    # labels in place of captions would train a worse model without a word: an error is better than a guess
    unread = unread_captions(location)
    if unread:
        listing = ", ".join(map(readable_text, unread[:3]))
        raise UsageError(
            f"{location.url!r} holds images in folders, and {listing}, which cannot be read as captions of theirs: it "
            "needs a column of images and one of captions (--image-column, --caption-column name them, and "
            "--captions FILE the file). To pack without it: --kind classes, or --captions none."
        )
    folders = label_folders(inside)
    if are_no_classes(folders):
        listing = ", ".join(map(repr, sorted(map(readable_text, folders))[:3]))
        raise UsageError(
            f"{location.url!r} holds {pluralize(len(inside), 'image')} in {listing}, hardly the names of classes, and "
            "no captions. Say --kind classes if they are, or --captions none to pack images without captions."
        )
    return True


def _contains_shards(location: SourceLocation) -> bool:
    if isinstance(location.files, TarFiles):
        return looks_like_shard(location.names)
    if location.files is None:
        return location.url != SCENES
    # lazily: looking through a large tar takes long, and the first one with samples decides
    return any(map(contains_samples, map(Path(location.files.url).joinpath, _tars_at_top(location))))


def _open_shards(location: SourceLocation) -> PairSource:
    options = location.options
    return ShardSource(
        expand_shards(location.url),
        allow_damage=options.allow_damage,
        caption_lines=options.caption_lines,
        captions_mode=options.captions,
        encoding=options.encoding,
        image_name=options.image_name,
        selection=read_selection(options.selection) if options.selection else None,
    )


KINDS: dict[SourceKind, SourceType] = {
    # the order matters: shards hold texts next to images, and annotations and tables lie next to class folders
    "scenes": SourceType(
        description=f"the word {SCENES} (images drawn by rule)",
        matches=lambda location: location.url == SCENES and location.files is None,
        open=lambda location: SyntheticShapesSource(location.options.scenes),
    ),
    "shards": SourceType(
        description="*.tar, *.tar.gz with key.jpg and key.txt or key.json (WebDataset, img2dataset)",
        matches=_contains_shards,
        open=_open_shards,
    ),
    "annotations": SourceType(
        description="COCO's captions_*.json or Karpathy's dataset_*.json next to folders of images",
        matches=_are_annotations,
        open=_open_annotations,
    ),
    "table": SourceType(
        description="captions.csv, .tsv, .jsonl or .parquet with the images it names or holds (also inside one .tar), "
        "captions.txt, metadata.csv in any folder",
        matches=lambda location: bool(location.tables),
        open=_open_table,
    ),
    "texts": SourceType(
        description="a.jpg with a.txt, a.caption or a.json next to it (also img2dataset's files)",
        matches=_are_texts,
        open=_open_images,
    ),
    "classes": SourceType(
        description="CLASS/image.jpg (also inside one .tar)",
        matches=_are_classes,
        open=_open_classes,
    ),
    "images": SourceType(
        description="images without captions (--captions none)",
        matches=lambda location: False,
        open=_open_images,
    ),
}
"""The layouts that are read; the first that fits is taken. Adding one is a class and a row here."""
