"""`vlm search --html`, `vlm.write_results_page`: search results as a page of thumbnails, scores and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import VlmError
from vlm.files import write_text
from vlm.index.engine_base import IndexInfo
from vlm.pages import Provenance, render
from vlm.service.images import read_image_bytes, thumbnail
from vlm.service.query import Query
from vlm.service.search import RankedHit, SearchResult

# twice the width of a tile, for screens with two pixels a point
THUMBNAIL_PIXELS = 420
_QUERY_PIXELS = 160


def write_results_page(
    path: str | Path,
    results: SearchResult | Sequence[SearchResult],
    *,
    title: str = "Search results",
    info: IndexInfo | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Write results as one page of thumbnails, scores and captions, whole or not at all; its folder is made.

    results: of `SearchIndex.search`, `search_many` or `vlm.find`. info: the index as the page names it,
    `SearchIndex.info()`. provenance: what made the page, for its footer.
    """
    results = [results] if isinstance(results, SearchResult) else results
    page = results_page(results, title=title, info=info, provenance=provenance)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), page)


def results_page(
    results: Sequence[SearchResult], *, title: str, info: IndexInfo | None, provenance: Provenance | None = None
) -> str:
    """One page with a section for each query; images are read from their shards by byte range.

    A hit whose shard is gone or whose image cannot be read gets a tile that says so.
    """
    return render(
        "results_page.html",
        provenance=provenance,
        title=title,
        info=info,
        sections=[_section(result) for result in results],
    )


@dataclass(frozen=True, kw_only=True)
class _Term:
    """A text, image, item or vector of a query; weight is below 0 where it is subtracted."""

    name: str
    weight: float
    image: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """A hit with its image, or the reason why there is none; share of the best score in [0, 1]."""

    hit: RankedHit
    share: float
    image: bytes | None = None
    error: str = ""


def _section(result: SearchResult) -> dict[str, Any]:
    best = max((hit.score for hit in result.hits), default=0.0)
    return {
        "name": result.query.describe(),
        "terms": _terms(result.query),
        "facts": [*_options(result.query), *_durations(result)],
        "tiles": [_tile(hit, best) for hit in result.hits],
    }


def _terms(query: Query) -> list[_Term]:
    # in the order of `Query.signed_weights`
    names: list[tuple[str, bytes | None]] = []
    for text in query.texts:
        names.append((f"“{text}”", None))
    for image in query.images:
        encoded = image if isinstance(image, bytes) else image.read_bytes()
        name = "the query image" if isinstance(image, bytes) else image.name
        names.append((name, thumbnail(encoded, pixels=_QUERY_PIXELS)))
    for uid in query.items:
        names.append((uid, None))
    for vector in query.vectors:
        names.append((vector.name if isinstance(vector, Path) else "a vector", None))
    for text in query.minus:
        names.append((f"“{text}”", None))

    terms: list[_Term] = []
    for (name, image), weight in zip(names, query.signed_weights(), strict=True):
        terms.append(_Term(name=name, image=image, weight=weight))
    return terms


def _options(query: Query) -> list[str]:
    """What narrows and orders the hits, where it was requested."""
    options = {
        "where": query.where,
        "words": query.words,
        "probability ≥": "" if query.relevant is None else f"{query.relevant:g}",
        "cosine ≥": "" if query.at_least is None else f"{query.at_least:g}",
        "duplicates collapsed from cosine": "" if query.duplicates is None else f"{query.duplicates:g}",
        "diversity": f"{query.diversity:g}" if query.diversity else "",
        "reranked by likelihood: top": str(query.rerank_top or ""),
    }
    return [f"{name} {value}" for name, value in options.items() if value]


def _durations(result: SearchResult) -> list[str]:
    durations = [f"embedded in {result.embed_milliseconds:,.1f} ms", f"found in {result.search_milliseconds:,.1f} ms"]
    if result.rerank_milliseconds is not None:
        durations.append(f"reranked in {result.rerank_milliseconds:,.0f} ms")
    if result.unread:
        durations.append(f"not reranked, image unreadable: {len(result.unread)}")
    return durations


def _tile(hit: RankedHit, best: float) -> _Tile:
    # cosines may be negative, bars may not
    share = max(hit.score, 0.0) / best if best > 0 else 0.0
    try:
        image = thumbnail(read_image_bytes(hit.entry), pixels=THUMBNAIL_PIXELS)
    except VlmError as error:
        return _Tile(hit=hit, share=share, error=str(error))
    return _Tile(hit=hit, share=share, image=image)
