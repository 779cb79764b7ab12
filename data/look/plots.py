"""Pieces of the page: histograms, bars, tables, as HTML without scripts."""

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from vlm.data.look.spread import Spread

Name = Callable[[float], str]

_HEIGHT = 88
_NUMBER = ' class="number"'


def plain(value: float) -> str:
    """A number as it is.

    >>> plain(1234.0)
    '1,234'
    """
    return f"{value:,g}" if value < 1e6 else f"{value:,.0f}"


def size_name(number_of_bytes: float) -> str:
    """Bytes for people.

    >>> size_name(1536)
    '1.5 KB'
    """
    size, units = float(number_of_bytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def aspect_name(ratio: float) -> str:
    """Width / height for people.

    >>> aspect_name(4 / 3), aspect_name(0.5)
    ('1.33 : 1', '1 : 2')
    """
    return f"{round(ratio, 2):g} : 1" if ratio >= 1 else f"1 : {round(1 / ratio, 2):g}"


def histogram(name: str, spread: Spread, *, value_name: Name = plain, note: str = "") -> str:
    """A card with the bars of a spread, and its least, median and most below."""
    if spread.least == spread.most:
        return always(name, value_name(spread.least), note=note)
    top, width = max(spread.counts), 100 / len(spread.counts)
    bars = "".join(
        f'<rect x="{place * width:.2f}" y="{_HEIGHT - height:.1f}" width="{width * 0.88:.2f}" height="{height:.1f}">'
        f"<title>{escape(_bin_name(spread, place, value_name))}: {count:,}</title></rect>"
        for place, count in enumerate(spread.counts)
        if (height := max(_HEIGHT * count / top, 1.5 if count else 0))
    )
    least, median, most = (escape(value_name(value)) for value in (spread.least, spread.median, spread.most))
    return (
        f'<figure class="card">{_caption(name, note)}<svg viewBox="0 0 100 {_HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(name)}">{bars}</svg>'
        f'<div class="axis"><span>{least}</span><span>median {median}</span><span>{most}</span></div></figure>'
    )


def bars(name: str, times: Mapping[str, int], *, of: int, note: str = "") -> str:
    """A card with a line for each value: how many of `of` have it."""
    lines = "".join(
        f'<li style="--share:{100 * min(count / max(of, 1), 1):.1f}%"><i title="{escape(value)}">{escape(value)}</i>'
        f"<span>{count:,}</span></li>"
        for value, count in times.items()
    )
    return f'<figure class="card">{_caption(name, note)}<ol class="bars">{lines}</ol></figure>'


def always(name: str, value: str, *, note: str = "") -> str:
    """A card for what is the same everywhere."""
    return (
        f'<figure class="card">{_caption(name, note)}<div class="always"><b>{escape(value)}</b>'
        "<span>always</span></div></figure>"
    )


def table(columns: list[str], rows: Iterable[list[Any]], *, numbers: frozenset[str] = frozenset()) -> str:
    """A table; the columns in `numbers` are set right-aligned."""
    head = "".join(f"<th{_NUMBER if name in numbers else ''}>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'


def _caption(name: str, note: str) -> str:
    return f"<figcaption><strong>{escape(name)}</strong><span>{escape(note)}</span></figcaption>"


def _bin_name(spread: Spread, place: int, value_name: Name) -> str:
    first, last = spread.edges[place], spread.edges[place + 1] - (0 if spread.is_log else 1)
    return value_name(first) if first == last else f"{value_name(first)} to {value_name(last)}"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    return f"<td{_NUMBER}>{value:,}</td>" if isinstance(value, int) else f"<td>{escape(str(value))}</td>"
