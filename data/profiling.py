"""A stage and how fast it is alone.

The disk and the indexes, alone: how fast shards are read in order and at random, and their members found.

What a process does to prepare a batch, each part alone: read, decode, view, tokenize; and all of it together.

From the workers to the main process: the hand-over alone, and the whole loader with several numbers of workers.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Literal

import numpy as np
import torch

from vlm.data.collate import AssembleTraining, TrainingBatch
from vlm.data.decode import EncodedPicture, open_picture
from vlm.data.loader import Assemble, ShardSet, stream_batches
from vlm.data.sampler import Address, SampleOrder, TrainingPlan
from vlm.data.samples import CaptionDraw, Sample, SampleChance
from vlm.data.shards import count_samples
from vlm.data.tar import Span, open_index, read_entries
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import RandomView
from vlm.errors import BadSample, UsageError, VlmError
from vlm.storage.remote import identity_of, read_blocks
from vlm.storage.urls import is_remote, local_path, needs_cache

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
"""What one process does, one after the other, to assemble a batch; `stack` puts its views together."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage measured alone, the median of a few repeats.

    rate: samples a second. cores: processor cores it keeps busy; 0 for a stage that waits for other hardware.
    each: whose rate it is; that of a process grows with the workers.
    bytes_rate: bytes a second, where bytes are what it moves.
    """

    name: StageName
    rate: float
    cores: int
    each: Literal["process", "machine"]
    bytes_rate: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LoaderRate:
    """The whole loader with so many workers: samples a second once it runs, and the time to its first batch."""

    workers: int
    rate: float
    first_batch_seconds: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was measured.

    cores: processor cores this process may use. device: what the model runs on, or what there is.
    busy_cores: cores that other work took just before; figures are too low by that.
    shares_cores: the model runs on the same cores as the workers.
    precision: of the model, fp32 or bf16.
    samples: how many were used; unusable: how many of them cannot be read or decoded.
    picture_format: of most of the pictures, as Pillow names it.
    shrink: median of the picture's shorter side / the view's side.
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
        return next((stage.rate for stage in self.stages if stage.name == name), None)


def seconds_of(
    work: Callable[[], object], *, repeats: int = REPEATS, before: Callable[[], object] | None = None
) -> float:
    """Seconds that `work` takes: the median of a few repeats; `before` is called before each and not counted."""
    taken: list[float] = []
    for _ in range(repeats):
        if before is not None:
            before()
        begun = perf_counter()
        work()
        taken.append(perf_counter() - begun)
    return max(median(taken), 1e-9)


_BLOCK_BYTES = 1 << 20
_MOST_BYTES = 256 << 20
_MOST_SHARDS = 8
_PROBES = 256
_MOSTLY = 0.5


def measure_disk(shards: Sequence[str], places: Sequence[tuple[int, int]]) -> list[Stage]:
    """Reading shards in order, and samples at random.

    places: (shard, number) of the samples to read at random, in that order.
    """
    counts = [len(open_index(shard)) for shard in shards[:_MOST_SHARDS]]
    files = [local_path(shard) for shard in shards[:_MOST_SHARDS]]
    read, seconds, note = _in_order(files)
    bytes_a_sample = max(sum(identity_of(file).size for file in files) / max(sum(counts), 1), 1)
    rate = read / seconds
    stages = [
        Stage(name="disk, in order", rate=rate / bytes_a_sample, cores=0, each="machine", bytes_rate=rate, note=note)
    ]
    if all(not needs_cache(shards[shard]) for shard, _ in places):
        stages.append(_at_random(shards, places))
    return stages


def measure_index(shards: Sequence[str]) -> list[Stage]:
    """Finding the members of shards: by going through the tar, and from the cached index."""
    files = [local_path(shard) for shard in shards[:_MOST_SHARDS] if not needs_cache(shard)]
    stages: list[Stage] = []
    if files:
        seconds = seconds_of(lambda: [_scan(shard) for shard in files])
        samples = sum(len(open_index(shard)) for shard in files)
        stages.append(Stage(name="index, scanned", rate=samples / seconds, cores=1, each="process"))
    opened = list(shards[:_MOST_SHARDS])
    samples = sum(len(open_index(shard)) for shard in opened)
    # in a fresh process: this one has them open
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds = pool.submit(seconds_to_open, opened).result()
    return [*stages, Stage(name="index, cached", rate=samples / seconds, cores=1, each="process")]


def seconds_to_open(shards: list[str]) -> float:
    """Seconds to open the indexes of shards for the first time in a process."""
    begun = perf_counter()
    for shard in shards:
        open_index(shard)
    return max(perf_counter() - begun, 1e-9)


def cached_share(path: str) -> float | None:
    """Which share of a file lies in the page cache, from evenly spread probes; None where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    size = os.path.getsize(path)
    probes = np.unique(np.linspace(0, max(size - 1, 0), _PROBES).astype(np.int64)).tolist()
    there = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in probes:
            try:
                there += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                continue
            except OSError:
                return None
    finally:
        os.close(descriptor)
    return there / len(probes)


def _in_order(files: list[str]) -> tuple[int, float, str]:
    """Bytes read, seconds taken, and whose speed that is."""
    if any(map(is_remote, files)):
        begun = perf_counter()
        return _read_all(files), perf_counter() - begun, "over the network, past the cache"
    before = cached_share(files[0])
    _drop(files)
    dropped = cached_share(files[0])
    read = min(sum(identity_of(file).size for file in files), _MOST_BYTES)
    seconds = seconds_of(lambda: _read_all(files), before=lambda: _drop(files))
    if before is None or dropped is None:
        return read, seconds, "it is not known what lay in memory"
    if dropped > _MOSTLY:
        return read, seconds, "from memory: it could not be read from the disk itself"
    return read, seconds, f"{before:.0%} lay in memory and was dropped first"


def _read_all(files: list[str]) -> int:
    """Read up to `_MOST_BYTES`; the bytes read."""
    read = 0
    for file in files:
        for block in _blocks(file):
            read += len(block)
            if read >= _MOST_BYTES:
                return read
    return read


def _at_random(shards: Sequence[str], places: Sequence[tuple[int, int]]) -> Stage:
    used = sorted({shard for shard, _ in places})
    files = [local_path(shards[shard]) for shard in used]
    descriptors = {shard: os.open(file, os.O_RDONLY) for shard, file in zip(used, files, strict=True)}
    indexes = {shard: open_index(shards[shard]) for shard in used}
    spans: list[tuple[int, Span]] = []
    for shard, number in places:
        member = indexes[shard][number]
        spans += [(descriptors[shard], span) for span in (member.image, member.text, member.json) if span]

    def read_all() -> None:
        for descriptor, span in spans:
            os.pread(descriptor, span.size, span.offset)

    try:
        seconds = seconds_of(read_all, before=lambda: _drop(files))
        warm = seconds_of(read_all)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return Stage(
        name="disk, at random",
        rate=len(places) / seconds,
        cores=0,
        each="process",
        bytes_rate=sum(span.size for _, span in spans) / seconds,
        note=f"{len(places) / warm:,.0f}/s once in memory",
    )


def _drop(files: list[str]) -> None:
    """Ask the system to forget what it keeps of these files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _scan(shard: str) -> None:
    with open(shard, "rb") as file:
        read_entries(file, shard)


def _blocks(address: str) -> Iterator[bytes]:
    if is_remote(address):
        yield from read_blocks(address, 0, identity_of(address))
        return
    with open(local_path(address), "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured: the first `samples` of the first epoch, whole batches of them."""

    shards: tuple[str, ...]
    view: RandomView
    tokenizer: Tokenizer
    samples: int = 512
    batch_size: int = 64
    draw: CaptionDraw = field(default_factory=CaptionDraw)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.samples < self.batch_size:
            raise UsageError(
                f"samples = {self.samples} must hold a batch at least, batch_size = {self.batch_size} a sample."
            )

    @property
    def num_batches(self) -> int:
        """Whole batches."""
        return self.samples // self.batch_size

    def plan(self) -> TrainingPlan:
        """Batches as training takes them."""
        counts = tuple(count_samples(list(self.shards), allow_damage=True))
        return TrainingPlan(order=SampleOrder(counts=counts), batch_size=self.batch_size)

    def assemble(self, plan: TrainingPlan) -> AssembleTraining:
        """What a worker does."""
        return AssembleTraining(plan=plan, view=self.view, tokenizer=self.tokenizer, draw=self.draw)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The stages of preparing, and what the samples are like (see `Diagnosis`)."""

    stages: tuple[Stage, ...]
    unusable: int
    picture_format: str
    shrink: float


def measure_preparing(trial: Trial) -> Prepared:
    """Measure reading, decoding, viewing and tokenizing alone, and assembling whole batches, in this process.

    Raises:
        VlmError: none of the samples can be used.
    """
    plan = trial.plan()
    batches = [plan[number] for number in range(trial.num_batches)]
    with one_thread():
        opened = ShardSet(trial.shards)
        usable = _usable(trial, [address for batch in batches for address in batch], opened)
        if not usable:
            raise VlmError(f"None of {trial.num_batches * trial.batch_size:,} samples can be used; see vlm inspect.")
        stages = [_stage("read", len(usable), seconds_of(lambda: [opened.read(address) for address, _ in usable]))]
        samples = [sample for _, sample in usable]
        stages += [*_pictures(trial, samples), _tokens(trial, samples), _stack(trial, samples)]
        assemble = trial.assemble(plan)
        seconds = seconds_of(lambda: [assemble(batch, opened) for batch in batches])
        stages.append(_stage("assemble", trial.num_batches * trial.batch_size, seconds))
    pictures = [EncodedPicture(sample.image) for sample in samples]
    formats = Counter(open_picture(sample.image).format or "unknown" for sample in samples)
    return Prepared(
        stages=tuple(stages),
        unusable=trial.num_batches * trial.batch_size - len(usable),
        picture_format=formats.most_common(1)[0][0],
        shrink=median(min(picture.width, picture.height) for picture in pictures) / trial.view.size,
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


def _usable(trial: Trial, addresses: Sequence[Address], opened: ShardSet) -> list[tuple[Address, Sample]]:
    found: list[tuple[Address, Sample]] = []
    for address in addresses:
        try:
            sample = opened.read(address)
            trial.draw(sample, SampleChance(0, 0, sample.key))
            trial.view(sample.image, SampleChance(0, 0, sample.key))
        except BadSample:
            continue
        found.append((address, sample))
    return found


def _pictures(trial: Trial, samples: list[Sample]) -> list[Stage]:
    size = trial.view.size

    def decode() -> None:
        for sample in samples:
            picture = EncodedPicture(sample.image)
            picture.pixels(resolution=min(1.0, size / min(picture.width, picture.height)))

    def view() -> None:
        for sample in samples:
            trial.view(sample.image, SampleChance(0, 0, sample.key))

    decoding = seconds_of(decode)
    # noise may make the whole shorter than its part
    viewing = max(seconds_of(view) - decoding, decoding / 100)
    return [_stage("decode", len(samples), decoding), _stage("view", len(samples), viewing)]


def _tokens(trial: Trial, samples: list[Sample]) -> Stage:
    captions = [trial.draw(sample, SampleChance(0, 0, sample.key)).text for sample in samples]
    parts = [captions[first : first + trial.batch_size] for first in range(0, len(captions), trial.batch_size)]
    return _stage("tokenize", len(samples), seconds_of(lambda: [trial.tokenizer.encode(part) for part in parts]))


def _stack(trial: Trial, samples: list[Sample]) -> Stage:
    views = [trial.view(sample.image, SampleChance(0, 0, sample.key)) for sample in samples[: trial.batch_size]]
    return _stage("stack", len(views), seconds_of(lambda: np.stack(views)))


def _stage(name: StageName, samples: int, seconds: float) -> Stage:
    return Stage(name=name, rate=samples / seconds, cores=1, each="process")


_ROUNDS = 4
_HANDED_OVER_BYTES = 512 << 20
_MOST_HANDED_OVER = 256


@dataclass(frozen=True)
class _Again:
    """The same few batches over and over."""

    plan: TrainingPlan
    batches: int

    @property
    def largest(self) -> int:
        return self.plan.largest

    def __getitem__(self, number: int) -> list[Address]:
        return self.plan[number % self.batches]

    def shards_from(self, number: int) -> list[int]:
        return self.plan.shards_from(number % self.batches)


@dataclass(frozen=True)
class _Ready:
    """Gives a batch that is ready, copied into the memory it is handed over in."""

    batch: TrainingBatch

    @property
    def image_bytes(self) -> int:
        return self.batch.images[0].numel()

    def __call__(self, addresses: list[Address], shards: ShardSet) -> TrainingBatch:
        images = shards.new_images(tuple(self.batch.images.shape))
        images[:] = self.batch.images.numpy()
        return replace(self.batch, images=torch.from_numpy(images), tokens=self.batch.tokens.clone())


def measure_hand_over(trial: Trial) -> Stage:
    """One worker that does nothing but hand over a batch that is ready."""
    plan = trial.plan()
    with one_thread():
        batch = trial.assemble(plan)(plan[0], ShardSet(trial.shards))
    size = batch.images.numel() + batch.tokens.numel() * batch.tokens.element_size()
    number = min(max(_HANDED_OVER_BYTES // size, 16), _MOST_HANDED_OVER)
    rate = _steady_rate(trial, _Ready(batch), workers=1, batches=number).rate
    return Stage(
        name="hand-over",
        rate=rate,
        cores=1,
        each="process",
        bytes_rate=rate * size / trial.batch_size,
        note=f"{size / 1e6:.1f} MB a batch",
    )


def measure_loader(trial: Trial, workers: Sequence[int]) -> list[LoaderRate]:
    """The whole loader with each number of workers, for as many batches as give each worker a few."""
    assemble = trial.assemble(trial.plan())
    return [
        _steady_rate(trial, assemble, workers=number, batches=max(trial.num_batches, _ROUNDS * max(number, 1)))
        for number in workers
    ]


def _steady_rate(trial: Trial, assemble: Assemble[TrainingBatch], *, workers: int, batches: int) -> LoaderRate:
    """Samples a second from the batch on with which every worker has given one."""
    warm = max(workers, 1)
    plan = _Again(trial.plan(), trial.num_batches)
    with one_thread(), warnings.catch_warnings():
        begun = perf_counter()
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        stream = stream_batches(plan, trial.shards, assemble, numbers=range(warm + batches), workers=workers)
        times = [perf_counter() for _ in _each(stream)]
    return LoaderRate(
        workers=workers,
        rate=batches * trial.batch_size / max(times[-1] - times[warm - 1], 1e-9),
        first_batch_seconds=times[0] - begun,
    )


def _each(stream: Iterator[TrainingBatch]) -> Iterator[None]:
    for _ in stream:
        yield None
