"""The result of an inspection: plain data, and the page of `vlm inspect --html` with histograms and a contact sheet."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vlm.data.inspection.distribution import Distribution
from vlm.data.samples import UNNAMED, Captions
from vlm.pages import Provenance, render


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
class Inspection:
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

    def facts(self) -> dict[str, Any]:
        """All but the images, as plain values."""
        values = asdict(self)
        del values["shown"]
        return values


_MAX_RECORDS = 100
_MAX_VALUES = 8


def contact_sheet(inspection: Inspection, *, title: str, provenance: Provenance | None = None) -> str:
    """The page: counts, damaged and unusable samples, histograms, metadata, and images with their captions."""
    languages = inspection.languages
    # in one table: a trait must not overwrite the count of a format of the same name
    traits = {name: count for name, count in inspection.traits.items() if name not in inspection.formats}
    return render(
        "contact_sheet.html",
        provenance=provenance,
        title=title,
        inspection=inspection,
        num_captions=sum(language.captions for language in languages.values()),
        num_truncated=sum(language.cut for language in languages.values()),
        is_multilingual=len(languages) > 1 or any(code != UNNAMED for code in languages),
        formats_and_modes=inspection.formats | traits,
        max_records=_MAX_RECORDS,
        max_values=_MAX_VALUES,
    )
