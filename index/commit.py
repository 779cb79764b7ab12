"""The step from one generation to the next: drafted from the one before, then committed by its manifest."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm import __version__
from vlm.files import fingerprint_of, replacing
from vlm.index.generations import Generation
from vlm.index.kinds import settings_of
from vlm.index.layout import Details, WritePoint, tombstones_file
from vlm.index.merging import settle
from vlm.index.segments import Written
from vlm.manifest import Manifest, record_file, write_manifest
from vlm.tensors import Array, Int64


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """The next generation.

    manifest: all but the line of its tombstones' file. dead: rows of its segments that are dead, sorted.
    """

    manifest: Manifest
    details: Details
    dead: Int64[Array, " N"]

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.manifest.generation


def draft_next(
    now: Generation, *, what: str, keep: int, written: Written | None, dying: Int64[Array, " N"], **details: Any
) -> Draft:
    """The generation after `now`.

    Args:
        what: the kind of change, part of the fingerprint.
        keep: how many of the first segments stay; all others were written anew, or are gone.
        written: the new segment, after those kept.
        dying: rows that die, sorted.
        details: what else changes in them.
    """
    dead = np.union1d(now.dead, dying)
    kept, dead = settle([selected.segment for selected in now.selected[:keep]], dead)
    segments = [segment.described for segment in kept] + ([written.segment] if written else [])
    files = {name: now.manifest.files[name] for segment in kept for name in segment.described.files}
    files |= written.files if written else {}
    number = now.number + 1
    changed = replace(
        now.details,
        segments=tuple(segments),
        next_segment=written.segment.number + 1 if written else now.details.next_segment,
        tombstones=tombstones_file(number) if len(dead) else "",
        **details,
    )
    checksums = [files[name].sha256 for name in sorted(files)]
    manifest = replace(
        now.manifest,
        fingerprint=fingerprint_of(now.manifest.fingerprint, what, dead.tobytes(), *checksums),
        generation=number,
        counts={"rows": sum(segment.rows for segment in segments) - len(dead), "dead": len(dead)},
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    return Draft(manifest=manifest, details=changed, dead=dead)


def searched_with(draft: Draft, *, effort: int | None, rerank: int) -> Draft:
    """The same, with another effort and re-ranking of its largest segment, also when it is compacted."""
    largest = max(draft.details.segments, key=lambda segment: segment.rows)
    told = settings_of(largest.kind, effort=effort, rerank=rerank)
    changed = replace(
        draft.details,
        segments=tuple(
            replace(segment, parameters=segment.parameters | told, rerank=rerank) if segment is largest else segment
            for segment in draft.details.segments
        ),
        tuning=draft.details.tuning | told,
    )
    return replace(draft, details=changed, manifest=replace(draft.manifest, details=asdict(changed)))


def commit(folder: Path, draft: Draft, change_catalogue: Callable[[], None], *, reached: WritePoint) -> None:
    """Write the tombstones, change the catalogue, and replace the manifest: only the last of these counts."""
    files = dict(draft.manifest.files)
    if len(draft.dead):
        path = folder / draft.details.tombstones
        path.parent.mkdir(exist_ok=True)
        reached("tombstones")
        with replacing(path) as file:
            np.save(file, draft.dead, allow_pickle=False)
            reached("tombstones before their rename")
        files[draft.details.tombstones] = record_file(path)
    reached("catalogue")
    change_catalogue()
    reached("manifest")
    write_manifest(folder, replace(draft.manifest, files=files))
    reached("manifest written")
