"""What a source was taken for, in words: two of its pairs, and which files no reading took."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from vlm.console import pluralize
from vlm.data.sources.image_names import endings, is_image_name
from vlm.data.sources.location import SourceLocation, is_bookkeeping, open_location
from vlm.data.sources.source import FolderFiles, PairSource, SourceOptions, readable_text
from vlm.data.sources.table import read_table
from vlm.errors import BadSample, VlmError
from vlm.storage.urls import is_shard


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
            listing = ", ".join(f"{count:,} {ending}" for ending, count in self.left_aside.items())
            yield f"  Not used: {listing}."
        yield from (f"  {note}" for note in self.notes)


_NUM_EXAMPLES = 2
_EXAMPLE_TRIES = 20
_EXAMPLE_CHARACTERS = 100


def describe_recognition(source: PairSource, url: str, options: SourceOptions | None = None) -> Recognition:
    """What a source was taken for, two pairs of it, and which files no reading took."""
    location = open_location(url, options or SourceOptions())
    described = source.describe()
    kind = str(described.get("kind", ""))
    left_aside: Counter[str] = Counter()
    notes: list[str] = []
    used = source.used_files() if isinstance(source, FileSource) else _tars(location)
    unused = [name for name in location.names if name not in used]
    left_aside.update(endings(map(readable_text, unused)))
    notes += _notes(location, unused)
    return Recognition(
        kind=kind,
        summary=_summary(source, described),
        examples=tuple(_examples(source)),
        left_aside=dict(left_aside.most_common()),
        notes=tuple(notes),
    )


def _tars(location: SourceLocation) -> set[str]:
    """What a source of shards reads: the tars at the top of its folder, or all of its one tar."""
    if isinstance(location.files, FolderFiles):
        return {name for name in location.names if "/" not in name and is_shard(name)}
    return set(location.names)


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
            return f"images with a text beside each: {number}"
        case "images":
            return f"images without words: {number}"
        case "shards":
            shards = described["shards"]
            return f"shards: {pluralize(len(shards), 'tar')}, {pluralize(len(source), 'sample')}"
    return f"{described.get('kind')}: {number}"


def _examples(source: PairSource) -> Iterator[tuple[str, str]]:
    num_found = 0
    for number in range(min(len(source), _EXAMPLE_TRIES)):
        try:
            pair = source.read(number)
        except BadSample:
            continue
        texts = [text for several in pair.captions.values() for text in several]
        yield pair.key, texts[0][:_EXAMPLE_CHARACTERS] if texts else ""
        num_found += 1
        if num_found == _NUM_EXAMPLES:
            return


def _notes(location: SourceLocation, unused: Sequence[str]) -> Iterator[str]:
    """What else a person should know of the files."""
    images = [name for name in unused if is_image_name(name)]
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
        listing = ", ".join(f"{count:,} {status}" for status, count in failed.most_common())
        yield f"Rows of img2dataset that came without an image: {listing}."


def _failed_downloads(location: SourceLocation) -> Counter[str]:
    """What img2dataset's tables say of rows that were not downloaded, by status."""
    failed: Counter[str] = Counter()
    for name in location.names:
        if not name.endswith(".parquet") or not is_bookkeeping(location, name):
            continue
        assert location.files is not None
        try:
            rows = read_table(location.files, name).rows
        except VlmError:
            continue
        if "status" in rows.columns:
            failed.update(str(status) for status in rows.column("status") if status != "success")
    return failed
