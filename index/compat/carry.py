"""An index whose rows are carried into the space of a head: padded with zeros, not embedded again."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from vlm import __version__
from vlm.console import say
from vlm.errors import UsageError
from vlm.files import fingerprint_of, new_folder, refuse_existing
from vlm.index.catalogue_writing import write_catalogue
from vlm.index.embeddings import Space
from vlm.index.encoder import absolute_spec
from vlm.index.generations import Generation, open_generation
from vlm.index.kinds import Tuning, choose_kind
from vlm.index.layout import Details, catalogue_file
from vlm.index.merging import living_blocks
from vlm.index.segments import Written, write_segment
from vlm.manifest import write_manifest
from vlm.models.compatible import Head
from vlm.tensors import Array, Float

_GENERATION = 1


@dataclass(frozen=True, kw_only=True)
class Carried:
    """The index that was made: its rows are those that lived, `dimension` the length they were padded to."""

    folder: str
    kind: str
    rows: int
    old_dimension: int
    dimension: int
    seconds: float


def upgrade_index(index: Path, out: Path, head: Head, *, head_spec: str) -> Carried:
    """A new index folder in the space of the head, with the living rows of `index` under their numbers.

    A row keeps its stored numbers, followed by zeros, so that cosines between old rows stay what they were. Kind and
    tuning stay as they were wished for; what a planner found is dropped, for it was measured with the old model.

    Args:
        head_spec: what the head was read from; kept absolute, so that a search finds it again.

    Raises:
        UsageError: the index is of another space than the head's old one, or `out` exists.
        VlmError: the index is damaged.
    """
    started = time.perf_counter()
    refuse_existing(out)
    now = open_generation(index)
    _require_old_space(now, head)
    with new_folder(out) as folder:
        written = _write_rows(folder, now, head) if len(now) else None
        catalogue = catalogue_file(_GENERATION)
        write_catalogue(folder / catalogue, now.entries(), generation=_GENERATION)
        space = replace(
            now.details.space, model=absolute_spec(head_spec), fingerprint=head.fingerprint, dimension=head.dimension
        )
        _write_manifest(folder, now, space, written)
    now.catalogue.close()
    return Carried(
        folder=str(out),
        kind=written.segment.kind if written else now.details.kind,
        rows=len(now),
        old_dimension=head.old_dimension,
        dimension=head.dimension,
        seconds=time.perf_counter() - started,
    )


def _require_old_space(now: Generation, head: Head) -> None:
    space = now.details.space
    if space.fingerprint != head.old:
        hint = " It was carried over by this head already." if space.fingerprint == head.fingerprint else ""
        raise UsageError(
            f"{now.folder} was embedded by {space.model} (fingerprint {space.fingerprint}), the head was fitted to "
            f"rows of a model with fingerprint {head.old}.{hint} Fit one to embeddings of {space.model}."
        )
    if space.dimension != head.old_dimension:
        raise UsageError(
            f"The rows of {now.folder} have {space.dimension} dimensions, the head was fitted to {head.old_dimension}."
        )


def _write_rows(folder: Path, now: Generation, head: Head) -> Written:
    def write(kind: str, tuning: Tuning) -> Written:
        blocks = chain.from_iterable(map(living_blocks, now.selected))
        padded = _padded(blocks, head.dimension - head.old_dimension)
        return write_segment(folder, 0, padded, now.rows, dimension=head.dimension, kind=kind, tuning=tuning)

    try:
        return write(choose_kind(now.details.kind, len(now)), Tuning(**now.details.tuning))
    except UsageError as error:
        say(f"The kind {now.details.kind} no longer fits, a flat segment is made: {error}")
        return write("flat", Tuning())


def _padded(blocks: Iterable[Float[Array, "_ D"]], extra: int) -> Iterator[Float[Array, "_ S"]]:
    for block in blocks:
        yield np.pad(block, ((0, 0), (0, extra)))


def _write_manifest(folder: Path, now: Generation, space: Space, written: Written | None) -> None:
    files = written.files if written else {}
    details: Details = replace(
        now.details,
        space=space,
        catalogue=catalogue_file(_GENERATION),
        segments=(written.segment,) if written else (),
        next_segment=1,
        tombstones="",
        evidence={},
    )
    checksums = [files[name].sha256 for name in sorted(files)]
    manifest = replace(
        now.manifest,
        fingerprint=fingerprint_of(now.manifest.fingerprint, "upgrade", space.fingerprint, *checksums),
        generation=_GENERATION,
        counts={"rows": len(now), "dead": 0},
        configuration={"index": str(now.folder.absolute()), "head": space.model},
        inputs=now.manifest.inputs | {"model": space.fingerprint, "index": now.manifest.fingerprint},
        files=files,
        details=asdict(details),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    write_manifest(folder, manifest)
