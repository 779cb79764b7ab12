"""Ask an index: by texts, by pictures, by a mix of both, less what is not wanted."""

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import read_text, show_json, show_table
from vlm.errors import UsageError
from vlm.files import json_text

if TYPE_CHECKING:
    from vlm.service.query import Query
    from vlm.service.search import SearchResult, SearchService

logger = logging.getLogger(__name__)

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm search`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ()
    """What to look for; several are added up."""

    image: tuple[Path, ...] = ()
    """Pictures to look for the like of; added to the texts."""

    like: tuple[str, ...] = ()
    """Items of the index to look for the like of, by uid; added too. Alone they need no model."""

    vector: tuple[Path, ...] = ()
    """Vectors of the index's space, each an .npy file of one row; added too. They need no model, and none is
    checked."""

    minus: tuple[str, ...] = ()
    """Texts taken away."""

    weights: tuple[float, ...] = ()
    """One for each term, in the order texts, pictures, items, vectors, minus; one below 0 takes its term away; empty
    weighs all alike."""

    top: int = 10
    """Answers wanted."""

    at_least: float | None = None
    """The lowest cosine of an answer."""

    where: str = ""
    """Only rows that this filter chooses: "language = 'en' and width >= 512 and tags has 'dog'"; also !=, in (…), like
    'a%', is missing, not, or, parentheses. Fields are those of the metadata, and key, language and caption."""

    words: str = ""
    """Raise captions with all these words: the first 1,000 of the full text and the first 1,000 of the vectors are
    fused by reciprocal rank; all others follow by cosine."""

    group_duplicates: float | None = None
    """Show one of the answers that are alike, with their number: those with at least this cosine, as 0.95."""

    diversity: float = 0.0
    """From 0, the nearest first, to 1, the most unlike each other first, among the nearest 1,000; the others follow."""

    rerank: str = ""
    """A model with a caption decoder, which may be the index's own: the nearest are ordered by how likely it finds the
    texts, given their pictures."""

    rerank_top: int = 50
    """How many of the nearest are re-ranked."""

    after: str = ""
    """The cursor an answer ended with: the next page of the same question."""

    queries: Path | None = None
    """A file of questions, - for stdin: a text a line, or a JSON object with texts, images, items, vectors, minus,
    weights, top, where, at_least, words, duplicates, diversity, rerank_top, after; or an .npy file, a vector a row.
    What is left out is as the options say. Answers are JSON, one a line; the index gives them on
    a GPU where FAISS sees one."""

    model: str = ""
    """Another place of the index's model, should it have moved."""

    html: Path | None = None
    """Write a page of thumbnails here."""

    json: bool = False
    """Print the answer as JSON."""


def run(arguments: Arguments) -> None:
    """Open the index, ask, show."""
    from vlm.service.query import Query

    query = Query(
        texts=arguments.texts,
        images=arguments.image,
        items=arguments.like,
        vectors=arguments.vector,
        minus=arguments.minus,
        weights=arguments.weights,
        top=arguments.top,
        where=arguments.where,
        at_least=arguments.at_least,
        words=arguments.words,
        duplicates=arguments.group_duplicates,
        diversity=arguments.diversity,
        rerank_top=arguments.rerank_top if arguments.rerank else 0,
        after=arguments.after,
    )
    if arguments.queries is None:
        query.check()
        _show(arguments, _open(arguments), query)
        return
    if arguments.texts or arguments.html:
        raise UsageError("--queries brings its texts, and answers in lines of JSON; leave TEXT and --html out.")
    queries = iter(_read_file(arguments.queries, query).items())
    service = _open(arguments)
    while named := dict(islice(queries, _QUERIES_AT_ONCE)):
        for result in service.search_many(list(named.values()), names=list(named)):
            print(json_text(result.to_json()), flush=True)


def show_result(result: "SearchResult") -> None:
    """The hits as a table."""
    asked = result.query
    columns, rows = ["", "score", "uid", "caption"], []
    for rank, hit in enumerate(result.hits, 1):
        caption = next((texts[0] for texts in hit.entry.captions.values() if texts), "")
        rows.append([rank, hit.score, hit.entry.uid, caption])
        if asked.rerank_top:
            rows[-1].insert(2, "–" if hit.likelihood is None else hit.likelihood)
        if hit.similar is not None:
            rows[-1].append(hit.similar)
    if asked.rerank_top:
        columns.insert(2, "likelihood")
    if asked.duplicates is not None:
        columns.append("more like it")
    show_table(columns, rows, title=asked.describe() + (f"  where {asked.where}" if asked.where else ""))
    _show_times(result)
    if result.next:
        logger.info(f"There is more: --after {result.next}")


def _show_times(result: "SearchResult") -> None:
    parts = [f"embedded in {result.embed_milliseconds:.0f} ms", f"searched in {result.search_milliseconds:.2f} ms"]
    if result.rerank_milliseconds is not None:
        parts.append(f"re-ranked in {result.rerank_milliseconds:.0f} ms")
    logger.info(", ".join(parts))
    for text in result.cut:
        logger.warning(
            f"The query is longer than the model's context, and its end was cut: {text[:60]!r} … "
            f"({len(text):,} characters)"
        )
    if result.unread:
        uid, reason = next(iter(result.unread.items()))
        number = len(result.unread)
        logger.info(f"Not reranked, because their images cannot be read: {number}; the first, {uid}: {reason}")


def _open(arguments: Arguments) -> "SearchService":
    from vlm.index.ann.gpu import find_gpu
    from vlm.service.search import SearchService

    return SearchService.open(
        arguments.index,
        model_spec=arguments.model,
        rerank_spec=arguments.rerank,
        gpu=find_gpu() if arguments.queries else None,
    )


def _show(arguments: Arguments, service: "SearchService", query: "Query") -> None:
    from vlm.service.gallery import write_gallery

    result = service.search(query)
    if arguments.html:
        write_gallery(arguments.html, [result], title="Search", info=service.index.info())
        logger.info(f"Page: {arguments.html}")
    if arguments.json:
        show_json(result.to_json())
    else:
        show_result(result)


def _read_file(path: Path, defaults: "Query") -> "dict[str, Query]":
    from vlm.service.query import queries_from_vectors, read_queries

    if path.suffix == ".npy":
        return queries_from_vectors(path, defaults)
    return read_queries(read_text(path).split("\n"), defaults)
