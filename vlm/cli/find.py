"""`vlm find` and `vlm watch`: search a folder of images where it lies, and keep its index up to date."""

import logging
import shlex
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import JsonOption, MinProbabilityOption, RelevantOption
from vlm.console import list_counts, show_fields, show_json, show_table, spaced_names
from vlm.errors import UsageError
from vlm.files import json_text

if TYPE_CHECKING:
    from vlm.api.find import ImageFolder
    from vlm.service.folder.folder_index import FolderUpdate
    from vlm.service.search import RankedHit, SearchResult

logger = logging.getLogger(__name__)

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

_WHERE_HELP = (
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

    where: Annotated[str, tyro.conf.arg(help=_WHERE_HELP)] = ""

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

        if self.poll is not None and not self.poll > 0:
            raise UsageError(f"--poll {self.poll:g} is out of range: give seconds above 0.")
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
    write_results_page(
        page, [result], title=f"Results in {images.root.name}", info=info, provenance=Provenance.current()
    )
    logger.info(f"Page: {page}")
    if not webbrowser.open(page.as_uri()):
        logger.warning("No browser could be opened; open the page yourself.")
