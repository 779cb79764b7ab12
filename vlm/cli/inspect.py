"""Look into shards: counts, sizes, captions, corrupt and duplicate samples, and a contact sheet."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.console import show_fields, show_json, show_table

if TYPE_CHECKING:
    from vlm.data.inspection.findings import ColumnStats, Inspection, LanguageStats
    from vlm.pages import Distribution

logger = logging.getLogger(__name__)

_MAX_BAD_SHOWN = 20
_MAX_VALUES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm inspect`."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to look into."""

    sample: int | None = None
    """Look at no more than so many samples, evenly spread; all if not given."""

    selection: Path | None = None
    """Look only at what a selection of vlm curate keeps."""

    tokenizer: str = ""
    """Count tokens too: clip, a SentencePiece .model file, or a tokenizer folder."""

    context_length: int | None = None
    """Tokens past which captions are cut; that of the tokenizer if not given."""

    near_limit: int = 100_000
    """Look for pictures that resemble each other among no more samples than that."""

    workers: int = 0
    """Processes that read and decode."""

    html: Path | None = None
    """Write a page with histograms and pictures here."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Inspect, show, and name what is damaged."""
    from vlm.data.inspection.contact_sheet import contact_sheet
    from vlm.data.inspection.inspection import inspect_shards
    from vlm.data.shards import expand_shards
    from vlm.files import check_parent_exists, write_text

    if arguments.html:
        check_parent_exists(arguments.html)
    found = inspect_shards(
        expand_shards(arguments.shards),
        sample=arguments.sample,
        workers=arguments.workers,
        selection=_selection(arguments.selection),
        tokenizer=arguments.tokenizer,
        context_length=arguments.context_length,
        near_limit=arguments.near_limit,
    )
    if arguments.html:
        write_text(arguments.html, contact_sheet(found, title=arguments.shards))
        logger.info(f"Page: {arguments.html}")
    if arguments.json:
        show_json(found.facts())
    else:
        show_inspection(found)


def show_inspection(found: "Inspection") -> None:
    """Tables for people: facts, captions by language, metadata, what is damaged or corrupt."""
    show_fields(_facts(found))
    has_tokens = found.context_length is not None
    columns = ["language", "captions", "distinct", "a picture", "words", "characters"]
    columns += ["tokens", f"over {found.context_length}"] if has_tokens else []
    show_table(columns, [_language(code, facts, has_tokens) for code, facts in found.languages.items()])
    most = [[name, column.samples, column.distinct, _values(column)] for name, column in found.columns.items()]
    if most:
        show_table(["metadata", "samples", "distinct texts", "most frequent"], most)
    bad = [*found.damaged, *found.corrupt][:_MAX_BAD_SHOWN]
    if bad:
        rows = [[Path(b.shard).name, b.key, "" if b.offset is None else b.offset, b.reason, b.detail] for b in bad]
        show_table(["bad in", "key", "at byte", "reason", "detail"], rows)


def _facts(found: "Inspection") -> dict[str, Any]:
    from vlm.pages import format_bytes

    facts: dict[str, Any] = {"shards": found.shards, "samples": found.samples}
    if found.selected is not None:
        facts["kept by the selection"] = found.selected
    facts |= {
        "size of pictures": format_bytes(found.image_bytes),
        "looked at": found.looked_at,
        "formats": _counts(found.formats),
        "modes": _counts(found.traits) or "nothing special",
        "width in pixels": _range(found.widths),
        "height in pixels": _range(found.heights),
        "width / height": _range(found.aspects),
        "kilobytes a picture": _range(found.sizes, per=1000),
        "duplicate pictures": found.duplicate_pictures,
    }
    if found.near_duplicates is not None:
        facts["look like an earlier one"] = found.near_duplicates
    return facts | {
        "duplicate keys": found.duplicate_keys,
        "damaged shards": len(found.damaged),
        "corrupt samples": f"{found.unusable:,} ({_counts(found.reasons)})" if found.reasons else 0,
    }


def _language(code: str, facts: "LanguageStats", has_tokens: bool) -> list[Any]:
    row = [code or "unnamed", facts.captions, facts.distinct]
    row += map(_range, (facts.per_picture, facts.words, facts.characters))
    if has_tokens:
        row += [_range(facts.tokens), f"{facts.cut / max(facts.captions, 1):.1%}"]
    return row


def _selection(path: Path | None) -> Any:
    if path is None:
        return None
    from vlm.data.selection import read_selection

    return read_selection(path)


def _values(column: "ColumnStats") -> str:
    most = dict(list(column.most.items())[:_MAX_VALUES_SHOWN])
    return _counts(most) if most else "each once" if column.distinct else "no texts"


def _counts(times: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in times.items())


def _range(distribution: "Distribution | None", per: float = 1) -> str:
    if distribution is None:
        return ""
    return " – ".join(
        f"{value / per:.3g}" if per != 1 or distribution.is_log else f"{value:g}"
        for value in (distribution.least, distribution.median, distribution.most)
    )
