"""The rows of a FAISS file, reconstructed: as they were where it keeps vectors, nearly so where it keeps codes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import VlmError
from vlm.index.kinds import load_faiss
from vlm.tensors import Array, Float32

FAISS_SUFFIXES = (".faiss", ".index")
# IndexFlat, IndexHNSWFlat, IndexIVFFlat, IndexRefineFlat and their likes
_KEEPS_VECTORS = re.compile(r"Flat(IP|L2)?$")


@dataclass(frozen=True, eq=False)
class FaissRows:
    """Row i is the vector of id i. kind: FAISS's name of the index."""

    path: Path
    kind: str
    index: Any

    def __len__(self) -> int:
        return self.index.ntotal

    @property
    def dimension(self) -> int:
        """D."""
        return self.index.d

    @property
    def is_exact(self) -> bool:
        """Whether vectors are kept, not codes of them."""
        return bool(_KEEPS_VECTORS.search(self.kind))

    def rows(self, first: int, last: int) -> Float32[Array, "N D"]:
        """Rows `first` to `last`, without the last.

        Raises:
            VlmError: the index cannot give them.
        """
        try:
            return self.index.reconstruct_batch(np.arange(first, last))
        except RuntimeError as error:
            raise VlmError(
                f"{self.path} ({self.kind}) cannot give its rows by number: import the vectors themselves (.npy) "
                f"where they still are. FAISS says: {_last_line(error)}"
            ) from error


def open_faiss(path: Path) -> FaissRows:
    """A FAISS file, memory-mapped where this build of FAISS can.

    Raises:
        VlmError: it is damaged or none, or its rows have ids that are not their numbers.
    """
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        inverted = faiss.try_extract_index_ivf(index)
        if inverted is not None:
            inverted.make_direct_map()
    except RuntimeError as error:
        raise VlmError(f"{path} cannot be read as a FAISS index ({_last_line(error)}).") from error
    return FaissRows(path, type(faiss.downcast_index(index)).__name__, index)


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().rpartition("\n")[2]
