"""Dataset reinforcement: shards written again with teachers' embeddings of random views and of the captions.

The teachers run once, whatever is trained on the shards afterwards (Faghri et al. 2023, section 3; MobileCLIP, Vasu et
al. 2023, section 4). The unit vectors of several teachers are concatenated, each divided by sqrt(n), so that a dot
product of two rows is the mean of the teachers' cosines. MobileCLIP instead averages the divergences from each teacher
(its equation 3); `teachers` in the manifest gives the columns of each, for whoever wants to separate them.

An interrupted run is resumed: a journal lists the finished shards, and the manifest is written at the end.
"""

import io
import json
import math
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch

from vlm.console import progress
from vlm.data.loader import stream_batches
from vlm.data.pack import read_journal
from vlm.data.sampler import SequentialBatches
from vlm.data.shard_cache import ShardCache
from vlm.data.shards import count_samples, shard_stem, shards_fingerprint
from vlm.data.tar import Arrays, Member, open_index, open_tar
from vlm.data.tar_entries import TarEntries, TarEntry, npy_bytes
from vlm.errors import UsageError, VlmError
from vlm.files import append_line, atomic_write, write_text
from vlm.manifest import FileRecord, Manifest, begin_or_resume_folder, record_file, write_manifest
from vlm.models.model import VisionLanguageModel
from vlm.models.sentence_encoder import LanguageModelEmbedder
from vlm.results import Result
from vlm.storage import file_identity, local_path
from vlm.tensor_types import Float32, Tensor
from vlm.train.teacher_views import (
    REINFORCEMENT,
    CollateViews,
    ViewedBatch,
    ViewedSample,
    ViewGeometry,
    read_reinforcement,
    views_to_values,
)

if TYPE_CHECKING:
    from tqdm import tqdm


UNREINFORCED = "unreinforced.jsonl"
"""File that lists the samples copied without features, and why."""

_JOURNAL = ".shards-done.jsonl"


@dataclass(frozen=True, kw_only=True)
class ReinforcedShard:
    """A finished shard. sizes: columns of each feature. left: the samples without features."""

    name: str
    samples: int
    bytes: int
    sha256: str
    sizes: dict[str, int]
    left: list[dict[str, Any]]


def reinforced_shard_names(shards: Sequence[str]) -> list[str]:
    """The name of each shard as a plain tar: its own, with its number before it where two have the same name.

    >>> reinforced_shard_names(["a/0.tar", "b/1.tar.gz"]), reinforced_shard_names(["a/0.tar", "b/0.tar"])
    (['0.tar', '1.tar'], ['00000-0.tar', '00001-0.tar'])
    """
    stems = list(map(shard_stem, shards))
    # the output is never compressed, so two inputs that differ only in their suffix would collide; so would names that
    # differ only in case, on macOS and Windows
    if len(set(map(str.lower, stems))) < len(stems) or any(stem.startswith(".") for stem in stems):
        stems = [f"{number:05d}-{stem}" for number, stem in enumerate(stems)]
    return [f"{stem}.tar" for stem in stems]


def record_finished_shard(out: Path, shard: ReinforcedShard) -> None:
    """Write into the journal that a shard is complete."""
    append_line(out / _JOURNAL, json.dumps(asdict(shard)))


def read_finished_shards(out: Path) -> list[ReinforcedShard]:
    """The shards an earlier run finished.

    Raises:
        VlmError: one of them is missing or was changed.
    """
    return read_journal(out / _JOURNAL, ReinforcedShard)


def finish_folder(
    out: Path,
    shards: Sequence[ReinforcedShard],
    *,
    reinforcement: dict[str, Any],
    configuration: dict[str, Any],
    inputs: dict[str, str],
    sources: Sequence[str],
) -> Manifest:
    """Write the list of skipped samples and the manifest; remove the journal."""
    samples = 0
    left: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    files: dict[str, FileRecord] = {}
    paths: list[str] = []
    for shard in shards:
        paths.append(str(out / shard.name))
        samples += shard.samples
        left += shard.left
        # a shard of nothing but bad samples has no features to take sizes from
        sizes = sizes or shard.sizes
        files[shard.name] = FileRecord(bytes=shard.bytes, sha256=shard.sha256)
    if left:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in left]
        write_text(out / UNREINFORCED, "".join(lines))
        files[UNREINFORCED] = record_file(out / UNREINFORCED)
    counts = {"samples": samples, "reinforced": samples - len(left), "bad": len(left), "shards": len(shards)}
    manifest = Manifest(
        kind="shards",
        fingerprint=shards_fingerprint(paths),
        counts=counts,
        configuration=configuration,
        inputs=inputs,
        files=files,
        details={
            "source": {"kind": "shards", "shards": list(sources)},
            REINFORCEMENT: reinforcement,
            "arrays": sizes,
            "unreinforced": dict(Counter(map(itemgetter("reason"), left))),
        },
    )
    write_manifest(out, manifest)
    # after the manifest, so that a kill in between leaves a finished folder
    (out / _JOURNAL).unlink()
    return manifest


@runtime_checkable
class TextEmbedder(Protocol):
    """Texts to vectors on the CPU; a `VisionLanguageModel` is one, and so is a language model."""

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same vectors."""
        ...

    @property
    def precision(self) -> torch.dtype:
        """Arithmetic of the model."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T E"]:
        """A row for each text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """The models that embed the samples. names: of `models` and of `text_model`, as given on the command line."""

    models: tuple[VisionLanguageModel, ...] = ()
    names: tuple[str, ...] = ()
    text_model: TextEmbedder | None = None
    text_name: str = ""

    def __post_init__(self) -> None:
        if not self.models and self.text_model is None:
            raise UsageError("There is nothing to store in the shards; give --teacher MODEL, --text-model, or both.")

    def compute_arrays(self, batch: ViewedBatch, view_indices: Sequence[int], *, half: bool) -> list[Arrays]:
        """The features of each usable sample of a batch. view_indices: for each model, the number of its view.

        Raises:
            VlmError: a number is not finite, or the batch does not fit into memory.
        """
        usable = batch.usable
        models = self.models
        stored_arrays = [Arrays() for _ in usable]
        if not usable:
            return stored_arrays
        try:
            if models:
                _add_array(stored_arrays, "view_seeds", [row.seeds for row in usable])
                images: list[Tensor] = []
                for model, view_index in zip(models, view_indices, strict=True):
                    images.append(model.embed_images(batch.views(view_index)))
                rows_per_sample = [batch.num_views] * len(usable)
                vectors = _concatenate_embeddings(images)
                rows = _rows(vectors, rows_per_sample, np.float16, self.names, usable)
                _add_array(stored_arrays, "teacher_image", rows)
            self._add_texts(stored_arrays, usable, half=half)
        except torch.OutOfMemoryError as error:
            raise VlmError(
                "A batch does not fit into the device's memory; repeat the command with a smaller --batch-size: it "
                "resumes after the finished shards."
            ) from error
        return stored_arrays

    def _add_texts(self, stored_arrays: list[Arrays], usable: list[ViewedSample], *, half: bool) -> None:
        captions: list[str] = []
        numbers: list[int] = []
        for row in usable:
            captions += row.captions
            numbers.append(len(row.captions))
        # all captions of the batch at once: one text alone leaves a GPU idle
        if self.models:
            embedded_by_model: list[Tensor] = []
            for model in self.models:
                embedded_by_model.append(model.embed_texts(captions))
            texts = _concatenate_embeddings(embedded_by_model)
            _add_array(stored_arrays, "teacher_text", _rows(texts, numbers, np.float16, self.names, usable))
        if self.text_model is not None:
            kind = np.float16 if half else np.float32
            embedded = self.text_model.embed_texts(captions)
            _add_array(stored_arrays, "text_embedding", _rows(embedded, numbers, kind, (self.text_name,), usable))


def _concatenate_embeddings(parts: Sequence[Float32[Tensor, "N _"]]) -> Float32[Tensor, "N D"]:
    """The teachers' unit vectors concatenated, at unit length again."""
    # a dot product of two rows is then the mean of the teachers' cosines
    return torch.cat(list(parts), dim=1) / math.sqrt(len(parts))


def _rows(
    vectors: Float32[Tensor, "N D"], numbers: list[int], kind: type, names: Sequence[str], usable: list[ViewedSample]
) -> list[np.ndarray]:
    """The vectors of each sample, as stored; VlmError if one is not finite."""
    # an overflow of float16 becomes infinite, which is reported below with the sample's key
    with np.errstate(over="ignore"):
        stored = vectors.numpy().astype(kind)
    # where each sample's rows end; the last end is that of the whole
    parts = np.split(stored, list(accumulate(numbers))[:-1])
    for part, row in zip(parts, usable, strict=True):
        if not np.isfinite(part).all():
            raise VlmError(
                f"{' + '.join(names)} gave numbers that are not finite in {np.dtype(kind)} for {row.key!r}: the "
                "weights are damaged, its training diverged, or (with --half) they are too large."
            )
    return parts


def _add_array(stored_arrays: list[Arrays], name: str, parts: Sequence[np.ndarray]) -> None:
    for arrays, part in zip(stored_arrays, parts, strict=True):
        arrays[name] = part


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """What is stored in the shards.

    num_views: A, views of each image. seed: of the views. half: text embeddings in float16 instead of float32.
    """

    num_views: int = 5
    geometry: ViewGeometry = field(default_factory=ViewGeometry)
    seed: int = 0
    half: bool = False

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise UsageError(f"views = {self.num_views}; a teacher needs at least one.")


@dataclass(frozen=True, kw_only=True)
class ReinforceSummary(Result):
    """What was written; `seconds` and `samples_per_second` are of this run, without what an earlier one had done.

    bad: samples copied without features, by reason in `unreinforced`. arrays: columns of each feature, by name.
    """

    out: str
    samples: int
    reinforced: int
    bad: int
    shards: int
    bytes: int
    arrays: dict[str, int]
    unreinforced: dict[str, int]
    fingerprint: str
    seconds: float
    samples_per_second: float


def reinforce(
    shards: Sequence[str],
    out: Path,
    teachers: Teachers,
    config: ReinforceConfig | None = None,
    *,
    batch_size: int = 256,
    workers: int = 0,
    allow_damage: bool = False,
) -> ReinforceSummary:
    """Write the shards into the new folder `out` with precomputed features, or resume an interrupted run.

    Contents and order of all files stay, and names but for endings, which become lower-case; samples that cannot be
    used are copied unchanged, and listed in `unreinforced.jsonl`. With the same batch size, the folder ends with the
    same bytes however often it was interrupted. Features the shards had before are kept, except those of the same name.

    Args:
        shards: URLs as `expand_shards` gives them.
        batch_size: views per forward pass of a teacher.
        allow_damage: copy what lies before the damage of a truncated tar.

    Raises:
        UsageError: `out` holds something else already, or the batch has no size.
        VlmError: a shard is damaged, a model gives vectors that are not finite, or no sample can be used.
    """
    config = config or ReinforceConfig()
    started = time.perf_counter()
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size}; a model must see at least one view.")
    counts = count_samples(list(shards), allow_damage=allow_damage)
    contents = _reinforcement(teachers, config, read_reinforcement(shards))
    inputs = {"shards": shards_fingerprint(shards)}
    options = {"batch_size": batch_size, "workers": workers}
    begin_or_resume_folder(out, kind="shards", configuration={"reinforcement": contents} | inputs)
    work = _ReinforceJob(list(shards), counts, out, teachers, config)
    done = sum(shard.samples for shard in work.done)
    with progress(total=sum(counts), done=done, what="reinforce", unit=" samples") as progress_bar:
        work.write_remaining_shards(batch_size=batch_size, workers=workers, progress_bar=progress_bar)
    manifest = finish_folder(
        out, work.done, reinforcement=contents, configuration=asdict(config) | options, inputs=inputs, sources=shards
    )
    seconds = time.perf_counter() - started
    return ReinforceSummary(
        out=str(out),
        samples=manifest.counts["samples"],
        reinforced=manifest.counts["reinforced"],
        bad=manifest.counts["bad"],
        shards=manifest.counts["shards"],
        bytes=sum(shard.bytes for shard in work.done),
        arrays=manifest.details["arrays"],
        unreinforced=manifest.details["unreinforced"],
        fingerprint=manifest.fingerprint,
        seconds=seconds,
        samples_per_second=(manifest.counts["samples"] - done) / seconds,
    )


def _reinforcement(teachers: Teachers, config: ReinforceConfig, before: dict[str, Any]) -> dict[str, Any]:
    """What the manifest records; what the shards had before and keep stays recorded."""
    contents = dict(before)
    if teachers.models:
        contents["views"] = views_to_values(config.geometry, number=config.num_views, seed=config.seed)
        records: list[dict[str, Any]] = []
        for model, name in zip(teachers.models, teachers.names, strict=True):
            record = {
                "name": name,
                "fingerprint": model.fingerprint,
                "precision": str(model.precision),
                "pixels": model.view.size,
                "columns": model.embedding_size,
                "logit_scale": model.logit_scale,
            }
            records.append(record)
        contents["teachers"] = records
    if (text_model := teachers.text_model) is not None:
        contents["text_embedding"] = {
            "name": teachers.text_name,
            "fingerprint": text_model.fingerprint,
            "precision": str(text_model.precision),
            "half": config.half,
            **(text_model.describe() if isinstance(text_model, LanguageModelEmbedder) else {}),
        }
    return contents


class _ReinforceJob:
    """Writes the shards, one after the other."""

    def __init__(
        self, shards: list[str], counts: list[int], out: Path, teachers: Teachers, config: ReinforceConfig
    ) -> None:
        # what a killed process left
        for half_written in out.glob(".*.part"):
            half_written.unlink()
        self.done = read_finished_shards(out)
        self._shards = shards
        self._counts = counts
        self._out = out
        self._teachers = teachers
        self._config = config
        self._names = reinforced_shard_names(shards)
        # teachers of the same size share a view, which is decoded and resized once
        views = [config.geometry.view_for(model.view) for model in teachers.models]
        self._views = tuple(dict.fromkeys(views))
        self._view_indices = list(map(self._views.index, views))

    def write_remaining_shards(self, *, batch_size: int, workers: int, progress_bar: "tqdm") -> None:
        """Write the shards that are missing, one after the other."""
        # batch_size counts views, since these are what fills the device's memory
        per_batch = max(batch_size // (self._config.num_views if self._views else 1), 1)
        plan = SequentialBatches(counts=self._counts, batch_size=per_batch)
        num_batches = [-(-count // per_batch) for count in self._counts]
        first = len(self.done)
        collate = CollateViews(views=self._views, num_views=self._config.num_views, seed=self._config.seed)
        # no batch spans two shards, so whole shards can be left out by the numbers of their batches
        missing = range(sum(num_batches[:first]), len(plan))
        stream = _with_progress(
            stream_batches(plan, self._shards, collate, numbers=missing, workers=workers), progress_bar
        )
        for number in range(first, len(self._shards)):
            self._write(number, islice(stream, num_batches[number]))

    def _write(self, number: int, batches: Iterator[ViewedBatch]) -> None:
        path = self._out / self._names[number]
        address = self._shards[number]
        sizes: dict[str, int] = {}
        left: list[dict[str, Any]] = []
        with atomic_write(path) as file:
            copy_with_arrays(address, file, self._arrays(batches, sizes, left, path.name))
        file = record_file(path)
        shard = ReinforcedShard(
            name=path.name,
            samples=self._counts[number],
            bytes=file.bytes,
            sha256=file.sha256,
            sizes=sizes,
            left=left,
        )
        # a first shard without one usable sample means a wrong format, which is not worth hours of work
        if not any(shard.samples > len(shard.left) for shard in [*self.done, shard]):
            path.unlink()
            raise VlmError(
                f"None of the {shard.samples:,} samples of {address} can be used; the first, {left[0]['key']!r}: "
                f"{left[0]['reason']}: {left[0]['detail']}. See vlm inspect."
            )
        # after the file is durable: the journal promises it
        record_finished_shard(self._out, shard)
        self.done.append(shard)

    def _arrays(
        self, batches: Iterator[ViewedBatch], sizes: dict[str, int], left: list[dict[str, Any]], name: str
    ) -> Iterator[Arrays]:
        """The features of each sample of a shard; empty for a bad one, which is added to `left`."""
        for batch in batches:
            for bad in batch.incidents:
                left.append({"shard": name, "key": bad.key, "reason": bad.reason, "detail": bad.detail})
            stored_arrays = iter(self._teachers.compute_arrays(batch, self._view_indices, half=self._config.half))
            for row in batch.rows:
                arrays = Arrays() if row is None else next(stored_arrays)
                for array_name, rows in arrays.items():
                    if rows.ndim == 2:
                        sizes[array_name] = rows.shape[1]
                yield arrays


def _with_progress(batches: Iterator[ViewedBatch], progress_bar: "tqdm") -> Iterator[ViewedBatch]:
    """The batches, each shown as done when the next one is requested."""
    for batch in batches:
        yield batch
        progress_bar.update(len(batch.rows))


def copy_with_arrays(url: str, out: BinaryIO, arrays: Iterator[Arrays], cache: ShardCache | None = None) -> None:
    """Copy the tar at `url`, with `KEY.NAME.npy` after the last part of each sample.

    Contents and order of the regular files stay, and so do names, but for endings, which become lower-case as other
    readers expect them; times, owners, links and folders are left out, so the same
    arrays give the same bytes. A stored array that the sample had under the same name is replaced. Of a tar cut short,
    the file that is cut is left out.

    Args:
        url: of a plain, compressed or remote tar.
        out: where the plain copy is written.
        arrays: those of each sample in the order of the index, by name; empty for a sample that gets none.
        cache: where remote and compressed tars are kept; the default one if not given.
    """
    index = open_index(url, cache)
    members: list[Member] = []
    sample_at: dict[int, int] = {}
    for number in range(len(index)):
        member = index[number]
        members.append(member)
        for span in member.spans:
            sample_at[span.offset] = number

    path = local_path(url)
    identity = file_identity(path, cache.retry_policy if cache else None)
    current = -1
    added = Arrays()
    with (
        open_tar(path, identity, cache) as file,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        end = file.seek(0, os.SEEK_END)
        for entry in TarEntries(file, url):
            if entry.offset_data + entry.size > end:
                break
            number = sample_at.get(entry.offset_data)
            if number is None:  # not part of a sample, as the index sees it
                _copy_entry(tar, entry, file)
                continue
            while current < number:
                current += 1
                added = next(arrays)
            member = members[number]
            if not _is_replaced(entry, member, added):
                _copy_entry(tar, entry, file)
            # after the last part, so that the run of members that makes the sample is not broken
            if entry.offset_data == max(span.offset for span in member.spans):
                for name in sorted(added):
                    data = npy_bytes(added[name])
                    tar.addfile(_tar_entry(f"{member.key}.{name}.npy", len(data)), io.BytesIO(data))
        for _ in arrays:  # run to the end, also past samples without any part that is known
            pass


def _is_replaced(entry: TarEntry, member: Member, added: Arrays) -> bool:
    return any(span.offset == entry.offset_data for name, span in member.arrays.items() if name in added)


def _copy_entry(tar: tarfile.TarFile, entry: TarEntry, file: BinaryIO) -> None:
    file.seek(entry.offset_data)
    folder, slash, name = entry.name.rpartition("/")
    stem, dot, ending = name.partition(".")
    tar.addfile(_tar_entry(f"{folder}{slash}{stem}{dot}{ending.lower()}", entry.size), file)


def _tar_entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry
