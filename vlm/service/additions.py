"""What people add to an index: images in any form, folders, tables, shards and embeddings, prepared as a batch of rows.

Whatever is new is embedded by the index's own model, without holding the index: image files where they lie, part by
part, so that a killed addition resumes; images without a file are first written into a shard in the index folder. What
the index has already is left out before anything is embedded.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import text_list
from vlm.console import progress
from vlm.data.image_inputs import ImageInput, encoded_image
from vlm.data.pack import REJECTED, PackConfig, encode_pair, pack
from vlm.data.photo_formats import read_photo
from vlm.data.samples import UNNAMED, Captions, Pair
from vlm.data.selection import SelectedShard, Selection
from vlm.data.shards import count_samples, expand_shards, is_remote
from vlm.data.sources.source import FolderFiles, PairSource
from vlm.data.sources.source_registry import holds_shards, open_source
from vlm.data.tar import open_index
from vlm.data.tar_entries import SampleWriter
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import atomic_write, compute_fingerprint, content_digest, read_lines
from vlm.index.embed import EmbedOptions, backend_of, embed_into
from vlm.index.embeddings_folder import (
    SKIPPED_JSONL,
    EmbeddingSpace,
    EmbeddingsWriter,
    Origin,
    SkippedSampleRecord,
    check_unit_norm,
    part_name,
)
from vlm.index.encoder import AnyEncoder
from vlm.index.engine_base import EngineSnapshot
from vlm.index.engine_writer import InsertBatch
from vlm.index.ids import UID_COLUMN
from vlm.index.metadata import check_json, is_field
from vlm.manifest import MANIFEST, PROGRESS, is_complete, recorded_configuration
from vlm.service.folder.folder_reader import FileReading, FolderReader
from vlm.service.folder.folder_scan import FileStamp, FolderScan, scan_folder
from vlm.service.images import read_stored_bytes
from vlm.service.query import embed_pixels

logger = logging.getLogger(__name__)

WORK = ".adding"
"""The folder in an index folder where unfinished additions lie."""

IMAGES = "images"
"""The folder in an index folder with the shards of images that had no file."""

PART_IMAGES = 1024
"""Images of a part of an addition, the most that a killed one embeds again."""

_BATCH_SIZE = 64
# a table is packed with what is usable of it; the rest is reported
_PACK_ANYWAY = 1.0


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Rows that are ready to be inserted. batch: None if there is nothing new.

    known: rows that the index has already. unreadable: what cannot be embedded, with the reason.
    is_finished: the rows were embedded before, by whoever adds them, who then knows which are new.
    work: folders that can be removed once the rows are in the index. new_files: files that are of no use if they are
    not. copies: folders in the index folder that are of no use if no row is new.
    """

    batch: InsertBatch | None
    known: int = 0
    is_finished: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    work: tuple[Path, ...] = ()
    new_files: tuple[Path, ...] = ()
    copies: tuple[Path, ...] = ()

    def remove_work(self, *, has_new_rows: bool) -> None:
        """Remove what served to prepare it, and copies of images of which not one row is new."""
        for folder in self.work if has_new_rows else (*self.work, *self.copies):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What is known of images, in their order: uids, captions and metadata; an empty list says nothing."""

    uids: Sequence[str] = ()
    captions: Sequence[Captions] = ()
    metadata: Sequence[Mapping[str, Any]] = ()

    def check(self, count: int) -> None:
        """Refuse what is said of another number of images.

        Raises:
            UsageError: a list is neither empty nor as long as there are images.
        """
        for name, values in (("uids", self.uids), ("captions", self.captions), ("metadata", self.metadata)):
            if values and len(values) != count:
                raise UsageError(f"{len(values):,} {name} for {count:,} images: give as many, or none.")


class AdditionPlanner:
    """Prepares additions to a version of an index.

    load: gives the index's model; called only if something has to be embedded, and once.
    uid_prefix: put before the uids of whatever is embedded.
    replace_known: rows that the index has are embedded again, to replace the old ones.
    """

    def __init__(
        self,
        snapshot: EngineSnapshot,
        load: Callable[[], AnyEncoder],
        *,
        uid_prefix: str = "",
        replace_known: bool = False,
    ) -> None:
        self._snapshot = snapshot
        self._load = cache(load)
        self._prefix = uid_prefix
        self._replace_known = replace_known
        self._space: EmbeddingSpace = snapshot.details.space

    def from_address(self, address: str) -> Addition:
        """Rows of an embeddings folder, shards, a table with its images, or a folder of images.

        Raises:
            UsageError: there is nothing of the kind.
        """
        path = Path(address).expanduser()
        # before shards are looked for: an embeddings folder holds no images, but somebody may have put tars beside
        if path.is_dir() and _holds_embeddings(path):
            column = self._snapshot.manifest.configuration.get(UID_COLUMN, "")
            return Addition(batch=InsertBatch.from_folder(path, uid_column=column), is_finished=True)
        if not (path.exists() or is_remote(address) or any(sign in address for sign in "{*:")):
            raise UsageError(f"There is nothing at {address}; give a folder of images, shards, or embeddings.")
        if holds_shards(address):
            return self._from_shards(expand_shards(address))
        self._require_images()
        source = None
        try:
            source = open_source(address)
        except UsageError:
            # images alone are no pairs to train on, but may well be searched
            if not path.is_dir():
                raise
        if source is not None and source.describe().get("kind") in ("table", "annotations"):
            return self._from_table(address, source)
        return self._from_folder(path)

    def from_images(self, images: Sequence[ImageInput], options: ImageOptions) -> Addition:
        """Rows of images in any form; each file stays where it is, and the others are kept in a shard of the index.

        A file's uid is its path as given, that of any other image a digest of its bytes.

        Raises:
            UsageError: one is not an image, two have the same uid, or one exists.
        """
        self._require_images()
        options.check(len(images))
        # all are opened before any is embedded, so that a mistake in the last one costs nothing
        encoded = list(map(encoded_image, images))
        uids = list(map(self._prefixed, options.uids or map(_default_uid, encoded)))
        for uid, times in Counter(uids).items():
            if times > 1:
                raise UsageError(f"{times} of the images have the uid {uid!r}; give each its own (uids).")
        existing = _entries_by_uid(self._snapshot, uids)
        # a uid that was chosen and exists is a mistake; a path or a digest that exists is the same image again
        if existing and options.uids and not self._replace_known:
            raise UsageError(
                f"{self._snapshot.folder} has {next(iter(existing))!r} already ({len(existing):,} of {len(uids):,} "
                "uids exist); nothing was added: update replaces them."
            )
        described = _Descriptions(uids, options)
        files: dict[int, Path] = {}
        others: dict[int, bytes] = {}
        for number, (uid, image) in enumerate(zip(uids, encoded, strict=True)):
            if uid in existing and not self._replace_known:
                continue
            if isinstance(image, Path):
                files[number] = image
            else:
                others[number] = image
        additions = [Addition(batch=None, known=len(uids) - len(files) - len(others))]
        if files:
            additions.append(self._from_files(files, described))
        if others:
            additions.append(self._from_bytes(others, described))
        return _joined(additions)

    def _require_images(self) -> None:
        if self._space.modality != "image":
            raise UsageError(f"{self._snapshot.folder} holds embeddings of texts; add shards or embeddings of texts.")

    def _prefixed(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _work(self, *identity: str) -> Path:
        # named by what is added, so that the same call after a kill comes upon what it had finished
        return self._snapshot.folder / WORK / compute_fingerprint(self._prefix, *identity)

    def _from_folder(self, root: Path) -> Addition:
        """The images below a folder; their uids are their names in it, and those that are known stay."""
        # resolved, since a row keeps the place of its file for processes started anywhere
        root = root.resolve()
        scan = scan_folder(root)
        for extra, count in scan.missing.items():
            logger.warning(f"{count:,} files are read with the extra {extra}: pip install 'vlm-pipeline[{extra}]'.")
        names = list(scan.stamps)
        if not names:
            raise UsageError(f"{root} holds no images, no shards (*.tar) and no embeddings.")
        existing = _entries_by_uid(self._snapshot, map(self._prefixed, names))
        new_names: list[str] = []
        for name in names:
            uid = self._prefixed(name)
            # known by place and size, so that files which the index has are not opened again
            new = _file_origin(uid, f"{root}/{name}", scan.stamps[name], {}, {})
            if self._replace_known or not _is_known(self._snapshot, existing.get(uid), new):
                new_names.append(name)
        folder = f"{root}/"

        def origin(reading: FileReading) -> Origin:
            path = reading.file.path
            fields = reading.content.fields if reading.content else {}
            described = {"file": path, "folder": path.rpartition("/")[0]} | fields | reading.file.metadata
            return _file_origin(
                self._prefixed(path), f"{folder}{path}", reading.file.stamp, reading.file.captions, described
            )

        addition = self._embed_files(root, scan, new_names, origin)
        if addition.batch is None and len(new_names) == len(names):
            raise _nothing_readable(addition.unreadable)
        return replace(addition, known=len(names) - len(new_names), unreadable=scan.unreadable | addition.unreadable)

    def _from_files(self, files: Mapping[int, Path], described: "_Descriptions") -> Addition:
        """Image files from anywhere, each by its number among the images."""
        stamps: dict[str, FileStamp] = {}
        number_of: dict[str, int] = {}
        for number, path in files.items():
            try:
                status = os.stat(path)
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
            name = str(path.absolute()).lstrip("/")
            stamps[name] = FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)
            number_of[name] = number
        root = Path("/")
        scan = FolderScan(files=FolderFiles(root), stamps=stamps, beside={}, unreadable={}, missing={})

        def origin(reading: FileReading) -> Origin:
            number = number_of[reading.file.path]
            fields = reading.content.fields if reading.content else {}
            metadata = {"file": files[number].name} | fields | described.metadata(number)
            path = f"/{reading.file.path}"
            return _file_origin(described.uids[number], path, reading.file.stamp, described.captions(number), metadata)

        addition = self._embed_files(root, scan, list(stamps), origin)
        if addition.batch is None:
            raise _nothing_readable(addition.unreadable)
        return addition

    def _embed_files(
        self, root: Path, scan: FolderScan, names: Sequence[str], origin: Callable[[FileReading], Origin]
    ) -> Addition:
        if not names:
            return Addition(batch=None)
        # with their sizes: after a kill, files that were changed meanwhile are another addition
        stamps = [f"{name}\n{scan.stamps[name].size}" for name in names]
        work = self._work(str(root), *stamps)
        unreadable: dict[str, str] = {}
        if (work / MANIFEST).is_file():
            unreadable = _read_incidents(work / SKIPPED_JSONL)
        else:
            model = self._load()
            backend = backend_of(model)
            _discard_other_work(work, backend)
            reader = FolderReader(root, scan, view=lambda: model.view, known_digests=())
            identity = {"files": compute_fingerprint(*stamps), "backend": backend}
            writer = EmbeddingsWriter(work, space=self._space, identity=identity)
            with progress(total=len(names), what="embed", unit=" images") as bar:
                for number, first in enumerate(range(0, len(names), PART_IMAGES)):
                    part_names = names[first : first + PART_IMAGES]
                    # what an interrupted addition has finished stays
                    if writer.part(number, verify=True) is None:
                        rows = _PartRows(str(root), number)
                        for readings in reader.batches(dict.fromkeys(part_names), _BATCH_SIZE):
                            rows.add(readings, origin, model)
                            bar.update(len(readings))
                        for record in rows.skipped:
                            unreadable[record.key] = record.detail
                        writer.add(
                            str(root), rows.matrix(self._space.dimension), rows.origins, rows.skipped, number=number
                        )
                    else:
                        bar.update(len(part_names))
            if not any(part.rows for part in writer.parts):
                return Addition(batch=None, unreadable=unreadable, work=(work,))
            writer.finish(inputs={"model": self._space.fingerprint}, details={"shards": []})
            # with those of the parts that an interrupted addition had finished
            unreadable = _read_incidents(work / SKIPPED_JSONL)
        return Addition(batch=InsertBatch.from_folder(work), unreadable=unreadable, work=(work,))

    def _from_bytes(self, images: Mapping[int, bytes], described: "_Descriptions") -> Addition:
        """Images without a file, each by its number: written to a shard in the index folder, then embedded from it."""
        # named by its content, so that the same call after a kill finds its shard and adds no second one
        name = compute_fingerprint(*map(content_digest, images.values()))
        path = self._snapshot.folder / IMAGES / f"{name}.tar"
        is_new = not path.exists()
        path.parent.mkdir(exist_ok=True)
        unreadable: dict[str, str] = {}
        with atomic_write(path) as file, SampleWriter(file) as tar:
            for number, image in images.items():
                try:
                    # with the size and what the camera wrote, as of files
                    metadata = read_photo(image, "").fields | described.metadata(number)
                    captions = described.captions(number)
                    pair = Pair(key=f"{number:06d}", image=image, captions=captions, metadata=metadata)
                    tar.write(encode_pair(pair))
                except BadSample as error:
                    unreadable[described.uids[number]] = str(error)
        if len(unreadable) == len(images):
            path.unlink()
            raise _nothing_readable(unreadable)
        addition = self._embed_shards([str(path)])
        assert addition.batch is not None
        rows = addition.batch.origins

        def origins() -> Iterator[Origin]:
            for origin in rows():
                # a sample's key in the shard is the number of its image
                number = int(origin.key)
                # a shard has captions in its JSON, which are no metadata of an image that someone hands over
                metadata = {name: value for name, value in origin.metadata.items() if is_field(name)}
                yield replace(origin, uid=described.uids[number], metadata=metadata)

        return replace(
            addition,
            batch=replace(addition.batch, origins=origins),
            unreadable=unreadable | addition.unreadable,
            new_files=(path,) if is_new else (),
        )

    def _from_table(self, address: str, source: PairSource) -> Addition:
        """The rows of a table, whose images are packed into the index folder; rows without a usable one are named."""
        out = self._snapshot.folder / IMAGES / source.fingerprint()
        is_new = not (out / MANIFEST).is_file()
        if is_new:
            logger.info(f"The pairs of {address} are packed to {out} first.")
            pack(source, out, PackConfig(max_bad_share=_PACK_ANYWAY))
        addition = self._from_shards(expand_shards(str(out)))
        return replace(
            addition,
            unreadable=_read_rejected(out / REJECTED) | addition.unreadable,
            copies=(out,) if is_new else (),
        )

    def _from_shards(self, shards: Sequence[str]) -> Addition:
        """The samples of shards that the index does not have; shards of which it has all are not read."""
        # absolute, as the rows name their shard: by another address it would be another shard
        addresses = [shard if is_remote(shard) else str(Path(shard).absolute()) for shard in shards]
        counts = dict(zip(addresses, count_samples(addresses), strict=True))
        missing: dict[str, np.ndarray] = {}
        num_known = 0
        for address, count in counts.items():
            # how often each sample is embedded: 0 leaves out those that have a row
            times = np.ones(count, np.uint16)
            # of texts a sample has as many rows as captions, which only embedding it tells
            if self._space.modality == "image" and not self._replace_known:
                times[self._snapshot.catalogue.sample_numbers(address)] = 0
            num_known += int((times == 0).sum())
            if times.any():
                missing[address] = times
        if not missing:
            return Addition(batch=None, known=num_known)
        addition = self._embed_shards(list(missing), selection=_selection(missing))
        if addition.batch is None and not num_known:
            raise _nothing_readable(addition.unreadable)
        return replace(addition, known=num_known)

    def _embed_shards(self, shards: Sequence[str], *, selection: Selection | None = None) -> Addition:
        work = self._work(*shards, selection.fingerprint if selection else "")
        options = EmbedOptions(model_spec=self._space.model, selection=selection)
        model = self._load()
        _discard_other_work(work, backend_of(model))
        try:
            embed_into(model, shards, {self._space.modality: work}, options)
        except VlmError:
            # not one sample can be used: then there are reasons, but no manifest
            if (work / MANIFEST).is_file() or not (work / SKIPPED_JSONL).is_file():
                raise
            return Addition(batch=None, unreadable=_read_incidents(work / SKIPPED_JSONL), work=(work,))
        column = self._snapshot.manifest.configuration.get(UID_COLUMN, "")
        batch = InsertBatch.from_folder(work, uid_column=column)
        if self._prefix:
            rows = batch.origins

            def origins() -> Iterator[Origin]:
                for origin in rows():
                    yield replace(origin, uid=self._prefixed(origin.uid))

            batch = replace(batch, origins=origins)
        return Addition(batch=batch, unreadable=_read_incidents(work / SKIPPED_JSONL), work=(work,))


class _Descriptions:
    """The uid, the captions and the metadata of each image by its number."""

    def __init__(self, uids: Sequence[str], options: ImageOptions) -> None:
        self.uids = uids
        self._options = options

    def captions(self, number: int) -> Captions:
        """Its captions by language."""
        return self._options.captions[number] if self._options.captions else {}

    def metadata(self, number: int) -> dict[str, Any]:
        """Its metadata."""
        return dict(self._options.metadata[number]) if self._options.metadata else {}


class _PartRows:
    """The rows of a part while its files are read, batch by batch, and the files that have no row."""

    def __init__(self, root: str, number: int) -> None:
        self._root = root
        self._number = number
        self._vectors: list[np.ndarray] = []
        self.origins: list[Origin] = []
        self.skipped: list[SkippedSampleRecord] = []

    def add(self, readings: Sequence[FileReading], origin: Callable[[FileReading], Origin], model: AnyEncoder) -> None:
        """Embed a batch."""
        pixels: list[np.ndarray] = []
        origins: list[Origin] = []
        for reading in readings:
            if reading.pixels is None:
                reason = reading.file.error or (reading.content.error if reading.content else "")
                self._skip(reading.file.path, reason)
            else:
                pixels.append(reading.pixels)
                origins.append(origin(reading))
        if not pixels:
            return
        vectors = embed_pixels(model, np.stack(pixels))
        check_unit_norm(vectors, [origin.uid for origin in origins])
        self._vectors.append(vectors)
        self.origins += origins

    def matrix(self, dimension: int) -> np.ndarray:
        """All vectors so far."""
        # the first is empty, so that a part without a readable image has a matrix as well
        return np.concatenate([np.zeros((0, dimension), np.float32), *self._vectors])

    def _skip(self, name: str, reason: str) -> None:
        record = SkippedSampleRecord(
            part=part_name(self._number), shard=self._root, number=0, key=name, reason="unreadable file", detail=reason
        )
        self.skipped.append(record)


def rows_to_write(addition: Addition, snapshot: EngineSnapshot) -> Addition:
    """The addition without the rows that a version of the index has already; changed files among them stay.

    Raises:
        UsageError: a uid is that of another image in the index.
    """
    batch = addition.batch
    if batch is None:
        return addition
    entries = _entries_by_uid(snapshot, batch.uids())
    if not entries:
        return addition
    selected: set[str] = set()
    for origin in batch.origins():
        if not _is_known(snapshot, entries.get(origin.uid), origin):
            selected.add(origin.uid)
    num_known = batch.count - len(selected)
    return replace(addition, batch=batch.select(selected) if selected else None, known=addition.known + num_known)


def _entries_by_uid(snapshot: EngineSnapshot, uids: Iterable[str]) -> dict[str, Origin]:
    """The rows of an index that have one of the uids."""
    rows = snapshot.catalogue.rows_by_uid(uids)
    return {entry.uid: entry for entry in snapshot.catalogue.entries(list(rows.values()))}


def _selection(times: Mapping[str, np.ndarray]) -> Selection:
    """A selection of samples of shards, by their addresses."""
    shards: list[SelectedShard] = []
    for address, of_shard in times.items():
        fingerprint = open_index(address).fingerprint
        shards.append(SelectedShard(name=address, fingerprint=fingerprint, samples=len(of_shard)))
    return Selection(shards=tuple(shards), times=tuple(times.values()))


def _nothing_readable(unreadable: Mapping[str, str]) -> UsageError:
    name, reason = next(iter(unreadable.items()))
    return UsageError(f"Not one of {len(unreadable):,} images can be decoded; the first, {name}: {reason}.")


def _is_known(snapshot: EngineSnapshot, entry: Origin | None, new: Origin) -> bool:
    """Whether a row with the uid of a new one is of the same image; a file that has changed is not.

    Raises:
        UsageError: it is of another image, which only has the same uid.
    """
    if entry is None:
        return False
    # one place holds one image, so the size alone tells whether the file was replaced
    if (entry.shard, entry.number) == (new.shard, new.number):
        return entry.image_size == new.image_size
    # the same image from another place, as from the folder that was packed into shards
    try:
        is_same = entry.image_size == new.image_size and read_stored_bytes(entry) == read_stored_bytes(new)
    except VlmError:
        # what cannot be read cannot be compared, and so does not count as the same
        is_same = False
    if is_same:
        return True
    raise UsageError(
        f"{snapshot.folder} has {entry.uid!r} already, from {entry.path or entry.shard}; nothing was added. Put text "
        "before the new uids (--uid-prefix), replace the old rows (vlm index update), or say where their images are "
        "now (vlm index relocate)."
    )


def _discard_other_work(work: Path, backend: str) -> None:
    """Remove embeddings that an interrupted addition left and this one cannot go on with; they are computed again."""
    begun = recorded_configuration(work)
    if not begun:
        return
    # before backends were noted there was torch alone, which embedded captions in another order
    goes_on = begun.get("modality") == "image" or is_complete(work)
    made_by = begun.get("backend", "torch" if goes_on else "torch of an earlier version")
    if made_by != backend:
        logger.info(f"{work} was begun by {made_by}, this addition embeds by {backend}: it is removed and made again.")
        shutil.rmtree(work)


def _joined(additions: Sequence[Addition]) -> Addition:
    """Several additions as one, so that they become one version."""
    batches: list[InsertBatch] = []
    known = 0
    unreadable: dict[str, str] = {}
    work: list[Path] = []
    new_files: list[Path] = []
    for addition in additions:
        if addition.batch is not None:
            batches.append(addition.batch)
        known += addition.known
        unreadable |= addition.unreadable
        work += addition.work
        new_files += addition.new_files
    return Addition(
        batch=_joined_batches(batches) if batches else None,
        known=known,
        unreadable=unreadable,
        work=tuple(work),
        new_files=tuple(new_files),
    )


def _joined_batches(batches: Sequence[InsertBatch]) -> InsertBatch:
    """Several batches as one; their rows are read when asked for, one batch after the other."""
    count = 0
    sources: list[str] = []
    shards: list[str] = []
    for batch in batches:
        count += batch.count
        sources.append(batch.source)
        shards += batch.shards

    # functions, since both are read several times, and an iterator would be empty the second time
    def blocks() -> Iterator[np.ndarray]:
        for batch in batches:
            yield from batch.blocks()

    def origins() -> Iterator[Origin]:
        for batch in batches:
            yield from batch.origins()

    return replace(
        batches[0],
        count=count,
        source=compute_fingerprint(*sources),
        shards=tuple(shards),
        blocks=blocks,
        origins=origins,
    )


def _file_origin(uid: str, path: str, stamp: FileStamp, captions: Captions, metadata: dict[str, Any]) -> Origin:
    """The row of an image that is a file of its own."""
    return Origin(
        uid=uid,
        key=uid,
        shard=path,
        number=0,
        image_offset=0,
        image_size=stamp.size,
        caption_number=None,
        captions=captions,
        metadata=metadata,
    )


def _default_uid(image: Path | bytes) -> str:
    # bytes have no name; by their digest, the same image added twice is one row
    return image.as_posix() if isinstance(image, Path) else content_digest(image).hex()


def _holds_embeddings(folder: Path) -> bool:
    """Whether a folder is one of embeddings, finished or not."""
    for name in (MANIFEST, PROGRESS):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("kind") == "embeddings":
            return True
    return False


def _read_incidents(path: Path) -> dict[str, str]:
    unreadable: dict[str, str] = {}
    for line in read_lines(path):
        record = json.loads(line)
        unreadable[record["key"]] = f"{record['reason']}: {record['detail']}"
    return unreadable


def _read_rejected(path: Path) -> dict[str, str]:
    """The pairs that packing had no use for, by their files; there is no list if it had use for all."""
    rejected: dict[str, str] = {}
    for line in read_lines(path) if path.is_file() else ():
        record = json.loads(line)
        rejected[record.get("file") or f"number {record['number']}"] = f"{record['reason']}: {record['detail']}"
    return rejected


def parse_descriptions(
    count: int,
    *,
    uids: Any,
    captions: Any,
    metadata: Any,
) -> ImageOptions:
    """What is said of `count` images: of a single one without a list around it; one metadata mapping is for all.

    captions: for each image a text, several, or texts by language.

    Raises:
        UsageError: it is of another kind.
    """
    uid_list = [] if uids is None else text_list(uids, "uids")
    if captions is None:
        caption_list: list[Any] = []
    elif not isinstance(captions, Iterable):
        raise UsageError(f"captions = {captions!r}: give for each image a text, several, or texts by language.")
    # several texts for a single image are its captions, not the captions of several images
    elif count == 1 and (isinstance(captions, str | Mapping) or all(isinstance(item, str) for item in captions)):
        caption_list = [captions]
    elif isinstance(captions, str | Mapping):
        raise UsageError(f"One caption for {count:,} images: give a list with the captions of each.")
    else:
        caption_list = list(captions)
    if not isinstance(metadata, Iterable | None) or isinstance(metadata, str):
        raise UsageError(f"metadata = {metadata!r}: give a mapping for all images, or for each one.")
    metadata_list = [metadata] * count if isinstance(metadata, Mapping) else list(metadata or ())
    for number, values in enumerate(metadata_list, 1):
        check_json(values, f"image {number}")
    return ImageOptions(uids=uid_list, captions=list(map(_captions_of, caption_list)), metadata=metadata_list)


def _captions_of(value: Any) -> Captions:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {language: tuple(text_list(texts, f"captions in {language!r}")) for language, texts in value.items()}
    return {UNNAMED: tuple(text_list(value, "captions"))}
