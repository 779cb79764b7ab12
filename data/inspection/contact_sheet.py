"""An inspection as one HTML page that needs no other file, host or script."""

import base64
from html import escape
from typing import Any

from vlm.console import pluralize
from vlm.data.inspection.findings import BadRecord, ColumnStats, ContactSheetSample, Inspection, LanguageStats
from vlm.data.samples import UNNAMED
from vlm.pages import STYLE, bar_card, constant_card, format_aspect, format_bytes, histogram, table

_MAX_BAD_SHOWN = 100
_MAX_VALUES_SHOWN = 8


def contact_sheet(inspection: Inspection, *, title: str) -> str:
    """The page: facts, what is bad, histograms, metadata, and pictures with their captions."""
    sections = [
        _facts(inspection),
        _damaged(inspection.damaged),
        _corrupt(inspection.corrupt, inspection.unusable),
        _image_distributions(inspection),
        _caption_distributions(inspection),
        _columns(inspection),
        _images(inspection),
        _repeated(inspection),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{_lead(inspection)}</p></header>{"".join(sections)}'
        "</body></html>\n"
    )


def language_name(code: str) -> str:
    """A language as people see it."""
    return "unnamed" if code == UNNAMED else code


def _lead(inspection: Inspection) -> str:
    lead = f"{pluralize(inspection.samples, 'sample')} in {pluralize(inspection.shards, 'shard')}"
    considered = inspection.samples
    if inspection.selected is not None:
        considered = inspection.selected
        lead += f"; the selection keeps {considered:,}"
    if inspection.looked_at < considered:
        lead += f"; {inspection.looked_at:,} of them, evenly spread, were looked at"
    return lead


def _facts(inspection: Inspection) -> str:
    captions = sum(language.captions for language in inspection.languages.values())
    bad = inspection.unusable
    cards = [
        ("samples", f"{inspection.samples:,}", False),
        ("of pictures", format_bytes(inspection.image_bytes), False),
        ("captions", f"{captions:,}", False),
        ("language" if len(inspection.languages) == 1 else "languages", f"{len(inspection.languages)}", False),
        ("same pictures again", f"{inspection.duplicate_pictures:,}", False),
        ("same keys again", f"{inspection.duplicate_keys:,}", inspection.duplicate_keys > 0),
        ("cannot be used", f"{bad:,}", bad > 0),
        ("damaged shards", f"{len(inspection.damaged):,}", bool(inspection.damaged)),
    ]
    if inspection.near_duplicates is not None:
        cards.insert(5, ("look like an earlier one", f"{inspection.near_duplicates:,}", False))
    if inspection.context_length is not None:
        cut = sum(language.cut for language in inspection.languages.values())
        name = f"captions longer than {inspection.context_length} tokens"
        cards.insert(4, (name, f"{cut / max(captions, 1):.1%}", False))
    shown = "".join(
        f'<div class="card{" bad" if is_bad else ""}"><b>{value}</b><span>{escape(name)}</span></div>'
        for name, value, is_bad in cards
    )
    return f'<div class="facts">{shown}</div>'


def _image_distributions(inspection: Inspection) -> str:
    shown = _shapes(inspection)
    if inspection.sizes is not None:
        shown.append(histogram("Size of a picture", inspection.sizes, value_name=format_bytes, note="log scale"))
    if inspection.formats:
        special = {name: count for name, count in inspection.traits.items() if name not in inspection.formats}
        shown.append(bar_card("Formats and modes", inspection.formats | special, of=sum(inspection.formats.values())))
    return _section("Pictures", "".join(shown))


def _shapes(inspection: Inspection) -> list[str]:
    widths, heights, aspects = inspection.widths, inspection.heights, inspection.aspects
    if widths is None or heights is None or aspects is None:
        return []
    if widths.least == widths.most and heights.least == heights.most:
        return [constant_card("Width × height", f"{widths.least:,g} × {heights.least:,g}", note="pixels")]
    return [
        histogram("Width", widths, note="pixels"),
        histogram("Height", heights, note="pixels"),
        histogram("Width : height", aspects, value_name=format_aspect, note="log scale"),
    ]


def _caption_distributions(inspection: Inspection) -> str:
    return "".join(_language(code, facts, inspection) for code, facts in inspection.languages.items())


def _language(code: str, language: LanguageStats, inspection: Inspection) -> str:
    of = f" · {escape(language_name(code))}" if len(inspection.languages) > 1 or code != UNNAMED else ""
    has_words = language.words.most > 1
    cards = [
        histogram("Captions a picture", language.per_picture),
        histogram("Length", language.words if has_words else language.characters, note=_unit(has_words)),
    ]
    if language.tokens is not None:
        note = f"{language.cut / max(language.captions, 1):.1%} over {inspection.context_length}"
        cards.append(histogram("Tokens", language.tokens, note=note))
    note = f"{language.captions:,}, {language.distinct:,} of them distinct"
    return _section(f"Captions{of}", "".join(cards), note=note)


def _unit(has_words: bool) -> str:
    return "words" if has_words else "characters"


def _columns(inspection: Inspection) -> str:
    cards = [
        _column_card(name, column, inspection.looked_at) for name, column in inspection.columns.items() if column.most
    ]
    without = [name for name, column in inspection.columns.items() if not column.most]
    note = f"also {', '.join(without)}" if without else ""
    return _section("Metadata", "".join(cards), note=note)


def _column_card(name: str, column: ColumnStats, looked_at: int) -> str:
    note = f"{'' if column.is_exact else '≥ '}{column.distinct:,} values"
    if column.samples < looked_at:
        note += f"; {column.samples / looked_at:.0%} have it"
    return bar_card(name, dict(list(column.most.items())[:_MAX_VALUES_SHOWN]), of=column.samples, note=note)


def _section(title: str, cards: str, *, note: str = "") -> str:
    if not cards:
        return ""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f'<h2>{title}{small}</h2><div class="plots">{cards}</div>'


def _damaged(records: tuple[BadRecord, ...]) -> str:
    if not records:
        return ""
    rows = [[record.shard, record.reason, record.detail] for record in records[:_MAX_BAD_SHOWN]]
    return f"<h2>Damaged shards{_first(rows, len(records))}</h2>{table(['shard', 'reason', 'detail'], rows)}"


def _corrupt(records: tuple[BadRecord, ...], total: int) -> str:
    if not records:
        return ""
    shown = records[:_MAX_BAD_SHOWN]
    rows = [[record.shard, record.key, record.offset, record.reason, record.detail] for record in shown]
    listed = table(["shard", "key", "at byte", "reason", "detail"], rows, numbers=frozenset({"at byte"}))
    return f"<h2>Samples that cannot be used{_first(rows, total)}</h2>{listed}"


def _first(rows: list[list[Any]], total: int) -> str:
    return f" <small>the first {len(rows):,} of {total:,}</small>" if total > len(rows) else ""


def _repeated(inspection: Inspection) -> str:
    if not inspection.repeated_captions:
        return ""
    rows = [[text, count] for text, count in inspection.repeated_captions.items()]
    return f"<h2>Captions that occur most</h2>{table(['caption', 'times'], rows, numbers=frozenset({'times'}))}"


def _images(inspection: Inspection) -> str:
    shown = "".join(map(_image, inspection.shown))
    return f'<h2>Samples</h2><div class="pictures">{shown}</div>' if shown else ""


def _image(sample: ContactSheetSample) -> str:
    first, *others = [
        f'<p lang="{escape(code)}">{escape(text)}</p>' if code else f"<p>{escape(text)}</p>"
        for code, texts in sample.captions.items()
        for text in texts
    ] or ["<p>–</p>"]
    more = f"<details><summary>{len(others)} more</summary>{''.join(others)}</details>" if others else ""
    data = base64.b64encode(sample.image).decode()
    return (
        f'<figure class="card"><img src="data:image/jpeg;base64,{data}" alt="{escape(sample.key)}" loading="lazy">'
        f"<div>{first}{more}<small>{escape(sample.key)} · {sample.width}×{sample.height}</small></div></figure>"
    )
