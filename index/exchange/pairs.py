"""Which files of another tool hold vectors, and which table tells about the rows of each."""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import UsageError
from vlm.index.embeddings import PART_LINES, Modality
from vlm.index.exchange.faiss_rows import FAISS_SUFFIXES

VECTOR_FOLDERS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
TABLE_FOLDER = "metadata"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Files whose rows belong together by position.

    vectors: a .npy matrix or a FAISS file; None: they are a column of the table.
    table: Parquet; None: nothing is known of the rows but their number.
    is_slice: several tables, one behind the other, tell about the rows of one FAISS file.
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


def find_pairs(source: Path, *, modality: Modality, metadata: Path | None = None) -> list[Pair]:
    """The files of a source, in the order of their numbers.

    source: a folder of clip-retrieval (`img_emb`, `text_emb`, `metadata`), a folder of .npy and Parquet files, of .npy
        alone, or of Parquet alone; a folder with a FAISS file in place of .npy, whose tables may lie in `metadata`; or
        one such file, whose table may lie beside it under the same name.
    metadata: where the tables are, if elsewhere.

    Raises:
        UsageError: there is nothing to import, or a file is without its partner.
    """
    if not source.exists():
        raise UsageError(f"There is no {source}.")
    if (source / PART_LINES).is_file():
        raise UsageError(f"{source} is an embeddings folder already; vlm index build takes it as it is.")
    vectors, tables = _files_of(source, modality, metadata)
    if metadata is not None and not (vectors and tables):
        raise UsageError(f"{source if tables else metadata} holds no {'.npy' if tables else '.parquet'} file.")
    if not vectors and not tables:
        raise UsageError(f"{source} holds neither .npy nor .parquet nor FAISS files (.faiss, .index).")
    if not vectors:
        return [Pair(vectors=None, table=table) for table in tables]
    if not tables:
        return [Pair(vectors=matrix, table=None) for matrix in vectors]
    if vectors[0].suffix in FAISS_SUFFIXES:
        return [Pair(vectors=vectors[0], table=table, is_slice=True) for table in tables]
    return _join(vectors, tables)


def _files_of(source: Path, modality: Modality, metadata: Path | None) -> tuple[list[Path], list[Path]]:
    """Vectors and tables; either may be empty."""
    present = [name for name in VECTOR_FOLDERS.values() if (source / name).is_dir()]
    if not present:
        vectors = _files(source, ".npy") or _faiss_file(source, modality)
        beside = source if source.is_dir() else source.with_suffix(".parquet")
        tables = _files(metadata or beside, ".parquet")
        if vectors and not tables and vectors[0].suffix in FAISS_SUFFIXES and metadata is None:
            tables = _files(source / TABLE_FOLDER, ".parquet")
        return vectors, tables
    folder = VECTOR_FOLDERS[modality]
    if folder not in present:
        other = next(name for name in VECTOR_FOLDERS if name != modality)
        raise UsageError(f"{source} has {present[0]}, but no {folder}; import it with --modality {other}.")
    tables = _files(metadata or source / TABLE_FOLDER, ".parquet")
    if not tables:
        raise UsageError(
            f"{source} has no tables in {TABLE_FOLDER}/; give {source / folder} to import the vectors alone, "
            "or the place of the tables as --metadata."
        )
    return _files(source / folder, ".npy"), tables


def _faiss_file(source: Path, modality: Modality) -> list[Path]:
    """The one of a folder; clip-retrieval's back end has `image.index` and `text.index` beside each other."""
    found = [path for suffix in FAISS_SUFFIXES for path in _files(source, suffix)]
    named = {f"{name}.index": name for name in VECTOR_FOLDERS}
    if len(found) > 1 and all(path.name in named for path in found):
        found = [path for path in found if named[path.name] == modality]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{source} holds several FAISS files ({names}); give one, and its tables as --metadata.")
    if found and named.get(found[0].name, modality) != modality:
        raise UsageError(f"{source} has {found[0].name} only; import it with --modality {named[found[0].name]}.")
    return found


def _files(place: Path, suffix: str) -> list[Path]:
    if place.is_dir():
        return sorted(place.glob(f"*{suffix}"), key=lambda path: (_number(path), path.name))
    return [place] if place.suffix == suffix and place.is_file() else []


def _number(path: Path) -> int:
    """The last number in a name, -1 without one: clip-retrieval and img2dataset number their parts so."""
    found = re.findall(r"\d+", path.stem)
    return int(found[-1]) if found else -1


def _join(vectors: Sequence[Path], tables: Sequence[Path]) -> list[Pair]:
    """By name, else by number; one of each belongs together whatever the names are."""
    if len(vectors) == len(tables) == 1:
        return [Pair(vectors=vectors[0], table=tables[0])]
    labels: tuple[Callable[[Path], Hashable], ...] = (lambda path: path.stem, _number)
    for label in labels:
        by_label = {label(table): table for table in tables}
        wanted = [label(matrix) for matrix in vectors]
        if len(by_label) == len(tables) and len(set(wanted)) == len(wanted) and set(wanted) == set(by_label):
            return [Pair(vectors=matrix, table=by_label[label(matrix)]) for matrix in vectors]
    numbers = [{_number(path) for path in paths} for paths in (vectors, tables)]
    lone = [path for path in (*vectors, *tables) if not all(_number(path) in known for known in numbers)]
    what = f"{lone[0]} has no partner" if lone else f"the number of {vectors[0]} is not its own"
    raise UsageError(
        f"{len(vectors)} .npy and {len(tables)} Parquet files cannot be matched by name or number: {what}. "
        "Move away what does not belong, or name the place of the tables as --metadata."
    )
