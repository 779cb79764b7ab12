"""Pieces of the page: histograms, bars, tables, as HTML without scripts.

The look of the page: one style sheet for light and dark, no other file.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

BINS = 24


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How numbers are spread; `edges` are the bounds of the bins whose sizes `counts` gives.

    is_log: the bins grow by a constant factor and the numbers need not be whole.
    """

    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_log: bool = False


def distribution(values: np.ndarray, *, bins: int = BINS) -> Distribution:
    """The spread of whole numbers, in bins of whole width.

    >>> distribution(np.array([1, 1, 2, 4])).counts
    (2, 1, 0, 1)
    """
    distinct, times = np.unique(values, return_counts=True)
    return distribution_of_counts(dict(zip(distinct.tolist(), times.tolist(), strict=True)), bins=bins)


def distribution_of_counts(times: Mapping[int, int], *, bins: int = BINS) -> Distribution:
    """The spread of whole numbers, given as how often each occurs.

    >>> distribution_of_counts({1: 2, 2: 1, 4: 1}).median
    1.5
    """
    values = np.array(sorted(times), dtype=np.int64)
    weights = np.array([times[value] for value in values.tolist()], dtype=np.int64)
    least, most = int(values[0]), int(values[-1])
    width = -(-(most - least + 1) // bins)
    edges = np.arange(least, most + width + 1, width)
    counts, _ = np.histogram(values, bins=edges, weights=weights)
    upto = np.cumsum(weights)
    middles = values[np.searchsorted(upto, [(upto[-1] + 1) // 2, upto[-1] // 2 + 1])]
    return Distribution(
        least=least,
        median=float(middles.mean()),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.astype(np.int64).tolist()),
    )


def log_distribution(values: np.ndarray, *, bins: int = BINS) -> Distribution:
    """The spread of numbers above 0, in bins that grow by a constant factor.

    >>> log_distribution(np.array([1.0, 2.0, 4.0, 8.0]), bins=3).counts
    (1, 1, 2)
    """
    least, most = float(values.min()), float(values.max())
    edges = np.geomspace(least, most, bins + 1) if most > least else np.array([least, least])
    edges[0], edges[-1] = least, most
    counts, _ = np.histogram(values, bins=edges) if most > least else ([len(values)], None)
    return Distribution(
        least=least,
        median=float(np.median(values)),
        most=most,
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
        is_log=True,
    )


class BoundedCounter:
    """How often values occur, for no more than `limit` different ones: past it the rarer half is forgotten.

    Frequent values keep their place; once something was forgotten, `is_exact` is False and the rarer counts are
    lower bounds.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self._limit, self._times = limit, Counter[str]()
        self.is_exact = True

    def add(self, value: str) -> None:
        """Count one."""
        self._times[value] += 1
        if len(self._times) > self._limit:
            self._times = Counter(dict(self._times.most_common(self._limit // 2)))
            self.is_exact = False

    def __len__(self) -> int:
        return len(self._times)

    def most_common(self, number: int) -> dict[str, int]:
        """The most frequent values with their counts; equal ones in the order in which they were met."""
        return dict(self._times.most_common(number))


Name = Callable[[float], str]

_HEIGHT = 88
_NUMBER = ' class="number"'


def plain(value: float) -> str:
    """A number as it is.

    >>> plain(1234.0)
    '1,234'
    """
    return f"{value:,g}" if value < 1e6 else f"{value:,.0f}"


def format_bytes(number_of_bytes: float) -> str:
    """Bytes for people.

    >>> format_bytes(1536)
    '1.5 KB'
    """
    size, units = float(number_of_bytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def format_aspect(ratio: float) -> str:
    """Width / height for people.

    >>> format_aspect(4 / 3), format_aspect(0.5)
    ('1.33 : 1', '1 : 2')
    """
    return f"{round(ratio, 2):g} : 1" if ratio >= 1 else f"1 : {round(1 / ratio, 2):g}"


def histogram(name: str, distribution: Distribution, *, value_name: Name = plain, note: str = "") -> str:
    """A card with the bars of a spread, and its least, median and most below."""
    if distribution.least == distribution.most:
        return constant_card(name, value_name(distribution.least), note=note)
    top, width = max(distribution.counts), 100 / len(distribution.counts)
    bar_card = "".join(
        f'<rect x="{position * width:.2f}" y="{_HEIGHT - height:.1f}" width="{width * 0.88:.2f}" height="{height:.1f}">'
        f"<title>{escape(_bin_name(distribution, position, value_name))}: {count:,}</title></rect>"
        for position, count in enumerate(distribution.counts)
        if (height := max(_HEIGHT * count / top, 1.5 if count else 0))
    )
    least, median, most = (
        escape(value_name(value)) for value in (distribution.least, distribution.median, distribution.most)
    )
    return (
        f'<figure class="card">{_caption(name, note)}<svg viewBox="0 0 100 {_HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(name)}">{bar_card}</svg>'
        f'<div class="axis"><span>{least}</span><span>median {median}</span><span>{most}</span></div></figure>'
    )


def bar_card(name: str, times: Mapping[str, int], *, of: int, note: str = "") -> str:
    """A card with a line for each value: how many of `of` have it."""
    lines = "".join(
        f'<li style="--share:{100 * min(count / max(of, 1), 1):.1f}%"><i title="{escape(value)}">{escape(value)}</i>'
        f"<span>{count:,}</span></li>"
        for value, count in times.items()
    )
    return f'<figure class="card">{_caption(name, note)}<ol class="bars">{lines}</ol></figure>'


def constant_card(name: str, value: str, *, note: str = "") -> str:
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


def _bin_name(distribution: Distribution, position: int, value_name: Name) -> str:
    first, last = distribution.edges[position], distribution.edges[position + 1] - (0 if distribution.is_log else 1)
    return value_name(first) if first == last else f"{value_name(first)} to {value_name(last)}"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    return f"<td{_NUMBER}>{value:,}</td>" if isinstance(value, int) else f"<td>{escape(str(value))}</td>"


STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e8eaed); --soft: light-dark(#5c6670, #9aa4ae);
  --paper: light-dark(#f6f7f9, #14171b); --card: light-dark(#fff, #1d2126); --line: light-dark(#dfe3e8, #2e343b);
  --accent: light-dark(#2c62ee, #7ea2ff); --faint: light-dark(#e6edfd, #25304a); --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 2rem clamp(1rem, 3vw, 3rem) 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; } h2 small { color: var(--soft); font-weight: 400; }
p.lead { margin: .3rem 0 1.4rem; color: var(--soft); }
.facts, .plots, .pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(285px, 1fr)); }
.plots figure { display: flex; flex-direction: column; }
.always { flex: 1; display: flex; flex-direction: column; justify-content: center; padding: .8rem 0; }
.plots svg { flex: 1 0 88px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  min-width: 0; margin: 0; }
.card b { display: block; font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span, figcaption { color: var(--soft); font-size: .85rem; }
.card.bad { border-color: var(--bad); } .card.bad b { color: var(--bad); }
figcaption { display: flex; justify-content: space-between; gap: 1rem; }
figcaption strong { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: 88px; margin: .6rem 0 .25rem; fill: var(--accent);
  border-bottom: 1px solid var(--line); }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .78rem;
  font-variant-numeric: tabular-nums; }
ol.bars { list-style: none; margin: .6rem 0 0; padding: 0; font-size: .88rem; }
ol.bars li { display: flex; justify-content: space-between; gap: 1rem; padding: .12rem .45rem; margin: .15rem 0;
  border-radius: 4px; background: linear-gradient(to right, var(--faint) var(--share), transparent var(--share)); }
ol.bars li i { font-style: normal; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
ol.bars li span { font-variant-numeric: tabular-nums; }
.pictures { gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.pictures figure { padding: 0; overflow: hidden; }
.pictures img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: light-dark(#eceff2, #0d0f12); }
.pictures div { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; }
.pictures p { margin: .15rem 0; } .pictures small { color: var(--soft); }
details summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { color: var(--soft); font-weight: 500; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""
