"""What a process does to prepare a batch, each part alone: read, decode, view, tokenize; and all of it together."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from vlm.data.captions import CaptionDraw
from vlm.data.decode import EncodedPicture, open_picture
from vlm.data.diagnosis.stages import Stage, StageName, seconds_of
from vlm.data.loader import ShardSet
from vlm.data.order import Address, SampleOrder
from vlm.data.plan import TrainingPlan
from vlm.data.samples import Sample, SampleChance
from vlm.data.shards import count_samples
from vlm.data.tokenizers import Tokenizer
from vlm.data.training_batches import AssembleTraining
from vlm.data.views import RandomView
from vlm.errors import BadSample, UsageError, VlmError


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
