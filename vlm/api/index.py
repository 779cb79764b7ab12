"""`vlm.open_index`: an index to hits and to its next version."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np

from vlm.config import text_list
from vlm.data.image_inputs import ImageInput, encoded_image, image_list
from vlm.errors import UsageError, os_errors_explained
from vlm.index.encoder import Encoder
from vlm.index.engine_base import EngineCatalogue, IndexInfo, check_index, open_writer, require_faiss, row_numbers
from vlm.index.metadata import metadata_lines
from vlm.index.row_map import SAMPLE
from vlm.results import Result
from vlm.service.query import Backend, Query, query_loader
from vlm.service.search import LoadEncoder, RankedHit, SearchResult, SearchService

# imported where they are used: a search needs none of them, and they need torch, FAISS's training or tables
if TYPE_CHECKING:
    from vlm.api.inference import Model
    from vlm.index.engine_writer import CommitInfo, EngineWriter
    from vlm.index.verify import CheckReport

Hit = RankedHit
Texts = str | Sequence[str]
Additions = ImageInput | Sequence[ImageInput]
Vectors = str | Path | np.ndarray | Sequence[float] | Sequence[Any]

_NUM_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class DeletePreview(Result):
    """What a deletion would remove: the number of rows, some of their uids, and the rows that would be left.

    hint: why a filter matches no row.
    """

    rows: int
    remaining: int
    examples: tuple[str, ...]
    hint: str = ""

    @property
    def is_majority(self) -> bool:
        """Whether it is more than half of the index."""
        return self.rows > self.remaining


def open_index(
    folder: str | Path,
    *,
    model: "str | Path | Model | Encoder | None" = None,
    rerank_model: str | Path = "",
    on_gpu: bool = False,
    backend: Backend = "auto",
) -> "SearchIndex":
    """Open an index; its model is loaded when a query first needs one.

    Args:
        model: where the index's model lies now, if it has moved, or what `vlm.load` gave.
        rerank_model: what reranks, for `rerank_top`: a folder of `vlm.fit_reranker`, or a model with a caption decoder.
        on_gpu: copy the index to a GPU where FAISS sees one, which pays off for many queries.
        backend: what embeds queries: `onnx`, the model's ONNX export, which needs no torch; `torch`; or `auto`, the
            export where there is one that is up to date. Rows to add are embedded by an export only if it is in
            float32, and there is no GPU.

    Raises:
        UsageError: there is no finished index. VlmError: it is damaged.
    """
    if not isinstance(folder, str | os.PathLike):
        raise UsageError(f"folder = {folder!r}: give the folder of an index.")
    spec = ""
    load: LoadEncoder = query_loader(backend=backend, prefers_gpu=on_gpu)
    if isinstance(model, str | Path):
        spec = str(model)
    elif model is not None:
        # what vlm.load gives holds the encoder
        encoder = cast(Encoder, getattr(model, "query_encoder", model))
        load = lambda _: encoder  # noqa: E731
    gpu = None
    if on_gpu:
        from vlm.index.ann.faiss_search import find_gpu

        gpu = find_gpu()
    return SearchIndex(
        SearchService.open(Path(folder), model_spec=spec, rerank_spec=str(rerank_model), load=load, gpu=gpu)
    )


class SearchIndex:
    """An open index, as `vlm.open_index` gives it.

    Searches see the newest version, whoever made it. Each change is one new version, whole or not at all, and returns
    what it did; only one process at a time may change an index.
    """

    def __init__(self, service: SearchService) -> None:
        self._service = service

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self._service.index.folder

    def __len__(self) -> int:
        self._service.index.refresh()
        return len(self._service.index)

    def __contains__(self, uid: str) -> bool:
        self._service.index.refresh()
        return self._catalogue.find(uid) is not None

    def __repr__(self) -> str:
        return f"<SearchIndex {str(self.folder)!r}, {len(self._service.index):,} rows>"

    def __enter__(self) -> "SearchIndex":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release its files; results that were returned stay valid."""
        self._service.close()

    @os_errors_explained()
    def search(
        self,
        texts: Texts = (),
        *,
        image: ImageInput | Sequence[ImageInput] = (),
        like: ImageInput | Sequence[ImageInput] = (),
        minus: Texts = (),
        vector: Vectors = (),
        weights: Sequence[float] = (),
        where: str = "",
        words: str = "",
        top: int = 10,
        at_least: float | None = None,
        group_duplicates: float | None = None,
        diversity: float = 0.0,
        rerank_top: int = 0,
        relevant: bool | float = False,
        after: str = "",
    ) -> SearchResult:
        """The rows nearest to a query: the sum of its texts, images, rows and vectors, less what is not wanted.

        Args:
            texts: one text or several, which are combined.
            image: one image or several: paths, bytes, PIL images, arrays.
            like: as `image`, or uids of rows, which need no model.
            minus: texts to subtract.
            vector: vectors of the index's space: numbers, a matrix of one a row, or an .npy file.
            weights: one a term, in the order texts, image, images of like, uids of like, vector, minus.
            where: a filter, as `"language == 'en' and width >= 512"` (vlm search --help).
            words: captions with these words come first, mixed by rank with the nearest rows.
            at_least: minimum cosine of a hit.
            group_duplicates: hits whose cosine with a better one is at least this are counted, not shown.
            diversity: from 0, relevance only, to 1, diversity only.
            rerank_top: so many first hits are ordered by the likelihood of the texts (`rerank_model`).
            relevant: only hits that are likely relevant, those of probability 0.9, or of the one given here; there may
                be none. The first time, some seconds go into calibrating the index (vlm.service.relevance).
            after: `next` of a result of this query, for the next page.

        Raises:
            UsageError: the query, its filter or a value of it is not valid.
            VlmError: an image cannot be read, or the index is damaged.
        """
        images, uids = self._terms_like(like)
        query = Query.of(
            texts=texts,
            images=(*_encoded_images(image), *images),
            items=uids,
            vectors=_query_vectors(vector),
            minus=minus,
            weights=weights,
            top=top,
            where=where,
            at_least=at_least,
            words=words,
            duplicates=group_duplicates,
            diversity=diversity,
            rerank_top=rerank_top,
            relevant=relevant,
            after=after,
        )
        return self._service.search(query)

    @os_errors_explained()
    def search_many(
        self, queries: Iterable[str | Query], *, names: Sequence[str] = (), **options: Any
    ) -> list[SearchResult]:
        """The results of several queries, from one version of the index; their texts are embedded together.

        queries: texts, or queries with terms of every kind. names: of the queries; an error about one begins with it.
        options: of every query that is a text, as `top=5, where="year > 2020"` (`search` has all).

        Raises: as `search`.
        """
        if isinstance(queries, str) or not isinstance(queries, Iterable):
            raise UsageError(f"queries = {queries!r}: give a list of texts or of queries; search takes a single one.")
        defaults = Query.of(**options)
        prepared: list[Query] = []
        for query in queries:
            if not isinstance(query, str | Query):
                raise UsageError(
                    f"queries holds {query!r}: give texts, or queries as vlm.service.query.Query(texts=…)."
                )
            # options belong to texts; a query says for itself what it wants
            prepared.append(replace(defaults, texts=(query,)) if isinstance(query, str) else query)
        return self._service.search_many(prepared, names=names)

    @os_errors_explained()
    def add(
        self,
        items: Additions,
        *,
        uids: Texts | None = None,
        captions: Any = None,
        metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        uid_prefix: str = "",
    ) -> "AddSummary":
        """Add what is new: images, a folder of images, shards, a table with images, or an embeddings folder.

        Images are embedded by the index's own model. Those with a file stay where they are; the others are kept in a
        shard in the index folder. An interrupted call resumes when it is repeated.

        Args:
            items: one image or several (paths, bytes, PIL images, arrays), or the address of a folder, of shards, of a
                table or of embeddings. Of a folder, shards and a table, what the index has already is left out.
            uids: of images; by default the path as given, or a digest of an image without a file. In a folder it is
                the path below it, in shards the key.
            captions: of images: for each a text, several, or texts by language.
            metadata: of images: for each a mapping, or one for all.
            uid_prefix: put before each uid.

        Raises:
            UsageError: there is nothing of the kind, a uid exists already, or embeddings are of another model.
            VlmError: not one image can be read.
        """
        return self._insert(
            items, _Described(uids, captions, metadata), uid_prefix=uid_prefix, where="", replace_known=False
        )

    @os_errors_explained()
    def update(
        self,
        items: Additions,
        *,
        uids: Texts | None = None,
        captions: Any = None,
        metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        uid_prefix: str = "",
        where: str = "",
    ) -> "AddSummary":
        """As `add`, but rows whose uid exists are embedded again and replaced (upsert).

        where: replace only rows that match this filter; all other rows, new ones included, are left out and counted.
        """
        return self._insert(
            items, _Described(uids, captions, metadata), uid_prefix=uid_prefix, where=where, replace_known=True
        )

    @os_errors_explained()
    def set_metadata(
        self,
        values: str | Path | Mapping[str, Mapping[str, Any]] | Iterable[Mapping[str, Any]],
        *,
        key: str = "uid",
        columns: Texts = (),
        encoding: str = "",
    ) -> "SetSummary":
        """Change metadata of rows; nothing is embedded again, and other values stay.

        Args:
            values: a table (CSV, TSV, JSONL, Parquet; an empty cell changes nothing), new values by uid, or one
                mapping a row with its `key` (None removes a value).
            key: the column that names the rows, by the metadata field of the same name; by default their uids.
            columns: those to set; all but the key if empty.
            encoding: of a table of text that is not UTF-8.

        Raises:
            UsageError: the table, its key or a column does not fit; nothing is set.
        """
        from vlm.index.catalog_edits import match_table, read_table

        if isinstance(values, str | Path):
            lines: Iterable[Mapping[str, Any]] = read_table(Path(values), encoding=encoding)
        else:
            lines = metadata_lines(values)
        names = text_list(columns, "columns")

        def change(writer: "EngineWriter") -> "SetSummary":
            # matched under the lock, so that it fits the version that is changed
            table = match_table(writer.snapshot.catalogue, lines, key=key, columns=names)
            info = writer.set_metadata(table.changes)
            return SetSummary(
                generation=info.generation,
                rows=info.rows,
                edited=info.edited,
                seconds=info.seconds,
                columns=table.columns,
                keys=table.num_keys,
                unknown=table.num_unknown,
                unknown_keys=table.unknown,
            )

        return self._change(change)

    @overload
    def delete(
        self, uids: Texts = (), *, where: str = "", dry_run: Literal[False] = False, expect: int | None = None
    ) -> "CommitInfo": ...
    @overload
    def delete(
        self, uids: Texts = (), *, where: str = "", dry_run: Literal[True], expect: int | None = None
    ) -> DeletePreview: ...
    @overload
    def delete(
        self, uids: Texts = (), *, where: str = "", dry_run: bool, expect: int | None = None
    ) -> "CommitInfo | DeletePreview": ...
    @os_errors_explained()
    def delete(
        self, uids: Texts = (), *, where: str = "", dry_run: bool = False, expect: int | None = None
    ) -> "CommitInfo | DeletePreview":
        """Delete rows by uid or by a filter; with `dry_run` only say what would go.

        expect: the number of rows to delete, as `dry_run` gave it; if it is another by now, nothing is deleted.

        Raises:
            UsageError: a uid does not exist, the filter is malformed, neither or both are given, or `expect` is not
                the number of rows.
        """
        names = text_list(uids, "uids")
        # both would leave open whether their union or their intersection is meant
        if bool(names) == bool(where):
            raise UsageError("Name the rows to delete: either uids or a filter (where), not both.")
        if dry_run:
            # of the newest version, which is the one that would be changed
            self._service.index.refresh()
            preview = self._preview_deletion(names, where)
            _check_expected(preview.rows, expect)
            return preview
        from vlm.index.engine_writer import rows_to_delete
        from vlm.index.filter_language import parse_filter

        # parsed before the index is locked, evaluated under the lock
        condition = parse_filter(where) if where else None

        def change(writer: "EngineWriter") -> "CommitInfo":
            snapshot = writer.snapshot
            rows = snapshot.catalogue.where(condition) if condition else rows_to_delete(snapshot, names)
            # under the lock: between a dry run and this call another writer may have added rows
            _check_expected(len(rows), expect)
            return writer.delete_rows(rows)

        return self._change(change)

    @os_errors_explained()
    def compact(self, *, index_type: str = "", keep_previous: bool = True) -> "CommitInfo":
        """Merge all segments into one, retrain it, and drop deleted rows.

        index_type: change to this type, with its default parameters. keep_previous: without, the version before is
            removed at once and cannot be rolled back to, which frees its disk space.
        """
        from vlm.index.ann.index_types import TuningParams

        # None keeps the parameters, which belong to the type that the index has
        tuning = TuningParams() if index_type else None
        return self._change(lambda writer: writer.compact(kind=index_type, tuning=tuning, keep_previous=keep_previous))

    @os_errors_explained()
    def rollback(self) -> "CommitInfo":
        """Undo the last change, as a new version; a second call redoes it.

        Raises:
            UsageError: no version before was kept. VlmError: its files are damaged.
        """
        return self._change(lambda writer: writer.rollback())

    @os_errors_explained()
    def relocate(self, old: str | Path = "", new: str | Path = "", *, shards: str = "") -> "CommitInfo":
        """Say where the images of the index lie now; nothing is embedded again.

        Args:
            old: the folder, shard or file of before; new: that of now.
            shards: instead of these: the shards where they are now (a folder, a pattern, several joined by ::), each
                found by its file name.

        Raises:
            UsageError: nothing of the index lies at `old`, or a file is not there, or is another one.
        """
        from vlm.data.shards import expand_shards
        from vlm.index.catalog_edits import addresses_below, addresses_by_name, check_addresses

        if bool(shards) == bool(old or new) or bool(old) != bool(new):
            raise UsageError("Say what moved where: either OLD and NEW, or the shards where they are now.")
        # listed before the index is locked: the answer of a bucket may take long
        present = expand_shards(shards) if shards else []

        def change(writer: "EngineWriter") -> "CommitInfo":
            ends = writer.snapshot.catalogue.image_ends()
            if shards:
                moved = addresses_by_name(list(ends), present)
            else:
                moved = addresses_below(list(ends), str(old), str(new))
            check_addresses(moved, ends)
            return writer.relocate(moved)

        return self._change(change)

    @os_errors_explained()
    def make_map(self, *, sample: int = SAMPLE, seed: int = 0) -> "MapSummary":
        """Lay its rows out on a map in two dimensions, like ones together, for the page of `vlm serve`; a new version.

        Rows that are added later are placed among their nearest; deleted ones vanish. A second call makes the map anew.

        Args:
            sample: the most rows that are laid out by UMAP; the others are placed among these.
            seed: of the sample and of UMAP: the same rows and versions of libraries give the same map.

        Raises:
            UsageError: umap-learn is not installed, sample or seed is out of range, or the index has no rows.
        """
        from vlm.index.index_files import MapRecord
        from vlm.index.row_map import METHOD, lay_out

        require_faiss(self.folder, "A map")
        started = time.perf_counter()
        self._service.index.refresh()
        snapshot = self._service.index.snapshot
        if not len(snapshot):
            raise UsageError(f"{self.folder} has no rows to lay out; add some first.")
        # before the index is locked; rows keep their numbers, whatever changes meanwhile
        layout = lay_out(snapshot.rows, snapshot.vectors, sample=sample, seed=seed)
        record = MapRecord(file="", rows=0, fitted=layout.fitted, method=METHOD, seed=seed)
        info = self._change(lambda writer: writer.set_map(snapshot.rows, layout.places, record))
        return MapSummary(
            generation=info.generation,
            rows=len(snapshot),
            fitted=layout.fitted,
            seconds=time.perf_counter() - started,
        )

    def info(self) -> IndexInfo:
        """What it holds, in numbers."""
        self._service.index.refresh()
        return self._service.index.info()

    @os_errors_explained()
    def check(self, *, sample: int = 1000, seed: int = 0) -> "CheckReport":
        """Read all of it and list its faults: checksums, joins, metadata and, of `sample` rows, distances."""
        self._service.index.require_open()
        if sample < 1:
            raise UsageError(f"sample = {sample} is out of range: give at least 1.")
        return check_index(self.folder, sample=sample, seed=seed)

    @property
    def _catalogue(self) -> EngineCatalogue:
        return self._service.index.catalogue

    def _change(self, change: Callable[["EngineWriter"], Any]) -> Any:
        self._service.index.require_open()
        with open_writer(self.folder) as writer:
            return change(writer)

    def _insert(
        self, items: Additions, described: "_Described", *, uid_prefix: str, where: str, replace_known: bool
    ) -> "AddSummary":
        from vlm.index.filter_language import parse_filter
        from vlm.service.additions import AdditionPlanner, parse_descriptions, rows_to_write

        started = time.perf_counter()
        # parsed and embedded before the index is locked: other writers do not wait for a model
        condition = parse_filter(where) if where else None
        self._service.index.refresh()
        planner = AdditionPlanner(
            self._service.index.snapshot,
            lambda: self._service.row_encoder,
            uid_prefix=uid_prefix,
            replace_known=replace_known,
        )
        address = _address_of(items)
        if address:
            if described.is_given:
                raise UsageError("uids, captions and metadata are said of images, not of a folder, shards or a table.")
            addition = planner.from_address(address)
        else:
            images = image_list(items)
            addition = planner.from_images(
                images,
                parse_descriptions(
                    len(images), uids=described.uids, captions=described.captions, metadata=described.metadata
                ),
            )

        def change(writer: "EngineWriter") -> "AddSummary":
            found = addition
            allowed_rows = writer.snapshot.catalogue.where(condition) if condition else None
            if not (replace_known or addition.is_finished):
                found = rows_to_write(addition, writer.snapshot)
            if found.batch is None:
                info = writer.describe()
            elif addition.is_finished and not replace_known:
                info = writer.add(found.batch)
            else:
                info = writer.update(found.batch, allowed_rows=allowed_rows)
            values = {name: getattr(info, name) for name in ("generation", "rows", "segments", "dead", "added")}
            return AddSummary(
                **values,
                replaced=info.replaced,
                left_out=info.left_out,
                known=found.known,
                unreadable=found.unreadable,
                seconds=time.perf_counter() - started,
            )

        try:
            summary = self._change(change)
        except BaseException:
            # no row names these files, so that nothing would ever remove them
            for path in addition.new_files:
                path.unlink(missing_ok=True)
            raise
        addition.remove_work(has_new_rows=bool(summary.added or summary.replaced))
        return summary

    def _terms_like(self, like: ImageInput | Sequence[ImageInput]) -> tuple[list[Path | bytes], tuple[str, ...]]:
        """The images and the uids among what rows should be like."""
        if isinstance(like, tuple) and not like:
            return [], ()
        values = image_list(like)
        names = [str(value) for value in values if isinstance(value, str | Path)]
        # the catalogue is asked only if there is a name, which a file may have as well: a uid comes first
        self._service.index.refresh()
        known = self._catalogue.rows_by_uid(names) if names else {}
        images: list[Path | bytes] = []
        uids: list[str] = []
        for value in values:
            if not isinstance(value, str | Path):
                images.append(encoded_image(value))
            elif str(value) in known:
                uids.append(str(value))
            elif Path(value).expanduser().is_file():
                images.append(Path(value).expanduser())
            else:
                raise UsageError(f"{self.folder} has no item {str(value)!r}, and there is no file of that name.")
        return images, tuple(uids)

    def _preview_deletion(self, uids: list[str], where: str) -> DeletePreview:
        from vlm.index.engine_writer import rows_to_delete
        from vlm.index.filter_hints import explain_no_match
        from vlm.index.filter_language import parse_filter

        catalogue = self._catalogue
        if uids:
            rows = rows_to_delete(self._service.index.snapshot, uids).tolist()
        else:
            rows = row_numbers(catalogue.where(parse_filter(where))).tolist()
        examples = tuple(entry.uid for entry in catalogue.entries(rows[:_NUM_NAMED]))
        return DeletePreview(
            rows=len(rows),
            remaining=len(self._service.index) - len(rows),
            examples=examples,
            hint=explain_no_match(catalogue, where) if where and not rows and len(catalogue) else "",
        )


@dataclass(frozen=True, kw_only=True)
class MapSummary(Result):
    """A map that was made: the version that has it, its rows, and how many of them UMAP laid out."""

    generation: int
    rows: int
    fitted: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SetSummary(Result):
    """What setting metadata did: the version it made, the rows it has, and how many of them have new values.

    columns: that were set. keys: of the table; unknown: how many of them no row has; unknown_keys: the first of these.
    """

    generation: int
    rows: int
    edited: int
    columns: tuple[str, ...]
    keys: int
    unknown: int
    unknown_keys: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AddSummary(Result):
    """What an addition did: the version of the index, and its rows.

    added: new rows. replaced: rows whose uid existed. known: rows that the index had already, which stay as they were.
    left_out: rows of an update that its filter leaves out. unreadable: what cannot be embedded, with the reason.
    """

    generation: int
    rows: int
    segments: int
    dead: int
    added: int
    replaced: int
    known: int
    left_out: int
    unreadable: dict[str, str]
    seconds: float
    removed: int = 0
    edited: int = 0


@dataclass(frozen=True)
class _Described:
    """What a call says of images."""

    uids: Texts | None
    captions: Any
    metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None

    @property
    def is_given(self) -> bool:
        """Whether it says anything."""
        return not (self.uids is None and self.captions is None and self.metadata is None)


def _address_of(items: Additions) -> str:
    """The address of a folder, shards, a table or embeddings; empty for images."""
    values = image_list(items)
    for value in values:
        if not isinstance(value, str | Path) or _is_image_file(value):
            continue
        if len(values) == 1:
            return str(value)
        raise UsageError(f"{value} is not an image file; add folders, shards and tables one by one.")
    if not values:
        raise UsageError("There is nothing to add.")
    return ""


def _check_expected(num_rows: int, expect: int | None) -> None:
    if expect is not None and num_rows != expect:
        raise UsageError(
            f"{num_rows:,} rows would be deleted, not {expect:,} as expected; nothing was deleted: look again with "
            "dry_run, then expect that number."
        )


def _is_image_file(path: str | Path) -> bool:
    from vlm.data.photo_formats import PHOTO_ENDINGS, ending

    return ending(str(path)) in PHOTO_ENDINGS and not Path(path).expanduser().is_dir()


def _encoded_images(images: ImageInput | Sequence[ImageInput]) -> list[Path | bytes]:
    # of words alone there is nothing to read
    if isinstance(images, tuple) and not images:
        return []
    return list(map(encoded_image, image_list(images)))


def _query_vectors(vector: Vectors) -> tuple[Path | tuple[float, ...], ...]:
    if isinstance(vector, str | Path):
        return (Path(vector),)
    try:
        if not len(vector):
            return ()
        if isinstance(vector[0], str | Path):
            return tuple(map(Path, cast(Sequence[str], vector)))
        # in double precision, which holds every float32 exactly
        rows = np.atleast_2d(np.asarray(vector, np.float64))
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"vector: numbers, a matrix of one vector a row, or .npy files were expected: {error}."
        ) from error
    if rows.ndim > 2:
        raise UsageError(f"vector has {rows.ndim} axes; give numbers, or a matrix of one vector a row.")
    return tuple(map(tuple, rows.tolist()))
