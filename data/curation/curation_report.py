"""`vlm curate --html`: what each filter keeps and drops, as a page with examples."""

from dataclasses import dataclass

import numpy as np

from vlm.data.curation.pipeline import CurationResult, FilterStep
from vlm.data.curation.sample_table import SampleTable
from vlm.data.decode import jpeg_thumbnail, open_image
from vlm.data.tar import ShardReader
from vlm.errors import BadSample
from vlm.pages import Provenance, render

_MAX_DROPPED = 18
_MAX_KEPT = 9
_THUMBNAIL_PIXELS = 320


def render_curation_report(curated: CurationResult, *, title: str, provenance: Provenance | None = None) -> str:
    """The page: the table of steps, and for each filter some of the samples it dropped and kept, with the reason."""
    columns, rows = step_rows(curated)
    return render(
        "curation.html",
        provenance=provenance,
        title=title,
        selection=curated.selection,
        columns=dict(zip(columns, range(len(columns)), strict=True)),
        rows=rows,
        steps=[_step_examples(step, curated.sample_table) for step in curated.steps],
    )


def step_rows(curated: CurationResult) -> tuple[list[str], list[list[str | int]]]:
    """The table of steps: the column names, and a row for each step; the scan with its unusable samples is first."""
    columns = ["step", "before", "kept", "dropped", "visits"]
    num_samples = len(curated.sample_table)
    num_unusable = sum(curated.corrupt.values())
    num_usable = num_samples - num_unusable
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in curated.corrupt.items())
    rows: list[list[str | int]] = [
        [f"scan: {reasons or 'all usable'}", num_samples, num_usable, num_unusable, num_usable]
    ]
    for step in curated.steps:
        name = step.configured.shown()
        if step.result.without_value:
            name += f" ({step.result.without_value:,} without value)"
        rows.append([name, step.before, step.kept, step.dropped, step.visits])
    return columns, rows


@dataclass(frozen=True, kw_only=True)
class _Thumbnail:
    """A small image of a sample; `jpeg` is None where it cannot be read, for the reason in `error`."""

    key: str
    jpeg: bytes | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class _Example:
    """A sample that a filter dropped or kept; of a duplicate, the sample it repeats is the second image.

    caption: the first; None where no filter looked at captions, empty where the sample has none.
    """

    key: str
    reason: str
    times: int
    caption: str | None
    images: list[_Thumbnail]


@dataclass(frozen=True, kw_only=True)
class _StepExamples:
    """A step with examples of what it dropped and kept; without any where it changed nothing."""

    step: FilterStep
    dropped: list[_Example]
    kept: list[_Example]


def _step_examples(step: FilterStep, sample_table: SampleTable) -> _StepExamples:
    # a step that only repeats samples keeps all, and changes the visits
    if step.kept == step.before and step.visits == step.before:
        return _StepExamples(step=step, dropped=[], kept=[])

    def examples(is_member: np.ndarray, limit: int) -> list[_Example]:
        # evenly spaced, not the first: shards are often sorted by source
        positions = _evenly_spaced(np.flatnonzero(is_member), limit)
        return [_example(step, position, sample_table) for position in positions.tolist()]

    is_kept = step.times > 0
    return _StepExamples(
        step=step,
        dropped=examples(step.was_remaining & ~is_kept, _MAX_DROPPED),
        kept=examples(is_kept, _MAX_KEPT),
    )


def _evenly_spaced(positions: np.ndarray, limit: int) -> np.ndarray:
    number = min(limit, len(positions))
    return positions[(np.arange(number, dtype=np.int64) * len(positions)) // max(number, 1)]


def _example(step: FilterStep, position: int, sample_table: SampleTable) -> _Example:
    images = [_thumbnail(position, sample_table)]
    duplicates_of = step.result.duplicates_of
    if duplicates_of is not None and duplicates_of[position] >= 0:
        # side by side, so that a wrong match is seen at a glance
        images.append(_thumbnail(int(duplicates_of[position]), sample_table))
    return _Example(
        key=sample_table.key(position),
        reason=step.result.why(position),
        times=int(step.times[position]),
        caption=_first_caption(position, sample_table),
        images=images,
    )


def _first_caption(position: int, sample_table: SampleTable) -> str | None:
    # only the columns that a filter requires were scanned
    if "captions" not in sample_table.table.column_names:
        return None
    captions = sample_table.table.column("captions")[position].as_py()
    return captions[0]["text"] if captions else ""


def _thumbnail(position: int, sample_table: SampleTable) -> _Thumbnail:
    key = sample_table.key(position)
    url, number = sample_table.where(position)
    reader = ShardReader(url)
    try:
        image = open_image(reader.read(number).image)
        return _Thumbnail(key=key, jpeg=jpeg_thumbnail(image, pixels=_THUMBNAIL_PIXELS))
    except BadSample as error:
        return _Thumbnail(key=key, error=str(error))
    finally:
        reader.close()
