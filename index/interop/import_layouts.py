"""The files of another tool: which hold vectors, which table describes their rows, and their rows block by block.

`find_file_pairs` pairs matrices or a FAISS file with Parquet tables, `open_parts` checks that they fit together before
anything is written, and `read_blocks` reads them. The columns of a table become uid, captions and metadata.
"""

import contextlib
import datetime
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm.config import suggest
from vlm.data.samples import Captions
from vlm.data.sources.table_rows import exact_value
from vlm.errors import UsageError, VlmError
from vlm.index.ann.faiss_search import load_faiss
from vlm.index.embeddings_folder import PARTS_JSONL, Modality, Origin
from vlm.tensor_types import Array, Float, Float32, Int64

ORIGIN = tuple(field.name for field in fields(Origin))
EMBEDDING = "embedding"
# in order of preference; clip-retrieval's tables have image_path, LAION's TEXT
_UIDS = ("uid", "key", "image_path")
_CAPTIONS = ("caption", "captions", "text", "TEXT")
# pandas stores its row labels under such a name
_LABELS = "__index_level_"


@dataclass(frozen=True, kw_only=True)
class ColumnChoice:
    """The columns to use; empty: the first of the usual names that exists."""

    uid: str = ""
    caption: str = ""
    embedding: str = ""


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """The columns of one table; empty if there is none.

    metadata: all others that can be stored. left_out: those that cannot: bytes, vectors other than those imported, and
        columns without a name.
    is_vlm_export: `vlm index export` wrote the table, so its rows have all fields of `Origin`.
    """

    uid: str
    caption: str
    embedding: str
    metadata: tuple[str, ...]
    left_out: tuple[str, ...]
    is_vlm_export: bool

    @property
    def value_columns(self) -> tuple[str, ...]:
        """All columns to read but the embedding."""
        if self.is_vlm_export:
            return ORIGIN
        return tuple(dict.fromkeys(filter(None, (self.uid, self.caption, *self.metadata))))

    def as_column_choice(self) -> ColumnChoice:
        """The same choice for another table."""
        return ColumnChoice(uid=self.uid, caption=self.caption, embedding=self.embedding)


def choose_columns(schema: pa.Schema, column_choice: ColumnChoice, path: Path, *, has_vectors: bool) -> TableColumns:
    """The use of each column of the table `path`.

    has_vectors: the vectors are in one of its columns.

    Raises:
        UsageError: a chosen column is missing or of the wrong type, or which column holds the vectors is ambiguous.
    """
    names = schema.names
    for name in (column_choice.uid, column_choice.caption, column_choice.embedding if has_vectors else ""):
        if name and name not in names:
            raise UsageError(f"{path} has no column {name!r}; {suggest(name, names)}")
    # whoever chooses another column wants our own table read like a foreign one
    is_vlm_export = (
        set(ORIGIN) <= set(names) and column_choice.uid in ("", "uid") and column_choice.caption in ("", "captions")
    )
    if is_vlm_export:
        uid = "uid"
        caption = "captions"
    else:
        uid = column_choice.uid or _first_present(_UIDS, names)
        caption = column_choice.caption or _first_present(_CAPTIONS, names)
    if uid and not _is_name(schema.field(uid).type):
        kind = schema.field(uid).type
        raise UsageError(f"The column {uid!r} of {path} holds {kind}; a uid is a text or a whole number.")
    vectors = [field.name for field in schema if _is_vector(field.type)] if has_vectors else []
    embedding = _choose_embedding(vectors, column_choice.embedding, path) if has_vectors else ""
    # filters find a row by its key and uid, so these need not be metadata too
    special = {embedding, caption, uid if uid in ("uid", "key") else ""} - {""}
    metadata: list[str] = []
    left_out: list[str] = []
    for name in names:
        if name in special or name.startswith(_LABELS):
            continue
        cannot_be_stored = not name or name in vectors or _is_binary(schema.field(name).type)
        (left_out if cannot_be_stored else metadata).append(name)
    return TableColumns(
        uid=uid,
        caption=caption,
        embedding=embedding,
        metadata=tuple(metadata),
        left_out=tuple(left_out),
        is_vlm_export=is_vlm_export,
    )


def _first_present(candidates: Sequence[str], names: Sequence[str]) -> str:
    return next((name for name in candidates if name in names), "")


def to_json_value(value: Any) -> Any:
    """The value as JSON can hold it: times as ISO texts, NaN and infinities as null.

    >>> to_json_value({"at": datetime.date(2024, 5, 31), "box": (1, float("nan"))})
    {'at': '2024-05-31', 'box': [1, None]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(name): to_json_value(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return list(map(to_json_value, value))
    return str(value)


def captions_of(value: Any) -> Captions:
    """A text, a list of texts, or either by language, as captions.

    >>> captions_of(["a dog", "a wet dog"]), captions_of({"de": "ein Hund"}), captions_of(None)
    ({'': ('a dog', 'a wet dog')}, {'de': ('ein Hund',)}, {})
    """
    by_language = value if isinstance(value, dict) else {"": value}
    captions: Captions = {}
    for language, texts in by_language.items():
        listed = texts if isinstance(texts, list) else [texts]
        non_empty = tuple(map(str, filter(None, listed)))
        if non_empty:
            captions[language] = non_empty
    return captions


def to_records(batch: pa.RecordBatch, names: Sequence[str]) -> list[dict[str, Any]]:
    """The named columns of a batch, row by row; decimals, times and maps as `exact_value` gives them."""
    records: list[dict[str, Any]] = [{} for _ in range(len(batch))]
    # column by column, since the type of a column says whether its cells need exact values
    for name in names:
        for record, value in zip(records, _exact_column(batch.column(name)), strict=True):
            record[name] = value
    return records


def _exact_column(column: pa.Array) -> list[Any]:
    if _needs_exact_values(column.type):
        return list(map(exact_value, column))
    return column.to_pylist()


def _needs_exact_values(kind: pa.DataType) -> bool:
    """Whether Python's own values would lose something: decimals, times of nanoseconds, durations, the keys of maps."""
    if pa.types.is_dictionary(kind):
        return _needs_exact_values(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_struct(kind):
        return any(_needs_exact_values(field.type) for field in kind)
    if pa.types.is_nested(kind) and not pa.types.is_map(kind):
        return _needs_exact_values(kind.value_type)
    checks = (pa.types.is_decimal, pa.types.is_timestamp, pa.types.is_time64, pa.types.is_duration, pa.types.is_map)
    return any(check(kind) for check in checks)


def _choose_embedding(vectors: Sequence[str], chosen: str, path: Path) -> str:
    if chosen and chosen not in vectors:
        raise UsageError(f"The column {chosen!r} of {path} does not hold lists of floating-point numbers.")
    if chosen:
        return chosen
    if EMBEDDING in vectors:
        return EMBEDDING
    if len(vectors) != 1:
        available = f"several: {', '.join(vectors)}; choose one by --embedding-column" if vectors else "none"
        raise UsageError(
            f"The vectors must be a column with lists of floating-point numbers, and {path} has {available}."
        )
    return vectors[0]


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _is_name(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


FAISS_SUFFIXES = (".faiss", ".index")
# IndexFlat, IndexHNSWFlat, IndexIVFFlat, IndexRefineFlat and their likes
_KEEPS_VECTORS = re.compile(r"Flat(IP|L2)?$")


@dataclass(frozen=True, eq=False)
class FaissRows:
    """The rows of a FAISS file, reconstructed; row i is the vector of id i.

    kind: FAISS's class of the index. places: where the index holds each row; None: in order.
    """

    path: Path
    kind: str
    index: Any
    places: Int64[Array, " N"] | None = None

    def __len__(self) -> int:
        return self.index.ntotal

    @property
    def dimension(self) -> int:
        """D."""
        return self.index.d

    @property
    def is_exact(self) -> bool:
        """Whether the index stores vectors, if only in float16, not codes of them."""
        faiss = load_faiss()
        inner = _without_ids(self.index)
        if isinstance(inner, faiss.IndexHNSWSQ):
            return faiss.downcast_index(inner.storage).sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return bool(_KEEPS_VECTORS.search(self.kind))

    def rows(self, first: int, last: int) -> Float32[Array, "N D"]:
        """Rows `first` up to but not including `last`.

        Raises:
            VlmError: the index cannot give them.
        """
        try:
            if self.places is not None:
                return _without_ids(self.index).reconstruct_batch(self.places[first:last])
            return self.index.reconstruct_batch(np.arange(first, last))
        except RuntimeError as error:
            raise VlmError(
                f"{self.path} ({self.kind}) cannot give its rows by number: import the vectors themselves (.npy) "
                f"if they still exist. FAISS says: {_last_line(error)}"
            ) from error


def open_faiss(path: Path) -> FaissRows:
    """A FAISS file, memory-mapped if this build of FAISS can.

    Raises:
        VlmError: it is damaged or not one, or its rows have ids that are not their numbers.
    """
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        inverted = faiss.try_extract_index_ivf(index)
        # without it an IVF index cannot find a row by its id
        if inverted is not None:
            inverted.make_direct_map()
    except RuntimeError as error:
        raise VlmError(f"{path} cannot be read as a FAISS index ({_last_line(error)}).") from error
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIDMap):
        ids = faiss.vector_to_array(outer.id_map)
        places = np.argsort(ids)
        # its rows in another order: each number is the id of one
        if np.array_equal(ids[places], np.arange(len(ids))):
            return FaissRows(path, type(_without_ids(index)).__name__, index, places)
    return FaissRows(path, type(outer).__name__, index)


def _without_ids(index: Any) -> Any:
    """The index behind a map of ids, which lives as long as `index`; transforms stay, for rows are those put in."""
    faiss = load_faiss()
    outer = faiss.downcast_index(index)
    return faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexIDMap) else outer


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().rpartition("\n")[2]


VECTOR_FOLDERS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
TABLE_FOLDER = "metadata"


@dataclass(frozen=True, kw_only=True)
class FilePair:
    """Files whose rows belong together by position.

    vectors: a .npy matrix or a FAISS file; None: they are a column of the table.
    table: Parquet; None: the rows have a number only.
    is_slice: several tables in turn describe the rows of one FAISS file.
    """

    vectors: Path | None
    table: Path | None
    is_slice: bool = False

    @property
    def path(self) -> Path:
        """The file that names the rows."""
        path = self.table or self.vectors
        assert path is not None
        return path


def find_file_pairs(source: Path, *, modality: Modality, metadata: Path | None = None) -> list[FilePair]:
    """The files of a source, in the order of their numbers.

    source: a folder of clip-retrieval (`img_emb`, `text_emb`, `metadata`), a folder of .npy and Parquet files, of .npy
        alone, or of Parquet alone; a folder with a FAISS file in place of .npy, whose tables may be in `metadata`; or
        one such file, whose table may be next to it under the same name.
    metadata: where the tables are, if elsewhere.

    Raises:
        UsageError: there is nothing to import, or a file lacks its partner.
    """
    if not source.exists():
        raise UsageError(f"There is no {source}.")
    if (source / PARTS_JSONL).is_file():
        raise UsageError(f"{source} is an embeddings folder already; vlm index build reads it directly.")
    vectors, tables = _files_of(source, modality, metadata)
    if metadata is not None and not (vectors and tables):
        raise UsageError(f"{source if tables else metadata} holds no {'.npy' if tables else '.parquet'} file.")
    if not vectors and not tables:
        raise UsageError(f"{source} holds neither .npy nor .parquet nor FAISS files (.faiss, .index).")
    if not tables:
        return [FilePair(vectors=matrix, table=None) for matrix in vectors]
    if vectors and vectors[0].suffix not in FAISS_SUFFIXES:
        return _join(vectors, tables)
    # one FAISS file for all tables, or none where the tables hold the vectors themselves
    faiss_file = vectors[0] if vectors else None
    return [FilePair(vectors=faiss_file, table=table, is_slice=faiss_file is not None) for table in tables]


def _files_of(source: Path, modality: Modality, metadata: Path | None) -> tuple[list[Path], list[Path]]:
    """Vectors and tables; either may be empty."""
    # clip-retrieval's layout, known by its folders
    present = [name for name in VECTOR_FOLDERS.values() if (source / name).is_dir()]
    if not present:
        vectors = _files(source, ".npy") or _faiss_file(source, modality)
        metadata_location = source if source.is_dir() else source.with_suffix(".parquet")
        tables = _files(metadata or metadata_location, ".parquet")
        if vectors and not tables and vectors[0].suffix in FAISS_SUFFIXES and metadata is None:
            tables = _files(source / TABLE_FOLDER, ".parquet")
        return vectors, tables
    folder = VECTOR_FOLDERS[modality]
    if folder not in present:
        other = "text" if modality == "image" else "image"
        raise UsageError(f"{source} has {present[0]}, but no {folder}; import it with --modality {other}.")
    tables = _files(metadata or source / TABLE_FOLDER, ".parquet")
    if not tables:
        raise UsageError(
            f"{source} has no tables in {TABLE_FOLDER}/; give {source / folder} to import the vectors alone, "
            "or the place of the tables as --metadata."
        )
    return _files(source / folder, ".npy"), tables


def _faiss_file(source: Path, modality: Modality) -> list[Path]:
    """The FAISS file of a folder; clip-retrieval's back end has `image.index` next to `text.index`."""
    files: list[Path] = []
    for suffix in FAISS_SUFFIXES:
        files += _files(source, suffix)
    named: dict[str, Modality] = {"image.index": "image", "text.index": "text"}
    names = [path.name for path in files]
    if len(files) > 1 and named.keys() >= set(names):
        files = [path for path in files if named[path.name] == modality]
    if len(files) > 1:
        raise UsageError(
            f"{source} holds several FAISS files ({', '.join(names)}); give one, and its tables as --metadata."
        )
    if files and named.get(files[0].name, modality) != modality:
        raise UsageError(f"{source} has {files[0].name} only; import it with --modality {named[files[0].name]}.")
    return files


def _files(place: Path, suffix: str) -> list[Path]:
    if place.is_dir():
        # names without leading zeros would put 10 before 2
        return sorted(place.glob(f"*{suffix}"), key=lambda path: (_number(path), path.name))
    return [place] if place.suffix == suffix and place.is_file() else []


def _number(path: Path) -> int:
    """The last number in a name, -1 without one: clip-retrieval and img2dataset number their parts so."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _join(vectors: Sequence[Path], tables: Sequence[Path]) -> list[FilePair]:
    """Pair by name, else by number; one of each belong together whatever their names."""
    if len(vectors) == len(tables) == 1:
        return [FilePair(vectors=vectors[0], table=tables[0])]
    # a whole name says more than its last number, so it comes first
    labels: tuple[Callable[[Path], str | int], ...] = (lambda path: path.stem, _number)
    for label in labels:
        by_label = {label(table): table for table in tables}
        vector_labels = set(map(label, vectors))
        is_one_to_one = len(vector_labels) == len(vectors) == len(tables) == len(by_label)
        if is_one_to_one and vector_labels == set(by_label):
            return [FilePair(vectors=matrix, table=by_label[label(matrix)]) for matrix in vectors]
    common_numbers = set(map(_number, vectors)) & set(map(_number, tables))
    unpaired = [path for path in (*vectors, *tables) if _number(path) not in common_numbers]
    reason = f"{unpaired[0]} has no partner" if unpaired else f"the number of {vectors[0]} is not unique"
    raise UsageError(
        f"{len(vectors)} .npy and {len(tables)} Parquet files cannot be matched by name or number: {reason}. "
        "Move away what does not belong, or give the folder of the tables as --metadata."
    )


ROWS_AT_ONCE = 16_384

Slices = Callable[[int, int], Float[Array, "N D"]]


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """A pair of files that fit together.

    first: number of its first row in the whole source. dimension: D. columns: None if there is no table to read.
    faiss: the FAISS file, if that holds the vectors.
    """

    pair: FilePair
    first: int
    rows: int
    dimension: int
    columns: TableColumns | None
    faiss: FaissRows | None = None

    def vectors(self) -> "Slices | None":
        """A function that gives the vectors of a range of rows; None: they are in the table."""
        if self.faiss is not None:
            faiss = self.faiss
            offset = self.first if self.pair.is_slice else 0
            return lambda first, last: faiss.rows(offset + first, offset + last)
        if self.pair.vectors is None:
            return None
        matrix = _open_matrix(self.pair.vectors)
        return lambda first, last: matrix[first:last]

    @property
    def place(self) -> Path:
        """The file with the vectors."""
        return self.pair.vectors or self.pair.path


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows of a part, from number `first` on; records has a dictionary for each row."""

    part: SourcePart
    first: int
    vectors: Float[Array, "N D"]
    records: list[dict[str, Any]] | None


def open_parts(pairs: Sequence[FilePair], column_choice: ColumnChoice) -> list[SourcePart]:
    """The parts that have rows, all of one dimension; only the headers of files are read.

    Raises:
        UsageError: a matrix and its table have different numbers of rows, two parts different dimensions, a file is not
            a matrix, a column is missing, or there is no row.
        VlmError: a file is damaged.
    """
    parts: list[SourcePart] = []
    # one FAISS file has the rows of all pairs
    faiss = _open_faiss(pairs[0])
    for pair in pairs:
        first = parts[-1].first + parts[-1].rows if parts else 0
        part = _open_part(pair, column_choice, faiss, first)
        if not part.rows:
            continue
        if parts and part.dimension != parts[0].dimension:
            raise UsageError(
                f"{parts[0].place} has vectors of {parts[0].dimension} dimensions, {part.place} of {part.dimension}: "
                "they are of two models; import them apart."
            )
        # the first table decides which columns are used, so that all parts agree
        column_choice = part.columns.as_column_choice() if part.columns else column_choice
        parts.append(part)
    if not parts:
        raise UsageError(f"There is no row in {pairs[0].path}" + (" or the other files." if pairs[1:] else "."))
    # its tables are slices in turn, so only their sum tells whether they fit
    if faiss is not None:
        tables = str(pairs[0].path) + (f" to {pairs[-1].path.name}" if pairs[1:] else "")
        _check_count(faiss.path, len(faiss), tables, parts[-1].first + parts[-1].rows)
    return parts


def read_blocks(part: SourcePart) -> Iterator[Block]:
    """All rows of a part in order, the matrix memory-mapped.

    Raises:
        VlmError: the table is damaged, or a vector in it has another length than the rest.
    """
    read_vectors = part.vectors()
    if part.columns is None:
        assert read_vectors is not None
        for first in range(0, part.rows, ROWS_AT_ONCE):
            vectors = read_vectors(first, min(first + ROWS_AT_ONCE, part.rows))
            yield Block(part=part, first=first, vectors=vectors, records=None)
        return
    first = 0
    columns = part.columns
    names = list(columns.value_columns)
    if columns.embedding:
        names.append(columns.embedding)
    for batch in _batches(part.pair.path, names):
        last = first + len(batch)
        vectors = read_vectors(first, last) if read_vectors else _vectors_in(batch, part, columns.embedding)
        yield Block(part=part, first=first, vectors=vectors, records=to_records(batch, columns.value_columns))
        first = last


def read_names(part: SourcePart) -> pa.ChunkedArray | None:
    """The uid column of a part, as texts; None: rows have numbers only.

    Raises:
        UsageError: a row has no uid.
        VlmError: the table is damaged.
    """
    if part.columns is None or not part.columns.uid:
        return None
    name = part.columns.uid
    path = part.pair.path
    batches = [batch.column(name).cast(pa.string()) for batch in _batches(path, [name])]
    names = pa.chunked_array(batches, pa.string())
    # a row without a name could be neither found nor replaced
    is_empty = pc.fill_null(pc.equal(names, ""), True)
    if num_empty := pc.sum(is_empty).as_py():
        row = pc.index(is_empty, True).as_py()
        raise UsageError(f"Row {row:,} of {path} has no {name!r} ({num_empty:,} such); choose another --uid-column.")
    return names


def _open_part(pair: FilePair, column_choice: ColumnChoice, faiss: FaissRows | None, first: int) -> SourcePart:
    """A pair, unchecked against others; `faiss` has the vectors of all pairs if it is given."""
    count, dimension = _shape(pair, faiss)
    if pair.table is None:
        return SourcePart(pair=pair, first=first, rows=count, dimension=dimension, columns=None, faiss=faiss)
    with _open_table(pair.table) as table:
        rows = table.metadata.num_rows
        schema = table.schema_arrow
    if pair.vectors is not None and not pair.is_slice:
        _check_count(pair.vectors, count, str(pair.table), rows)
    columns = choose_columns(schema, column_choice, pair.table, has_vectors=pair.vectors is None)
    return SourcePart(
        pair=pair,
        first=first,
        rows=rows,
        dimension=dimension if pair.vectors else _dimension_in(pair.table, columns.embedding),
        columns=columns if columns.value_columns or columns.embedding else None,
        faiss=faiss,
    )


def _open_faiss(pair: FilePair) -> FaissRows | None:
    """The FAISS file of a source, which never has several."""
    is_faiss = pair.vectors is not None and pair.vectors.suffix in FAISS_SUFFIXES
    return open_faiss(pair.vectors) if is_faiss and pair.vectors else None


def _shape(pair: FilePair, faiss: FaissRows | None) -> tuple[int, int]:
    """Rows and dimension of the file with the vectors; zeros where they are in the table."""
    if faiss is not None:
        return len(faiss), faiss.dimension
    matrix = _open_matrix(pair.vectors) if pair.vectors else np.zeros((0, 0))
    return matrix.shape[0], matrix.shape[1]


def _check_count(vectors: Path, count: int, table: str, rows: int) -> None:
    if count != rows:
        raise UsageError(
            f"{vectors} has {count:,} rows and {table} {rows:,}. Rows are joined by position, so these do not belong "
            "together; nothing was imported."
        )


def _open_matrix(path: Path) -> Float[Array, "N D"]:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} cannot be read as an array ({error}); it is damaged or not a .npy file.") from error
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating) or not matrix.shape[1]:
        raise UsageError(
            f"{path} holds {matrix.dtype} of shape {matrix.shape}; a floating-point row for each item is needed."
        )
    return matrix


def _dimension_in(path: Path, column: str) -> int:
    """The length of the first vector, 0 if there is none."""
    # few rows at once, because one of the first nearly always has a vector
    for batch in _batches(path, [column], rows_at_once=256):
        lengths = _lengths(batch.column(0)).drop_null()
        if len(lengths):
            return lengths[0].as_py()
    return 0


def _vectors_in(batch: pa.RecordBatch, part: SourcePart, column: str) -> Float[Array, "N D"]:
    """The vectors of a batch; NaN for a null."""
    lists = batch.column(column)
    lengths = _lengths(lists)
    for length in lengths.drop_null().unique().to_pylist():
        if length != part.dimension:
            raise VlmError(
                f"{part.place} has vectors of {part.dimension} and of {length} numbers; nothing was imported."
            )
    # flattening leaves nulls out, so the vectors are put back at the rows that have one
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    vectors = np.full((len(lists), part.dimension), np.nan, flat.dtype)
    vectors[lengths.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, part.dimension)
    return vectors


def _lengths(lists: pa.Array) -> pa.Array:
    # by name: pyarrow makes its compute functions at run time, where type checkers cannot see them
    return pc.call_function("list_value_length", [lists])


def _batches(path: Path, names: Sequence[str], rows_at_once: int = ROWS_AT_ONCE) -> Iterator[pa.RecordBatch]:
    with _open_table(path) as table:
        for batch in table.iter_batches(batch_size=rows_at_once, columns=list(names)):
            # Parquet also selects the fields inside a struct of this name
            yield batch.select(list(names))


@contextlib.contextmanager
def _open_table(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise VlmError(f"{path} cannot be read as Parquet ({error}).") from error
