"""An inspection as one HTML page that needs no other file, host or script."""

import base64
from collections.abc import Iterable
from html import escape
from typing import Any

from vlm.data.inspection import BadRecord, Inspection, LanguageFacts, Shown, Spread
from vlm.data.samples import UNNAMED

_MOST_BAD_SHOWN = 100
_NUMBER = ' class="number"'
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e8eaed); --soft: light-dark(#5c6670, #9aa4ae);
  --paper: light-dark(#f6f7f9, #14171b); --card: light-dark(#fff, #1d2126); --line: light-dark(#dfe3e8, #2e343b);
  --accent: light-dark(#2c62ee, #7ea2ff); --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 2rem clamp(1rem, 3vw, 3rem) 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; }
p.lead { margin: .2rem 0 0; color: var(--soft); }
.facts, .plots { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  min-width: 0; }
.card b { display: block; font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span, figcaption { color: var(--soft); font-size: .85rem; }
.card.bad b { color: var(--bad); }
figure { margin: 0; } svg { display: block; width: 100%; height: 76px; margin: .5rem 0 .2rem; fill: var(--accent); }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .78rem; }
.pictures { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.pictures figure { padding: 0; overflow: hidden; }
.pictures img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: light-dark(#eceff2, #0d0f12); }
.pictures div { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; }
.pictures p { margin: .15rem 0; } .pictures small, code { color: var(--soft); }
details summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def contact_sheet(inspection: Inspection, *, title: str) -> str:
    """The page: facts, histograms, what is bad, and pictures with their captions."""
    sections = [
        _facts(inspection),
        _bad("Damaged shards", inspection.damaged),
        _bad("Samples that cannot be used", inspection.corrupt),
        _plots(inspection),
        _pictures(inspection),
        _repeated(inspection),
    ]
    lead = f"{inspection.samples:,} samples in {inspection.shards:,} shards"
    if inspection.looked_at < inspection.samples:
        lead += f"; {inspection.looked_at:,} of them, evenly spread, were looked at"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>{"".join(sections)}</body></html>\n'
    )


def language_name(code: str) -> str:
    """A language as people see it."""
    return "unnamed" if code == UNNAMED else code


def _facts(inspection: Inspection) -> str:
    captions = sum(language.captions for language in inspection.languages.values())
    cards = [
        ("samples", f"{inspection.samples:,}", False),
        ("of pictures", _size(inspection.image_bytes), False),
        ("captions", f"{captions:,}", False),
        ("languages", f"{len(inspection.languages)}", False),
        (", ".join(inspection.formats) or "formats", " / ".join(f"{n:,}" for n in inspection.formats.values()), False),
        ("same pictures again", f"{inspection.duplicate_pictures:,}", False),
        ("same keys again", f"{inspection.duplicate_keys:,}", inspection.duplicate_keys > 0),
        ("cannot be used", f"{len(inspection.corrupt):,}", bool(inspection.corrupt)),
        ("damaged shards", f"{len(inspection.damaged):,}", bool(inspection.damaged)),
    ]
    shown = "".join(
        f'<div class="card{" bad" if is_bad else ""}"><b>{value or "0"}</b><span>{escape(name)}</span></div>'
        for name, value, is_bad in cards
    )
    return f'<h2>Facts</h2><div class="facts">{shown}</div>'


def _plots(inspection: Inspection) -> str:
    plots = [("Width, pixels", inspection.widths), ("Height, pixels", inspection.heights)]
    for code, language in inspection.languages.items():
        plots += _language_plots(code, language)
    shown = "".join(_histogram(name, spread) for name, spread in plots if spread is not None)
    return f'<h2>How it is spread</h2><div class="plots">{shown}</div>' if shown else ""


def _language_plots(code: str, language: LanguageFacts) -> list[tuple[str, Spread | None]]:
    of = "" if code == UNNAMED else f" · {code}"
    length = ("characters", language.characters) if language.words.most < 2 else ("words", language.words)
    return [
        (f"Captions a picture{of} ({language.captions:,}, {language.distinct:,} distinct)", language.per_picture),
        (f"Caption length{of}, {length[0]}", length[1]),
    ]


def _histogram(name: str, spread: Spread) -> str:
    if spread.least == spread.most:
        return f'<figure class="card"><figcaption>{escape(name)}</figcaption>always<b>{spread.least:,g}</b></figure>'
    top, width = max(spread.counts), 100 / len(spread.counts)
    bars = "".join(
        f'<rect x="{place * width:.2f}" y="{76 - height:.1f}" width="{width * 0.86:.2f}" height="{height:.1f}">'
        f"<title>{_bin_name(spread, place)}: {count:,}</title></rect>"
        for place, count in enumerate(spread.counts)
        if (height := max(76 * count / top, 1.5 if count else 0))
    )
    return (
        f'<figure class="card"><figcaption>{escape(name)}</figcaption>'
        f'<svg viewBox="0 0 100 76" preserveAspectRatio="none" role="img">{bars}</svg>'
        f'<div class="axis"><span>{spread.least:,g}</span><span>median {spread.median:,g}</span>'
        f"<span>{spread.most:,g}</span></div></figure>"
    )


def _bin_name(spread: Spread, place: int) -> str:
    first, last = spread.edges[place], spread.edges[place + 1] - 1
    return f"{first:,g}" if first == last else f"{first:,g} to {last:,g}"


def _bad(title: str, records: tuple[BadRecord, ...]) -> str:
    if not records:
        return ""
    rows = [[record.shard, record.key, record.reason, record.detail] for record in records[:_MOST_BAD_SHOWN]]
    more = len(records) - len(rows)
    note = f"<p><small>… and {more:,} more.</small></p>" if more else ""
    return f"<h2>{title}</h2>{_table(['shard', 'key', 'reason', 'detail'], rows)}{note}"


def _repeated(inspection: Inspection) -> str:
    if not inspection.repeated_captions:
        return ""
    rows = [[text, count] for text, count in inspection.repeated_captions.items()]
    return f"<h2>Captions that occur most</h2>{_table(['caption', 'times'], rows)}"


def _table(columns: list[str], rows: Iterable[list[Any]]) -> str:
    head = "".join(f"<th{_NUMBER if name == 'times' else ''}>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    return f"<td{_NUMBER}>{value:,}</td>" if isinstance(value, int) else f"<td>{escape(str(value))}</td>"


def _pictures(inspection: Inspection) -> str:
    shown = "".join(map(_picture, inspection.shown))
    return f'<h2>Pictures</h2><div class="pictures">{shown}</div>' if shown else ""


def _picture(sample: Shown) -> str:
    first, *others = [
        f'<p lang="{escape(code)}">{escape(text)}</p>' if code else f"<p>{escape(text)}</p>"
        for code, texts in sample.captions.items()
        for text in texts
    ] or ["<p>–</p>"]
    more = f"<details><summary>{len(others)} more</summary>{''.join(others)}</details>" if others else ""
    data = base64.b64encode(sample.picture).decode()
    return (
        f'<figure class="card"><img src="data:image/jpeg;base64,{data}" alt="{escape(sample.key)}" loading="lazy">'
        f"<div>{first}{more}<small>{escape(sample.key)} · {sample.width}×{sample.height}</small></div></figure>"
    )


def _size(number_of_bytes: int) -> str:
    """Bytes for people.

    >>> _size(1536)
    '1.5 KB'
    """
    size, units = float(number_of_bytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
