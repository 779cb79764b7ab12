"""Profiling the input pipeline: each stage between the disk and the model measured alone, then the loader as a whole.

Bottom up: the disk and the indexes; what one process does to prepare a batch (read, decode, view, tokenize, stack);
the transfer from a worker to the main process; the loader with several numbers of workers; and `profile_pipeline`,
which measures all of it. What the figures mean is for `vlm.data.bottleneck_report` to say.
"""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Literal

import numpy as np
import psutil
import torch

from vlm.console import pluralize
from vlm.data.caption_sampler import CaptionSampler
from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.decode import EncodedImage, open_image
from vlm.data.loader import WORKER_THREADS, stream_batches
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.samples import Sample, SampleIndex, SampleRng
from vlm.data.shards import Collator, ShardSet, count_samples
from vlm.data.tar import Span, TarIndex, open_index
from vlm.data.tar_entries import TarEntries
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import BadSample, UsageError, VlmError
from vlm.storage import file_identity, is_remote, local_path, needs_cache, read_blocks

logger = logging.getLogger(__name__)

REPEATS = 3

StageName = Literal[
    "disk, in order",
    "disk, at random",
    "index, scanned",
    "index, cached",
    "read",
    "decode",
    "view",
    "tokenize",
    "stack",
    "assemble",
    "hand-over",
    "copy to device",
    "model, forward",
    "model, forward and backward",
]

PARTS: tuple[StageName, ...] = ("read", "decode", "view", "tokenize", "stack")
"""What one process does in turn to make a batch; `stack` joins its views."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage measured alone, the median of a few repeats.

    rate: samples a second. cores: processor cores it keeps busy; 0 for a stage that waits for other hardware.
    each: whose rate it is; that of a process grows with the workers.
    bytes_rate: bytes a second, for stages that move bytes.
    """

    name: StageName
    rate: float
    cores: int
    each: Literal["process", "machine"]
    bytes_rate: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LoaderRate:
    """The whole loader with so many workers: samples a second in steady state, and the time to its first batch."""

    workers: int
    rate: float
    first_batch_seconds: float


@dataclass(frozen=True, kw_only=True)
class PipelineProfile:
    """All that was measured.

    cores: processor cores this process may use. device: what the model runs on, or what is available.
    busy_cores: cores that other work used just before; the figures are too low by that.
    shares_cores: the model runs on the same cores as the workers.
    precision: of the model, fp32 or bf16.
    samples: how many were used; unusable: how many of them cannot be read or decoded.
    picture_format: of most images, as Pillow names it.
    shrink: median of the image's shorter side / the view's side.
    """

    cores: int
    busy_cores: float
    device: str
    shares_cores: bool
    precision: str
    samples: int
    unusable: int
    batch_size: int
    size: int
    picture_format: str
    shrink: float
    stages: tuple[Stage, ...]
    loader: tuple[LoaderRate, ...]

    def rate(self, name: StageName) -> float | None:
        """Samples a second of a stage; None if it was not measured."""
        for stage in self.stages:
            if stage.name == name:
                return stage.rate
        return None


def seconds_of(
    work: Callable[[], object], *, repeats: int = REPEATS, before: Callable[[], object] | None = None
) -> float:
    """Seconds that `work` takes: the median of a few repeats; `before` is called before each and not timed."""
    durations: list[float] = []
    for _ in range(repeats):
        if before is not None:
            before()
        start = perf_counter()
        work()
        durations.append(perf_counter() - start)
    # rates divide by this: work too short for the clock must not give zero
    return max(median(durations), 1e-9)


_QUIET_SECONDS = 0.5
# bounds of what is read, whatever the size of the shards
_BLOCK_BYTES = 1 << 20
_MAX_BYTES = 256 << 20
_MAX_SHARDS = 8
_PROBES = 256
_MOSTLY_CACHED = 0.5


def measure_disk(shards: Sequence[str], locations: Sequence[tuple[int, int]]) -> list[Stage]:
    """Reading shards in order, and samples at random.

    locations: (shard, number) of the samples to read at random, in that order.
    """
    num_samples = _count_indexed(shards[:_MAX_SHARDS])
    files = list(map(local_path, shards[:_MAX_SHARDS]))
    num_bytes, seconds, note = _measure_sequential_read(files)
    # headers and padding count too: reading in order passes over them
    bytes_a_sample = max(_total_size(files) / max(num_samples, 1), 1)
    rate = num_bytes / seconds
    stages = [
        Stage(name="disk, in order", rate=rate / bytes_a_sample, cores=0, each="machine", bytes_rate=rate, note=note)
    ]
    # offsets are those of the plain tar, which for a remote or compressed shard lies elsewhere, in the cache
    if all(not needs_cache(shards[shard]) for shard, _ in locations):
        stages.append(_measure_random_reads(shards, locations))
    return stages


def measure_index(shards: Sequence[str]) -> list[Stage]:
    """Finding the members of shards: by scanning the tar, and from the cached index."""
    files = [local_path(shard) for shard in shards[:_MAX_SHARDS] if not needs_cache(shard)]
    stages: list[Stage] = []
    if files:
        seconds = seconds_of(lambda: list(map(_scan_headers, files)))
        samples = _count_indexed(files)
        stages.append(Stage(name="index, scanned", rate=samples / seconds, cores=1, each="process"))
    opened = list(shards[:_MAX_SHARDS])
    samples = _count_indexed(opened)
    # in a new process: this one has them open already
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds = pool.submit(seconds_to_open, opened).result()
    return [*stages, Stage(name="index, cached", rate=samples / seconds, cores=1, each="process")]


def _count_indexed(shards: Sequence[str]) -> int:
    return sum(len(open_index(shard)) for shard in shards)


def _total_size(files: Sequence[str]) -> int:
    return sum(file_identity(file).size for file in files)


def seconds_to_open(shards: list[str]) -> float:
    """Seconds to open the indexes of shards for the first time in a process."""
    start = perf_counter()
    for shard in shards:
        open_index(shard)
    return max(perf_counter() - start, 1e-9)


def cached_share(path: str) -> float | None:
    """The share of a file in the page cache, from evenly spaced probes; None where the system does not tell."""
    # RWF_NOWAIT reads only what is in the page cache, so that asking does not change the answer (Linux alone)
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    size = os.path.getsize(path)
    probes = np.unique(np.linspace(0, max(size - 1, 0), _PROBES).astype(np.int64)).tolist()
    num_cached = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in probes:
            try:
                num_cached += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
            except BlockingIOError:  # it would have to be read from the disk
                continue
            except OSError:
                return None
    finally:
        os.close(descriptor)
    return num_cached / len(probes)


def _measure_sequential_read(files: list[str]) -> tuple[int, float, str]:
    """Bytes read, seconds taken, and a note on where the bytes came from."""
    if any(map(is_remote, files)):
        start = perf_counter()
        num_bytes = _read_all(files)
        return num_bytes, perf_counter() - start, "over the network, past the cache"
    # a file in the page cache would give the speed of memory, so it is dropped before each repeat
    before = cached_share(files[0])
    _drop_page_cache(files)
    dropped = cached_share(files[0])
    num_bytes = min(_total_size(files), _MAX_BYTES)
    seconds = seconds_of(lambda: _read_all(files), before=lambda: _drop_page_cache(files))
    if before is None or dropped is None:
        return num_bytes, seconds, "it is not known how much was cached in memory"
    if dropped > _MOSTLY_CACHED:
        return num_bytes, seconds, "from memory: it could not be read from the disk itself"
    return num_bytes, seconds, f"{before:.0%} was cached in memory and was dropped first"


def _read_all(files: list[str]) -> int:
    """Read up to `_MAX_BYTES`; the bytes read."""
    num_bytes = 0
    for file in files:
        for block in _blocks(file):
            num_bytes += len(block)
            if num_bytes >= _MAX_BYTES:
                return num_bytes
    return num_bytes


def _measure_random_reads(shards: Sequence[str], locations: Sequence[tuple[int, int]]) -> Stage:
    needed_shards = sorted({shard for shard, _ in locations})
    files: list[str] = []
    descriptors: dict[int, int] = {}
    indexes: dict[int, TarIndex] = {}
    for shard in needed_shards:
        file = local_path(shards[shard])
        files.append(file)
        descriptors[shard] = os.open(file, os.O_RDONLY)
        indexes[shard] = open_index(shards[shard])

    # looked up before the clock starts: only the reads themselves are timed
    spans: list[tuple[int, Span]] = []
    num_bytes = 0
    for shard, number in locations:
        member = indexes[shard][number]
        for span in (member.image, member.text, member.json):
            if span:
                spans.append((descriptors[shard], span))
                num_bytes += span.size

    # positioned reads, as a worker makes them
    def read_all() -> None:
        for descriptor, span in spans:
            os.pread(descriptor, span.size, span.offset)

    try:
        seconds = seconds_of(read_all, before=lambda: _drop_page_cache(files))
        # the repeats above have just filled the page cache
        cached_seconds = seconds_of(read_all)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return Stage(
        name="disk, at random",
        rate=len(locations) / seconds,
        cores=0,
        each="process",
        bytes_rate=num_bytes / seconds,
        note=f"{len(locations) / cached_seconds:,.0f}/s once in memory",
    )


def _drop_page_cache(files: list[str]) -> None:
    """Ask the system to drop these files from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # advice only: dirty or mapped pages stay, hence the check with cached_share
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _scan_headers(shard: str) -> None:
    with open(shard, "rb") as file:
        for _ in TarEntries(file, shard):
            pass


def _blocks(url: str) -> Iterator[bytes]:
    if is_remote(url):
        yield from read_blocks(url, 0, file_identity(url))
        return
    # unbuffered: the system call is what is measured, not a copy through Python's buffer
    with open(local_path(url), "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


@dataclass(frozen=True, kw_only=True)
class ProfileSetup:
    """What is measured: the first `samples` of the first epoch, in whole batches."""

    shards: tuple[str, ...]
    view: RandomResizedCrop
    tokenizer: Tokenizer
    samples: int = 512
    batch_size: int = 64
    draw: CaptionSampler = field(default_factory=CaptionSampler)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.samples < self.batch_size:
            raise UsageError(
                f"samples = {self.samples} must hold a batch at least, batch_size = {self.batch_size} a sample."
            )

    @property
    def num_batches(self) -> int:
        """The number of whole batches."""
        return self.samples // self.batch_size

    def plan(self) -> BatchSampler:
        """The batches of training."""
        counts = tuple(count_samples(list(self.shards), allow_damage=True))
        return BatchSampler(order=SampleOrder(counts=counts), batch_size=self.batch_size)

    def collate(self, plan: BatchSampler) -> TrainingCollator:
        """The work of a loader's worker."""
        return TrainingCollator(plan=plan, view=self.view, tokenizer=self.tokenizer, draw=self.draw)


@dataclass(frozen=True, kw_only=True)
class PreparationProfile:
    """The stages of preparing a batch, and the properties of the samples (see `PipelineProfile`)."""

    stages: tuple[Stage, ...]
    unusable: int
    picture_format: str
    shrink: float


def measure_preparation(setup: ProfileSetup) -> PreparationProfile:
    """Measure reading, decoding, cropping and tokenizing alone, and making whole batches, in this process.

    Raises:
        VlmError: none of the samples can be used.
    """
    plan = setup.plan()
    batches = [plan[number] for number in range(setup.num_batches)]
    num_samples = setup.num_batches * setup.batch_size
    with one_thread():
        shard_set = ShardSet(setup.shards)
        usable, samples = _read_usable(setup, list(chain.from_iterable(batches)), shard_set)
        if not usable:
            raise VlmError(f"None of {num_samples:,} samples can be used; see vlm inspect.")
        # read once already, so this is from memory: the disk has stages of its own
        read_seconds = seconds_of(lambda: list(map(shard_set.read, usable)))
        stages = [_stage("read", len(usable), read_seconds)]
        stages += [*_measure_images(setup, samples), _measure_tokenizer(setup, samples), _measure_stack(setup, samples)]
        collate = setup.collate(plan)
        # whole batches, unusable samples and their replacements included, as a worker makes them
        seconds = seconds_of(lambda: [collate(batch, shard_set) for batch in batches])
        stages.append(_stage("assemble", num_samples, seconds))

    # how large the images are against the view says whether shrinking them before packing would help
    shorter_sides: list[int] = []
    formats: Counter[str] = Counter()
    for sample in samples:
        image = EncodedImage(sample.image)
        shorter_sides.append(min(image.width, image.height))
        formats[open_image(sample.image).format or "unknown"] += 1
    return PreparationProfile(
        stages=tuple(stages),
        unusable=num_samples - len(usable),
        picture_format=formats.most_common(1)[0][0],
        shrink=median(shorter_sides) / setup.view.size,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_usable(
    setup: ProfileSetup, sample_indices: Sequence[SampleIndex], shard_set: ShardSet
) -> tuple[list[SampleIndex], list[Sample]]:
    """The samples that every later step can use: their indices, and what they hold."""
    usable: list[SampleIndex] = []
    samples: list[Sample] = []
    for sample_index in sample_indices:
        try:
            sample = shard_set.read(sample_index)
            setup.draw(sample, SampleRng(0, 0, sample.key))
            setup.view(sample.image, SampleRng(0, 0, sample.key))
        except BadSample:
            continue
        usable.append(sample_index)
        samples.append(sample)
    return usable, samples


def _measure_images(setup: ProfileSetup, samples: list[Sample]) -> list[Stage]:
    size = setup.view.size

    def decode() -> None:
        for sample in samples:
            image = EncodedImage(sample.image)
            image.pixels(resolution=min(1.0, size / min(image.width, image.height)))

    def view() -> None:
        for sample in samples:
            setup.view(sample.image, SampleRng(0, 0, sample.key))

    decode_seconds = seconds_of(decode)
    # a view includes its decoding; noise may make the whole shorter than its part
    view_seconds = max(seconds_of(view) - decode_seconds, decode_seconds / 100)
    return [_stage("decode", len(samples), decode_seconds), _stage("view", len(samples), view_seconds)]


def _measure_tokenizer(setup: ProfileSetup, samples: list[Sample]) -> Stage:
    captions: list[str] = []
    for sample in samples:
        captions.append(setup.draw(sample, SampleRng(0, 0, sample.key)).text)
    # as a run encodes them: a whole batch in one call
    batches: list[list[str]] = []
    for first in range(0, len(captions), setup.batch_size):
        batches.append(captions[first : first + setup.batch_size])
    seconds = seconds_of(lambda: list(map(setup.tokenizer.encode, batches)))
    return _stage("tokenize", len(samples), seconds)


def _measure_stack(setup: ProfileSetup, samples: list[Sample]) -> Stage:
    views = [setup.view(sample.image, SampleRng(0, 0, sample.key)) for sample in samples[: setup.batch_size]]
    return _stage("stack", len(views), seconds_of(lambda: np.stack(views)))


def _stage(name: StageName, samples: int, seconds: float) -> Stage:
    return Stage(name=name, rate=samples / seconds, cores=1, each="process")


_BATCHES_PER_WORKER = 4
_TRANSFER_BYTES = 512 << 20
_MAX_TRANSFERS = 256


@dataclass(frozen=True)
class _RepeatedBatches:
    """The same few batches over and over, so that a long measurement stays within the samples of the setup."""

    plan: BatchSampler
    num_batches: int

    @property
    def largest_batch(self) -> int:
        return self.plan.largest_batch

    def __getitem__(self, number: int) -> list[SampleIndex]:
        return self.plan[number % self.num_batches]

    def upcoming_shards(self, number: int) -> list[int]:
        return self.plan.upcoming_shards(number % self.num_batches)


@dataclass(frozen=True)
class _ReadyBatch:
    """Returns a finished batch, copied into the memory it is handed over in."""

    batch: TrainingBatch

    @property
    def image_bytes(self) -> int:
        return self.batch.images[0].numel()

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> TrainingBatch:
        # into the shared memory a real worker writes to, whose fresh pages are what a hand-over costs
        images = shards.allocate_images(tuple(self.batch.images.shape))
        images[:] = self.batch.images.numpy()
        return replace(self.batch, images=torch.from_numpy(images), tokens=self.batch.tokens.clone())


def measure_worker_transfer(setup: ProfileSetup) -> Stage:
    """One worker that does nothing but hand over a finished batch."""
    plan = setup.plan()
    with one_thread():
        batch = setup.collate(plan)(plan[0], ShardSet(setup.shards))
    batch_bytes = batch.images.numel() + batch.tokens.numel() * batch.tokens.element_size()
    # by bytes: enough small batches for the clock, and not so many large ones that it takes minutes
    num_batches = min(max(_TRANSFER_BYTES // batch_bytes, 16), _MAX_TRANSFERS)
    rate = _measure_steady_rate(setup, _ReadyBatch(batch), workers=1, num_batches=num_batches).rate
    return Stage(
        name="hand-over",
        rate=rate,
        cores=1,
        each="process",
        bytes_rate=rate * batch_bytes / setup.batch_size,
        note=f"{batch_bytes / 1e6:.1f} MB a batch",
    )


def measure_loader(setup: ProfileSetup, workers: Sequence[int]) -> list[LoaderRate]:
    """The whole loader with each number of workers, for as many batches as give each worker a few."""
    collate = setup.collate(setup.plan())
    rates: list[LoaderRate] = []
    for number in workers:
        num_batches = max(setup.num_batches, _BATCHES_PER_WORKER * max(number, 1))
        rates.append(_measure_steady_rate(setup, collate, workers=number, num_batches=num_batches))
    return rates


def _measure_steady_rate(
    setup: ProfileSetup, collate: Collator[TrainingBatch], *, workers: int, num_batches: int
) -> LoaderRate:
    """Samples a second, from the batch on with which every worker has given one."""
    # starting the workers is no part of the steady rate; it is reported as the time to the first batch
    num_warmup = max(workers, 1)
    plan = _RepeatedBatches(setup.plan(), setup.num_batches)
    with one_thread(), warnings.catch_warnings():
        start = perf_counter()
        # more workers than cores are tried on purpose, to show where more stop helping
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        numbers = range(num_warmup + num_batches)
        times: list[float] = []
        stream = stream_batches(plan, setup.shards, collate, numbers=numbers, workers=workers, threads=WORKER_THREADS)
        for _ in stream:
            times.append(perf_counter())
    return LoaderRate(
        workers=workers,
        rate=num_batches * setup.batch_size / max(times[-1] - times[num_warmup - 1], 1e-9),
        first_batch_seconds=times[0] - start,
    )


def profile_pipeline(
    setup: ProfileSetup,
    workers: Sequence[int],
    *,
    device: str,
    shares_cores: bool,
    precision: str,
    measure_compute: Callable[[TrainingBatch], list[Stage]],
) -> PipelineProfile:
    """Measure each stage from the disk to the model alone, then the loader with each number of workers.

    device, shares_cores, precision: as of `PipelineProfile`. measure_compute: measures copy and model on a batch; the
        model is a layer above this one.

    Raises:
        VlmError: no sample can be used.
    """
    # before anything else: later this process is what keeps the cores busy
    busy_cores = psutil.cpu_percent(interval=_QUIET_SECONDS) / 100 * (psutil.cpu_count() or 1)
    num_samples = setup.num_batches * setup.batch_size
    logger.info(f"Profiling {pluralize(num_samples, 'sample')} of {pluralize(len(setup.shards), 'shard')} …")
    plan = setup.plan()
    locations: list[tuple[int, int]] = []
    for number in range(setup.num_batches):
        for sample_index in plan[number]:
            locations.append((sample_index.shard, sample_index.number))

    # the disk first: every later step leaves shards in the page cache, and not every system drops them
    stages = [*measure_disk(setup.shards, locations), *measure_index(setup.shards)]
    prepared = measure_preparation(setup)
    stages += [*prepared.stages, measure_worker_transfer(setup)]
    loader = measure_loader(setup, workers)
    stages += measure_compute(setup.collate(plan)(plan[0], ShardSet(setup.shards)))
    return PipelineProfile(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        busy_cores=busy_cores,
        device=device,
        shares_cores=shares_cores,
        precision=precision,
        samples=num_samples,
        unusable=prepared.unusable,
        batch_size=setup.batch_size,
        size=setup.view.size,
        picture_format=prepared.picture_format,
        shrink=prepared.shrink,
        stages=tuple(stages),
        loader=tuple(loader),
    )
