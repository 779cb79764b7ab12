"""The verbs that change an index: add, update, set, delete, compact, rollback, map, relocate."""

import logging
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import IndexArgument, JsonOption
from vlm.console import pluralize, read_text, show_fields, show_json, spaced_names
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.api.index import AddSummary, DeletePreview, SearchIndex
    from vlm.index.engine_writer import CommitInfo

logger = logging.getLogger(__name__)

_UPDATE_WHERE_HELP = (
    "Replace only rows that match this filter, e.g. \"split = 'old' and width < 64\"; other rows of SOURCE, new "
    "ones included, are skipped and counted."
)
_KEY_HELP = (
    "Column of the table that names the rows, by the metadata field of the same name; uid names them by their uids. "
    "Several rows may have a key, as the images of one product."
)
_SHARDS_HELP = (
    "Instead of OLD and NEW: the shards where they are now (a folder, a pattern, several joined by ::); each is found "
    "by its file name."
)
_DISCARD_HELP = (
    "Remove the version before at once, which frees its disk space; vlm index rollback cannot bring it back then."
)

_UID_PREFIX_HELP = "Text before each new uid, such as 'spring/', for images that are called like others in the index."
SourceArgument = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="SOURCE",
        help="Folder of images, an image, shards (a folder, a pattern, several joined by ::), a table with its images, "
        "or an embeddings folder made by vlm embed with the index's model.",
    ),
]

_MAX_DELETED_SHARE = 0.2
"""From this share on, deleted rows slow searches more than a compaction costs."""


@dataclass(frozen=True, kw_only=True)
class AddRows:
    """Add what is new of a folder of images, of shards, or of embeddings to an index; searches can run meanwhile.

    Images are embedded by the index's own model. Those of a folder stay where they are and are known by their paths
    below it and their sizes; a table with images is packed into shards in the index folder. Safe to interrupt: rerun
    the same command to resume. All that a command adds is one version: vlm index rollback undoes it.
    """

    index: IndexArgument

    source: SourceArgument

    uid_prefix: Annotated[str, tyro.conf.arg(help=_UID_PREFIX_HELP)] = ""

    model: str = ""
    """New location of the index's model, if it has moved."""

    json: JsonOption = False

    def run(self) -> None:
        """Embed, add, then show the counts."""
        summary = _open(self.index, self.model).add(self.source, uid_prefix=self.uid_prefix)
        _show_added(summary, self.index, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class UpdateRows:
    """Upsert images, shards or embeddings into an index by uid: what exists is embedded again and replaced."""

    index: IndexArgument

    source: SourceArgument

    where: Annotated[str, tyro.conf.arg(help=_UPDATE_WHERE_HELP)] = ""

    uid_prefix: Annotated[str, tyro.conf.arg(help=_UID_PREFIX_HELP)] = ""

    model: str = ""
    """New location of the index's model, if it has moved."""

    json: JsonOption = False

    def run(self) -> None:
        """Replace and add, then show the counts."""
        summary = _open(self.index, self.model).update(self.source, where=self.where, uid_prefix=self.uid_prefix)
        _show_added(summary, self.index, as_json=self.json)


def _show_added(summary: "AddSummary", index: Path, *, as_json: bool) -> None:
    if summary.unreadable:
        name, reason = next(iter(summary.unreadable.items()))
        logger.warning(
            f"{len(summary.unreadable):,} cannot be embedded; the first, {name}: {reason}. --json lists all."
        )
    if as_json:
        show_json(summary)
        return
    fields = asdict(summary) | {"unreadable": len(summary.unreadable)}
    # an addition has neither
    del fields["removed"], fields["edited"]
    show_fields(spaced_names(fields))
    _log_compaction(summary.dead, summary.rows, index)


@dataclass(frozen=True, kw_only=True)
class SetMetadata:
    """Set metadata columns of rows from a table; nothing is embedded again, and other columns stay.

    Whole numbers of up to 64 bits are kept exactly; an empty cell changes nothing.
    """

    index: IndexArgument

    table: Annotated[Path, tyro.conf.arg(name="from", metavar="TABLE")]
    """CSV, TSV, JSONL or Parquet file."""

    key: Annotated[str, tyro.conf.arg(help=_KEY_HELP)]

    columns: tuple[str, ...] = ()
    """Columns to set; by default all but the key."""

    encoding: str = ""
    """Encoding of a table of text that is not UTF-8."""

    json: JsonOption = False

    def run(self) -> None:
        """Set, then show the counts and the keys that no row has."""
        summary = _open(self.index).set_metadata(self.table, key=self.key, columns=self.columns, encoding=self.encoding)
        if summary.unknown:
            shown = ", ".join(summary.unknown_keys) + (" …" if summary.unknown > len(summary.unknown_keys) else "")
            logger.warning(f"{pluralize(summary.unknown, 'key')} of {self.table} that no row has: {shown}")
        if self.json:
            show_json(summary)
            return
        fields = asdict(summary)
        del fields["unknown_keys"]
        show_fields(spaced_names(fields | {"columns": ", ".join(summary.columns)}))


@dataclass(frozen=True, kw_only=True)
class DeleteRows:
    """Delete rows of an index by uid or filter; vlm index rollback undoes it."""

    index: IndexArgument

    uid: tuple[str, ...] = ()
    """Uids to delete; if one does not exist, nothing is deleted."""

    uids: Path | None = None
    """File with one uid per line; - reads standard input."""

    where: str = ""
    """Delete rows that match this filter, e.g. "split = 'old' and width < 64"."""

    dry_run: bool = False
    """Only show how many rows would be deleted, and some of their uids."""

    yes: bool = False
    """Do not ask before more than half of the rows are deleted."""

    json: JsonOption = False

    def run(self) -> None:
        """Look what would go, ask if that is most of the index, delete, show the counts."""
        uids = list(self.uid)
        if self.uids:
            uids += _read_uids(self.uids)
        # both would leave open whether their union or their intersection is meant
        if bool(uids) == bool(self.where):
            raise UsageError("Name the rows to delete: either uids (--uid A B or --uids FILE) or a filter (--where).")
        index = _open(self.index)
        preview = index.delete(uids, where=self.where, dry_run=True)
        if self.dry_run:
            self._show_preview(preview)
            return
        if preview.is_majority and not self.yes:
            self._confirm(preview)
        info = index.delete(uids, where=self.where)
        if preview.hint:
            logger.info(preview.hint)
        show_commit_info(info, self.index, as_json=self.json)

    def _show_preview(self, preview: "DeletePreview") -> None:
        if self.json:
            show_json(preview)
            return
        fields = preview.to_json()
        show_fields(fields | {"examples": ", ".join(preview.examples)}, title="Nothing was deleted (--dry-run).")
        if preview.hint:
            logger.info(preview.hint)

    def _confirm(self, preview: "DeletePreview") -> None:
        """Ask at a terminal.

        Raises:
            UsageError: the answer is not yes, or there is no terminal to ask at.
        """
        what = f"{preview.rows:,} of {preview.rows + preview.remaining:,} rows of {self.index} would be deleted"
        # a person answers only where both ends are theirs
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"{what}, more than half; add --yes if that is meant, --dry-run shows some of them.")
        print(f"{what}. Delete them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError("Nothing was deleted.")


def _read_uids(path: Path) -> list[str]:
    # a uid may hold any character but a line feed, so that splitlines would cut some
    uids = list(filter(None, read_text(path).split("\n")))
    if not uids:
        raise UsageError(f"{path} holds no uid: one per line was expected; nothing was deleted.")
    return uids


@dataclass(frozen=True, kw_only=True)
class CompactIndex:
    """Merge all segments into one, retrain it, and drop deleted rows."""

    index: IndexArgument

    index_type: str = ""
    """Change to this index type, with its default parameters; empty keeps type and parameters."""

    discard_previous: Annotated[bool, tyro.conf.arg(help=_DISCARD_HELP)] = False

    json: JsonOption = False

    def run(self) -> None:
        """Compact, then show the counts."""
        info = _open(self.index).compact(index_type=self.index_type, keep_previous=not self.discard_previous)
        show_commit_info(info, self.index, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """Undo the last change of an index, as a new version; repeated, it redoes the change.

    The version before is kept, with its files, until the next change, whatever that is.
    """

    index: IndexArgument

    json: JsonOption = False

    def run(self) -> None:
        """Roll back, then show the counts."""
        show_commit_info(_open(self.index).rollback(), self.index, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class MakeMap:
    """Lay the rows of an index out on a map in two dimensions by UMAP, like ones together; vlm serve shows it.

    Rows added later are placed among their nearest; run it again to lay all of them out anew. Needs the extra map.
    """

    index: IndexArgument

    sample: int = 50_000
    """Maximum number of rows that UMAP lays out; the others are placed among these."""

    seed: int = 0
    """Random seed of the sample and of UMAP."""

    json: JsonOption = False

    def run(self) -> None:
        """Lay out, then show the counts and where to see it."""
        summary = _open(self.index).make_map(sample=self.sample, seed=self.seed)
        if self.json:
            show_json(summary)
            return
        show_fields(asdict(summary))
        logger.info(f"To see it, next: {shlex.join(['vlm', 'serve', str(self.index)])}")


@dataclass(frozen=True, kw_only=True)
class Relocate:
    """Say where the shards or image files of an index lie now; nothing is embedded again."""

    index: IndexArgument

    old: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OLD")] = ""
    """Folder, shard or image file of before, as hits show it."""

    new: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NEW")] = ""
    """Folder, shard or image file of now."""

    shards: Annotated[str, tyro.conf.arg(help=_SHARDS_HELP)] = ""

    json: JsonOption = False

    def run(self) -> None:
        """Relocate, then show the counts."""
        info = _open(self.index).relocate(self.old, self.new, shards=self.shards)
        show_commit_info(info, self.index, as_json=self.json)


def _open(folder: Path, model: str = "") -> "SearchIndex":
    from vlm.api.index import open_index
    from vlm.service.query import chosen_backend

    # VLM_BACKEND decides over what embeds new rows, too
    return open_index(folder, model=model or None, backend=chosen_backend())


def show_commit_info(info: "CommitInfo", index: Path, *, as_json: bool) -> None:
    """What a change did, and whether it is time to compact."""
    if as_json:
        show_json(info)
        return
    show_fields(spaced_names(asdict(info)))
    _log_compaction(info.dead, info.rows, index)


def _log_compaction(dead: int, rows: int, index: Path) -> None:
    if dead > _MAX_DELETED_SHARE * (dead + rows):
        command = shlex.join(["vlm", "index", "compact", str(index)])
        logger.info(f"Next: {command}, since every search skips {dead:,} deleted rows.")
