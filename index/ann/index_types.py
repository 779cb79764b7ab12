"""The FAISS index types: each one entry of `INDEX_TYPES`, with its factory string, its default parameters and its cost.

`IndexType` is what an entry says: how an index is made and trained, what it costs, which parameter trades latency for
recall. `fill_index` adds the rows.

flat     every row is compared, exactly
ivf      rows by their nearest centroid; a search reads the `nprobe` nearest of `nlist` lists
ivfsq    the same with 8 bits per dimension, ivfpq with product codes of 2 bits, rabitq with 1 bit
sq8      8 bits per dimension, all rows compared
hnsw     a graph of near rows (Malkov and Yashunin 2018), searched with `ef_search` candidates; it holds float16
         rows, those linked to each other near in memory; queries can add links (`graph_links.link_answers`)

Types with codes take `rerank` times the results by their codes; the stored rows decide among these. All but ivfpq
compare by inner product of unit vectors, for which the nearest rows are also those by Euclidean distance.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from vlm.config import lookup
from vlm.errors import UsageError
from vlm.index.ann.faiss_search import CopyToGpu, load_faiss, set_search_effort, unwrap_transforms
from vlm.index.ann.gpu import extract_ivf, make_add_function, train
from vlm.index.ann.graph_links import order_graph
from vlm.tensor_types import Array, Float32, Int64

if TYPE_CHECKING:
    import faiss

logger = logging.getLogger(__name__)


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
    has_array_lists: as of `faiss_search.map_index`.
    keeps_float16: it holds rows in float16, so that those already rounded to it stay as they are.
    is_graph: queries can add links to it (`graph_links.link_answers`).
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
    has_array_lists: bool = False
    keeps_float16: bool = False
    is_graph: bool = False

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


def check_range(name: str, value: int, limit: int, reason: str, *, least: int = 1) -> None:
    """Refuse a number outside least … limit; `reason` says where the limit comes from.

    Raises:
        UsageError: it is not.
    """
    if not least <= value <= limit:
        raise UsageError(f"{name} = {value:,} is out of range: it must be {least} to {limit:,} ({reason}).")


def fill_index(
    index: "faiss.Index", blocks: Callable[[], Iterable[Float32[Array, "_ D"]]], count: int, gpu: CopyToGpu | None
) -> Iterator[int]:
    """Add rows to a trained index; gives the number of rows after each step of the work.

    An index of whole rows takes its memory at once. FAISS itself doubles that of a list whenever it is full, and so
    holds up to twice as much as there is. The bytes are the same.

    blocks: gives the rows, `count` in all, from the first on each time it is called.
    """
    inner = unwrap_transforms(index)
    if not isinstance(inner, load_faiss().IndexIVFFlat):
        _reserve_rows(inner, count)
        is_ordered = isinstance(index, load_faiss().IndexIDMap)
        add = inner.add if is_ordered else make_add_function(index, gpu) if gpu else index.add
        for block in blocks():
            add(block)
            num_rows = len(block)
            # before the next one is made
            del block
            yield num_rows
        if is_ordered and count:
            order_graph(index, inner)
        return
    quantizer = gpu(inner.quantizer) if gpu else inner.quantizer
    lists: list[Int64[Array, "_ 1"]] = []
    for block in blocks():
        lists.append(quantizer.search(block, 1)[1])
        del block
        # nearly all of the work: the second time, rows are only copied
        yield len(lists[-1])
    _reserve_lists(inner, np.bincount(np.concatenate(lists)[:, 0], minlength=inner.nlist))
    pointer = load_faiss().swig_ptr
    remaining = iter(lists)
    for block in blocks():
        inner.add_core(len(block), pointer(block), None, pointer(next(remaining)))
        del block


def _reserve_lists(ivf: Any, sizes: Int64[Array, " L"]) -> None:
    lists = load_faiss().downcast_InvertedLists(ivf.invlists)
    for number, size in enumerate(sizes.tolist()):
        # what was resized once keeps its memory
        lists.resize(number, size)
        lists.resize(number, 0)


def _reserve_rows(index: Any, count: int) -> None:
    faiss = load_faiss()
    rows = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    if isinstance(rows, faiss.IndexFlatCodes):
        rows.codes.resize(count * rows.code_size)
        rows.codes.resize(0)


Parameters = Mapping[str, int]
Result = TypeVar("Result")

_FLOAT_BYTES = 4
_FLOAT16_BYTES = 2
_ID_BYTES = 8

MAX_RERANK = 1024


def _rerank_factor(tuning: TuningParams, default: int) -> int:
    """How many times more rows than results are taken by their codes."""
    rerank = default if tuning.rerank is None else tuning.rerank
    check_range("rerank", rerank, MAX_RERANK, "times the results")
    return rerank


def _all_rows(rows: int, parameters: Parameters) -> float:
    return rows


FLAT = IndexType(
    name="flat",
    factory="Flat",
    parameters=lambda rows, tuning: {},
    resident_bytes=lambda rows, dimension, parameters: rows * dimension * _FLOAT_BYTES,
    num_distances=_all_rows,
)


# ranges of values settle quickly: more rows move the codes by less than their step
_SQ_TRAINING_ROWS = 65_536
# measured on text queries against 20,000 × 64: recall@10 0.986 by codes alone, 1.000 among four times as many
_SQ_RERANK = 4


def _train_sq(index: "faiss.Index", rows: TrainingRows, parameters: Parameters, gpu: CopyToGpu | None) -> None:
    """Learn the least and the greatest value of each dimension, which 8 bits divide."""
    sample: Any = rows.sample(_SQ_TRAINING_ROWS, seed=parameters["seed"])
    index.train(sample)


SQ8 = IndexType(
    name="sq8",
    factory="SQ8",
    parameters=lambda rows, tuning: {"rerank": _rerank_factor(tuning, _SQ_RERANK), "seed": tuning.seed},
    train=_train_sq,
    resident_bytes=lambda rows, dimension, parameters: rows * dimension + 8 * dimension,
    num_distances=_all_rows,
    tunable=("rerank",),
)


# the FAISS wiki's range is 4 to 64 links; 32 and efConstruction 40 take a sixth longer at one recall
_LINKS = 16
_MAX_LINKS = 256
# as hnswlib's and usearch's users choose it; half of it halves the time of the build, and a search takes a tenth longer
_EF_CONSTRUCTION = 200
# text embeddings lie off the images' manifold and need about four times an image query's 16
_EF_SEARCH = 64
MAX_EF = 4096


def _hnsw_parameters(rows: int, tuning: TuningParams) -> dict[str, int]:
    links = _LINKS if tuning.links is None else tuning.links
    ef_construction = _EF_CONSTRUCTION if tuning.ef_construction is None else tuning.ef_construction
    ef_search = _EF_SEARCH if tuning.ef_search is None else tuning.ef_search
    check_range("links", links, _MAX_LINKS, "above it a node's list outgrows its row", least=2)
    check_range("ef_construction", ef_construction, MAX_EF, "above it flat is faster")
    check_range("ef_search", ef_search, MAX_EF, "above it flat is faster")
    return {"links": links, "ef_construction": ef_construction, "ef_search": ef_search}


def _set_hnsw_effort(index: Any, rows: TrainingRows, parameters: Parameters, gpu: CopyToGpu | None) -> None:
    """Set the effort of build and search; a graph built by several threads is not reproducible."""
    graph = unwrap_transforms(index)
    graph.hnsw.efConstruction = parameters["ef_construction"]
    set_search_effort(graph, parameters["ef_search"])


def _hnsw_bytes(rows: int, dimension: int, parameters: Parameters) -> int:
    links = parameters["links"]
    # a node has 2 M links of 4 bytes at the bottom, and is in one of M - 1 nodes' higher levels with M links each
    bottom_bytes = 8 * links
    upper_bytes = 4 * links / (links - 1)
    level_and_offset_bytes = 12
    links_bytes = bottom_bytes + upper_bytes + level_and_offset_bytes
    return round(rows * (_FLOAT16_BYTES * dimension + links_bytes + _ID_BYTES))


HNSW = IndexType(
    name="hnsw",
    factory="IDMap,HNSW{links}_SQfp16",
    parameters=_hnsw_parameters,
    train=_set_hnsw_effort,
    resident_bytes=_hnsw_bytes,
    num_distances=lambda rows, parameters: parameters["ef_search"] * log2(max(rows, 2)),
    tunable=("links", "ef_construction", "ef_search"),
    effort="ef_search",
    keeps_float16=True,
    is_graph=True,
)


# FAISS's k-means warns below 39 rows per centroid; its wiki advises 30 to 256, and time grows with their number
MIN_ROWS_PER_LIST = 39
_TRAINING_ROWS_PER_LIST = 50
# with fewer lists a search hardly reads fewer rows
MIN_LISTS = 8
# codes are learned on at least this many rows, if there are so many: 16 centroids a code settle long before
_CODE_TRAINING_ROWS = 16_384
# FastScan stores the rows of a list in blocks of 32
_FAST_SCAN_BLOCK = 32


def default_lists(rows: int) -> int:
    """4 √N lists, at least 8, but none of fewer than 39 rows.

    >>> default_lists(20_000)
    512
    """
    return max(MIN_LISTS, min(round(4 * sqrt(rows)), rows // MIN_ROWS_PER_LIST))


def _ivf_parameters(rows: int, tuning: TuningParams, *, rerank: int) -> dict[str, int]:
    """By default nlist = 4 √N (FAISS wiki, "Guidelines to choose an index"), and nprobe = nlist / 16, at least 8.

    Text embeddings lie off the images' manifold, so their neighbours are spread over more lists than an image's are.

    rerank: the default factor; 0: the type stores whole rows.
    """
    if rows < MIN_LISTS * MIN_ROWS_PER_LIST and tuning.nlist is None:
        raise UsageError(
            f"An index with lists needs at least {MIN_LISTS * MIN_ROWS_PER_LIST} rows, there are {rows}; "
            "use the index type flat, which is exact and fast at this size."
        )
    nlist = default_lists(rows) if tuning.nlist is None else tuning.nlist
    check_range("nlist", nlist, rows, "the number of rows")
    nprobe = min(nlist, max(8, nlist // 16)) if tuning.nprobe is None else tuning.nprobe
    check_range("nprobe", nprobe, nlist, "nlist")
    parameters = {"nlist": nlist, "nprobe": nprobe, "seed": tuning.seed}
    return parameters | {"rerank": _rerank_factor(tuning, rerank)} if rerank else parameters


def _train_ivf(index: "faiss.Index", rows: TrainingRows, parameters: Parameters, gpu: CopyToGpu | None) -> None:
    """Learn the centroids by spherical k-means, and the codes."""
    nlist = parameters["nlist"]
    seed = parameters["seed"]
    ivf = extract_ivf(index)
    ivf.nprobe = parameters["nprobe"]
    ivf.cp.seed = seed
    ivf.cp.min_points_per_centroid = 1
    num_training_rows = nlist * _TRAINING_ROWS_PER_LIST
    if "rerank" in parameters:
        num_training_rows = max(num_training_rows, _CODE_TRAINING_ROWS)
    sample = rows.sample(num_training_rows, seed=seed)
    logger.info(f"Training {nlist:,} lists on {len(sample):,} rows.")
    train(index, sample, gpu)


def _make_ivfsq(dimension: int, parameters: Parameters) -> "faiss.Index":
    """8 bits per dimension of the difference to the centroid, with one range for all dimensions (QT_8bit_uniform).

    A range for each dimension, as the factory's "SQ8" has, finds as many rows at the same reranking factor, but takes a
    fifth longer to search.
    """
    faiss = load_faiss()
    quantizer = faiss.IndexFlatIP(dimension)
    codec = faiss.ScalarQuantizer.QT_8bit_uniform
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dimension, parameters["nlist"], codec, faiss.METRIC_INNER_PRODUCT, True
    )
    return index


def _make_ivfpq(dimension: int, parameters: Parameters) -> "faiss.Index":
    """4-bit codes that are compared by Euclidean distance, whose order for rows of unit length is that of the cosine.

    Codes are shorter or longer than the rows they stand for. An inner product takes the longer ones for nearer, a
    distance does not (`benchmarks/run code_metrics`): it finds as many rows with half of the reranking.
    """
    faiss = load_faiss()
    description = f"IVF{parameters['nlist']},PQ{num_subvectors(dimension)}x4fs"
    index = faiss.index_factory(dimension, description, faiss.METRIC_L2)
    # as FAISS itself does for inner products: the nearest of centroids on the sphere is the same by either measure
    index.cp.spherical = True
    return index


def _train_rabitq(index: Any, rows: TrainingRows, parameters: Parameters, gpu: CopyToGpu | None) -> None:
    """Initialise the random rotation that the bound of RaBitQ (Gao and Long 2024) rests on, then as `_train_ivf`."""
    # FAISS itself always takes the same seed
    load_faiss().downcast_VectorTransform(index.chain.at(0)).init(parameters["seed"])
    _train_ivf(index, rows, parameters, gpu)


def _ivf_bytes(
    rows: int, dimension: int, parameters: Parameters, *, row_bytes: Callable[[int], int], fixed_bytes: int = 0
) -> int:
    centroid_bytes = parameters["nlist"] * dimension * _FLOAT_BYTES
    return rows * (row_bytes(dimension) + _ID_BYTES) + centroid_bytes + fixed_bytes


def _ivfpq_bytes(rows: int, dimension: int, parameters: Parameters) -> int:
    code_bytes = ceil(num_subvectors(dimension) / 2)
    # lists are padded to whole blocks, on average by half a block
    padding_bytes = parameters["nlist"] * _FAST_SCAN_BLOCK // 2 * code_bytes
    codebook_bytes = 16 * dimension * _FLOAT_BYTES
    return _ivf_bytes(
        rows,
        dimension,
        parameters,
        row_bytes=lambda dimension: code_bytes,
        fixed_bytes=padding_bytes + codebook_bytes,
    )


def _rabitq_bytes(rows: int, dimension: int, parameters: Parameters) -> int:
    # a bit per dimension and two factors; the rotation is a square matrix
    return _ivf_bytes(
        rows,
        dimension,
        parameters,
        row_bytes=lambda dimension: ceil(dimension / 8) + 2 * _FLOAT_BYTES,
        fixed_bytes=dimension * dimension * _FLOAT_BYTES,
    )


def _ivf_type(
    name: str,
    factory: str,
    resident_bytes: Callable[[int, int, Parameters], int],
    *,
    rerank: int = 0,
    make: Callable[[int, Parameters], "faiss.Index"] | None = None,
    train: Callable[..., None] = _train_ivf,
) -> IndexType:
    return IndexType(
        name=name,
        factory=factory,
        make=make,
        parameters=partial(_ivf_parameters, rerank=rerank),
        train=train,
        resident_bytes=resident_bytes,
        num_distances=lambda rows, parameters: parameters["nlist"] + parameters["nprobe"] * rows / parameters["nlist"],
        tunable=("nlist", "nprobe", "rerank") if rerank else ("nlist", "nprobe"),
        effort="nprobe",
        # those of ivfpq are blocks
        has_array_lists=name != "ivfpq",
    )


# the reranking factors are those at which recall@10 of text queries reached 0.999 on 20,000 × 64, that of ivfpq on
# 7,383 × 192 of a trained model
IVF = _ivf_type("ivf", "IVF{nlist},Flat", partial(_ivf_bytes, row_bytes=lambda dimension: dimension * _FLOAT_BYTES))
IVFSQ = _ivf_type("ivfsq", "", partial(_ivf_bytes, row_bytes=lambda dimension: dimension), rerank=4, make=_make_ivfsq)
# product quantization (Jégou et al. 2011) scanned in registers (André et al. 2015): 4-bit codes of two dimensions; of
# the same size, 8-bit codes of four dimensions need about a quarter of the reranking, but twenty times the training
# and twice the search (measured at 20,000 × 64)
IVFPQ = _ivf_type("ivfpq", "", _ivfpq_bytes, rerank=8, make=_make_ivfpq)
RABITQ = _ivf_type("rabitq", "RR{dimension},IVF{nlist},RaBitQ", _rabitq_bytes, rerank=16, train=_train_rabitq)


INDEX_TYPES: dict[str, IndexType] = {kind.name: kind for kind in (FLAT, IVF, IVFSQ, IVFPQ, RABITQ, SQ8, HNSW)}

AUTO = "auto"
# below it an exact search of 512 dimensions takes about 5 ms on one core, so there is nothing to gain
FLAT_BELOW_ROWS = 50_000


def resolve_index_type(kind: str, num_rows: int) -> str:
    """The index type asked for; `auto` is flat below 50,000 rows and ivf from there on.

    >>> resolve_index_type("auto", 1000)
    'flat'

    Raises:
        UsageError: there is no such type.
    """
    if kind == AUTO:
        return "flat" if num_rows < FLAT_BELOW_ROWS else "ivf"
    lookup(INDEX_TYPES, kind, "index kind")
    return kind


def fall_back_to_flat(
    build: Callable[[str, TuningParams], Result], kind: str, num_rows: int, tuning: TuningParams
) -> Result:
    """Build the index type that an index was made with, or flat if it does not fit these rows, as when they are few."""
    try:
        return build(resolve_index_type(kind, num_rows), tuning)
    except UsageError as error:
        logger.info(f"The index type {kind} does not fit these rows, so a flat index is built: {error}")
        return build("flat", TuningParams())


def search_params_dict(kind: str, *, effort: int | None, rerank: int) -> dict[str, int]:
    """The parameters of an index type that may change after the build, by their names.

    >>> search_params_dict("ivfsq", effort=40, rerank=2), search_params_dict("flat", effort=None, rerank=0)
    ({'nprobe': 40, 'rerank': 2}, {})
    """
    values: dict[str, int] = {}
    name = INDEX_TYPES[kind].effort
    if name is not None and effort is not None:
        values[name] = effort
    if rerank:
        values["rerank"] = rerank
    return values
