"""What an index type is: how it is made and trained, what it costs, and which parameter trades latency for recall."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vlm.errors import UsageError, VlmError
from vlm.tensor_types import Array, Float32

if TYPE_CHECKING:
    import faiss


CopyToGpu = Callable[["faiss.Index"], "faiss.Index"]
"""Makes the copy of an index that lives on a GPU."""


@runtime_checkable
class TrainingRows(Protocol):
    """The rows an index will hold, as its training sees them."""

    def __len__(self) -> int: ...

    @property
    def dimension(self) -> int:
        """D."""
        ...

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """Distinct rows sampled uniformly."""
        ...


@dataclass(frozen=True, kw_only=True)
class TuningParams:
    """Parameters of an index; None leaves a number to the type's own rule.

    nlist: lists of an IVF index. nprobe: lists that a search reads.
    links: edges of a node in an HNSW graph (M).
    ef_construction, ef_search: candidates kept while a graph is built, and while it is searched.
    rerank: how many times more rows than results are taken by their codes, for exact cosines to decide.
    seed: of the training sample and of k-means.
    """

    nlist: int | None = None
    nprobe: int | None = None
    links: int | None = None
    ef_construction: int | None = None
    ef_search: int | None = None
    rerank: int | None = None
    seed: int = 0

    def set_values(self) -> dict[str, int]:
        """The parameters that are set, not left to the type's own rule."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class PreparedIndex:
    """A trained index without rows, and the parameters it was made with.

    rerank: 0 if its scores are exact cosines; else a search takes more rows (`faiss_search.num_candidates`), and the
        cosines with the stored float16 rows decide among them (`faiss_search.rerank`).
    """

    index: "faiss.Index"
    parameters: dict[str, int]
    rerank: int = 0


def _train_nothing(
    index: "faiss.Index", rows: TrainingRows, parameters: Mapping[str, int], gpu: CopyToGpu | None
) -> None:
    """For an index type that learns nothing from its rows."""


@dataclass(frozen=True, kw_only=True)
class IndexType:
    """One type of index; called with rows and tuning parameters it prepares one.

    factory: its description for `faiss.index_factory`, with the names of parameters, `dimension` and `num_subvectors`
        in braces.
    parameters: all its numbers for so many rows, from the tuning parameters and its own rule.
    resident_bytes: memory that an index of (rows, dimension, parameters) needs, as read from its file; the float16
        rows that reranking maps from disk are not counted.
    num_distances: computed by a query in an index of (rows, parameters), to scale a latency with the size.
    make: an empty index of (dimension, parameters), where the factory knows none.
    train: trains the empty index and sets its search parameters; with a GPU at hand it may learn there.
    tunable: the fields of `TuningParams` it uses besides the seed.
    effort: the parameter that trades latency for recall and can change after the build; None: there is none.
    """

    name: str
    factory: str
    parameters: Callable[[int, TuningParams], dict[str, int]]
    resident_bytes: Callable[[int, int, Mapping[str, int]], int]
    num_distances: Callable[[int, Mapping[str, int]], float]
    make: Callable[[int, Mapping[str, int]], "faiss.Index"] | None = None
    train: Callable[["faiss.Index", TrainingRows, Mapping[str, int], CopyToGpu | None], None] = _train_nothing
    tunable: tuple[str, ...] = ()
    effort: str | None = None

    def parameters_for(self, num_rows: int, tuning: TuningParams) -> dict[str, int]:
        """All numbers of an index of so many rows.

        Raises:
            UsageError: a parameter that this type does not have, a number out of range, or too few rows.
        """
        # a parameter that would have no effect is refused, not ignored
        for name in tuning.set_values():
            if name != "seed" and name not in self.tunable:
                has = f"it has {', '.join(self.tunable)}" if self.tunable else "it has no parameters"
                raise UsageError(f"The index type {self.name} has no {name}: {has}. Leave {name} out.")
        return self.parameters(num_rows, tuning)

    def __call__(self, rows: TrainingRows, tuning: TuningParams, gpu: CopyToGpu | None = None) -> PreparedIndex:
        """A trained index without rows; trained on a GPU if one is given and the type can.

        Raises:
            UsageError: as `parameters_for`.
        """
        parameters = self.parameters_for(len(rows), tuning)
        index = self._make_empty(rows.dimension, parameters)
        self.train(index, rows, parameters, gpu)
        return PreparedIndex(index=index, parameters=parameters, rerank=parameters.get("rerank", 0))

    def _make_empty(self, dimension: int, parameters: dict[str, int]) -> "faiss.Index":
        if self.make is not None:
            return self.make(dimension, parameters)
        faiss = load_faiss()
        description = self.factory.format(dimension=dimension, num_subvectors=num_subvectors(dimension), **parameters)
        return faiss.index_factory(dimension, description, faiss.METRIC_INNER_PRODUCT)


def num_subvectors(dimension: int) -> int:
    """Subvectors of a product code: pairs of dimensions, or single ones where their number is odd."""
    return dimension // 2 if dimension % 2 == 0 else dimension


def load_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        VlmError: it is not installed.
    """
    # on first use, so that what needs no index works without FAISS
    try:
        import faiss
    except ImportError as error:
        raise VlmError(f"FAISS cannot be imported ({error}); install it with: pip install faiss-cpu") from error
    return faiss


def unwrap_transforms(index: "faiss.Index") -> Any:
    """The index behind the transforms of its rows, if it has any, as FAISS's own class; it lives as long as `index`."""
    faiss = load_faiss()
    # FAISS hands out base classes, whose parameters Python cannot see
    inner = faiss.downcast_index(index)
    return unwrap_transforms(inner.index) if isinstance(inner, faiss.IndexPreTransform) else inner


def check_range(name: str, value: int, limit: int, reason: str, *, least: int = 1) -> None:
    """Refuse a number outside least … limit; `reason` says where the limit comes from.

    Raises:
        UsageError: it is not.
    """
    if not least <= value <= limit:
        raise UsageError(f"{name} = {value:,} is out of range: it must be {least} to {limit:,} ({reason}).")
