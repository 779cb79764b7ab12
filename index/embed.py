"""The embedding stage: shards through a model into an embeddings folder, one part per shard, resumed after a crash."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.console import progress, say
from vlm.data.batches import AssembleItems
from vlm.data.loader import stream_batches
from vlm.data.plan import ShardPlan
from vlm.data.selection import Selection
from vlm.data.shards import count_samples, is_remote, shards_fingerprint
from vlm.index.collect import PartRows
from vlm.index.embeddings import EmbeddingsWriter, Modality, Space, check_same_origin, part_name
from vlm.index.encoder import Encoder, absolute_spec
from vlm.index.uids import UidNamer
from vlm.manifest import Manifest, is_complete


@dataclass(frozen=True, kw_only=True)
class EmbedSummary:
    """What the folder holds, and what this call did: `new_rows` in `seconds`.

    bad: samples left out, named in `incidents.jsonl`. was_complete: there was nothing left to do.
    """

    folder: str
    modality: Modality
    dimension: int
    parts: int
    rows: int
    bad: int
    new_rows: int
    seconds: float
    was_complete: bool


def embed_shards(
    model: Encoder,
    shards: Sequence[str],
    out: Path,
    *,
    model_spec: str,
    modality: Modality = "image",
    batch_size: int = 256,
    workers: int = 0,
    allow_damage: bool = False,
    selection: Selection | None = None,
) -> EmbedSummary:
    """Embed the picture, or each caption, of every sample of the shards into the folder `out`.

    Killed at any moment and repeated with the same batch size, it leaves the files of an uninterrupted run; repeated
    when complete, it does nothing.

    Args:
        shards: addresses as `expand_shards` gives them.
        model_spec: what the model was loaded from; kept absolute, so that a search finds it again.
        allow_damage: embed what lies before the damage of a tar cut short.
        selection: embed only the samples it names, each once.

    Raises:
        UsageError: `out` holds something else, or the work of another model or of other shards.
        VlmError: a shard is damaged, a vector is not of unit length, or not one sample can be used.
    """
    started = time.perf_counter()
    addresses = [_absolute(shard) for shard in shards]
    inputs = {"model": model.fingerprint, "shards": shards_fingerprint(addresses)}
    counts = count_samples(addresses, allow_damage=allow_damage)
    inputs["selection"] = selection.fingerprint if selection else ""
    identity: dict[str, Any] = {"modality": modality, **inputs, "addresses": addresses}
    times = selection.times_of(addresses) if selection else None
    plan = ShardPlan(counts=counts, batch_size=batch_size, times=times)
    if was_complete := is_complete(out):
        manifest, new_rows = check_same_origin(out, identity), 0
        say(f"{out} is complete already: {manifest.counts['rows']:,} rows of this model and these shards.")
    else:
        spec, size = absolute_spec(model_spec), model.embedding_size
        space = Space(model=spec, fingerprint=model.fingerprint, dimension=size, modality=modality)
        writer = EmbeddingsWriter(out, space=space, identity=identity)
        new_rows = _write_missing_parts(writer, model, addresses, plan, workers=workers)
        manifest = writer.finish(inputs=inputs, details={"shards": addresses, "batch_size": batch_size})
    return _summary(out, manifest, new_rows=new_rows, seconds=time.perf_counter() - started, was_complete=was_complete)


def _absolute(shard: str) -> str:
    """The address from anywhere; a link to a tar stays a link, because its target need not be named `.tar`."""
    path = Path(shard)
    return shard if is_remote(shard) else str(path.parent.resolve() / path.name)


def _write_missing_parts(
    writer: EmbeddingsWriter,
    model: Encoder,
    shards: Sequence[str],
    plan: ShardPlan,
    *,
    workers: int,
) -> int:
    """Write the part of each shard that has none yet; the number of rows written."""
    modality, dimension, done = writer.space.modality, writer.space.dimension, len(writer.parts)
    num_batches = [-(-count // plan.batch_size) for count in plan.kept]
    assemble = AssembleItems(view=model.view if modality == "image" else None)
    missing = range(sum(num_batches[:done]), len(plan))
    stream = stream_batches(plan, shards, assemble, numbers=missing, workers=workers)
    namer, new_rows = UidNamer(shards), 0
    with progress(total=sum(plan.kept), done=sum(plan.kept[:done]), what="embed", unit=" samples") as shown:
        for number in range(done, len(shards)):
            rows = PartRows(name=part_name(number), shard=shards[number], number=number, namer=namer)
            for batch in islice(stream, num_batches[number]):
                rows.take(batch, model, modality)
                shown.update(len(batch.items) + len(batch.incidents))
            writer.add(rows.shard, rows.matrix(dimension), rows.origins, rows.incidents)
            new_rows += len(rows.origins)
    return new_rows


def _summary(out: Path, manifest: Manifest, *, new_rows: int, seconds: float, was_complete: bool) -> EmbedSummary:
    space = Space(**manifest.details["space"])
    return EmbedSummary(
        folder=str(out),
        modality=space.modality,
        dimension=space.dimension,
        new_rows=new_rows,
        seconds=seconds,
        was_complete=was_complete,
        **manifest.counts,
    )
