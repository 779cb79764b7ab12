"""The result of an inspection: plain data with distributions, and the page of `vlm inspect --html` that shows it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlm.data.samples import UNNAMED, Captions
from vlm.pages import Provenance, render
from vlm.results import Result, json_values

BINS = 24


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Minimum, median and maximum of some numbers, and their histogram.

    edges: bounds of the bins, one more than there are counts; bins of whole numbers exclude their upper bound.
    is_log: the bins grow by a constant factor and the numbers need not be whole.
    """

    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_log: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether all numbers are equal."""
        return self.least == self.most

    def bin_bounds(self, number: int) -> tuple[float, float]:
        """The first and the last number of a bin.

        >>> distribution_of_counts({10: 1, 57: 2}).bin_bounds(1)
        (12, 13)
        """
        first, end = self.edges[number], self.edges[number + 1]
        return first, end if self.is_log else end - 1


def distribution_of_counts(counts: Mapping[int, int], *, bins: int = BINS) -> Distribution:
    """The distribution of whole numbers, given how often each occurs, in bins of whole width.

    >>> distribution_of_counts({1: 2, 2: 1, 4: 1}).median
    1.5
    """
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    least, most = int(values[0]), int(values[-1])
    # rounded up: whole numbers need bins of whole width, or some bins would hold one number more than others
    width = -(-(most - least + 1) // bins)
    edges = np.arange(least, most + width + 1, width)
    histogram, _ = np.histogram(values, bins=edges, weights=weights)

    # of an even number of values the median is the mean of the two in the middle
    cumulative = np.cumsum(weights)
    total = cumulative[-1]
    middle = values[np.searchsorted(cumulative, [(total + 1) // 2, total // 2 + 1])]
    return Distribution(
        least=least,
        median=float(middle.mean()),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(histogram.astype(np.int64).tolist()),
    )


def log_distribution(values: np.ndarray, *, bins: int = BINS) -> Distribution:
    """The distribution of numbers above 0, in bins that grow by a constant factor.

    >>> log_distribution(np.array([1.0, 2.0, 4.0, 8.0]), bins=3).counts
    (1, 1, 2)
    """
    least, most = float(values.min()), float(values.max())
    if least == most:
        edges, histogram = np.array([least, most]), np.array([len(values)])
    else:
        edges = np.geomspace(least, most, bins + 1)
        # geomspace rounds; a value at either end must not fall outside
        edges[0], edges[-1] = least, most
        histogram, _ = np.histogram(values, bins=edges)
    return Distribution(
        least=least,
        median=float(np.median(values)),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(histogram.tolist()),
        is_log=True,
    )


@dataclass(frozen=True, kw_only=True)
class LanguageStats:
    """Captions of one language; an empty code is for captions that do not name theirs.

    tokens: of a caption with its start and end, uncut; None where no tokenizer was given.
    cut: captions longer than the context.
    """

    captions: int
    distinct: int
    per_picture: Distribution
    words: Distribution
    characters: Distribution
    tokens: Distribution | None = None
    cut: int = 0


@dataclass(frozen=True, kw_only=True)
class ColumnStats:
    """A column of the metadata: the samples that have it, and its most frequent texts (or list entries).

    distinct: different texts; a lower bound where `is_exact` is False.
    """

    samples: int
    distinct: int
    is_exact: bool
    most: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A sample that cannot be used, or a whole shard that ends early (then without a key and an offset).

    offset: of its first part in the tar, in bytes.
    """

    shard: str
    key: str
    reason: str
    detail: str
    offset: int | None = None


@dataclass(frozen=True, kw_only=True)
class ContactSheetSample:
    """A sample for the contact sheet; `image` is a small JPEG."""

    key: str
    image: bytes = field(repr=False)
    width: int
    height: int
    captions: Captions


@dataclass(frozen=True, kw_only=True)
class Inspection(Result):
    """What shards hold.

    samples, image_bytes: of all shards; everything else is about the `looked_at` samples among them.
    selected: samples left by the selection; None without one.
    damaged: shards that end early, cannot be read, or hold no samples. corrupt: the first samples that cannot be used;
        reasons counts all of them.
    traits: images with alpha, a palette, CMYK, grey or 16-bit values, several frames, an EXIF orientation.
    sizes: bytes an image. aspects: width / height.
    duplicate_pictures: samples whose image, bit for bit, an earlier one has; duplicate_keys likewise.
    near_duplicates: samples that look like an earlier one, the former included; None if they were not searched.
    repeated_captions: the most frequent captions that occur more than once, with their numbers.
    context_length: of the tokenizer, if one was given.
    caption_lines: samples whose captions go over several lines, and the captions there are if each line is one.
    garbled_captions: captions with bytes that are not UTF-8, each of which reads as �.
    repeated_members: by shard and key, how often a member name came again within a sample and began another one of the
        same key; the most frequent. num_repeated_members: of all.
    unused_members: members of the shards that are not part of any sample, by extension.
    """

    shards: int
    samples: int
    selected: int | None
    image_bytes: int
    looked_at: int
    damaged: tuple[BadRecord, ...]
    corrupt: tuple[BadRecord, ...]
    reasons: dict[str, int]
    formats: dict[str, int]
    traits: dict[str, int]
    widths: Distribution | None
    heights: Distribution | None
    aspects: Distribution | None
    sizes: Distribution | None
    languages: dict[str, LanguageStats]
    context_length: int | None
    caption_lines: dict[str, int] | None
    garbled_captions: int
    repeated_members: dict[str, int]
    num_repeated_members: int
    unused_members: dict[str, int]
    columns: dict[str, ColumnStats]
    duplicate_pictures: int
    duplicate_keys: int
    near_duplicates: int | None
    repeated_captions: dict[str, int]
    shown: tuple[ContactSheetSample, ...]

    @property
    def unusable(self) -> int:
        """Samples that cannot be used."""
        return sum(self.reasons.values())

    def to_json(self) -> dict[str, Any]:
        """All but the images."""
        values = asdict(self)
        del values["shown"]
        return json_values(values)


_MAX_RECORDS = 100
_MAX_VALUES = 8


def contact_sheet(inspection: Inspection, *, title: str, provenance: Provenance | None = None) -> str:
    """The page: counts, damaged and unusable samples, histograms, metadata, and images with their captions."""
    languages = inspection.languages
    formats_and_modes = dict(inspection.formats)
    for name, count in inspection.traits.items():
        # in one table: a trait must not overwrite the count of a format of the same name
        formats_and_modes.setdefault(name, count)
    return render(
        "contact_sheet.html",
        provenance=provenance,
        title=title,
        inspection=inspection,
        num_captions=sum(language.captions for language in languages.values()),
        num_truncated=sum(language.cut for language in languages.values()),
        is_multilingual=len(languages) > 1 or any(code != UNNAMED for code in languages),
        formats_and_modes=formats_and_modes,
        max_records=_MAX_RECORDS,
        max_values=_MAX_VALUES,
    )
