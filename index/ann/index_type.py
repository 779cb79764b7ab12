"""What a kind of index is: how it is prepared, what it needs in memory, and which number trades time for recall."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vlm.errors import UsageError, VlmError
from vlm.tensors import Array, Float32

if TYPE_CHECKING:
    import faiss


CopyToGpu = Callable[["faiss.Index"], "faiss.Index"]
"""Makes the copy of an index that lives on a GPU."""


@runtime_checkable
class TrainingRows(Protocol):
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
class TuningParams:
    """Wishes about an index; None leaves the number to the kind's rule.

    nlist: lists of an IVF index. nprobe: lists a search reads.
    links: edges of a node in an HNSW graph (M).
    ef_construction, ef_search: candidates kept while a graph is built, and while it is searched.
    rerank: how many times more rows than asked for are taken by their codes, for exact cosines to decide.
    seed: of the training sample and of k-means.
    """

    nlist: int | None = None
    nprobe: int | None = None
    links: int | None = None
    ef_construction: int | None = None
    ef_search: int | None = None
    rerank: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PreparedIndex:
    """A trained index without rows, and the parameters it was made with.

    rerank: 0 if the scores are exact cosines; else FAISS is to be asked for more rows (`searching.candidates_for`), and
        the cosines with the stored float16 rows decide among them (`searching.rerank`).
    """

    index: "faiss.Index"
    parameters: dict[str, int]
    rerank: int = 0


@dataclass(frozen=True, kw_only=True)
class IndexType:
    """One kind of index; called with rows and wishes it prepares one.

    parameters: all its numbers for so many rows, from the wishes and its own rule.
    prepare: makes the trained, empty index of these parameters; with a GPU at hand it may learn there.
    resident_bytes: memory an index of (rows, dimension, parameters) must hold, as read from its file; the float16
        rows that re-ranking maps from disk are not in it.
    work: distances a question computes in an index of (rows, parameters), to scale a latency with the size.
    wishes: the fields of `Tuning` it heeds besides the seed.
    effort: the parameter that trades time for recall and can be changed after the build; None: there is none.
    """

    name: str
    parameters: Callable[[int, TuningParams], dict[str, int]]
    prepare: Callable[[TrainingRows, dict[str, int], CopyToGpu | None], "faiss.Index"]
    resident_bytes: Callable[[int, int, Mapping[str, int]], int]
    num_distances: Callable[[int, Mapping[str, int]], float]
    tunable: tuple[str, ...] = ()
    effort: str | None = None

    def parameters_for(self, num_rows: int, tuning: TuningParams) -> dict[str, int]:
        """All numbers of an index of so many rows.

        Raises:
            UsageError: a wish that this kind cannot heed, a number out of range, or too few rows.
        """
        for name, value in asdict(tuning).items():
            if name != "seed" and value is not None and name not in self.tunable:
                takes = f"it takes {', '.join(self.tunable)}" if self.tunable else "it has nothing to tune"
                raise UsageError(f"An index of kind {self.name} has no {name}: {takes}. Leave {name} out.")
        return self.parameters(num_rows, tuning)

    def __call__(self, rows: TrainingRows, tuning: TuningParams, gpu: CopyToGpu | None = None) -> PreparedIndex:
        """A trained index without rows; learned on a GPU, if one is given and the kind can.

        Raises:
            UsageError: as `parameters_for`.
        """
        parameters = self.parameters_for(len(rows), tuning)
        index = self.prepare(rows, parameters, gpu)
        return PreparedIndex(index=index, parameters=parameters, rerank=parameters.get("rerank", 0))


def load_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        VlmError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise VlmError(f"FAISS cannot be imported ({error}); install it with: pip install faiss-cpu") from error
    return faiss


def unwrap_transforms(index: "faiss.Index") -> Any:
    """The index behind the transforms of its rows, if it has any, as FAISS's own class; it lives as long as `index`."""
    faiss = load_faiss()
    inner = faiss.downcast_index(index)
    return unwrap_transforms(inner.index) if isinstance(inner, faiss.IndexPreTransform) else inner


def check_range(name: str, value: int, limit: int, what: str, *, least: int = 1) -> None:
    """Refuse a number that is not in least … limit; `what` says where the limit comes from.

    Raises:
        UsageError: it is not.
    """
    if not least <= value <= limit:
        raise UsageError(f"{name} = {value:,} does not fit: {least} to {limit:,} ({what}) can be.")
