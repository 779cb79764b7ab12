"""`vlm inspect`: what shards hold, as tables, JSON and a page."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.cli.options import JsonOption, ShardsArgument, WorkersOption, call_options
from vlm.console import format_bytes, pluralize, show_fields, show_json, show_table

if TYPE_CHECKING:
    from vlm.data.inspection.findings import ColumnStats, Distribution, Inspection, LanguageStats

logger = logging.getLogger(__name__)

_MAX_BAD_SHOWN = 20
_MAX_VALUES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Inspect shards: counts, sizes, captions, corrupt and duplicate samples, and a contact sheet."""

    shards: ShardsArgument

    sample: int | None = None
    """Inspect at most this many samples, evenly spread; None inspects all."""

    selection: Path | None = None
    """Inspect only samples of this selection file of vlm curate."""

    tokenizer: str = ""
    """Count tokens, too: clip, a SentencePiece .model file, or a tokenizer folder."""

    context_length: int | None = None
    """Context length to report truncated captions for; None uses the tokenizer's."""

    near_limit: int = 100_000
    """Search for near-duplicate images among at most this many samples."""

    workers: WorkersOption = 0

    html: Path | None = None
    """Write a page with histograms and images to this file."""

    json: JsonOption = False

    def run(self) -> None:
        """Inspect, show, and list what is damaged."""
        from vlm.api.curation import inspect

        inspection = inspect(**call_options(self))
        if self.json:
            show_json(inspection)
        else:
            show_inspection(inspection)


def show_inspection(inspection: "Inspection") -> None:
    """Tables of sizes, captions by language, metadata, and what is damaged or corrupt."""
    show_fields(_overview_fields(inspection))
    columns = ["language", "captions", "distinct", "per image", "words", "characters"]
    if inspection.context_length is not None:
        columns += ["tokens", f"over {inspection.context_length}"]
    rows = [_language_row(code, stats, inspection) for code, stats in inspection.languages.items()]
    show_table(columns, rows)
    if inspection.caption_lines:
        samples = inspection.caption_lines["samples"]
        captions = inspection.caption_lines["captions"]
        logger.info(
            f"{samples:,} samples have captions of several lines. If every line is a caption ({captions:,} in all), "
            "repack them: vlm pack SHARDS OUT --caption-lines"
        )
    if inspection.garbled_captions:
        logger.info(
            f"{pluralize(inspection.garbled_captions, 'caption')} with bytes that are not UTF-8. If the texts have "
            "another encoding, repack them: vlm pack SHARDS OUT --encoding latin-1"
        )
    rows = []
    for name, column in inspection.columns.items():
        rows.append([name, column.samples, column.distinct, _most_frequent(column)])
    if rows:
        show_table(["metadata", "samples", "distinct texts", "most frequent"], rows)
    rows = []
    # damaged shards first, since each of them loses many samples
    for bad in [*inspection.damaged, *inspection.corrupt][:_MAX_BAD_SHOWN]:
        offset = "" if bad.offset is None else bad.offset
        rows.append([Path(bad.shard).name, bad.key, offset, bad.reason, bad.detail])
    if rows:
        show_table(["bad in", "key", "at byte", "reason", "detail"], rows)


def _overview_fields(inspection: "Inspection") -> dict[str, Any]:
    fields: dict[str, Any] = {"shards": inspection.shards, "samples": inspection.samples}
    if inspection.selected is not None:
        fields["selected samples"] = inspection.selected
    fields |= {
        "total size of images": format_bytes(inspection.image_bytes),
        "inspected samples": inspection.looked_at,
        "formats": _counts(inspection.formats),
        "modes": _counts(inspection.traits) or "RGB",
        "width in pixels": _range(inspection.widths),
        "height in pixels": _range(inspection.heights),
        "width / height": _range(inspection.aspects),
        "kilobytes per image": _range(inspection.sizes, per=1000),
        "duplicate images": inspection.duplicate_pictures,
    }
    if inspection.near_duplicates is not None:
        fields["near-duplicate images"] = inspection.near_duplicates
    if inspection.garbled_captions:
        fields["captions not in UTF-8"] = inspection.garbled_captions
    if inspection.unused_members:
        fields["members not used"] = _counts({f".{name}": count for name, count in inspection.unused_members.items()})
    if inspection.num_repeated_members:
        first = next(iter(inspection.repeated_members))
        fields["member names that come twice"] = f"{inspection.num_repeated_members:,} (as in {first})"
    reasons = inspection.reasons
    return fields | {
        "duplicate keys": inspection.duplicate_keys,
        "damaged shards": len(inspection.damaged),
        "corrupt samples": f"{inspection.unusable:,} ({_counts(reasons)})" if reasons else 0,
    }


def _language_row(code: str, stats: "LanguageStats", inspection: "Inspection") -> list[Any]:
    distributions = (stats.per_picture, stats.words, stats.characters)
    row = [code or "unnamed", stats.captions, stats.distinct, *map(_range, distributions)]
    if inspection.context_length is not None:
        row += [_range(stats.tokens), f"{stats.cut / max(stats.captions, 1):.1%}"]
    return row


def _most_frequent(column: "ColumnStats") -> str:
    most = dict(list(column.most.items())[:_MAX_VALUES_SHOWN])
    if most:
        return _counts(most)
    return "all distinct" if column.distinct else "no texts"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _range(distribution: "Distribution | None", per: float = 1) -> str:
    """Minimum – median – maximum."""
    if distribution is None:
        return ""
    # orders of magnitude need three digits; counts are shown whole
    values = (distribution.least, distribution.median, distribution.most)
    if per != 1 or distribution.is_log:
        return " – ".join(f"{value / per:.3g}" for value in values)
    return " – ".join(f"{value:g}" for value in values)
