"""The kinds of FAISS index: each one function and one line in `KINDS`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vlm.config import choose
from vlm.console import say
from vlm.errors import UsageError, VlmError
from vlm.tensors import Array, Float32

if TYPE_CHECKING:
    import faiss

AUTO = "auto"
# below it an exact scan of 512 dimensions takes about 5 ms on one core, so there is nothing to win
FLAT_BELOW_ROWS = 50_000
# FAISS's k-means warns below 39 points a centroid; its wiki advises 30 to 256, and time grows with their number
MIN_ROWS_PER_LIST, TRAINING_ROWS_PER_LIST = 39, 50
# fewer lists than this do not narrow a search down
MIN_LISTS = 8


@runtime_checkable
class Rows(Protocol):
    """What a kind may ask about the rows it will hold."""

    def __len__(self) -> int: ...

    @property
    def dimension(self) -> int:
        """D."""
        ...

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """Distinct rows drawn evenly."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Wishes about an index; None leaves the number to the kind's rule.

    nlist: lists of an IVF index. nprobe: lists a search reads. seed: of the training sample and of k-means.
    """

    nlist: int | None = None
    nprobe: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A trained index without rows, and the parameters it was made with."""

    index: "faiss.Index"
    parameters: dict[str, int]


def prepare_flat(rows: Rows, tuning: Tuning) -> Prepared:
    """Exact: every search compares the query with every row."""
    if tuning.nlist is not None or tuning.nprobe is not None:
        raise UsageError("A flat index has no lists: leave nlist and nprobe out, or choose the kind ivf.")
    return Prepared(index=load_faiss().IndexFlatIP(rows.dimension), parameters={})


def prepare_ivf(rows: Rows, tuning: Tuning) -> Prepared:
    """IVF-Flat: rows in lists by nearest centroid (spherical k-means); a search reads the `nprobe` nearest lists.

    By default nlist = 4 √N (FAISS wiki, "Guidelines to choose an index"), but never so many that a list has fewer than
    39 rows, and nprobe = nlist / 16, at least 8: texts lie off the pictures' manifold, so their neighbours are
    spread over more lists than a picture's are.

    Raises:
        UsageError: too few rows, or nlist or nprobe out of range.
    """
    faiss, num_rows = load_faiss(), len(rows)
    if num_rows < MIN_LISTS * MIN_ROWS_PER_LIST and tuning.nlist is None:
        raise UsageError(
            f"An ivf index needs at least {MIN_LISTS * MIN_ROWS_PER_LIST} rows, there are {num_rows}; "
            "use the kind flat, which is exact and quick at this size."
        )
    nlist = tuning.nlist or max(MIN_LISTS, min(round(4 * sqrt(num_rows)), num_rows // MIN_ROWS_PER_LIST))
    nprobe = tuning.nprobe or min(nlist, max(8, nlist // 16))
    _check_range("nlist", nlist, num_rows, "the number of rows")
    _check_range("nprobe", nprobe, nlist, "nlist")
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.dimension), rows.dimension, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = tuning.seed
    index.cp.min_points_per_centroid = 1
    training = rows.sample(nlist * TRAINING_ROWS_PER_LIST, seed=tuning.seed)
    say(f"Training {nlist:,} lists on {len(training):,} rows.")
    index.train(training)
    index.nprobe = nprobe
    return Prepared(index=index, parameters={"nlist": nlist, "nprobe": nprobe, "seed": tuning.seed})


KINDS: dict[str, Callable[[Rows, Tuning], Prepared]] = {
    "flat": prepare_flat,
    "ivf": prepare_ivf,
}


def choose_kind(kind: str, num_rows: int) -> str:
    """The kind asked for; `auto` is flat below 50,000 rows and ivf from there on.

    >>> choose_kind("auto", 1000)
    'flat'

    Raises:
        UsageError: there is no such kind.
    """
    if kind == AUTO:
        return "flat" if num_rows < FLAT_BELOW_ROWS else "ivf"
    choose(KINDS, kind, "index kind")
    return kind


def load_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        VlmError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise VlmError(f'FAISS cannot be imported ({error}); pip install "vlm[cpu]" brings it.') from error
    return faiss


def _check_range(name: str, value: int, limit: int, what: str) -> None:
    if not 1 <= value <= limit:
        raise UsageError(f"{name} = {value:,} does not fit: 1 to {limit:,} ({what}) can be.")
