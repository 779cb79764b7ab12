"""Export the live rows of an index for other tools: npy, FAISS, Parquet, or clip-retrieval's folders.

Row i of the vectors, or id i of the FAISS file, is row i of the Parquet table that comes with them.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.errors import UsageError
from vlm.files import atomic_folder, atomic_write, check_not_exists, compute_fingerprint, json_text
from vlm.index.ann.faiss_search import load_faiss, to_float32
from vlm.index.ann.index_types import TuningParams, fall_back_to_flat
from vlm.index.catalog import Catalogue, Entry
from vlm.index.embeddings_folder import normalize_rows
from vlm.index.filter_language import parse_filter
from vlm.index.index_files import SEGMENTS
from vlm.index.interop.import_layouts import EMBEDDING, ORIGIN, TABLE_FOLDER, VECTOR_FOLDERS
from vlm.index.interop.importer import EXPORT
from vlm.index.reader import IndexSnapshot, open_snapshot
from vlm.index.segments import SegmentView, write_segment
from vlm.manifest import Manifest, record_file, write_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Float, Int64

logger = logging.getLogger(__name__)

Precision = Literal["float16", "float32"]

_ROWS_AT_ONCE = 8192
_TYPES = {
    # few shards, many rows
    "shard": pa.dictionary(pa.int32(), pa.string()),
    "number": pa.int64(),
    "image_offset": pa.int64(),
    "image_size": pa.int64(),
    "caption_number": pa.int32(),
}
# columns that clip-retrieval's back end displays
_DISPLAYED = ("image_path", "caption", "url")


def write_rows(
    path: Path,
    catalogue: Catalogue,
    views: Iterable[SegmentView],
    *,
    precision: Precision | None = None,
    for_clip_retrieval: bool = False,
) -> None:
    """Write the rows of the views as a Parquet table, in their order, atomically.

    Columns are those of `Origin`, captions and metadata as JSON; with `precision` also `embedding`, the unit vector;
    for clip-retrieval also `image_path`, `caption` and `url`.
    """
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in ORIGIN])
    if for_clip_retrieval:
        for name in _DISPLAYED:
            schema = schema.append(pa.field(name, pa.string()))
    if precision is not None:
        schema = schema.append(pa.field(EMBEDDING, pa.list_(pa.float16() if precision == "float16" else pa.float32())))
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        # a row group for each block bounds the memory of the writer, and of readers
        for rows, stored in iter_stored_rows(views):
            entries = catalogue.entries(rows.tolist())
            columns: dict[str, Any] = {}
            for name in ORIGIN:
                columns[name] = [_value(entry, name) for entry in entries]
            for name in _DISPLAYED if for_clip_retrieval else ():
                columns[name] = [_displayed(entry, name) for entry in entries]
            if precision is not None:
                columns[EMBEDDING] = _lists(to_precision(stored, precision))
            writer.write_table(pa.table(columns, schema=schema))


def iter_stored_rows(views: Iterable[SegmentView]) -> Iterator[tuple[Int64[Array, " N"], Float[Array, "N D"]]]:
    """The catalogue's rows and the stored float16 vectors, block by block."""
    for view in views:
        for positions in view.position_blocks(_ROWS_AT_ONCE):
            yield view.segment.rows[positions], view.segment.vectors.stored[positions]


def to_precision(stored: Float[Array, "N D"], precision: Precision) -> Float[Array, "N D"]:
    """Stored vectors unchanged, or as float32 of exactly unit length."""
    return normalize_rows(to_float32(stored)) if precision == "float32" else np.asarray(stored)


def _value(entry: Entry, name: str) -> Any:
    value = getattr(entry, name)
    return json_text(value) if name in ("captions", "metadata") else value


def _displayed(entry: Entry, name: str) -> str | None:
    if name == "caption":
        return next(chain.from_iterable(entry.captions.values()), None)
    value = entry.metadata.get(name, entry.key if name == "image_path" else None)
    return None if value is None else str(value)


def _lists(vectors: Float[Array, "N D"]) -> pa.ListArray:
    # all lists are of one length, so their offsets are known and no row is copied by itself
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))


ExportFormat = Literal["npy", "clip-retrieval", "faiss", "parquet"]

FAISS_FILE = "index.faiss"
MATRIX = "embeddings.npy"
TABLE = "metadata.parquet"
WITH_VECTORS = "embeddings.parquet"


@dataclass(frozen=True, kw_only=True)
class ExportSummary(Result):
    """What was written, and of which version. faiss_kind: type of the FAISS file, empty if there is none."""

    folder: str
    to: ExportFormat
    generation: int
    rows: int
    dimension: int
    precision: Precision
    faiss_kind: str
    files: tuple[str, ...]
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _RowsToExport:
    """The rows to export, by segment."""

    snapshot: IndexSnapshot
    views: Sequence[SegmentView]
    precision: Precision

    @property
    def rows(self) -> int:
        return sum(view.count for view in self.views)

    @property
    def dimension(self) -> int:
        return self.snapshot.details.space.dimension


def export_index(
    index: Path, out: Path, *, to: ExportFormat, where: str = "", precision: Precision | None = None
) -> ExportSummary:
    """Write the live rows of the newest version, or those a filter selects, into a new folder, whole or not at all.

    Args:
        precision: of the vectors; left out, float16 as they are stored, but float32 for Parquet, because few tools read
            float16 from it. A FAISS file has its own.

    Raises:
        UsageError: no row is selected, the filter is malformed, `out` exists, or `index` is not an index.
        VlmError: the index is damaged. OSError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    check_not_exists(out)
    snapshot = open_snapshot(index)
    try:
        export_rows = _choose(snapshot, where, precision or ("float32" if to == "parquet" else "float16"))
        with atomic_folder(out) as folder:
            kind = _WRITERS[to](folder, export_rows)
            # listed before the manifest, which does not name itself
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            _write_manifest(folder, export_rows, to, where, files)
            num_bytes = sum((folder / name).stat().st_size for name in files)
    finally:
        snapshot.catalogue.close()
    return ExportSummary(
        folder=str(out),
        to=to,
        generation=snapshot.number,
        rows=export_rows.rows,
        dimension=export_rows.dimension,
        precision=export_rows.precision,
        faiss_kind=kind,
        files=tuple(files),
        bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


def _choose(snapshot: IndexSnapshot, where: str, precision: Precision) -> _RowsToExport:
    views = snapshot.views
    if where:
        rows = snapshot.catalogue.where(parse_filter(where))
        views = [view.restricted_to(rows) for view in views]
    export_rows = _RowsToExport(snapshot=snapshot, views=[view for view in views if view.count], precision=precision)
    if not export_rows.rows:
        reason = f"the filter {where!r} selects none" if where else "it is empty"
        raise UsageError(f"{snapshot.folder} has no row to export: {reason}.")
    return export_rows


def _write_npy(folder: Path, export_rows: _RowsToExport) -> str:
    _write_matrix(folder / MATRIX, export_rows)
    write_rows(folder / TABLE, export_rows.snapshot.catalogue, export_rows.views)
    return ""


def _write_clip_retrieval(folder: Path, export_rows: _RowsToExport) -> str:
    """One numbered part, as clip-retrieval's inference leaves it."""
    name = VECTOR_FOLDERS[export_rows.snapshot.details.space.modality]
    (folder / name).mkdir()
    (folder / TABLE_FOLDER).mkdir()
    _write_matrix(folder / name / f"{name}_0.npy", export_rows)
    table = folder / TABLE_FOLDER / f"{TABLE_FOLDER}_0.parquet"
    write_rows(table, export_rows.snapshot.catalogue, export_rows.views, for_clip_retrieval=True)
    return ""


def _write_parquet(folder: Path, export_rows: _RowsToExport) -> str:
    catalogue = export_rows.snapshot.catalogue
    write_rows(folder / WITH_VECTORS, catalogue, export_rows.views, precision=export_rows.precision)
    return ""


def _write_faiss(folder: Path, export_rows: _RowsToExport) -> str:
    """The FAISS index of the only segment if all of its rows are exported, else a new one; its type."""
    write_rows(folder / TABLE, export_rows.snapshot.catalogue, export_rows.views)
    view = export_rows.views[0]
    if len(export_rows.views) > 1 or view.count < len(view.segment):
        return _build_faiss(folder, export_rows)
    # positions are the ids then, as in the table
    faiss = load_faiss()
    # of lists on disk FAISS would write the path of the segment's file
    index = view.segment.index_in_memory()
    with atomic_write(folder / FAISS_FILE) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return view.segment.meta.kind


def _build_faiss(folder: Path, export_rows: _RowsToExport) -> str:
    details = export_rows.snapshot.details
    rows = np.arange(export_rows.rows)

    def write(kind: str, tuning: TuningParams) -> str:
        blocks = (stored for _, stored in iter_stored_rows(export_rows.views))
        written = write_segment(
            folder,
            0,
            blocks,
            rows,
            dimension=export_rows.dimension,
            kind=kind,
            tuning=tuning,
            link_queries=export_rows.snapshot.link_queries(),
        )
        # of the segment's three files other tools read only this one
        (folder / written.segment.index_file).replace(folder / FAISS_FILE)
        shutil.rmtree(folder / SEGMENTS)
        return kind

    return fall_back_to_flat(write, details.kind, export_rows.rows, TuningParams(**details.tuning))


def _write_matrix(path: Path, export_rows: _RowsToExport) -> None:
    shape = (export_rows.rows, export_rows.dimension)
    dtype = np.dtype(export_rows.precision)
    # header first, then block by block: np.save would need the whole matrix at once
    with atomic_write(path) as file:
        meta = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, meta)
        for _, stored in iter_stored_rows(export_rows.views):
            file.write(np.ascontiguousarray(to_precision(stored, export_rows.precision), dtype).tobytes())


def _write_manifest(
    folder: Path, export_rows: _RowsToExport, to: ExportFormat, where: str, files: Sequence[str]
) -> None:
    before = export_rows.snapshot.manifest
    space = export_rows.snapshot.details.space
    manifest = Manifest(
        kind=EXPORT,
        fingerprint=compute_fingerprint(before.fingerprint, to, where, export_rows.precision),
        counts={"rows": export_rows.rows},
        configuration={"index": str(export_rows.snapshot.folder.absolute()), "to": to, "where": where},
        inputs={"model": space.fingerprint, "index": before.fingerprint},
        files={name: record_file(folder / name) for name in files},
        details={"space": asdict(space)},
        generation=before.generation,
    )
    write_manifest(folder, manifest)


_WRITERS: dict[ExportFormat, Callable[[Path, _RowsToExport], str]] = {
    "npy": _write_npy,
    "clip-retrieval": _write_clip_retrieval,
    "faiss": _write_faiss,
    "parquet": _write_parquet,
}
