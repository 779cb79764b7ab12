"""What rules would keep and drop, as one HTML page that needs no other file, host or script."""

import base64
import io
from html import escape

import numpy as np

from vlm.console import counted
from vlm.data.curation.pipeline import Curated, Step
from vlm.data.curation.sample_table import Facts
from vlm.data.decode import open_picture, to_rgb
from vlm.data.tar import ShardReader
from vlm.errors import BadSample
from vlm.pages import STYLE, table

_SHOWN_DROPPED = 18
_SHOWN_KEPT = 9
_THUMBNAIL_PIXELS = 160
_COUNTS = frozenset({"before", "kept", "dropped", "visits"})
_OWN_STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; } .pair img + img { border-left: 2px solid var(--line); }
.pictures .dropped { border-color: var(--bad); } h3 { font-size: .95rem; margin: 1.1rem 0 .5rem; }
h2 code { font-size: .85em; }
"""


def curation_page(curated: Curated, *, title: str) -> str:
    """The page: the table of steps, and for each rule some of the samples it dropped and kept, with the reason."""
    pictures = _Pictures(curated.facts)
    sections = "".join(_step(step, number, pictures) for number, step in enumerate(curated.steps, start=1))
    kept = curated.selection
    lead = (
        f"{kept.kept:,} of {counted(kept.samples, 'sample')} in {counted(len(kept.shards), 'shard')} are kept, "
        f"seen {kept.visits:,} times in an epoch"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_OWN_STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>'
        f"<h2>Steps</h2>{_steps(curated)}{sections}</body></html>\n"
    )


def step_rows(curated: Curated) -> tuple[list[str], list[list[str | int]]]:
    """The table of steps: names of the columns, and a row a step, what cannot be used first."""
    columns = ["step", "before", "kept", "dropped", "visits"]
    bad = sum(curated.corrupt.values())
    samples = len(curated.facts)
    what = ", ".join(f"{count:,} {reason}" for reason, count in curated.corrupt.items())
    rows: list[list[str | int]] = [[f"scan: {what or 'all usable'}", samples, samples - bad, bad, samples - bad]]
    for step in curated.steps:
        missing = step.verdict.without_value
        shown = f"{step.asked.shown()} ({missing:,} without value)" if missing else step.asked.shown()
        rows.append([shown, step.before, step.kept, step.dropped, step.visits])
    return columns, rows


def _steps(curated: Curated) -> str:
    columns, rows = step_rows(curated)
    return table(columns, rows, numbers=_COUNTS)


def _step(step: Step, number: int, pictures: "_Pictures") -> str:
    is_kept = step.times > 0
    dropped = _spread_evenly(np.flatnonzero(step.is_left_before & ~is_kept), _SHOWN_DROPPED)
    kept = _spread_evenly(np.flatnonzero(is_kept), _SHOWN_KEPT)
    parts = [f"<h2>{number}. <code>{escape(step.asked.shown())}</code></h2><p>{escape(step.asked.rule.help)}</p>"]
    if not step.dropped and step.visits == step.kept == step.before:
        return f"{parts[0]}<p>Nothing was dropped.</p>"
    for name, places, count in (("Dropped", dropped, step.dropped), ("Kept", kept, step.kept)):
        if len(places):
            figures = "".join(_figure(step, int(place), pictures) for place in places)
            parts.append(f'<h3>{name}: {len(places)} of {count:,}</h3><div class="pictures">{figures}</div>')
    return "".join(parts)


def _figure(step: Step, place: int, pictures: "_Pictures") -> str:
    times = int(step.times[place])
    shown = [place]
    twins = step.verdict.twins
    if twins is not None and twins[place] >= 0:
        shown.append(int(twins[place]))
    images = "".join(pictures.image(each) for each in shown)
    key = escape(pictures.facts.key(place))
    beside = " · beside it the one that stays" if len(shown) > 1 else ""
    often = f" · {times} times" if times > 1 else ""
    return (
        f'<figure class="card{"" if times else " dropped"}"><div class="{"pair" if len(shown) > 1 else "one"}" '
        f'style="padding:0">{images}</div><div><p>{escape(step.verdict.why(place))}{often}</p>'
        f"{pictures.caption(place)}<small>{key}{beside}</small></div></figure>"
    )


def _spread_evenly(places: np.ndarray, wanted: int) -> np.ndarray:
    wanted = min(wanted, len(places))
    return places[(np.arange(wanted, dtype=np.int64) * len(places)) // max(wanted, 1)]


class _Pictures:
    """Small pictures of samples, read when they are shown."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def caption(self, place: int) -> str:
        """The first caption, where captions were looked at."""
        if "captions" not in self.facts.table.column_names:
            return ""
        captions = self.facts.table.column("captions")[place].as_py()
        return f"<p><em>{escape(captions[0]['text'])}</em></p>" if captions else "<p>no caption</p>"

    def image(self, place: int) -> str:
        """An `img` element, or the reason why there is none."""
        address, number = self.facts.where(place)
        reader = ShardReader(address)
        try:
            picture = open_picture(reader.read(number).image)
            rgb = to_rgb(picture, resolution=min(1.0, _THUMBNAIL_PIXELS / max(picture.size)))
        except BadSample as error:
            return f"<p>{escape(str(error))}</p>"
        finally:
            reader.close()
        rgb.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        file = io.BytesIO()
        rgb.save(file, format="JPEG", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        key = escape(self.facts.key(place), quote=True)
        return f'<img src="data:image/jpeg;base64,{data}" alt="{key}" loading="lazy">'
