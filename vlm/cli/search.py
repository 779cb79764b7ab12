"""`vlm search`: an index, by one query or a file; `vlm find`, `vlm watch`: a folder of images where it lies."""

import logging
import shlex
import sys
import webbrowser
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import BackendOption, IndexArgument, JsonOption, MinProbabilityOption, RelevantOption
from vlm.console import list_counts, read_text, show_fields, show_json, show_table, spaced_names
from vlm.errors import UsageError
from vlm.files import json_text

if TYPE_CHECKING:
    from vlm.api.find import ImageFolder
    from vlm.api.index import SearchIndex
    from vlm.service.folder.folder_index import FolderUpdate
    from vlm.service.query import Query
    from vlm.service.search import RankedHit, SearchResult

logger = logging.getLogger(__name__)


_QUERIES_AT_ONCE = 256

_VECTOR_HELP = (
    "Query vectors in the index's space, each an .npy file with one row; combined with the other terms. They need no "
    "model, and none is checked."
)
_WEIGHTS_HELP = (
    "A weight for each term, in the order texts, images, items, vectors, minus; a negative one subtracts its term. "
    "Empty weighs all terms equally."
)
_WHERE_HELP = (
    "Search only rows that match this filter: \"language = 'en' and width >= 512 and tags has 'dog'\"; also !=, in "
    "(…), like 'a%', is missing, not, or, parentheses. Fields are those of the metadata, and key, language and caption."
)
_WORDS_HELP = (
    "Boost captions that contain all these words, whatever their case and accents (lodz is in Łódź): the top 1,000 of "
    "full-text search and the top 1,000 by cosine are combined by reciprocal rank fusion; all others follow by cosine."
)
_DIVERSITY_HELP = (
    "Maximal marginal relevance on the top 1,000, from 0 (relevance only) to 1 (diversity only); the others follow."
)
_RERANK_HELP = (
    "Rerank the top results: a folder of vlm index fit-reranker (a poly-encoder over stored embeddings, milliseconds), "
    "or a model with a caption decoder, which may be the index's own (its log-likelihood of the text; reads images)."
)
_QUERIES_HELP = (
    "File of queries, - for stdin: one text per line, or a JSON object with texts, images, items, vectors, minus, "
    "weights, top, where, at_least, words, duplicates, diversity, rerank_top, relevant, after; or an .npy file with "
    "one vector per row. Missing fields default to the command-line options. Results are JSON, one per line; the index "
    "runs on a GPU where FAISS sees one."
)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Search an index by text, image, or both, optionally subtracting negative terms."""

    index: IndexArgument

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ()
    """Query texts; several are combined."""

    image: tuple[Path, ...] = ()
    """Query images; combined with the text queries."""

    like: tuple[str, ...] = ()
    """Uids of stored items, or image files, to search by; combined too. Uids alone need no model."""

    vector: Annotated[tuple[Path, ...], tyro.conf.arg(help=_VECTOR_HELP)] = ()

    minus: tuple[str, ...] = ()
    """Texts to subtract."""

    weights: Annotated[tuple[float, ...], tyro.conf.arg(help=_WEIGHTS_HELP)] = ()

    top: int = 10
    """Number of results."""

    at_least: float | None = None
    """Minimum cosine similarity of a result."""

    relevant: RelevantOption = False

    min_probability: MinProbabilityOption = None

    where: Annotated[str, tyro.conf.arg(help=_WHERE_HELP)] = ""

    words: Annotated[str, tyro.conf.arg(help=_WORDS_HELP)] = ""

    group_duplicates: float | None = None
    """Collapse results whose cosine similarity is at least this (e.g. 0.95) and show the group size."""

    diversity: Annotated[float, tyro.conf.arg(help=_DIVERSITY_HELP)] = 0.0

    rerank: Annotated[str, tyro.conf.arg(help=_RERANK_HELP)] = ""

    rerank_top: int = 50
    """Number of top results to rerank."""

    after: str = ""
    """Cursor at the end of a result: show the next page of the same query."""

    queries: Annotated[Path | None, tyro.conf.arg(help=_QUERIES_HELP)] = None

    model: str = ""
    """New location of the index's model, if it has moved."""

    backend: BackendOption = ""

    html: Path | None = None
    """Write a page of thumbnails to this file."""

    json: JsonOption = False

    def run(self) -> None:
        """Open the index, search, show."""
        if self.queries is None:
            self._search_once()
            return
        if self.texts or self.html:
            raise UsageError("--queries has its own texts and results as JSON lines; omit TEXT and --html.")
        # the whole file is checked before the first query is answered
        queries = iter(_read_queries_file(self.queries, self._defaults()).items())
        index = self._open()
        # in batches, so that results appear before the last query of a long file is embedded
        while named := dict(islice(queries, _QUERIES_AT_ONCE)):
            for result in index.search_many(list(named.values()), names=list(named)):
                print(json_text(result.to_json()), flush=True)

    def _defaults(self) -> "Query":
        """What the queries of a file have where they say nothing themselves."""
        from vlm.service.query import Query

        return Query(
            images=self.image,
            items=self.like,
            vectors=self.vector,
            minus=self.minus,
            weights=self.weights,
            top=self.top,
            where=self.where,
            at_least=self.at_least,
            words=self.words,
            duplicates=self.group_duplicates,
            diversity=self.diversity,
            rerank_top=self.rerank_top if self.rerank else 0,
            relevant=self.relevant if self.min_probability is None else self.min_probability,
            after=self.after,
        )

    def _open(self) -> "SearchIndex":
        from vlm.api.index import open_index
        from vlm.service.query import chosen_backend

        # only many queries are worth moving the index to a GPU
        return open_index(
            self.index,
            model=self.model or None,
            rerank_model=self.rerank,
            on_gpu=self.queries is not None,
            backend=chosen_backend(self.backend),
        )

    def _search_once(self) -> None:
        index = self._open()
        result = index.search(
            self.texts,
            image=self.image,
            like=self.like,
            minus=self.minus,
            vector=self.vector,
            weights=self.weights,
            where=self.where,
            words=self.words,
            top=self.top,
            at_least=self.at_least,
            group_duplicates=self.group_duplicates,
            diversity=self.diversity,
            rerank_top=self.rerank_top if self.rerank else 0,
            relevant=self.relevant if self.min_probability is None else self.min_probability,
            after=self.after,
        )
        if self.html:
            # only here: a page needs Pillow and Jinja2
            from vlm.pages import Provenance
            from vlm.service.results_page import write_results_page

            write_results_page(self.html, result, info=index.info(), provenance=Provenance.current())
            logger.info(f"Page: {self.html}")
        if self.json:
            show_json(result.to_json())
        else:
            show_result(result)


def _read_queries_file(path: Path, defaults: "Query") -> "dict[str, Query]":
    from vlm.service.query import queries_from_vectors, read_queries

    if path.suffix == ".npy":
        return queries_from_vectors(path, defaults)
    return read_queries(read_text(path).split("\n"), defaults)


def show_result(result: "SearchResult") -> None:
    """The hits as a table, with columns for what the query asked for."""
    query = result.query
    if result.hint:
        logger.info(result.hint)
    columns = ["", "score", "uid", "caption", "image"]
    if query.rerank_top:
        columns.insert(2, "likelihood")
    if query.duplicates is not None:
        columns.append("duplicates")
    if query.relevant is not None:
        columns.insert(2, "probability")
    rows: list[list[object]] = []
    for rank, hit in enumerate(result.hits, 1):
        # a column for each language would leave no room
        row: list[object] = [rank, hit.score, hit.uid, hit.caption, _shown_path(hit.path)]
        if query.rerank_top:
            row.insert(2, "–" if hit.likelihood is None else hit.likelihood)
        if hit.similar is not None:
            row.append(hit.similar)
        if hit.probability is not None:
            row.insert(2, f"{hit.probability:.3f}")
        rows.append(row)
    title = query.describe() + (f"  where {query.where}" if query.where else "")
    show_table(columns, rows, title=title)
    _log_times(result)
    if result.next:
        logger.info(f"Next page: --after {result.next}")


def _shown_path(path: str) -> str:
    """Below the working folder without that folder, as short as it can be given to another command."""
    folder = Path.cwd()
    return str(Path(path).relative_to(folder)) if path and Path(path).is_relative_to(folder) else path


def _log_times(result: "SearchResult") -> None:
    parts = [f"embedded in {result.embed_milliseconds:.0f} ms", f"searched in {result.search_milliseconds:.2f} ms"]
    if result.rerank_milliseconds is not None:
        parts.append(f"reranked in {result.rerank_milliseconds:.0f} ms")
    logger.info(", ".join(parts))
    for text in result.cut:
        shown = f"{text[:60]!r} … ({len(text):,} characters)"
        logger.warning(f"The query is longer than the model's context and was truncated: {shown}")
    if result.unread:
        uid, reason = next(iter(result.unread.items()))
        number = len(result.unread)
        logger.info(f"Not reranked, because their images cannot be read: {number}; the first, {uid}: {reason}")


FolderArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="Folder of images.")]
FolderModelOption = Annotated[
    str,
    tyro.conf.arg(
        help="Run folder, model folder, or open_clip NAME:WEIGHTS; by default the model the folder was indexed with, "
        "else the environment variable VLM_MODEL."
    ),
]
HomeOption = Annotated[
    Path | None,
    tyro.conf.arg(metavar="DIR", help="Where the index is kept, by default among the user's data."),
]

_FOLDER_WHERE_HELP = (
    "Search only images that match this filter: \"year = 2024 and camera like 'Canon%'\". Fields: taken "
    "('2024-05-17T10:22:31'), year, month, camera, latitude, longitude, folder, file, width, height, caption, and "
    "those of a JSON file next to an image."
)


@dataclass(frozen=True, kw_only=True)
class Find:
    """Search a folder of images where it lies, by words or by images; nothing is written into it.

    The first call indexes the folder, and can be interrupted: the next one resumes. Later calls take in what is new,
    changed, moved or gone, and embed only contents never seen before. Without a query, only that is done. Captions
    next to images, EXIF date, camera and position, and folder names can be filtered by.
    """

    folder: FolderArgument

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORDS")] = ()
    """What to search for; several are combined."""

    like: tuple[Path, ...] = ()
    """Images to search by, from anywhere; combined with the words. One of the folder needs no model."""

    minus: tuple[str, ...] = ()
    """Words to subtract."""

    where: Annotated[str, tyro.conf.arg(help=_FOLDER_WHERE_HELP)] = ""

    top: int = 10
    """Number of results."""

    relevant: RelevantOption = False

    min_probability: MinProbabilityOption = None

    files: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Print bare paths, one per line, to pipe into another program."""

    null: Annotated[bool, tyro.conf.arg(aliases=["-0"])] = False
    """As --files, with a NUL after each path, as xargs -0 reads them."""

    open: bool = False
    """Open a page with thumbnails of the results in the browser."""

    model: FolderModelOption = ""

    index: HomeOption = None

    no_update: bool = False
    """Do not look for changes first: search what is indexed at once."""

    rebuild: bool = False
    """Embed all images again, as with another model."""

    json: JsonOption = False

    def run(self) -> None:
        """Update, search, show."""
        from vlm.api.find import ImageFolder

        has_query = bool(self.words or self.like)
        if not has_query and (self.minus or self.where or self.files or self.null or self.open or self.no_update):
            raise UsageError("There is nothing to search for: give words, or an image with --like.")
        if self.rebuild and self.no_update:
            raise UsageError("--rebuild is an update; leave out --no-update.")
        if self.json and (self.files or self.null):
            raise UsageError("--json prints the results as JSON, --files (-f) and --null (-0) bare paths: give one.")
        images = ImageFolder(self.folder, model=self.model, index=self.index)
        update = None if self.no_update else images.update(rebuild=self.rebuild)
        if not has_query:
            self._show_update(update)
            return
        if update is not None:
            logger.info(update.describe())
            self._log_problems(update)
        result = images.search(
            self.words,
            like=self.like,
            minus=self.minus,
            where=self.where,
            top=self.top,
            relevant=self.relevant if self.min_probability is None else self.min_probability,
        )
        if result.hint:
            logger.info(result.hint)
        self._show(images, result)

    def _show(self, images: "ImageFolder", result: "SearchResult") -> None:
        if self.files or self.null:
            end = "\0" if self.null else "\n"
            for hit in result.hits:
                print(self._path_of(hit), end=end)
            sys.stdout.flush()
        elif self.json:
            show_json(result.to_json())
        else:
            columns = ["", "score", "file", "caption or date"]
            if result.query.relevant is not None:
                columns.insert(2, "probability")
            rows: list[list[object]] = []
            for rank, hit in enumerate(result.hits, 1):
                probability = [] if hit.probability is None else [f"{hit.probability:.3f}"]
                rows.append([rank, hit.score, *probability, str(self._path_of(hit)), _described(hit)])
            title = result.query.describe() + (f"  where {self.where}" if self.where else "")
            show_table(columns, rows, title=title)
        if self.open:
            _open_results_page(images, result)

    def _show_update(self, update: "FolderUpdate | None") -> None:
        if update is None:
            return
        if self.json:
            show_json(update.to_json())
            return
        fields = spaced_names(update.to_json())
        fields["unreadable"] = len(update.unreadable)
        fields["missing"] = list_counts(update.missing.items()) or 0
        show_fields(fields, title=update.describe())
        self._log_problems(update)

    def _log_problems(self, update: "FolderUpdate") -> None:
        for extra, count in update.missing.items():
            logger.warning(f"{count:,} files are read with the extra {extra}: pip install 'vlm-pipeline[{extra}]'.")
        if update.unreadable:
            name, reason = next(iter(update.unreadable.items()))
            number = len(update.unreadable)
            index = [] if self.index is None else ["--index", str(self.index)]
            command = shlex.join(["vlm", "find", update.folder, *index, "--json"])
            logger.warning(
                f"{number:,} cannot be read, and are tried again when they change; the first, {name}: {reason}. "
                f"{command} lists all."
            )

    def _path_of(self, hit: "RankedHit") -> Path:
        """The image as the user names the folder, so that it opens from where the command runs."""
        return self.folder / hit.entry.uid


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Keep the index of a folder of images up to date until interrupted; a line for each batch of changes.

    Changes are told by the system where the extra watch (watchfiles) is installed, else looked for every 10 seconds.
    vlm find on the same folder meanwhile searches what is indexed.
    """

    folder: FolderArgument

    poll: float | None = None
    """Look for changes every so many seconds instead of being told by the system, as network drives need."""

    model: FolderModelOption = ""

    index: HomeOption = None

    json: JsonOption = False

    def run(self) -> None:
        """Update at every change, until Ctrl-C."""
        from vlm.api.find import watch

        try:
            for update in watch(self.folder, model=self.model, index=self.index, poll_seconds=self.poll):
                if self.json:
                    print(json_text(update.to_json()), flush=True)
                else:
                    print(update.describe(), flush=True)
        except KeyboardInterrupt:
            logger.info("Stopped watching; what was embedded is kept.")


def _described(hit: "RankedHit") -> str:
    """A caption, else when and with what the photo was taken."""
    for texts in hit.entry.captions.values():
        if texts:
            return texts[0]
    fields = (hit.entry.metadata.get("taken"), hit.entry.metadata.get("camera"))
    return ", ".join(str(value) for value in fields if value)


def _open_results_page(images: "ImageFolder", result: "SearchResult") -> None:
    from vlm.index.reader import Index
    from vlm.pages import Provenance
    from vlm.service.results_page import write_results_page

    page = images.home / "results.html"
    info = Index.open(images.index_folder).info()
    write_results_page(page, result, title=f"Results in {images.root.name}", info=info, provenance=Provenance.current())
    logger.info(f"Page: {page}")
    if not webbrowser.open(page.as_uri()):
        logger.warning("No browser could be opened; open the page yourself.")
