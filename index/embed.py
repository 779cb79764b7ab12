"""The embedding stage: shards through a model into embeddings folders, one part per shard, resumed after a crash.

Which of several processes this one is, and which shards are its own.

From the batches of one shard to the rows of its part: vectors, where they come from, and what had to be left out.

The parts that embeddings folders lack, made in one pass over their shards.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlm.console import progress
from vlm.data.collate import EvalBatch, EvalCollator, EvalSample, SampleFailure
from vlm.data.loader import stream_batches
from vlm.data.sampler import SequentialBatches
from vlm.data.samples import Captions
from vlm.data.selection import Selection
from vlm.data.shards import count_samples, is_remote, shards_fingerprint
from vlm.data.tar import Span, TarIndex, open_index
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings import (
    FLOAT16,
    EmbeddingSpace,
    EmbeddingsWriter,
    Modality,
    Origin,
    SkippedSampleRecord,
    VectorStorage,
    check_compatible,
    exclusive_lock,
    first_mismatch,
    part_name,
    remove_leftovers,
    save_batch_size,
    saved_batch_size,
)
from vlm.index.encoder import Encoder, absolute_spec, check_unit_norm, compile_encoder, find_fastest_batch_size
from vlm.index.ids import UidAssigner
from vlm.manifest import Manifest, is_complete, mark_unfinished, read_manifest
from vlm.tensors import Array, Float32

logger = logging.getLogger(__name__)

# torchrun and accelerate launch set the first; srun sets the second for each process of a step, and only then
_NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class ProcessRank:
    """Process `rank` of `world`; `local_rank` is its number on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def shard_indices(self, count: int) -> range:
        """The numbers below `count` that are this process's: they are the same whatever is done already."""
        return range(self.rank, count, self.world_size)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ProcessRank":
        """As torchrun, accelerate launch or srun started this process; alone where none of them did.

        Raises:
            UsageError: the numbers do not fit together.
        """
        for names in _NAMES:
            if all(name in environment for name in names[:2]):
                told = {name: environment.get(name, environment[names[0]]) for name in names}
                if not all(value.isdecimal() for value in told.values()) or int(told[names[0]]) >= int(told[names[1]]):
                    raise UsageError(f"{told} name no process: {names[0]} counts from 0 to {names[1]} - 1.")
                return cls(*map(int, told.values()))
        return cls()


SINGLE_PROCESS = ProcessRank()


@dataclass(kw_only=True)
class PartBuilder:
    """The rows of the part of shard `number` while they grow, batch by batch."""

    name: str
    shard: str
    number: int
    namer: UidAssigner
    modality: Modality
    vectors: list[Float32[Array, "_ D"]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    incidents: list[SkippedSampleRecord] = field(default_factory=list)

    def add_batch(self, batch: EvalBatch, model: Encoder) -> None:
        """Embed the pictures of a batch, or every caption of its samples.

        Raises:
            VlmError: the model gave a vector that is not of unit length.
        """
        is_image = self.modality == "image"
        for incident in sorted((*batch.unread, *(batch.undecoded if is_image else ())), key=_number):
            self._skip(_number(incident), incident.reason, incident.detail)
        if is_image:
            origins = [self._image_origin(item) for item in batch.decoded]
            embedded = model.embed_images(batch.images) if origins else None
        else:
            origins = [origin for item in batch.samples for origin in self._caption_origins(item)]
            embedded = model.embed_texts([_only_caption(origin.captions) for origin in origins]) if origins else None
        if embedded is not None:
            vectors = embedded.float().numpy()
            check_unit_norm(vectors, [f"{origin.uid} of {origin.shard}" for origin in origins])
            self.vectors.append(vectors)
            self.origins += origins

    def matrix(self, dimension: int) -> Float32[Array, "N D"]:
        """All vectors so far."""
        return np.concatenate([np.zeros((0, dimension), np.float32), *self.vectors])

    @cached_property
    def _index(self) -> TarIndex:
        return open_index(self.shard)

    def _image_origin(self, item: EvalSample) -> Origin:
        place = self._index[item.sample_index.number].image or Span(0, 0)
        return Origin(
            uid=self.namer.name(self.number, item.sample_index.number, item.key),
            key=item.key,
            shard=self.shard,
            number=item.sample_index.number,
            image_offset=place.offset,
            image_size=place.size,
            caption_number=None,
            captions=item.captions,
            metadata=item.metadata,
        )

    def _caption_origins(self, item: EvalSample) -> Iterator[Origin]:
        image, count = self._image_origin(item), 0
        for language, texts in item.captions.items():
            for text in texts:
                uid = self.namer.name(self.number, item.sample_index.number, item.key, count)
                yield replace(image, uid=uid, caption_number=count, captions={language: (text,)})
                count += 1
        if not count:
            self._skip(item.sample_index.number, "no caption", "a text embedding needs one")

    def _skip(self, number: int, reason: str, detail: str) -> None:
        key = self._index[number].key
        self.incidents.append(
            SkippedSampleRecord(part=self.name, shard=self.shard, number=number, key=key, reason=reason, detail=detail)
        )


def _number(incident: SampleFailure) -> int:
    return incident.sample_index.number


def _only_caption(captions: Captions) -> str:
    ((text,),) = captions.values()
    return text


@dataclass(kw_only=True)
class OutputFolder:
    """A folder to fill. writer: None where it was complete. manifest: once it is whole. new_rows: written by us."""

    path: Path
    space: EmbeddingSpace
    writer: EmbeddingsWriter | None
    manifest: Manifest | None = None
    new_rows: int = 0

    def is_missing(self, number: int) -> bool:
        """Whether a part is not there, or not as it was written."""
        return self.writer is not None and self.writer.part(number, verify=True) is None

    def add(self, rows: PartBuilder) -> None:
        """Write a part."""
        assert self.writer is not None
        vectors = rows.matrix(self.space.dimension)
        self.writer.add(rows.shard, vectors, rows.origins, rows.incidents, number=rows.number)
        self.new_rows += len(rows.origins)


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbedJob:
    """A way through shards. counts: samples of each. times: of a selection (`ShardPlan`)."""

    shards: Sequence[str]
    counts: Sequence[int]
    times: Sequence[np.ndarray] | None
    batch_size: int
    workers: int
    is_compiled: bool

    def write_missing(self, model: Encoder, targets: Sequence[OutputFolder], numbers: range) -> None:
        """Write those parts of these numbers that are missing; what is finished stays whatever happens then.

        Raises:
            VlmError: a shard cannot be read, a vector is not of unit length, or a batch does not fit into memory.
        """
        missing = {number: [target for target in targets if target.is_missing(number)] for number in numbers}
        missing = {number: outputs for number, outputs in missing.items() if outputs}
        if not missing:
            return
        has_images = any(target.space.modality == "image" for outputs in missing.values() for target in outputs)
        try:
            if has_images and self.is_compiled:
                model = compile_encoder(model, self.batch_size)
            self._write(model, missing, all_numbers=numbers, has_images=has_images)
        except torch.OutOfMemoryError as error:
            raise VlmError(
                f"A batch of {self.batch_size} does not fit into memory; finished parts are kept: repeat with a "
                "smaller --batch-size."
            ) from error

    def _write(
        self, model: Encoder, missing: dict[int, list[OutputFolder]], *, all_numbers: range, has_images: bool
    ) -> None:
        plan, namer = self._plan(missing), UidAssigner(self.shards)
        shards = [self.shards[number] for number in missing]
        collate = EvalCollator(view=model.view if has_images else None)
        stream = stream_batches(plan, shards, collate, numbers=range(len(plan)), workers=self.workers)
        total, pending = sum(self._plan(all_numbers).samples_per_shard), None
        with (
            progress(total=total, done=total - sum(plan.samples_per_shard), what="embed", unit=" samples") as shown,
            ThreadPoolExecutor(1) as pool,
        ):
            for (number, targets), kept in zip(missing.items(), plan.samples_per_shard, strict=True):
                builders = [(target, self._rows(number, target, namer)) for target in targets]
                for batch in islice(stream, -(-kept // self.batch_size)):
                    for _, rows in builders:
                        rows.add_batch(batch, model)
                    shown.update(len(batch.samples) + len(batch.unread))
                if pending:
                    pending.result()
                pending = pool.submit(_add, builders)  # written while the next part is embedded
            if pending:
                pending.result()

    def _rows(self, number: int, target: OutputFolder, namer: UidAssigner) -> PartBuilder:
        return PartBuilder(
            name=part_name(number),
            shard=self.shards[number],
            number=number,
            namer=namer,
            modality=target.space.modality,
        )

    def _plan(self, numbers: Iterable[int]) -> SequentialBatches:
        chosen = list(numbers)
        times = None if self.times is None else [self.times[number] for number in chosen]
        return SequentialBatches(
            counts=[self.counts[number] for number in chosen], batch_size=self.batch_size, times=times
        )


def _add(builders: list[tuple[OutputFolder, PartBuilder]]) -> None:
    for target, rows in builders:
        target.add(rows)


BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How shards are embedded.

    model_spec: what the model was loaded from; kept absolute, so that a search finds it again.
    batch_size: samples at once; auto tries which is fastest and keeps to it when the work goes on after a crash.
    workers: processes that read and decode ahead of the model; with 0, reading and the model take turns.
    allow_damage: embed what lies before the damage of a tar cut short.
    selection: embed only the samples it names, each once.
    is_compiled: let torch compile the model for pictures.
    precision: what the model computes in, fp32 or bf16; rows of both do not come into one folder.
    share: which of several processes that fill the folders together this one is.
    """

    model_spec: str
    batch_size: int | Literal["auto"] = BATCH_SIZE
    workers: int = 0
    allow_damage: bool = False
    selection: Selection | None = None
    storage: VectorStorage = FLOAT16
    is_compiled: bool = False
    precision: str = "fp32"
    share: ProcessRank = SINGLE_PROCESS

    def __post_init__(self) -> None:
        """Refuse what cannot be, before a folder is begun."""
        if self.batch_size != "auto" and self.batch_size < 1:
            raise UsageError(f"batch_size = {self.batch_size}; one sample at once is the least.")
        if self.workers < 0:
            raise UsageError(f"workers = {self.workers}; 0 is the least: reading and the model take turns then.")


@dataclass(frozen=True, kw_only=True)
class EmbedSummary:
    """What the folder holds, and what this call did: `new_rows` in `seconds`.

    bad: samples left out, named in `incidents.jsonl`. incidents: how many for which reason.
    missing_parts: what other processes have still to write; 0 when the folder is whole.
    was_complete: there was nothing left to do. ended_here: of several processes, this one wrote the last manifest.
    """

    folder: str
    modality: Modality
    dimension: int
    parts: int
    rows: int
    bad: int
    incidents: dict[str, int]
    missing_parts: int
    new_rows: int
    seconds: float
    was_complete: bool
    ended_here: bool


def embed_into(
    model: Encoder, shards: Sequence[str], folders: Mapping[Modality, Path], options: EmbedOptions
) -> dict[Modality, EmbedSummary]:
    """Embed the shards into a folder for each modality, reading every sample once.

    Killed at any moment and repeated with the same batch size, by any number of processes, it leaves the files of an
    uninterrupted run; repeated when complete, it makes again what is damaged. Of several processes, each writes the
    parts of its own shards; the one that finds all parts there ends the work.

    Args:
        shards: addresses as `expand_shards` gives them.

    Raises:
        UsageError: a folder holds something else, or the work of another model or of other shards.
        VlmError: a shard is damaged, a vector is not of unit length, memory is short, or not one sample can be used.
    """
    started, addresses = time.perf_counter(), [_absolute(shard) for shard in shards]
    inputs = {"model": model.fingerprint, "shards": shards_fingerprint(addresses)}
    counts = count_samples(addresses, allow_damage=options.allow_damage)
    times = options.selection.times_of(addresses) if options.selection else None
    inputs["selection"] = options.selection.fingerprint if options.selection else ""
    if options.is_compiled and "image" not in folders:
        raise UsageError("Only the model's part for pictures is compiled; leave --compile out for texts.")
    targets = [_open(model, path, modality, addresses, inputs, options) for modality, path in folders.items()]
    ended = False
    if unfinished := [target for target in targets if target.writer]:
        batch_size = _batch_size(model, targets, options, largest=max(counts))
        job = EmbedJob(
            shards=addresses,
            counts=counts,
            times=times,
            batch_size=batch_size,
            workers=options.workers,
            is_compiled=options.is_compiled,
        )
        job.write_missing(model, unfinished, options.share.shard_indices(len(addresses)))
        ended = _finish(unfinished, inputs, {"shards": addresses, "batch_size": batch_size})
    ended_here = bool(unfinished) and ended and all(target.manifest for target in targets)
    seconds = time.perf_counter() - started
    return {
        target.space.modality: _summary(target, len(addresses), seconds, ended_here=ended_here) for target in targets
    }


def _absolute(shard: str) -> str:
    """The address from anywhere; a link to a tar stays a link, because its target need not be named `.tar`."""
    path = Path(shard)
    return shard if is_remote(shard) else str(path.parent.resolve() / path.name)


def _open(
    model: Encoder,
    path: Path,
    modality: Modality,
    addresses: list[str],
    inputs: dict[str, str],
    options: EmbedOptions,
) -> OutputFolder:
    identity: dict[str, Any] = {"modality": modality, **inputs, "addresses": addresses, **asdict(options.storage)}
    identity["precision"] = options.precision
    spec, size = absolute_spec(options.model_spec), model.embedding_size
    space = EmbeddingSpace(model=spec, fingerprint=model.fingerprint, dimension=size, modality=modality)
    if not is_complete(path):
        try:
            writer = EmbeddingsWriter(path, space=space, identity=identity, storage=options.storage)
            return OutputFolder(path=path, space=space, writer=writer)
        except UsageError:
            if not is_complete(path):  # else another process finished it just now
                raise
    manifest = check_compatible(path, identity)
    if fault := first_mismatch(path, manifest.files, verify=True):
        logger.info(f"{path} was complete: {fault}. The damaged parts are made again.")
        _reopen(path, identity)
        return _open(model, path, modality, addresses, inputs, options)
    remove_leftovers(path)
    logger.info(f"{path} is complete already: {manifest.counts['rows']:,} rows of this model and these shards.")
    return OutputFolder(path=path, space=space, writer=None, manifest=manifest)


def _reopen(path: Path, identity: dict[str, Any]) -> None:
    """Make a complete but damaged folder unfinished, unless another process does so or has mended it already."""
    with exclusive_lock(path):
        if is_complete(path):
            manifest = check_compatible(path, identity)
            if first_mismatch(path, manifest.files, verify=True):
                save_batch_size(path, manifest.details["batch_size"])
                mark_unfinished(path, kind="embeddings", configuration=identity)


def _batch_size(model: Encoder, targets: Sequence[OutputFolder], options: EmbedOptions, *, largest: int) -> int:
    if options.batch_size != "auto":
        return options.batch_size
    if all(target.space.modality == "text" for target in targets):
        return BATCH_SIZE
    finished = [target.manifest.details["batch_size"] for target in targets if target.manifest]
    unfinished = [target.path for target in targets if target.writer]
    with exclusive_lock(unfinished[0]):
        known = [*finished, *filter(None, map(saved_batch_size, unfinished))]
        size = known[0] if known else find_fastest_batch_size(model, largest=largest)
        for path in unfinished:
            save_batch_size(path, size)
    return size


def _finish(targets: Sequence[OutputFolder], inputs: dict[str, str], details: dict[str, Any]) -> bool:
    """Write the manifests of those that have all parts; whether one was still to be written.

    One process at a time does so in all of its folders, so that exactly one finds that it wrote the last.
    """
    wrote = False
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(exclusive_lock(target.path))
        for target in targets:
            assert target.writer is not None
            if all(target.writer.part(number) for number in range(len(details["shards"]))):
                wrote |= target.writer.end(inputs=inputs, details=details)
                target.manifest = read_manifest(target.path, "embeddings")
    return wrote


def _summary(target: OutputFolder, num_parts: int, seconds: float, *, ended_here: bool) -> EmbedSummary:
    if target.manifest is not None:
        counts, incidents = target.manifest.counts, target.manifest.details.get("incidents", {})
    else:
        assert target.writer is not None
        there = [part for number in range(num_parts) if (part := target.writer.part(number))]
        rows, bad = sum(part.rows for part in there), sum(part.bad for part in there)
        counts, incidents = {"rows": rows, "bad": bad, "parts": len(there)}, {}
    return EmbedSummary(
        folder=str(target.path),
        modality=target.space.modality,
        dimension=target.space.dimension,
        incidents=incidents,
        missing_parts=num_parts - counts["parts"],
        new_rows=target.new_rows,
        seconds=seconds,
        was_complete=target.writer is None,
        ended_here=ended_here,
        **counts,
    )
