"""The embedding stage: shards through a model into embeddings folders, one part per shard, resumed after a crash."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlm.console import say
from vlm.data.selection import Selection
from vlm.data.shards import count_samples, is_remote, shards_fingerprint
from vlm.errors import UsageError
from vlm.index.batch_size import fastest_batch_size
from vlm.index.embeddings import EmbeddingsWriter, Modality, Space, check_same_origin, first_fault
from vlm.index.encoder import Encoder, absolute_spec
from vlm.index.missing_parts import Pass, Target
from vlm.index.parts import FLOAT16, Storage
from vlm.index.share import ALONE, Share
from vlm.index.unfinished import agree_on_batch_size, agreed_batch_size, alone, tidy
from vlm.manifest import is_complete, read_manifest, reopen_folder

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
    storage: Storage = FLOAT16
    is_compiled: bool = False
    precision: str = "fp32"
    share: Share = ALONE

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


def embed_shards(
    model: Encoder,
    shards: Sequence[str],
    out: Path,
    *,
    model_spec: str,
    modality: Modality = "image",
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    allow_damage: bool = False,
    selection: Selection | None = None,
) -> EmbedSummary:
    """Embed the picture, or each caption, of every sample of the shards into the folder `out` (see `embed_into`)."""
    options = EmbedOptions(
        model_spec=model_spec,
        batch_size=batch_size,
        workers=workers,
        allow_damage=allow_damage,
        selection=selection,
    )
    return embed_into(model, shards, {modality: out}, options)[modality]


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
        way = Pass(
            shards=addresses,
            counts=counts,
            times=times,
            batch_size=batch_size,
            workers=options.workers,
            is_compiled=options.is_compiled,
        )
        way.write_missing(model, unfinished, options.share.of(len(addresses)))
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
) -> Target:
    identity: dict[str, Any] = {"modality": modality, **inputs, "addresses": addresses, **asdict(options.storage)}
    identity["precision"] = options.precision
    spec, size = absolute_spec(options.model_spec), model.embedding_size
    space = Space(model=spec, fingerprint=model.fingerprint, dimension=size, modality=modality)
    if not is_complete(path):
        try:
            writer = EmbeddingsWriter(path, space=space, identity=identity, storage=options.storage)
            return Target(path=path, space=space, writer=writer)
        except UsageError:
            if not is_complete(path):  # else another process finished it just now
                raise
    manifest = check_same_origin(path, identity)
    if fault := first_fault(path, manifest.files, verify=True):
        say(f"{path} was complete: {fault}. The damaged parts are made again.")
        _reopen(path, identity)
        return _open(model, path, modality, addresses, inputs, options)
    tidy(path)
    say(f"{path} is complete already: {manifest.counts['rows']:,} rows of this model and these shards.")
    return Target(path=path, space=space, writer=None, manifest=manifest)


def _reopen(path: Path, identity: dict[str, Any]) -> None:
    """Make a complete but damaged folder unfinished, unless another process does so or has mended it already."""
    with alone(path):
        if is_complete(path):
            manifest = check_same_origin(path, identity)
            if first_fault(path, manifest.files, verify=True):
                agree_on_batch_size(path, manifest.details["batch_size"])
                reopen_folder(path, kind="embeddings", configuration=identity)


def _batch_size(model: Encoder, targets: Sequence[Target], options: EmbedOptions, *, largest: int) -> int:
    if options.batch_size != "auto":
        return options.batch_size
    if all(target.space.modality == "text" for target in targets):
        return BATCH_SIZE
    finished = [target.manifest.details["batch_size"] for target in targets if target.manifest]
    unfinished = [target.path for target in targets if target.writer]
    with alone(unfinished[0]):
        known = [*finished, *filter(None, map(agreed_batch_size, unfinished))]
        size = known[0] if known else fastest_batch_size(model, largest=largest)
        for path in unfinished:
            agree_on_batch_size(path, size)
    return size


def _finish(targets: Sequence[Target], inputs: dict[str, str], details: dict[str, Any]) -> bool:
    """Write the manifests of those that have all parts; whether one was still to be written.

    One process at a time does so in all of its folders, so that exactly one finds that it wrote the last.
    """
    wrote = False
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(alone(target.path))
        for target in targets:
            assert target.writer is not None
            if all(target.writer.part(number) for number in range(len(details["shards"]))):
                wrote |= target.writer.end(inputs=inputs, details=details)
                target.manifest = read_manifest(target.path, "embeddings")
    return wrote


def _summary(target: Target, num_parts: int, seconds: float, *, ended_here: bool) -> EmbedSummary:
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
