"""Embed shards: samples through a model into embeddings folders, one part per shard, resumed after a crash.

`embed_into` is the whole way: open the folders, see which parts are missing, read the shards of these parts batch by
batch, embed each batch into rows of every folder, write each part when its shard ends, and write the manifests when all
parts exist. A part is whole or absent, so a killed run loses at most the part it was in; several processes share the
work by taking turns over the shards, or, on a Ray cluster (`ray_parts.py`), take a shard whenever they are free.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from vlm.console import progress
from vlm.data.sampler import SequentialBatches
from vlm.data.samples import Captions
from vlm.data.selection import Selection
from vlm.data.shards import (
    EvalBatch,
    EvalCollator,
    EvalSample,
    absolute_shard,
    count_samples,
    read_batches,
    shards_fingerprint,
)
from vlm.data.tar import Span, TarIndex, open_index
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import (
    FLOAT16,
    EmbeddingSpace,
    EmbeddingsWriter,
    Modality,
    Origin,
    SkippedSampleRecord,
    VectorStorage,
    check_compatible,
    check_unit_norm,
    exclusive_lock,
    part_name,
    remove_leftovers,
    save_batch_size,
    saved_batch_size,
)
from vlm.index.encoder import AnyEncoder, compile_encoder, find_fastest_batch_size, is_out_of_memory
from vlm.index.ids import UidAssigner
from vlm.manifest import (
    Manifest,
    first_mismatch,
    is_complete,
    mark_unfinished,
    read_manifest,
    recorded_configuration,
)
from vlm.model_spec import absolute_spec
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.results import Result
from vlm.tensor_types import Array, Float32

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# torchrun and accelerate launch set the first; srun sets the second for each process of a step, and only there
_RANK_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class ProcessRank:
    """Process `rank` of `world_size`; `local_rank` is its number on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def shard_indices(self, count: int) -> range:
        """The shards of `count` that this process embeds: the same ones, whatever is finished already."""
        # dealt in turn, since neighbouring shards are often of like size and kind
        return range(self.rank, count, self.world_size)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ProcessRank":
        """As torchrun, accelerate launch or srun started this process; alone if none of them did.

        Raises:
            UsageError: the numbers do not fit together.
        """
        for rank, world_size, local_rank in _RANK_VARIABLES:
            if rank not in environment or world_size not in environment:
                continue
            values = {rank: environment[rank], world_size: environment[world_size]}
            # a launcher that says nothing of machines has one, where both numbers are the same
            values[local_rank] = environment.get(local_rank, environment[rank])
            are_numbers = all(map(str.isdecimal, values.values()))
            if not are_numbers or int(values[rank]) >= int(values[world_size]):
                raise UsageError(f"{values} are not a rank: {rank} counts from 0 to {world_size} - 1.")
            return cls(int(values[rank]), int(values[world_size]), int(values[local_rank]))
        return cls()


SINGLE_PROCESS = ProcessRank()


BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How shards are embedded.

    model_spec: what the model was loaded from; stored as an absolute path, so that a search finds it again.
    batch_size: auto tries which is fastest, and keeps it when the work is resumed.
    workers: that read and decode ahead of the model, processes for torch and threads for an ONNX export; with 0,
        reading and the model take turns.
    allow_damage: embed what precedes the damage of a truncated tar.
    selection: embed only the samples it names, each once.
    is_compiled: let torch compile the image tower.
    precision: what the model computes in, fp32 or bf16; a folder holds rows of one only.
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
        """Refuse numbers out of range before a folder is begun."""
        if self.batch_size != "auto" and self.batch_size < 1:
            raise UsageError(f"batch_size = {self.batch_size} is out of range: it must be at least 1.")
        if self.workers < 0:
            raise UsageError(f"workers = {self.workers}; 0 is the least: reading and the model take turns then.")


@dataclass(frozen=True, kw_only=True)
class EmbedSummary(Result):
    """What a folder holds, and what this call did: `new_rows` in `seconds`.

    bad: skipped samples, listed in `incidents.jsonl`. incidents: their number by reason.
    missing_parts: what other processes still have to write; 0 when the folder is complete.
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
    model: AnyEncoder, shards: Sequence[str], folders: Mapping[Modality, Path], options: EmbedOptions
) -> dict[Modality, EmbedSummary]:
    """Embed the shards into a folder for each modality, reading every sample once.

    Killed at any moment and repeated with the same batch size, by any number of processes, it leaves the files of an
    uninterrupted run; repeated when complete, it makes damaged files again. Of several processes each writes the parts
    of its own shards; the one that finds all parts finished writes the manifests.

    Args:
        shards: addresses as from `expand_shards`.

    Raises:
        UsageError: a folder holds something else, or the work of another model or of other shards.
        VlmError: a shard is damaged, a vector is not of unit length, out of memory, or no sample can be used.
    """
    started = time.perf_counter()
    embedder = ShardEmbedder(model, EmbedPlan.make(model, shards, folders, options))
    embedder.write_missing_parts(options.share.shard_indices(len(shards)))
    return embedder.finish(seconds=time.perf_counter() - started)


EmbeddingBackend = Literal["torch", "onnx", "onnx-int8"]
"""What made rows: their last bits depend on it, of int8 more than those."""


def backend_of(model: AnyEncoder) -> EmbeddingBackend:
    """What a model computes by."""
    if not isinstance(model, OnnxEncoder):
        return "torch"
    return "onnx" if model.export.details.precision == "float32" else "onnx-int8"


@dataclass(frozen=True, kw_only=True)
class EmbedPlan:
    """What is embedded into which folders; travels by pickle, so that only one process reads all indexes of shards.

    shards: absolute addresses. counts: samples of each. inputs: fingerprints that decide over the rows; a folder begun
    with other ones is refused. assigner: of the uids; made from the indexes where it is needed, unless it travels too.
    """

    shards: list[str]
    counts: list[int]
    inputs: dict[str, str]
    folders: Mapping[Modality, Path]
    options: EmbedOptions
    assigner: UidAssigner | None = None

    @classmethod
    def make(
        cls, model: AnyEncoder, shards: Sequence[str], folders: Mapping[Modality, Path], options: EmbedOptions
    ) -> "EmbedPlan":
        """Read the shards' indexes; nothing is written."""
        if options.is_compiled and "image" not in folders:
            raise UsageError("Only the image tower can be compiled; leave --compile out for texts.")
        if options.is_compiled and isinstance(model, OnnxEncoder):
            raise UsageError("An ONNX export is not compiled: leave --compile out, or embed with --backend torch.")
        addresses = list(map(absolute_shard, shards))
        # before a folder is begun: a shard that is missing leaves nothing behind
        counts = count_samples(addresses, allow_damage=options.allow_damage)
        inputs = {
            "model": model.fingerprint,
            "shards": shards_fingerprint(addresses),
            "selection": options.selection.fingerprint if options.selection else "",
        }
        return cls(shards=addresses, counts=counts, inputs=inputs, folders=folders, options=options)


@dataclass(kw_only=True)
class _Output:
    """A folder to fill. writer: None if it was complete. manifest: once it is complete. new_rows: written by us."""

    path: Path
    space: EmbeddingSpace
    writer: EmbeddingsWriter | None
    manifest: Manifest | None = None
    new_rows: int = 0

    def is_missing(self, number: int) -> bool:
        """Whether a part is missing or damaged."""
        return self.writer is not None and self.writer.part(number, verify=True) is None

    def write_part(self, part: "_PartRows") -> None:
        """Write a part."""
        assert self.writer is not None
        vectors = part.matrix(self.space.dimension)
        self.writer.add(part.shard, vectors, part.origins, part.skipped, number=part.number)
        self.new_rows += len(part.origins)


def find_complete(
    model: AnyEncoder, shards: Sequence[str], folders: Mapping[Modality, Path], options: EmbedOptions
) -> dict[Modality, EmbedSummary] | None:
    """What folders hold that are complete already, whichever backend made their rows; None where one is not whole.

    model: only its fingerprint and size are asked for.

    Raises:
        UsageError: a folder holds something else, or the work of another model or of other shards.
    """
    started = time.perf_counter()
    plan = EmbedPlan.make(model, shards, folders, options)
    outputs: list[_Output] = []
    for modality, path in folders.items():
        if not is_complete(path):
            return None
        backend = recorded_configuration(path).get("backend", "torch")
        output = _open_complete(path, _space(model, plan, modality), _identity(plan, modality, backend))
        if output is None:
            return None
        outputs.append(output)
    seconds = time.perf_counter() - started
    return {output.space.modality: _summary(output, len(shards), seconds, ended_here=False) for output in outputs}


def _open_output(model: AnyEncoder, plan: EmbedPlan, modality: Modality) -> _Output:
    """Begin or resume a folder, or open a complete one; a complete but damaged one is resumed."""
    path = plan.folders[modality]
    space = _space(model, plan, modality)
    identity = _identity(plan, modality, backend_of(model))
    if not is_complete(path):
        _as_earlier_versions(path, identity)
        try:
            writer = EmbeddingsWriter(path, space=space, identity=identity, storage=plan.options.storage)
            return _Output(path=path, space=space, writer=writer)
        except UsageError:
            # unless another process has finished it just now
            if not is_complete(path):
                raise
    if output := _open_complete(path, space, identity):
        return output
    _reopen(path, identity)
    # unfinished now, or complete again where another process repaired it meanwhile
    return _open_output(model, plan, modality)


def _space(model: AnyEncoder, plan: EmbedPlan, modality: Modality) -> EmbeddingSpace:
    return EmbeddingSpace(
        model=absolute_spec(plan.options.model_spec),
        fingerprint=model.fingerprint,
        dimension=model.embedding_size,
        modality=modality,
    )


def _identity(plan: EmbedPlan, modality: Modality, backend: str) -> dict[str, Any]:
    """What the rows of a folder depend on."""
    identity: dict[str, Any] = {"modality": modality, **plan.inputs, "addresses": plan.shards}
    identity |= asdict(plan.options.storage)
    # rows in float32 and bfloat16 differ by more than rounding, those of two backends in their last bits
    return identity | {"precision": plan.options.precision, "backend": backend}


def _open_complete(path: Path, space: EmbeddingSpace, identity: dict[str, Any]) -> _Output | None:
    """Open a complete folder; None where a file of it is missing or damaged."""
    manifest = check_compatible(path, identity)
    if first_mismatch(path, manifest.files, verify=True):
        return None
    remove_leftovers(path)
    logger.info(f"{path} is complete already: {manifest.counts['rows']:,} rows of this model and these shards.")
    return _Output(path=path, space=space, writer=None, manifest=manifest)


def _as_earlier_versions(path: Path, identity: dict[str, Any]) -> None:
    """Give an identity the form of unfinished work from before backends were noted, where its rows are made alike.

    Raises:
        UsageError: they are not.
    """
    begun = recorded_configuration(path)
    if "modality" not in begun or "backend" in begun or identity["backend"] != "torch":
        return
    if identity["modality"] == "text":
        raise UsageError(
            f"{path} was begun by an earlier version, which embedded captions in another order, so that rows differ in "
            "their last bits: remove it, or name another folder, and embed the captions anew."
        )
    del identity["backend"]


def _reopen(path: Path, identity: dict[str, Any]) -> None:
    """Mark a complete but damaged folder unfinished, unless another process does so or has repaired it already."""
    with exclusive_lock(path):
        if not is_complete(path):
            return
        manifest = check_compatible(path, identity)
        if fault := first_mismatch(path, manifest.files, verify=True):
            logger.info(f"{path} was complete: {fault}. The damaged parts are made again.")
            # repaired parts must equal those that were damaged, bit for bit
            save_batch_size(path, manifest.details["batch_size"])
            mark_unfinished(path, kind="embeddings", configuration=identity)


def _choose_batch_size(model: AnyEncoder, outputs: Sequence[_Output], options: EmbedOptions, *, largest: int) -> int:
    """The batch size asked for; for auto the one the work was begun with, else the fastest."""
    if options.batch_size != "auto":
        return options.batch_size
    # sizes are tried with images only
    if all(output.space.modality == "text" for output in outputs):
        return BATCH_SIZE
    used: list[int] = []
    unfinished: list[Path] = []
    for output in outputs:
        if output.manifest:
            used.append(output.manifest.details["batch_size"])
        if output.writer:
            unfinished.append(output.path)
    # the first process decides for all of them
    with exclusive_lock(unfinished[0]):
        for path in unfinished:
            if (size := saved_batch_size(path)) is not None:
                used.append(size)
        # the last bits of a vector depend on its batch, so work that was begun keeps its size
        batch_size = used[0] if used else find_fastest_batch_size(model, largest=largest)
        for path in unfinished:
            save_batch_size(path, batch_size)
    return batch_size


class ShardEmbedder:
    """A model and the folders that its embeddings of the shards of a plan go to, part by part."""

    def __init__(self, model: AnyEncoder, plan: EmbedPlan) -> None:
        """Begin, resume or open the folders.

        Raises:
            UsageError: a folder holds something else, or the work of another model or of other shards.
        """
        self.plan = plan
        self._model = model
        self._is_compiled = False
        self._outputs = [_open_output(model, plan, modality) for modality in plan.folders]
        self._times: dict[int, np.ndarray] = {}

    @cached_property
    def assigner(self) -> UidAssigner:
        """Gives the rows their uids."""
        return self.plan.assigner or UidAssigner.for_shards(self.plan.shards)

    @cached_property
    def _batch_size(self) -> int:
        return _choose_batch_size(self._model, self._outputs, self.plan.options, largest=max(self.plan.counts))

    def missing_parts(self, numbers: Iterable[int]) -> dict[int, list[_Output]]:
        """Of these shards those that lack a part in a folder, and where."""
        missing: dict[int, list[_Output]] = {}
        for number in numbers:
            # with checksums, because what stopped the last run may have damaged a part
            lacking = [output for output in self._outputs if output.is_missing(number)]
            if lacking:
                missing[number] = lacking
        return missing

    def num_samples(self, numbers: Sequence[int]) -> list[int]:
        """Of each of these shards the samples that are embedded: all, or those that the selection names."""
        if (times := self._times_of(numbers)) is not None:
            return [int(np.count_nonzero(times_of_shard)) for times_of_shard in times]
        return [self.plan.counts[number] for number in numbers]

    def _times_of(self, numbers: Sequence[int]) -> list[np.ndarray] | None:
        """How often a selection names each sample of these shards, 0 or 1."""
        if (selection := self.plan.options.selection) is None:
            return None
        # of these alone: finding a shard in the selection takes its index, which a process of a cluster lacks
        unknown = [number for number in numbers if number not in self._times]
        if unknown:
            times = selection.times_of([self.plan.shards[number] for number in unknown])
            self._times |= zip(unknown, times, strict=True)
        return [self._times[number] for number in numbers]

    def write_missing_parts(self, numbers: Sequence[int], *, is_shown: bool = True) -> None:
        """Write the parts of these shards that are missing; finished parts stay, whatever happens then.

        is_shown: draw a progress bar.

        Raises:
            VlmError: a shard cannot be read, a vector is not of unit length, or a batch does not fit into memory.
        """
        missing = self.missing_parts(numbers)
        if not missing:
            return
        lacking = chain.from_iterable(missing.values())
        has_images = any(output.space.modality == "image" for output in lacking)
        total = sum(self.num_samples(numbers))
        done = total - sum(self.num_samples(list(missing)))
        try:
            if has_images and self.plan.options.is_compiled and not self._is_compiled:
                self._model = compile_encoder(self._model, self._batch_size)
                self._is_compiled = True
            with progress(total=total, done=done, what="embed", unit=" samples", is_shown=is_shown) as bar:
                self._embed(missing, bar, has_images=has_images)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise VlmError(
                f"A batch of {self._batch_size} does not fit into memory; finished parts are kept: repeat with a "
                "smaller --batch-size."
            ) from error

    def _embed(self, missing: dict[int, list[_Output]], bar: "tqdm[NoReturn]", *, has_images: bool) -> None:
        """For every missing part: read its batches, embed them into rows, and write the part."""
        shards = self.plan.shards
        # one stream over all missing shards, so that workers read ahead from one into the next
        plan = SequentialBatches(
            counts=[self.plan.counts[number] for number in missing],
            batch_size=self._batch_size,
            times=self._times_of(list(missing)),
        )
        as_arrays = isinstance(self._model, OnnxEncoder)
        batches = read_batches(
            plan,
            [shards[number] for number in missing],
            EvalCollator(view=self._model.view if has_images else None, as_arrays=as_arrays),
            numbers=range(len(plan)),
            workers=self.plan.options.workers,
            as_arrays=as_arrays,
        )
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1) as pool:
            for (number, outputs), num_samples in zip(missing.items(), plan.samples_per_shard, strict=True):
                parts: list[_PartRows] = []
                for output in outputs:
                    parts.append(_PartRows(shards[number], number, self.assigner, output.space.modality))
                for batch in islice(batches, ceil(num_samples / self._batch_size)):
                    for part in parts:
                        part.add_batch(batch, self._model)
                    bar.update(len(batch.samples) + len(batch.unread))
                # a part is written while the next one is embedded, but not two at once
                if writing:
                    writing.result()
                writing = pool.submit(_write_parts, outputs, parts)
            if writing:
                writing.result()

    def count_parts(self, numbers: Iterable[int]) -> None:
        """Count these parts, which other processes wrote for this one, as new."""
        for output in self._outputs:
            for number in numbers:
                if output.writer and (part := output.writer.part(number)):
                    output.new_rows += part.rows

    def finish(self, *, seconds: float) -> dict[Modality, EmbedSummary]:
        """Write the manifests of the folders that have all parts; what each folder holds then.

        seconds: what the work took, for the summaries.
        """
        shards = self.plan.shards
        unfinished = [output for output in self._outputs if output.writer]
        wrote_manifest = False
        if unfinished:
            details = {"shards": shards, "batch_size": self._batch_size}
            wrote_manifest = _finish(unfinished, self.plan.inputs, details)
        ended_here = wrote_manifest and all(output.manifest for output in self._outputs)
        summaries: dict[Modality, EmbedSummary] = {}
        for output in self._outputs:
            summaries[output.space.modality] = _summary(output, len(shards), seconds, ended_here=ended_here)
        return summaries


class _PartRows:
    """The rows of one part while its shard is embedded, batch by batch.

    vectors: a block of each batch. origins: of their rows. skipped: samples that have no embedding.
    """

    def __init__(self, shard: str, number: int, assigner: UidAssigner, modality: Modality) -> None:
        self.shard = shard
        self.number = number
        self._assigner = assigner
        self._modality = modality
        self.vectors: list[Float32[Array, "_ D"]] = []
        self.origins: list[Origin] = []
        self.skipped: list[SkippedSampleRecord] = []

    def add_batch(self, batch: EvalBatch, model: AnyEncoder) -> None:
        """Embed the images of a batch, or every caption of its samples.

        Raises:
            VlmError: the model gave a vector that is not of unit length.
        """
        is_image = self._modality == "image"
        # a text embedding needs no image, so an image that cannot be decoded is none of its failures
        failures = [*batch.unread, *batch.undecoded] if is_image else list(batch.unread)
        for failure in sorted(failures, key=lambda failure: failure.sample_index.number):
            self._skip(failure.sample_index.number, failure.reason, failure.detail)

        origins: list[Origin] = []
        if is_image:
            origins += map(self._image_origin, batch.decoded)
        else:
            for sample in batch.samples:
                origins += self._caption_origins(sample)
        if not origins:
            return
        if is_image:
            vectors = np.asarray(model.embed_images(batch.images))
        else:
            vectors = embed_by_length(model, [_only_caption(origin.captions) for origin in origins])
        check_unit_norm(vectors, [f"{origin.uid} of {origin.shard}" for origin in origins])
        self.vectors.append(vectors)
        self.origins += origins

    def matrix(self, dimension: int) -> Float32[Array, "N D"]:
        """All vectors so far."""
        # a shard without a usable sample has a part too, of no rows
        return np.concatenate([np.zeros((0, dimension), np.float32), *self.vectors])

    @cached_property
    def _index(self) -> TarIndex:
        return open_index(self.shard)

    def _image_origin(self, sample: EvalSample) -> Origin:
        number = sample.sample_index.number
        # texts are embedded of samples without an image too
        image = self._index[number].image or Span(0, 0)
        return Origin(
            uid=self._assigner.name(self.number, number, sample.key),
            key=sample.key,
            shard=self.shard,
            number=number,
            image_offset=image.offset,
            image_size=image.size,
            caption_number=None,
            captions=sample.captions,
            metadata=sample.metadata,
        )

    def _caption_origins(self, sample: EvalSample) -> Iterator[Origin]:
        number = sample.sample_index.number
        image_origin = self._image_origin(sample)
        caption_number = 0
        for language, texts in sample.captions.items():
            for text in texts:
                uid = self._assigner.name(self.number, number, sample.key, caption_number)
                yield replace(image_origin, uid=uid, caption_number=caption_number, captions={language: (text,)})
                caption_number += 1
        if not caption_number:
            self._skip(number, "no caption", "a text embedding needs one")

    def _skip(self, number: int, reason: str, detail: str) -> None:
        self.skipped.append(
            SkippedSampleRecord(
                part=part_name(self.number),
                shard=self.shard,
                number=number,
                key=self._index[number].key,
                reason=reason,
                detail=detail,
            )
        )


# of what torch runs on the CPU: fewer would leave its threads waiting for each other
_TEXTS_AT_ONCE = 64


def embed_by_length(model: AnyEncoder, texts: Sequence[str]) -> Float32[Array, "T D"]:
    """Unit vectors of texts, texts of like length together: a batch takes as long as if all were its longest."""
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), texts[row]))
    # an export has small batches of its own, and a GPU is quickest with large ones
    is_torch_on_cpu = str(getattr(model, "device", "")) == "cpu"
    size = _TEXTS_AT_ONCE if is_torch_on_cpu else len(texts)
    vectors = np.empty((len(texts), model.embedding_size), np.float32)
    for first in range(0, len(texts), size):
        rows = order[first : first + size]
        vectors[rows] = np.asarray(model.embed_texts([texts[row] for row in rows]))
    return vectors


def _only_caption(captions: Captions) -> str:
    ((text,),) = captions.values()
    return text


def _write_parts(outputs: list[_Output], parts: list[_PartRows]) -> None:
    for output, part in zip(outputs, parts, strict=True):
        output.write_part(part)


def _finish(outputs: Sequence[_Output], inputs: dict[str, str], details: dict[str, Any]) -> bool:
    """Write the manifests of the folders that have all parts; whether one was still to be written.

    A process holds the locks of all its folders meanwhile, so that exactly one finds that it wrote the last manifest.
    """
    wrote_manifest = False
    with contextlib.ExitStack() as stack:
        # in one order everywhere, so that no two processes wait for each other
        for output in outputs:
            stack.enter_context(exclusive_lock(output.path))
        for output in outputs:
            assert output.writer is not None
            if all(map(output.writer.part, range(len(details["shards"])))):
                wrote_manifest |= output.writer.end(inputs=inputs, details=details)
                output.manifest = read_manifest(output.path, "embeddings")
    return wrote_manifest


def _summary(output: _Output, num_parts: int, seconds: float, *, ended_here: bool) -> EmbedSummary:
    if output.manifest is not None:
        counts = output.manifest.counts
        reasons = output.manifest.details.get("incidents", {})
    else:
        assert output.writer is not None
        # parts that other processes wrote count too
        counts = {"rows": 0, "bad": 0, "parts": 0}
        for number in range(num_parts):
            if part := output.writer.part(number):
                counts["rows"] += part.rows
                counts["bad"] += part.bad
                counts["parts"] += 1
        # only the manifest has them counted; parts of an unfinished folder are still being written
        reasons = {}
    return EmbedSummary(
        folder=str(output.path),
        modality=output.space.modality,
        dimension=output.space.dimension,
        incidents=reasons,
        missing_parts=num_parts - counts["parts"],
        new_rows=output.new_rows,
        seconds=seconds,
        was_complete=output.writer is None,
        ended_here=ended_here,
        **counts,
    )
