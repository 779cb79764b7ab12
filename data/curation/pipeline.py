"""Curation: the table of filters, and applying some in their order over shards, which gives a selection.

Adding a filter is a function in `caption_filters` or `image_filters` and an entry in `FILTERS`.
`render_curation_report` (`vlm curate --html`) shows what each filter keeps and drops, with examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.curation import caption_filters, image_filters
from vlm.data.curation.filter import ConfiguredFilter, Filter, FilterContext, FilterResult, NoParameters
from vlm.data.curation.sample_table import RequiredColumn, SampleTable, scan
from vlm.data.curation.score_columns import SCORES, ScoreColumns
from vlm.data.decode import jpeg_thumbnail, open_image
from vlm.data.selection import (
    MAX_TIMES,
    SelectedShard,
    Selection,
    add,
    intersect_selections,
    reweight,
    stochastic_round,
    subtract_selection,
)
from vlm.data.tar import ShardReader
from vlm.errors import BadSample, UsageError
from vlm.files import compute_fingerprint
from vlm.pages import Provenance, render
from vlm.ray_engine import RayCluster

_SIZE = frozenset({RequiredColumn.SIZE})
_CAPTIONS = frozenset({RequiredColumn.CAPTIONS})
_FILE = frozenset({RequiredColumn.SIZE, RequiredColumn.DIGEST})
_SIGNATURE = frozenset({RequiredColumn.SIZE, RequiredColumn.SIGNATURE})
_BOTH = frozenset({RequiredColumn.DIGEST, RequiredColumn.SIGNATURE})
_NONE: frozenset[RequiredColumn] = frozenset()


FILTERS: dict[str, Filter] = {
    "usable": Filter(
        "drop what cannot be decoded",
        NoParameters,
        image_filters.filter_by_decoding,
        frozenset({RequiredColumn.DECODED}),
    ),
    "size": Filter(
        "shorter side at least min, longer at most max, in pixels",
        image_filters.SizeLimits,
        image_filters.filter_by_size,
        _SIZE,
    ),
    "aspect": Filter(
        "longer side at most max times the shorter", image_filters.AspectLimit, image_filters.filter_by_aspect, _SIZE
    ),
    "words": Filter(
        "a caption of min to max words, a character counting as one in Chinese, Japanese, Thai",
        caption_filters.LengthLimits,
        caption_filters.filter_by_words,
        _CAPTIONS,
    ),
    "characters": Filter(
        "a caption of min to max characters",
        caption_filters.LengthLimits,
        caption_filters.filter_by_characters,
        _CAPTIONS,
    ),
    "language": Filter(
        "a caption in any of the languages, with a share of at least script of its letters in their script",
        caption_filters.Languages,
        caption_filters.filter_by_language,
        _CAPTIONS,
    ),
    "repeated-caption": Filter(
        "no caption on more than max samples",
        caption_filters.CaptionLimit,
        caption_filters.limit_repeated_captions,
        _CAPTIONS,
    ),
    "exact-duplicates": Filter(
        "one of the samples with equal files", NoParameters, image_filters.drop_exact_duplicates, _FILE
    ),
    "near-duplicates": Filter(
        "one of the images that differ by encoding, size, a little brightness or a crop by a few pixels",
        image_filters.HashDistance,
        image_filters.drop_near_duplicates,
        _SIGNATURE,
    ),
    "embedding-duplicates": Filter(
        "one of the samples with nearly equal embeddings",
        NoParameters,
        image_filters.drop_embedding_duplicates,
        _SIZE,
        "duplicates",
    ),
    "decontaminate": Filter(
        "nothing that the evaluation shards also hold",
        image_filters.Decontamination,
        image_filters.decontaminate,
        _BOTH,
    ),
    "similarity": Filter(
        "image and caption alike: min cosine, or the top share",
        image_filters.MinimumScore,
        image_filters.filter_by_similarity,
        _NONE,
        "similarity",
    ),
    "near": Filter(
        "near to a target set: min, or the top share",
        image_filters.MinimumScore,
        image_filters.filter_by_target,
        _NONE,
        "near",
    ),
    "typical": Filter(
        "the k, or the share, most typical",
        image_filters.KeepCount,
        image_filters.keep_typical,
        _NONE,
        "centre-distance",
    ),
    "atypical": Filter(
        "the k, or the share, least typical",
        image_filters.KeepCount,
        image_filters.keep_atypical,
        _NONE,
        "centre-distance",
    ),
    "cluster-balance": Filter(
        "at most cap expected of a cluster", image_filters.ClusterCap, image_filters.balance_clusters, _NONE, "cluster"
    ),
    "balance": Filter(
        "frequent concepts less often, after MetaCLIP",
        caption_filters.ConceptCap,
        caption_filters.balance_concepts,
        _CAPTIONS,
    ),
    "listed": Filter("what a file of keys names", image_filters.KeyList, image_filters.keep_listed, _NONE),
    "sample": Filter("a share, drawn", image_filters.KeepShare, image_filters.keep_random_share, _NONE),
    "weight": Filter("everything so many times", image_filters.Repeats, image_filters.apply_weight, _NONE),
}
"""Each filter by its name, as in `--filter NAME:PARAMETER=VALUE`."""


@dataclass(frozen=True, kw_only=True)
class FilterStep:
    """One filter as it was applied.

    before, kept: distinct samples; visits: of an epoch; was_remaining (bool [N]), times (uint16 [N]): of each sample.
    """

    configured: ConfiguredFilter
    result: FilterResult
    before: int
    kept: int
    visits: int
    was_remaining: np.ndarray
    times: np.ndarray

    @property
    def dropped(self) -> int:
        """Samples it dropped."""
        return self.before - self.kept

    def described(self) -> dict[str, Any]:
        """For the lineage, as plain JSON."""
        counts = {"before": self.before, "kept": self.kept, "visits": self.visits}
        if self.configured.sample_filter.score:
            counts["without_value"] = self.result.without_value
        return {"step": "rule", **self.configured.described(), **counts, **self.result.record}


@dataclass(frozen=True, kw_only=True)
class CurationResult:
    """A selection with how it came about. corrupt: samples that cannot be used, by reason."""

    selection: Selection
    steps: tuple[FilterStep, ...]
    sample_table: SampleTable
    corrupt: dict[str, int]

    def summary(self, selection: Selection) -> dict[str, Any]:
        """The counts of the final selection as plain JSON."""
        return {
            "samples": selection.samples,
            "kept": selection.kept,
            "visits": selection.visits,
            "corrupt": self.corrupt,
            "fingerprint": selection.fingerprint,
        }

    def report(self, selection: Selection) -> dict[str, Any]:
        """Counts, lineage, and the curve of each filter that balances, as plain JSON."""
        curves: list[dict[str, Any]] = []
        for position, step in enumerate(self.steps):
            if step.result.curve:
                # several filters may have one name, hence the place
                curves.append({"rule": step.configured.name, "place": position, "curve": list(step.result.curve)})
        return {**self.summary(selection), "lineage": list(selection.lineage), "curves": curves}


def curate(
    shards: Sequence[str],
    filters: Sequence[ConfiguredFilter],
    *,
    columns: ScoreColumns | None = None,
    seed: int = 0,
    workers: int = 1,
    allow_damage: bool = False,
    cluster: RayCluster | None = None,
) -> CurationResult:
    """Apply the filters in their order, each on what the earlier ones left; the times a sample gets multiply.

    A sample found unusable, as far as the filters require the scan to look, is left out before the first filter. A
    fractional weight is rounded at random from (seed, position of the filter, its name), so the result depends on
    nothing else. `cluster`: scan on a Ray cluster instead of by `workers`.

    Raises:
        UsageError: a filter requires a stored column that is not given.
    """
    score_columns = columns or ScoreColumns()
    # before the scan, which may take hours
    for configured in filters:
        _check_scores_exist(configured, score_columns)

    def scan_shards(urls: Sequence[str], required_columns: frozenset[RequiredColumn]) -> SampleTable:
        return scan(urls, required_columns, workers=workers, allow_damage=allow_damage, cluster=cluster)

    # one scan for all filters: reading and decoding costs more than all of them together
    required_columns: frozenset[RequiredColumn] = frozenset()
    for configured in filters:
        required_columns |= configured.sample_filter.required_columns
    sample_table = scan_shards(shards, required_columns)

    times = sample_table.is_usable.astype(np.uint16)  # as a selection stores them
    steps: list[FilterStep] = []
    for number, configured in enumerate(filters):
        # position and name: the same filter twice draws again, and another filter in its place draws other numbers
        rng = np.random.default_rng(int(compute_fingerprint(f"{seed}/{number}/{configured.name}"), 16))
        is_remaining = times > 0
        context = FilterContext(
            sample_table=sample_table, is_remaining=is_remaining, columns=score_columns, rng=rng, scan=scan_shards
        )
        result = configured.sample_filter.apply(context, configured.parameters)
        # the generator continues after the filter: a filter that draws shifts its own rounding, no other filter's
        factors = stochastic_round(result.weights, rng)
        # in 64 bits, since the product of two uint16 wraps around
        times = np.minimum(times.astype(np.int64) * factors, MAX_TIMES).astype(np.uint16)
        step = FilterStep(
            configured=configured,
            result=result,
            before=int(is_remaining.sum()),
            kept=int(np.count_nonzero(times)),
            visits=int(times.sum(dtype=np.int64)),
            was_remaining=is_remaining,
            times=times,
        )
        steps.append(step)

    corrupt = _corrupt_by_reason(sample_table)
    first_record = {"step": "curate", "seed": seed, "samples": len(sample_table), "corrupt": corrupt}
    lineage = (first_record, *(step.described() for step in steps))
    return CurationResult(
        selection=_selection(sample_table, times, lineage),
        steps=tuple(steps),
        sample_table=sample_table,
        corrupt=corrupt,
    )


def compose_selections(
    selection: Selection,
    *,
    intersect: Sequence[Selection] = (),
    subtract: Sequence[Selection] = (),
    plus: Sequence[Selection] = (),
    weight: float = 1.0,
    seed: int = 0,
) -> Selection:
    """The selection intersected with others, less others, plus others, then reweighted, in this order."""
    for other in intersect:
        selection = intersect_selections(selection, other)
    for other in subtract:
        selection = subtract_selection(selection, other)
    for other in plus:
        selection = add(selection, other)
    return selection if weight == 1 else reweight(selection, weight, seed=seed)


def _check_scores_exist(configured: ConfiguredFilter, columns: ScoreColumns) -> None:
    score = configured.sample_filter.score
    if score and score not in columns:
        raise UsageError(
            f"--filter {configured.name} reads the stored score {score!r} ({SCORES[score][1]}), which no --columns "
            "FILE holds; compute it with vlm score EMBEDDINGS …"
        )


def _corrupt_by_reason(sample_table: SampleTable) -> dict[str, int]:
    corrupt: dict[str, int] = {}
    for count in sample_table.table.column("reason").value_counts().to_pylist():
        # a usable sample has an empty reason
        if count["values"]:
            corrupt[count["values"]] = count["counts"]
    return corrupt


def _selection(sample_table: SampleTable, times: np.ndarray, lineage: tuple[dict[str, Any], ...]) -> Selection:
    shards: list[SelectedShard] = []
    for shard in sample_table.shards:
        # the name without its folder: it is for people, shards are found by content
        name = shard.url.rpartition("/")[2]
        shards.append(SelectedShard(name=name, fingerprint=shard.fingerprint, samples=shard.samples))
    return Selection(shards=tuple(shards), times=tuple(np.split(times, sample_table.starts[1:-1])), lineage=lineage)


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
