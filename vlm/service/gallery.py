"""A page of answers that needs nothing but itself: thumbnails, scores, captions.

How a gallery page looks; in Python, because a wheel of this project carries no other files.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from vlm.errors import VlmError
from vlm.files import write_text
from vlm.index.reader import Hit, IndexInfo
from vlm.service.images import read_image_bytes, thumbnail
from vlm.service.query import Query
from vlm.service.search import RankedHit, SearchResult

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --line: #e4e1da; --mat: #efede8;
  --ink: #1d1c1a; --soft: #6d6a63; --accent: #0f766e; --track: #e4e1da; --minus: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1c1e21; --line: #2c2f34; --mat: #24272b;
    --ink: #eceae6; --soft: #9a9890; --accent: #2dd4bf; --track: #31353b; --minus: #f97066;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 1500px;
  background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; font-weight: 650; letter-spacing: -0.02em; overflow-wrap: anywhere; }
.facts { margin: 0.3rem 0 0; color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0.5rem; margin-top: 1.1rem; font-size: 0.88rem; }
nav a {
  padding: 0.25rem 0.75rem; border: 1px solid var(--line); border-radius: 999px;
  background: var(--card); color: var(--ink); text-decoration: none; overflow-wrap: anywhere;
}
nav a:hover { border-color: var(--accent); color: var(--accent); }
section { margin-top: 2.2rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
.question { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; margin: 0; font-size: 1.15rem; }
.term { display: inline-flex; align-items: center; gap: 0.4rem; font-weight: 600; overflow-wrap: anywhere; }
.term img { display: block; height: 4.5rem; border-radius: 8px; border: 1px solid var(--line); }
.sign { color: var(--soft); font-weight: 400; }
.minus .sign, .minus .text { color: var(--minus); }
.weight { color: var(--soft); font-weight: 400; font-size: 0.85rem; }
.took { margin: 0.3rem 0 1.1rem; color: var(--soft); font-size: 0.82rem; }
.hits {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); gap: 1rem;
  margin: 0; padding: 0; list-style: none;
}
.hit {
  display: flex; flex-direction: column; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
}
.picture { aspect-ratio: 1; display: grid; place-items: center; background: var(--mat); overflow: hidden; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.missing { padding: 1.2rem; color: var(--soft); font-size: 0.82rem; text-align: center; overflow-wrap: anywhere; }
.score { display: flex; align-items: center; gap: 0.6rem; padding: 0.65rem 0.8rem 0; }
.rank { color: var(--soft); font-size: 0.8rem; min-width: 1.1rem; }
.track { flex: 1; height: 5px; border-radius: 3px; background: var(--track); overflow: hidden; }
.track span { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.value { font-size: 0.85rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.caption {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5; line-clamp: 5; overflow: hidden;
  margin: 0.45rem 0.8rem 0; overflow-wrap: anywhere;
}
.note { margin: 0.3rem 0.8rem 0; color: var(--soft); font-size: 0.85rem; }
details { padding: 0.3rem 0.8rem 0; color: var(--soft); font-size: 0.85rem; }
summary { cursor: pointer; }
details ul { margin: 0.3rem 0 0; padding-left: 1.1rem; }
.key {
  margin: auto 0 0; padding: 0.6rem 0.8rem 0.75rem; color: var(--soft);
  font: 0.75rem/1.3 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
}
.none { color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.8rem; }
@media print { body { padding: 0; } .hit { break-inside: avoid; } }
"""


# twice the width of a card's picture, for screens with two pixels a point
THUMBNAIL_PIXELS = 420
_QUERY_PIXELS = 160


def write_gallery(path: Path, results: Sequence[SearchResult], *, title: str, info: IndexInfo) -> None:
    """Write `gallery_page` to a file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, gallery_page(results, title=title, info=info))


def gallery_page(results: Sequence[SearchResult], *, title: str, info: IndexInfo) -> str:
    """One HTML page with a section for each answer; pictures are read from their shards by byte range.

    A hit whose shard is gone or whose picture cannot be read gets a tile that says so.
    """
    facts = f"{info.rows:,} {info.modality} embeddings · {info.dimension} dimensions · {info.kind} index · {info.model}"
    sections = "\n".join(_section(result, number) for number, result in enumerate(results, 1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="facts">{escape(facts)}</p>
{_contents(results) if len(results) > 1 else ""}</header>
<main>
{sections}
</main>
<footer>Scores are cosines; a bar shows a score's share of the best one. {escape(info.made_by)}, generation \
{info.generation} of {escape(info.folder)}.</footer>
</body>
</html>
"""


def _contents(results: Sequence[SearchResult]) -> str:
    links = [f'<a href="#q{number}">{escape(result.query.describe())}</a>' for number, result in enumerate(results, 1)]
    return f"<nav>{''.join(links)}</nav>\n"


def _section(result: SearchResult, number: int) -> str:
    best = max((hit.score for hit in result.hits), default=0.0)
    hits = "\n".join(_card(hit, rank, best) for rank, hit in enumerate(result.hits, 1))
    took = f"embedded in {result.embed_milliseconds:.1f} ms, found in {result.search_milliseconds:.1f} ms"
    if result.rerank_milliseconds is not None:
        took += f", re-ranked in {result.rerank_milliseconds:.0f} ms"
    if result.unread:
        took += f", but for {len(result.unread)} whose pictures cannot be read"
    return f"""<section id="q{number}">
<h2 class="question">{_terms(result)}</h2>
<p class="took">{escape(" · ".join([f"{len(result.hits)} nearest", *_limits(result.query), took]))}</p>
{f'<ol class="hits">{hits}</ol>' if hits else '<p class="none">Nothing was found.</p>'}
</section>"""


def _limits(query: Query) -> list[str]:
    """What narrows and orders the answers, where it is asked for."""
    limits = {
        "where": query.where,
        "with the words": query.words,
        "cosine at least": "" if query.at_least is None else f"{query.at_least:g}",
        "one of those alike from": "" if query.duplicates is None else f"{query.duplicates:g}",
        "diversity": f"{query.diversity:g}" if query.diversity else "",
        "re-ranked by likelihood: the first": str(query.rerank_top or ""),
    }
    return [f"{name} {value}" for name, value in limits.items() if value]


def _terms(result: SearchResult) -> str:
    query, terms = result.query, []
    shown = [f"“{escape(text)}”" for text in query.texts]
    shown += [_query_thumbnail(image) for image in query.images]
    shown += [escape(uid) for uid in query.items]
    shown += [escape(vector.name) if isinstance(vector, Path) else "a vector" for vector in query.vectors]
    shown += [f"“{escape(text)}”" for text in query.minus]
    for term, weight in zip(shown, query.signed_weights(), strict=True):
        sign = "−" if weight < 0 else "+" if terms else ""
        factor = f' <span class="weight">×{abs(weight):g}</span>' if abs(weight) != 1 else ""
        terms.append(
            f'<span class="sign">{sign}</span>' * bool(sign)
            + f'<span class="term{" minus" if weight < 0 else ""}"><span class="text">{term}</span>{factor}</span>'
        )
    return "\n".join(terms)


def _query_thumbnail(image: Path | bytes) -> str:
    data = image if isinstance(image, bytes) else image.read_bytes()
    name = "the picture asked with" if isinstance(image, bytes) else image.name
    return f'<img src="{thumbnail(data, pixels=_QUERY_PIXELS)}" alt="{escape(name)}" title="{escape(name)}">'


def _card(hit: RankedHit, rank: int, best: float) -> str:
    entry = hit.entry
    captions = [text for texts in entry.captions.values() for text in texts]
    share = max(hit.score, 0.0) / best if best > 0 else 0.0
    likely = "" if hit.likelihood is None else f"{hit.likelihood:.3f} nats a token"
    notes = [note for note in (likely, f"{hit.similar} more like it" if hit.similar else "") if note]
    more = f'<p class="note">{" · ".join(notes)}</p>\n' if notes else ""
    place = f"{entry.uid} · sample {entry.number} of {entry.shard}"
    return f"""<li class="hit">
<div class="picture">{_image(hit)}</div>
<div class="score"><span class="rank">{rank}</span><div class="track"><span style="width:{share:.1%}"></span></div>\
<span class="value">{hit.score:.3f}</span></div>
{f'<p class="caption" title="{escape(captions[0])}">{escape(captions[0])}</p>' if captions else ""}
{_more(captions[1:])}{more}<p class="key" title="{escape(place)}">{escape(entry.key)}</p>
</li>"""


def _image(hit: Hit) -> str:
    try:
        address = thumbnail(read_image_bytes(hit.entry), pixels=THUMBNAIL_PIXELS)
    except VlmError as error:
        return f'<p class="missing">{escape(str(error))}</p>'
    return f'<img src="{address}" alt="{escape(hit.entry.key)}">'


def _more(captions: Sequence[str]) -> str:
    if not captions:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in captions)
    return f"<details><summary>{len(captions)} more</summary><ul>{items}</ul></details>\n"
