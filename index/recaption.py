"""Re-captioning: shards to new captions of all their samples, in a folder beside them that the loader mixes in.

One Parquet table for each shard, written whole or not at all, with a marker and in the end a manifest, as embeddings
are (`embeddings_folder`); so the work may be killed at any moment, resumed, and divided among processes.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from vlm.console import progress
from vlm.data.caption_sampler import KIND, SidecarShard, read_captions
from vlm.data.loader import stream_batches
from vlm.data.sampler import SequentialBatches
from vlm.data.shards import EvalBatch, EvalCollator, SampleFailure, absolute_shard, count_samples, shards_fingerprint
from vlm.data.tar import open_index
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write, compute_fingerprint, write_text
from vlm.index.embed import SINGLE_PROCESS, ProcessRank
from vlm.index.embeddings_folder import (
    PARTS,
    SKIPPED_JSONL,
    Part,
    SkippedSampleRecord,
    begin_or_resume,
    check_compatible,
    exclusive_lock,
    part_name,
    read_marker,
    remove_leftovers,
    write_marker,
)
from vlm.manifest import (
    FileRecord,
    Manifest,
    first_mismatch,
    is_complete,
    mark_unfinished,
    record_file,
    sorted_checksums,
    write_manifest,
)
from vlm.model_spec import absolute_spec
from vlm.models.decoding_options import DecodingOptions
from vlm.models.model import VisionLanguageModel
from vlm.results import Result

if TYPE_CHECKING:
    import pyarrow
    from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RecaptionOptions:
    """How shards are captioned.

    model_spec: what the model was loaded from. precision: what it computes in. workers: processes that read and decode
    ahead of it. allow_damage: caption what precedes the damage of a truncated tar. share: which of several processes
    that fill the folder together this one is.
    """

    model_spec: str
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    batch_size: int = 64
    workers: int = 0
    allow_damage: bool = False
    precision: str = "fp32"
    share: ProcessRank = SINGLE_PROCESS

    def __post_init__(self) -> None:
        """Refuse numbers out of range before a folder is begun."""
        if self.batch_size < 1:
            raise UsageError(f"batch_size = {self.batch_size} is out of range: it must be at least 1.")
        if self.workers < 0:
            raise UsageError(f"workers = {self.workers}; 0 is the least: reading and the model take turns then.")


@dataclass(frozen=True, kw_only=True)
class RecaptionSummary(Result):
    """What the folder holds, and what this call did: `new_samples` in `seconds`.

    captioned: samples with captions. different: captions that differ from one another. bad: samples without captions,
    listed in `incidents.jsonl`. incidents: their number by reason. mean_log_likelihood: of the first captions.
    missing_parts: what other processes still have to write; 0 when the folder is complete.
    ended_here: of several processes, this one wrote the manifest.
    """

    folder: str
    shards: int
    samples: int
    captioned: int
    captions: int
    different: int
    bad: int
    incidents: dict[str, int]
    mean_log_likelihood: float
    missing_parts: int
    new_samples: int
    seconds: float
    was_complete: bool
    ended_here: bool


def recaption(
    model: VisionLanguageModel, shards: Sequence[str], out: Path, options: RecaptionOptions
) -> RecaptionSummary:
    """Write new captions of all samples of the shards into the folder `out`, or resume that.

    Killed at any moment and repeated with the same batch size, by any number of processes, it leaves the files of an
    uninterrupted run; repeated when complete, it makes damaged files again. Samples that cannot be used have no
    captions in their row, and are listed with the reason.

    Args:
        shards: addresses as from `expand_shards`.

    Raises:
        UsageError: the model has no caption decoder, or the folder holds something else, or the work of another model,
            of other shards or of other decoding options.
        VlmError: a shard is damaged, out of memory, or no sample can be used.
    """
    started = time.perf_counter()
    recaptioner = ShardRecaptioner(model, RecaptionPlan.make(model, shards, out, options))
    recaptioner.write_missing_parts(options.share.shard_indices(len(shards)))
    return recaptioner.finish(seconds=time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class RecaptionPlan:
    """What is captioned into which folder; travels by pickle, so that only one process reads all indexes of shards.

    shards: absolute addresses. counts: samples of each. identity: what decides over the captions.
    """

    shards: list[str]
    counts: list[int]
    out: Path
    identity: dict[str, Any]
    options: RecaptionOptions

    @classmethod
    def make(
        cls, model: VisionLanguageModel, shards: Sequence[str], out: Path, options: RecaptionOptions
    ) -> "RecaptionPlan":
        """Read the shards' indexes; nothing is written."""
        model.check_can_caption()
        addresses = list(map(absolute_shard, shards))
        # before a folder is begun: a shard that is missing leaves nothing behind
        counts = count_samples(addresses, allow_damage=options.allow_damage)
        identity = {
            "model": model.fingerprint,
            "shards": shards_fingerprint(addresses),
            "decoding": options.decoding.to_values(),
            "precision": options.precision,
        }
        return cls(shards=addresses, counts=counts, out=out, identity=identity, options=options)


def _open_folder(out: Path, identity: dict[str, Any]) -> bool:
    """Begin or resume the folder; True if it is complete and intact."""
    if not is_complete(out):
        try:
            begin_or_resume(out, identity, kind=KIND)
        except UsageError:
            # unless another process has finished it just now
            if not is_complete(out):
                raise
        else:
            return False
    with exclusive_lock(out):
        manifest = check_compatible(out, identity, kind=KIND)
        fault = first_mismatch(out, manifest.files, verify=True)
        if not fault:
            remove_leftovers(out)
            return True
        # made again rather than refused: the folder says itself what it was made from
        logger.info(f"{out} was complete: {fault}. The damaged tables are made again.")
        mark_unfinished(out, kind=KIND, configuration=identity)
    return False


@dataclass(eq=False)
class _Counts:
    """Counted over parts, from their markers."""

    samples: int = 0
    captioned: int = 0
    captions: int = 0
    likelihood_sum: float = 0.0
    texts: set[str] = field(default_factory=set)


class ShardRecaptioner:
    """A model and the folder that its captions of the shards of a plan go to, table by table."""

    def __init__(self, model: VisionLanguageModel, plan: RecaptionPlan) -> None:
        """Begin, resume or open the folder.

        Raises:
            UsageError: it holds something else, or the work of another model, of other shards or decoding options.
        """
        self.plan = plan
        self._model = model
        self._was_complete = _open_folder(plan.out, plan.identity)
        self._new_samples = 0

    def missing_parts(self, numbers: Iterable[int]) -> list[int]:
        """Of these shards those that lack their table."""
        if self._was_complete:
            return []
        # with checksums, because what stopped the last run may have damaged a table
        return [number for number in numbers if read_marker(self.plan.out, part_name(number), verify=True) is None]

    def num_samples(self, numbers: Sequence[int]) -> list[int]:
        """The samples of each of these shards."""
        return [self.plan.counts[number] for number in numbers]

    def write_missing_parts(self, numbers: Sequence[int], *, is_shown: bool = True) -> None:
        """Write the tables that are missing of these shards; finished ones stay, whatever happens then.

        is_shown: draw a progress bar.

        Raises:
            VlmError: a shard cannot be read, or a batch does not fit into memory.
        """
        missing = self.missing_parts(numbers)
        if not missing:
            return
        total = sum(self.num_samples(numbers))
        done = total - sum(self.num_samples(missing))
        try:
            with progress(total=total, done=done, what="caption", unit=" samples", is_shown=is_shown) as bar:
                self._caption(missing, bar)
        except torch.OutOfMemoryError as error:
            raise VlmError(
                f"A batch of {self.plan.options.batch_size} does not fit into memory; finished shards are kept: "
                "repeat with a smaller --batch-size."
            ) from error

    def _caption(self, missing: list[int], bar: "tqdm[NoReturn]") -> None:
        shards = self.plan.shards
        counts = self.plan.counts
        options = self.plan.options
        plan = SequentialBatches(counts=[counts[number] for number in missing], batch_size=options.batch_size)
        # one stream over all missing shards, so that workers read ahead from one into the next
        batches = stream_batches(
            plan,
            [shards[number] for number in missing],
            EvalCollator(view=self._model.view),
            numbers=range(len(plan)),
            workers=options.workers,
        )
        # batches end with a shard, so that a table does not depend on which others were missing
        for number in missing:
            table = _Table(shards[number], number, counts[number])
            for batch in islice(batches, ceil(counts[number] / options.batch_size)):
                table.add_batch(batch, self._model, options.decoding)
                bar.update(len(batch.samples) + len(batch.unread))
            table.write(self.plan.out)
            self._new_samples += counts[number]

    def count_parts(self, numbers: Iterable[int]) -> None:
        """Count these tables, which other processes wrote for this one, as new."""
        for number in numbers:
            if read_marker(self.plan.out, part_name(number)) is not None:
                self._new_samples += self.plan.counts[number]

    def finish(self, *, seconds: float) -> RecaptionSummary:
        """Write the manifest if all tables exist; what the folder holds then.

        seconds: what the work took, for the summary.

        Raises:
            VlmError: not one sample could be captioned.
        """
        wrote_manifest = False if self._was_complete else self._complete()
        return self._summary(seconds, ended_here=wrote_manifest)

    def _complete(self) -> bool:
        """Write the manifest if all tables exist; whether it was still to be written."""
        out = self.plan.out
        with exclusive_lock(out):
            if is_complete(out):
                return False
            parts: list[Part] = []
            skipped: list[SkippedSampleRecord] = []
            for number in range(len(self.plan.shards)):
                marker = read_marker(out, part_name(number))
                if marker is None:
                    return False
                parts.append(marker.part)
                skipped += marker.incidents
            self._write_manifest(parts, skipped)
            remove_leftovers(out)
        return True

    def _write_manifest(self, parts: list[Part], skipped: list[SkippedSampleRecord]) -> None:
        out = self.plan.out
        identity = self.plan.identity
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in skipped]
        # before the refusal below, which sends its reader to the list
        write_text(out / SKIPPED_JSONL, "".join(lines))
        if sum(part.rows for part in parts) == len(skipped):
            first = f"{skipped[0].key} {skipped[0].reason} {skipped[0].detail}"
            raise VlmError(
                f"Not one of {len(skipped):,} samples could be captioned; the first: {first}. "
                f"All are in {out / SKIPPED_JSONL}."
            )
        files: dict[str, FileRecord] = {}
        shards: list[dict[str, Any]] = []
        for part in parts:
            files |= part.files
            (path,) = part.files
            # by this the loader notices a shard that was written anew since it was captioned
            fingerprint = open_index(part.shard).fingerprint
            shards.append(SidecarShard(part.shard, fingerprint, path, part.rows)._asdict())
        files[SKIPPED_JSONL] = record_file(out / SKIPPED_JSONL)
        manifest = Manifest(
            kind=KIND,
            # of the contents, so that a run that trained with other captions is not resumed with these
            fingerprint=compute_fingerprint(identity["model"], *sorted_checksums(files)),
            counts={"samples": sum(part.rows for part in parts), "bad": len(skipped), "shards": len(parts)},
            configuration=identity,
            inputs={"model": identity["model"], "shards": identity["shards"]},
            files=files,
            details={
                "model": absolute_spec(self.plan.options.model_spec),
                "batch_size": self.plan.options.batch_size,
                "shards": shards,
                "incidents": _by_reason(skipped),
            },
        )
        write_manifest(out, manifest)

    def _summary(self, seconds: float, *, ended_here: bool) -> RecaptionSummary:
        """Counted from the tables that are there."""
        out = self.plan.out
        counts = _Counts()
        skipped: list[SkippedSampleRecord] = []
        num_parts = 0
        for number in range(len(self.plan.shards)):
            marker = read_marker(out, part_name(number))
            if marker is not None:
                num_parts += 1
                skipped += marker.incidents
                _count_table(out, marker.part, counts)
        return RecaptionSummary(
            folder=str(out),
            shards=len(self.plan.shards),
            samples=counts.samples,
            captioned=counts.captioned,
            captions=counts.captions,
            different=len(counts.texts),
            bad=len(skipped),
            incidents=_by_reason(skipped),
            mean_log_likelihood=counts.likelihood_sum / max(counts.captioned, 1),
            missing_parts=len(self.plan.shards) - num_parts,
            new_samples=self._new_samples,
            seconds=seconds,
            was_complete=self._was_complete,
            ended_here=ended_here,
        )


class _Table:
    """The captions of a shard, while its batches come."""

    def __init__(self, shard: str, number: int, num_samples: int) -> None:
        self._shard = shard
        self._number = number
        index = open_index(shard)
        self._keys = [index[place].key for place in range(num_samples)]
        self._captions: list[list[str]] = [[] for _ in self._keys]
        self._likelihoods: list[list[float]] = [[] for _ in self._keys]
        self._skipped: list[SkippedSampleRecord] = []

    def add_batch(self, batch: EvalBatch, model: VisionLanguageModel, decoding: DecodingOptions) -> None:
        """Caption the images of a batch."""
        # in the shard's order, so that the list is the same however many workers read
        failures = sorted([*batch.unread, *batch.undecoded], key=lambda failure: failure.sample_index.number)
        self._skipped += map(self._skip, failures)
        written = model.decode_captions(batch.images, decoding)
        for sample, captions in zip(batch.decoded, written.captions, strict=True):
            place = sample.sample_index.number
            # a caption of no words is none
            usable = [caption for caption in captions if caption.text.strip()]
            if not usable:
                self._skipped.append(self._record(place, "empty caption", "the model wrote no word"))
            self._captions[place] = [caption.text for caption in usable]
            self._likelihoods[place] = [caption.log_likelihood for caption in usable]

    def write(self, out: Path) -> None:
        """Write the table, then its marker; from then on it survives any crash."""
        from pyarrow import parquet

        name = part_name(self._number)
        path = out / PARTS / f"{name}.parquet"
        with atomic_write(path) as file:
            parquet.write_table(self._to_arrow(), file, compression="zstd")
        part = Part(
            name=name,
            shard=self._shard,
            rows=len(self._keys),
            bad=len(self._skipped),
            files={f"{PARTS}/{path.name}": record_file(path)},
        )
        write_marker(out, part, sorted(self._skipped, key=lambda record: record.number))

    def _to_arrow(self) -> "pyarrow.Table":
        import pyarrow

        types = {
            "key": pyarrow.string(),
            "captions": pyarrow.list_(pyarrow.string()),
            "log_likelihoods": pyarrow.list_(pyarrow.float32()),
        }
        columns = {"key": self._keys, "captions": self._captions, "log_likelihoods": self._likelihoods}
        return pyarrow.table(columns, schema=pyarrow.schema(types))

    def _skip(self, failure: SampleFailure) -> SkippedSampleRecord:
        return self._record(failure.sample_index.number, failure.reason, failure.detail)

    def _record(self, place: int, reason: str, detail: str) -> SkippedSampleRecord:
        return SkippedSampleRecord(
            part=part_name(self._number),
            shard=self._shard,
            number=place,
            key=self._keys[place],
            reason=reason,
            detail=detail,
        )


def _by_reason(skipped: Sequence[SkippedSampleRecord]) -> dict[str, int]:
    return dict(sorted(Counter(record.reason for record in skipped).items()))


def _count_table(out: Path, part: Part, counts: _Counts) -> None:
    (path,) = part.files
    table = read_captions(out / path)
    counts.samples += part.rows
    captions: list[list[str]] = table.column("captions").to_pylist()
    for texts, values in zip(captions, table.column("log_likelihoods").to_pylist(), strict=True):
        if texts:
            counts.captioned += 1
            counts.captions += len(texts)
            # the first is the best: further captions are sampled or less likely, and their number differs
            counts.likelihood_sum += values[0]
            counts.texts.update(texts)
