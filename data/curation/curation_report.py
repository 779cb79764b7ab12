"""What rules would keep and drop, as one HTML page that needs no other file, host or script."""

import base64
import io
from html import escape

import numpy as np

from vlm.console import pluralize
from vlm.data.curation.pipeline import CurationResult, FilterStep
from vlm.data.curation.sample_table import SampleTable
from vlm.data.decode import open_image, to_rgb
from vlm.data.tar import ShardReader
from vlm.errors import BadSample
from vlm.pages import STYLE, table

_MAX_DROPPED_SHOWN = 18
_MAX_KEPT_SHOWN = 9
_THUMBNAIL_PIXELS = 160
_COUNTS = frozenset({"before", "kept", "dropped", "visits"})
_OWN_STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; } .pair img + img { border-left: 2px solid var(--line); }
.pictures .dropped { border-color: var(--bad); } h3 { font-size: .95rem; margin: 1.1rem 0 .5rem; }
h2 code { font-size: .85em; }
"""


def render_curation_report(curated: CurationResult, *, title: str) -> str:
    """The page: the table of steps, and for each rule some of the samples it dropped and kept, with the reason."""
    thumbnails = _Thumbnails(curated.sample_table)
    sections = "".join(_step(step, number, thumbnails) for number, step in enumerate(curated.steps, start=1))
    kept = curated.selection
    lead = (
        f"{kept.kept:,} of {pluralize(kept.samples, 'sample')} in {pluralize(len(kept.shards), 'shard')} are kept, "
        f"seen {kept.visits:,} times in an epoch"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_OWN_STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>'
        f"<h2>Steps</h2>{_steps(curated)}{sections}</body></html>\n"
    )


def step_rows(curated: CurationResult) -> tuple[list[str], list[list[str | int]]]:
    """The table of steps: names of the columns, and a row a step, what cannot be used first."""
    columns = ["step", "before", "kept", "dropped", "visits"]
    bad = sum(curated.corrupt.values())
    samples = len(curated.sample_table)
    what = ", ".join(f"{count:,} {reason}" for reason, count in curated.corrupt.items())
    rows: list[list[str | int]] = [[f"scan: {what or 'all usable'}", samples, samples - bad, bad, samples - bad]]
    for step in curated.steps:
        missing = step.result.without_value
        shown = f"{step.configured.shown()} ({missing:,} without value)" if missing else step.configured.shown()
        rows.append([shown, step.before, step.kept, step.dropped, step.visits])
    return columns, rows


def _steps(curated: CurationResult) -> str:
    columns, rows = step_rows(curated)
    return table(columns, rows, numbers=_COUNTS)


def _step(step: FilterStep, number: int, thumbnails: "_Thumbnails") -> str:
    is_kept = step.times > 0
    dropped = _evenly_spaced(np.flatnonzero(step.was_remaining & ~is_kept), _MAX_DROPPED_SHOWN)
    kept = _evenly_spaced(np.flatnonzero(is_kept), _MAX_KEPT_SHOWN)
    parts = [
        f"<h2>{number}. <code>{escape(step.configured.shown())}</code></h2>"
        f"<p>{escape(step.configured.sample_filter.help)}</p>"
    ]
    if not step.dropped and step.visits == step.kept == step.before:
        return f"{parts[0]}<p>Nothing was dropped.</p>"
    for name, positions, count in (("Dropped", dropped, step.dropped), ("Kept", kept, step.kept)):
        if len(positions):
            figures = "".join(_figure(step, int(position), thumbnails) for position in positions)
            parts.append(f'<h3>{name}: {len(positions)} of {count:,}</h3><div class="pictures">{figures}</div>')
    return "".join(parts)


def _figure(step: FilterStep, position: int, thumbnails: "_Thumbnails") -> str:
    times = int(step.times[position])
    shown = [position]
    duplicates_of = step.result.duplicates_of
    if duplicates_of is not None and duplicates_of[position] >= 0:
        shown.append(int(duplicates_of[position]))
    images = "".join(thumbnails.image(each) for each in shown)
    key = escape(thumbnails.sample_table.key(position))
    beside = " · beside it the one that stays" if len(shown) > 1 else ""
    often = f" · {times} times" if times > 1 else ""
    return (
        f'<figure class="card{"" if times else " dropped"}"><div class="{"pair" if len(shown) > 1 else "one"}" '
        f'style="padding:0">{images}</div><div><p>{escape(step.result.why(position))}{often}</p>'
        f"{thumbnails.caption(position)}<small>{key}{beside}</small></div></figure>"
    )


def _evenly_spaced(positions: np.ndarray, wanted: int) -> np.ndarray:
    wanted = min(wanted, len(positions))
    return positions[(np.arange(wanted, dtype=np.int64) * len(positions)) // max(wanted, 1)]


class _Thumbnails:
    """Small pictures of samples, read when they are shown."""

    def __init__(self, sample_table: SampleTable) -> None:
        self.sample_table = sample_table

    def caption(self, position: int) -> str:
        """The first caption, where captions were looked at."""
        if "captions" not in self.sample_table.table.column_names:
            return ""
        captions = self.sample_table.table.column("captions")[position].as_py()
        return f"<p><em>{escape(captions[0]['text'])}</em></p>" if captions else "<p>no caption</p>"

    def image(self, position: int) -> str:
        """An `img` element, or the reason why there is none."""
        url, number = self.sample_table.where(position)
        reader = ShardReader(url)
        try:
            pil_image = open_image(reader.read(number).image)
            rgb = to_rgb(pil_image, resolution=min(1.0, _THUMBNAIL_PIXELS / max(pil_image.size)))
        except BadSample as error:
            return f"<p>{escape(str(error))}</p>"
        finally:
            reader.close()
        rgb.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        file = io.BytesIO()
        rgb.save(file, format="JPEG", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        key = escape(self.sample_table.key(position), quote=True)
        return f'<img src="data:image/jpeg;base64,{data}" alt="{key}" loading="lazy">'
