"""The engine that has the rows of an index: FAISS in the index folder, or Milvus in a collection.

The manifest names it, so every command and call that takes an index folder finds it here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from vlm.errors import UsageError
from vlm.index.ann.gpu import CopyToGpu
from vlm.index.engine_base import EngineIndex
from vlm.index.reader import Index
from vlm.manifest import read_manifest

# imported where they are used: a search needs neither a writer nor a check
if TYPE_CHECKING:
    from vlm.index.engine_writer import EngineWriter
    from vlm.index.verify import CheckReport

Engine = Literal["faiss", "milvus"]


def engine_of(folder: Path) -> Engine:
    """The engine of a finished index folder.

    Raises:
        UsageError: there is no index, or one of an engine that this version does not know.
    """
    engine = read_manifest(folder, "index").details.get("engine", "faiss")
    if engine not in ("faiss", "milvus"):
        raise UsageError(f"{folder} has the engine {engine!r}, this version knows faiss and milvus: use a newer vlm.")
    return cast(Engine, engine)


def open_engine_index(folder: Path, *, gpu: CopyToGpu | None = None) -> EngineIndex:
    """Open an index folder by its engine.

    gpu: as of `Index.open`; Milvus searches where its server runs, whatever is said here.

    Raises:
        UsageError: there is no finished index. VlmError: it is damaged, or its server cannot be reached.
    """
    if engine_of(folder) == "faiss":
        return Index.open(folder, gpu=gpu)
    from vlm.index.milvus.milvus_reader import MilvusIndex

    return MilvusIndex.open(folder)


def open_writer(folder: Path) -> "EngineWriter":
    """The writer of an index folder, by its engine.

    Raises:
        UsageError: there is another writer, or no index. VlmError: it is damaged, or its server cannot be reached.
    """
    if engine_of(folder) == "faiss":
        from vlm.index.writer import IndexWriter

        return IndexWriter(folder)
    from vlm.index.milvus.milvus_writer import MilvusWriter

    return MilvusWriter(folder)


def check_index(folder: Path, *, sample: int = 1000, seed: int = 0) -> "CheckReport":
    """Read and check a whole index, by its engine.

    sample: number of rows whose metadata and distances are computed again.

    Raises:
        UsageError: there is no index. VlmError: its manifest is damaged, or its server cannot be reached.
    """
    if engine_of(folder) == "faiss":
        from vlm.index import verify

        return verify.check_index(folder, sample=sample, seed=seed)
    from vlm.index.milvus.milvus_verify import check_milvus_index

    return check_milvus_index(folder, sample=sample, seed=seed)


def require_faiss(folder: Path, what: str) -> None:
    """Refuse what only FAISS can do, before any work.

    what: needs it, as the message begins.

    Raises:
        UsageError: the index has another engine.
    """
    if engine_of(folder) != "faiss":
        raise UsageError(f"{what} needs the rows of a FAISS index; those of {folder} are kept by Milvus.")
