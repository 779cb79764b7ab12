"""Shards: from what a person types to a list of tars, and their samples by index, as batches read them.

Nothing here needs torch: `batches_by_threads` makes batches in this process, `vlm.data.loader` in worker processes.
`EvalCollator`, for evaluation and embedding, gives each sample with its fixed view, all its captions and its metadata,
and leaves out what cannot be used.
"""

import glob
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from braceexpand import braceexpand

from vlm.console import track
from vlm.data.samples import Captions, Sample, SampleIndex
from vlm.data.shard_cache import Prefetcher, ShardCache
from vlm.data.tar import ShardReader, TarIndex, open_index
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.manifest import MANIFEST, PROGRESS
from vlm.storage import (
    SHARD_SUFFIXES,
    is_remote,
    is_shard,
    list_files,
    local_path,
    needs_cache,
    split_urls,
    url_basename,
)
from vlm.tensor_types import Array, Tensor, UInt8

# named alone: who opens an index decodes no images
if TYPE_CHECKING:
    from vlm.data.transforms import EvalTransform

__all__ = [
    "BatchPlan",
    "Collator",
    "EvalBatch",
    "EvalCollator",
    "EvalSample",
    "Pixels",
    "SampleFailure",
    "ShardSet",
    "Shards",
    "absolute_shard",
    "as_pixels",
    "batches_by_threads",
    "count_samples",
    "expand_shards",
    "is_remote",
    "join_shards",
    "prefetching",
    "read_batches",
    "sample_failure",
    "shards_fingerprint",
    "track_indexing",
]

INDEXING_DELAY_SECONDS = 2.0
"""Opening the indexes of shards shows no progress before so many seconds."""

Shards: TypeAlias = str | Path | Sequence[str | Path]
"""Shards as a folder, a pattern, a URL, or several of these."""

Item = TypeVar("Item")

_THREADS = 8
_MANY_REMOTE = 4


def join_shards(shards: Shards) -> str:
    """As one address, whose parts `::` separates.

    Raises:
        UsageError: none is given.
    """
    parts = [str(shards)] if isinstance(shards, str | Path) else [str(part) for part in shards]
    if not any(parts):
        raise UsageError("No shards are given: name a folder, a tar, a pattern or a URL.")
    return "::".join(parts)


def expand_shards(url: str) -> list[str]:
    """The tars named by a folder, a pattern, an fsspec address, or several joined with `::`.

    A pattern may hold `{a,b}`, `{00..12}`, `*` and `**` (any number of folders), and may name folders; `~` is home.

    Tars end in .tar, .tar.gz or .tgz. The order is that of the address, sorted inside folders and globs: it is part of
    a run's identity.

    Raises:
        UsageError: a part of the address names no tar, or asks for a protocol that is not allowed.
        VlmError: a remote folder cannot be reached.
    """
    shards: list[str] = []
    for part in split_urls(url):
        if part.endswith(".toml"):
            raise UsageError(f"{part!r} is not shards: a mixture file is read by vlm train alone; name the data in it.")
        found = _expand_remote(part) if is_remote(part) else _expand_local(local_path(part))
        if not found:
            raise UsageError(
                f"No shards (*.tar) at {part!r}; give a folder, a tar, or a pattern as {{000..099}}.tar."
                f"{'' if is_remote(part) else deeper_tars_hint(local_path(part))}"
            )
        shards += found
    return shards


def deeper_tars_hint(folder: str) -> str:
    """How to name the tars in the folders of a folder, as a sentence to append; empty if there are none."""
    for tar in Path(folder).glob("**/*.tar"):
        if tar.is_file():
            return f" Its tars lie deeper; name them by a pattern: '{folder.rstrip('/')}/**/*.tar'."
    return ""


def _expand_local(part: str) -> list[str]:
    # a name that exists is used unchanged: folders may be called `parts{1}` or `set [new]`
    if Path(part).is_dir():
        return _shards_in_folder(Path(part))
    paths: list[str] = []
    for pattern in [part] if Path(part).is_file() else braceexpand(part):
        shards: list[str] = []
        for match in _matches(Path(pattern).expanduser()):
            shards += [str(match)] if match.is_file() else _shards_in_folder(match)
        if not shards:
            raise UsageError(f"There is no shard {pattern!r}.")
        paths += shards
    return paths


def _shards_in_folder(folder: Path) -> list[str]:
    return _shards_among(list(map(str, folder.iterdir())), str(folder))


def _matches(pattern: Path) -> list[Path]:
    """The files and folders of a name or glob pattern, sorted; of a pattern that names tars, the tars alone.

    Hidden ones are left out unless the pattern names the dot: other systems leave `._NAME` next to files.
    """
    if pattern.exists() or not any(sign in str(pattern) for sign in "*?["):
        return [pattern] if pattern.exists() else []
    names_hidden = pattern.name.startswith(".")
    files: list[Path] = []
    folders: list[Path] = []
    # glob gives them in the order of the disk, and the order of shards is part of a run's identity
    for match in sorted(map(Path, glob.glob(str(pattern), recursive=True))):
        if match.name.startswith(".") and not names_hidden:
            continue
        if match.is_file():
            files.append(match)
        elif match.is_dir():
            folders.append(match)
    # `parts/*` names the tars of a folder, not what lies in folders next to them, nor manifests, tables and statistics
    tars = [file for file in files if is_shard(str(file))]
    return tars or folders or files


def _expand_remote(part: str) -> list[str]:
    shards: list[str] = []
    for url in braceexpand(part):
        # named outright, so taken as it is: listing may be forbidden, or slow, where reading is not
        if is_shard(url) and "*" not in url:
            shards.append(url)
        else:
            shards += _shards_among(list_files(url), url)
    return shards


def _shards_among(files: Sequence[str], folder: str) -> list[str]:
    """The tars among the files of a folder, sorted; hidden ones are left out."""
    names = {url_basename(file): file for file in files}
    if PROGRESS in names and MANIFEST not in names:
        raise UsageError(f"{folder} is unfinished: run the command that makes it again.")
    shards: list[str] = []
    for name, file in names.items():
        if is_shard(name) and not name.startswith("."):
            shards.append(file)
    shards.sort()
    # a.tar next to a.tar.gz is most likely the same shard twice, whose samples would be seen twice an epoch
    num_with_stem = Counter(map(shard_stem, shards))
    for shard in shards:
        if num_with_stem[shard_stem(shard)] > 1:
            raise UsageError(
                f"{folder} holds {url_basename(shard)} in more than one form; keep one, or name the ones to read."
            )
    return shards


def shard_stem(shard: str) -> str:
    """The file name of a shard without its ending, `.tar.gz` as a whole."""
    name = url_basename(shard)
    return next(name[: -len(suffix)] for suffix in SHARD_SUFFIXES[::-1] if name.lower().endswith(suffix))


def absolute_shard(shard: str) -> str:
    """The address from anywhere; a link to a tar stays a link, because its target need not be named `.tar`."""
    path = Path(shard)
    return shard if is_remote(shard) else str(path.parent.resolve() / path.name)


def count_samples(shards: list[str], *, allow_damage: bool = False, cache: ShardCache | None = None) -> list[int]:
    """Number of samples of each shard, from its index; remote shards are asked several at a time.

    Raises:
        VlmError: a shard is cut short (unless allowed) or holds no sample.
    """
    if sum(map(needs_cache, shards)) < _MANY_REMOTE:
        return _counts(shards, (open_index(shard, cache) for shard in shards), allow_damage=allow_damage)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="vlm-count") as pool:
        indexes = pool.map(lambda shard: open_index(shard, cache), shards)
        try:
            return _counts(shards, indexes, allow_damage=allow_damage)
        except BaseException:
            # an error or an interrupt must not wait for the shards still queued to be fetched
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def track_indexing(items: Iterable[Item], *, total: int) -> Iterator[Item]:
    """Yield something for each shard whose index is opened; a bar shows once it takes long."""
    # an index takes a millisecond if cached, but the scan of a new tar of 10,000 samples a second
    return track(items, total=total, what="indexing shards", unit="shard", delay=INDEXING_DELAY_SECONDS)


def _counts(shards: Sequence[str], indexes: Iterable[TarIndex], *, allow_damage: bool) -> list[int]:
    shown = track_indexing(zip(shards, indexes, strict=True), total=len(shards))
    return [_count(shard, index, allow_damage=allow_damage) for shard, index in shown]


def _count(shard: str, index: TarIndex, *, allow_damage: bool) -> int:
    if index.damage and not allow_damage:
        raise VlmError(
            f"{shard} is damaged: {index.damage}; whole samples before it: at least {max(len(index) - 1, 0):,}. "
            "Fetch or pack the shard again, or use the samples before the damage by --allow-damage."
        )
    if not len(index):
        raise VlmError(f"{shard} holds no samples (key.jpg, .png, .webp … with key.txt or key.json); leave it out.")
    return len(index)


def shards_fingerprint(shards: Sequence[str], cache: ShardCache | None = None) -> str:
    """Identity of an ordered list of shards: the keys and the sizes of all parts, from the indexes alone.

    It stays the same when the files are moved or renamed; new bytes of just the same size go unnoticed.
    """
    return compute_fingerprint(*(open_index(shard, cache).fingerprint for shard in shards))


BatchT = TypeVar("BatchT", covariant=True)

_MAX_OPEN_SHARDS = 64
# batches of each thread that wait for the reader
_BATCHES_AHEAD = 2


@runtime_checkable
class BatchPlan(Protocol):
    """Which samples batch `number` holds; a batch sampler of `vlm.data.sampler`."""

    @property
    def largest_batch(self) -> int:
        """Most samples a batch may hold."""
        ...

    def __getitem__(self, number: int) -> list[SampleIndex]: ...

    def upcoming_shards(self, number: int) -> list[int]:
        """The shards that batch `number` and those soon after it need, in order."""
        ...


class ShardSet:
    """Samples by their index in some shards; keeps the shards used last open. Each process or thread has its own.

    cache: where remote and compressed shards are kept; the default one if not given.
    """

    def __init__(self, shards: Sequence[str], cache: ShardCache | None = None) -> None:
        self.shards = tuple(shards)
        self.cache = cache
        self._open: dict[int, ShardReader] = {}

    def allocate_images(self, shape: tuple[int, ...]) -> UInt8[Array, "..."]:
        """Memory for the images of a batch."""
        return np.empty(shape, np.uint8)

    def read(self, sample_index: SampleIndex, arrays: tuple[str, ...] = ()) -> Sample:
        """The sample at an index, with the stored arrays of these names.

        Raises:
            BadSample: it cannot be read.
            VlmError: its shard cannot be read.
        """
        return self._reader(sample_index.shard).read(sample_index.number, arrays=arrays)

    def key_and_offset(self, sample_index: SampleIndex) -> tuple[str, int]:
        """Key of a sample and the byte offset of its first part."""
        return self._reader(sample_index.shard).key_and_offset(sample_index.number)

    def _reader(self, shard: int) -> ShardReader:
        # taken out and put back at the end: the dictionary is ordered by last use
        reader = self._open.pop(shard, None)
        if reader is None:  # not by its truth, for which Python would ask for its length
            reader = ShardReader(self.shards[shard], self.cache)
        self._open[shard] = reader
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()
        return reader

    def close(self) -> None:
        """Release the files of the shards; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


@runtime_checkable
class Collator(Protocol[BatchT]):
    """Turns the sample indices of a batch into a batch; runs in the workers.

    Images in memory of `ShardSet.allocate_images` are handed over without a copy.
    """

    @property
    def image_bytes(self) -> int:
        """Bytes of the image of a sample in the batch."""
        ...

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> BatchT:
        """The batch of these samples."""
        ...


def prefetching(shards: Sequence[str], cache: ShardCache | None = None) -> Prefetcher | nullcontext[None]:
    """What fetches the shards needed soon, to be entered; None where all are read where they lie."""
    return Prefetcher(cache, shards) if any(map(needs_cache, shards)) else nullcontext()


def batches_by_threads(
    plan: BatchPlan, shards: Sequence[str], collate: Collator[BatchT], *, numbers: range, threads: int = 1
) -> Iterator[BatchT]:
    """The batches of the given numbers, in order, made in threads while the caller works on the one before.

    For what spends its time where Python's lock is free (decoding, resizing) and needs no process of its own, which
    takes torch and seconds to start. With 0 threads the caller makes them itself.

    Raises:
        UsageError: threads is negative. VlmError: a shard cannot be read.
    """
    if threads < 0:
        raise UsageError(f"workers = {threads}; give 0 or more (with 0 this process reads and decodes).")
    of_thread = threading.local()
    opened: list[ShardSet] = []

    def make(number: int) -> BatchT:
        # each thread opens the shards for itself: a file is read from where it stands
        if not hasattr(of_thread, "shards"):
            of_thread.shards = ShardSet(shards)
            opened.append(of_thread.shards)
        return collate(plan[number], of_thread.shards)

    pending: deque[Future[BatchT]] = deque()
    pool = ThreadPoolExecutor(threads, "batches") if threads else None
    try:
        with prefetching(shards) as prefetcher:
            for number in numbers:
                if prefetcher is not None:
                    prefetcher.request(plan.upcoming_shards(number))
                if pool is None:
                    yield make(number)
                    continue
                pending.append(pool.submit(make, number))
                if len(pending) > threads * _BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        # nothing is begun after the caller has left, or a thread has failed
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for shard_set in opened:
            shard_set.close()


def read_batches(
    plan: BatchPlan,
    shards: Sequence[str],
    collate: Collator[BatchT],
    *,
    numbers: range,
    workers: int,
    as_arrays: bool,
) -> Iterator[BatchT]:
    """The batches of the given numbers, in order, read ahead of a model that is not trained.

    as_arrays: for a model without torch; the workers are threads then, else processes, which torch starts.

    Raises: as of `batches_by_threads` and `stream_batches`.
    """
    if as_arrays:
        return batches_by_threads(plan, shards, collate, numbers=numbers, threads=workers)
    # here, since what is embedded by an ONNX export needs no torch, which takes seconds to load
    from vlm.data.loader import stream_batches

    with_tensors: Any = collate
    return stream_batches(plan, shards, with_tensors, numbers=numbers, workers=workers)


Pixels: TypeAlias = UInt8[Array, "..."] | UInt8[Tensor, "..."]
"""Images as arrays, which a model without torch takes, or as tensors."""


def as_pixels(pixels: UInt8[Array, "..."], *, as_arrays: bool) -> Pixels:
    """The same images as a model takes them, in the same memory."""
    if as_arrays:
        return pixels
    import torch

    return torch.from_numpy(pixels)


@dataclass(frozen=True, kw_only=True)
class SampleFailure:
    """A sample that cannot be used: where it is, its key, the byte offset of its first part in the tar, and why.

    is_replacement: it was not requested itself, but tried in place of another.
    """

    sample_index: SampleIndex
    key: str
    offset: int
    reason: str
    detail: str
    is_replacement: bool = False


def sample_failure(
    sample_index: SampleIndex, error: BadSample, shards: ShardSet, *, is_replacement: bool = False
) -> SampleFailure:
    """The failure that an error makes of a sample."""
    key, offset = shards.key_and_offset(sample_index)
    return SampleFailure(
        sample_index=sample_index,
        key=key,
        offset=offset,
        reason=error.reason,
        detail=error.detail,
        is_replacement=is_replacement,
    )


@dataclass(frozen=True, kw_only=True)
class EvalSample:
    """What evaluation and the catalogue keep of a sample in addition to its image."""

    sample_index: SampleIndex
    key: str
    captions: Captions
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvalBatch:
    """Samples of one shard in file order, for evaluation and embedding.

    images: UInt8 [B, 3, H, W], `Pixels` of the kind that the collator was asked for.
    samples: those that can be read. decoded: those whose image can be decoded too, parallel to `images`; all of them
        if there is no view.
    unread: samples that cannot be read. undecoded: samples whose image cannot be decoded.
    """

    images: Any
    samples: tuple[EvalSample, ...]
    decoded: tuple[EvalSample, ...]
    unread: tuple[SampleFailure, ...]
    undecoded: tuple[SampleFailure, ...]

    def with_images(self, images: Any) -> "EvalBatch":
        """The same batch with other images."""
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class EvalCollator:
    """Each sample with its fixed view, all its captions and its metadata; without a view, no image is decoded.

    as_arrays: images are arrays, for a model without torch.
    """

    view: "EvalTransform | None"
    as_arrays: bool = False

    @property
    def image_bytes(self) -> int:
        """Bytes of an image as the model sees it."""
        return 3 * self.view.size**2 if self.view else 0

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> EvalBatch:
        """Read and decode these samples."""
        images: list[np.ndarray] = []
        samples: list[EvalSample] = []
        decoded: list[EvalSample] = []
        unread: list[SampleFailure] = []
        undecoded: list[SampleFailure] = []
        for sample_index in sample_indices:
            try:
                content = shards.read(sample_index)
            except BadSample as error:
                unread.append(sample_failure(sample_index, error, shards))
                continue
            sample = EvalSample(
                sample_index=sample_index, key=content.key, captions=content.captions, metadata=content.metadata
            )
            samples.append(sample)
            # a sample with a damaged image still has captions to embed
            try:
                if self.view is not None:
                    images.append(self.view(content.image))
                decoded.append(sample)
            except BadSample as error:
                undecoded.append(sample_failure(sample_index, error, shards))

        size = self.view.size if self.view else 0
        # only now: those that do not decode would leave gaps in the batch's memory
        stacked = shards.allocate_images((len(images), 3, size, size))
        if images:
            np.stack(images, out=stacked)
        return EvalBatch(
            images=as_pixels(stacked, as_arrays=self.as_arrays),
            samples=tuple(samples),
            decoded=tuple(decoded),
            unread=tuple(unread),
            undecoded=tuple(undecoded),
        )
