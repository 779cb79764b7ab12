"""Flat: every question is compared with every row, exactly.

HNSW: a graph of near rows over the float32 rows, walked from its top (Malkov and Yashunin 2018).

Scalar codes: every row in one byte a dimension, all of them compared, the best compared again exactly.

Inverted lists: rows by nearest centroid, of which a search reads the nearest lists; four ways to store the rows.

The kinds of FAISS index: each one function that prepares it, one `Kind` beside it, and one line in `KINDS`.
"""

import logging
from collections.abc import Callable, Mapping
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING, Any

from vlm.config import lookup
from vlm.errors import UsageError
from vlm.index.ann.gpu import train
from vlm.index.ann.index_type import CopyToGpu, IndexType, TrainingRows, TuningParams, check_range, load_faiss

if TYPE_CHECKING:
    import faiss

logger = logging.getLogger(__name__)


_FLOAT_BYTES = 4


def _flat_parameters(rows: int, tuning: TuningParams) -> dict[str, int]:
    return {}


def _flat_prepare(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    return load_faiss().IndexFlatIP(rows.dimension)


def _flat_resident_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    return rows * dimension * _FLOAT_BYTES


def _flat_num_distances(rows: int, parameters: Mapping[str, int]) -> float:
    return rows


FLAT = IndexType(
    name="flat",
    parameters=_flat_parameters,
    prepare=_flat_prepare,
    resident_bytes=_flat_resident_bytes,
    num_distances=_flat_num_distances,
)


# the FAISS wiki's range is 4 to 64 links; 32 is its and autofaiss's usual choice
_LINKS, _MAX_LINKS = 32, 256
# FAISS's own default; more lengthens the build in proportion
_EF_CONSTRUCTION = 40
# texts lie off the pictures' manifold and need about four times a picture's 16
_EF_SEARCH = 64
MAX_EF = 4096


def _hnsw_parameters(rows: int, tuning: TuningParams) -> dict[str, int]:
    """By default 32 links a node, ef_construction 40, ef_search 64."""
    links = _LINKS if tuning.links is None else tuning.links
    ef_construction = _EF_CONSTRUCTION if tuning.ef_construction is None else tuning.ef_construction
    ef_search = _EF_SEARCH if tuning.ef_search is None else tuning.ef_search
    check_range("links", links, _MAX_LINKS, "above it a node's list outgrows its row", least=2)
    check_range("ef_construction", ef_construction, MAX_EF, "above it flat is quicker")
    check_range("ef_search", ef_search, MAX_EF, "above it flat is quicker")
    return {"links": links, "ef_construction": ef_construction, "ef_search": ef_search}


def _hnsw_prepare(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    """HNSW over float32 rows by inner product: at unit length the nearest by it are the nearest by Euclid too.

    A graph built with several threads is not the same twice.
    """
    faiss = load_faiss()
    index = faiss.IndexHNSWFlat(rows.dimension, parameters["links"], faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = parameters["ef_construction"], parameters["ef_search"]
    return index


def _hnsw_resident_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    """Row, 2 M links of 4 bytes on the ground, M for each of the 1 / (M - 1) levels above it, level and offset."""
    links = parameters["links"]
    above = 4 * links / (links - 1)
    return round(rows * (4 * dimension + 8 * links + above + 12))


def _hnsw_num_distances(rows: int, parameters: Mapping[str, int]) -> float:
    return parameters["ef_search"] * log2(max(rows, 2))


HNSW = IndexType(
    name="hnsw",
    parameters=_hnsw_parameters,
    prepare=_hnsw_prepare,
    resident_bytes=_hnsw_resident_bytes,
    num_distances=_hnsw_num_distances,
    tunable=("links", "ef_construction", "ef_search"),
    effort="ef_search",
)


# ranges of values settle quickly: more rows move the codes by less than their step
_TRAINING_ROWS = 65_536
# measured on text queries against 20,000 × 64: recall@10 0.986 by codes alone, 1.000 among four times as many
DEFAULT_RERANK = 4
MAX_RERANK = 1024


def _scalar_parameters(rows: int, tuning: TuningParams) -> dict[str, int]:
    return {"rerank": rerank_factor(tuning, DEFAULT_RERANK), "seed": tuning.seed}


def _scalar_prepare(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    """8 bits a dimension between the least and the greatest value of a training sample (FAISS QT_8bit)."""
    faiss = load_faiss()
    index = faiss.IndexScalarQuantizer(rows.dimension, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    index.train(rows.sample(_TRAINING_ROWS, seed=parameters["seed"]))
    return index


def rerank_factor(tuning: TuningParams, default: int) -> int:
    """How many times more rows than asked for are taken by their codes.

    Raises:
        UsageError: out of range.
    """
    rerank = default if tuning.rerank is None else tuning.rerank
    check_range("rerank", rerank, MAX_RERANK, "times the answers asked for")
    return rerank


def _scalar_resident_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    return rows * dimension + 8 * dimension


def _scalar_num_distances(rows: int, parameters: Mapping[str, int]) -> float:
    return rows


SQ8 = IndexType(
    name="sq8",
    parameters=_scalar_parameters,
    prepare=_scalar_prepare,
    resident_bytes=_scalar_resident_bytes,
    num_distances=_scalar_num_distances,
    tunable=("rerank",),
)


# FAISS's k-means warns below 39 points a centroid; its wiki advises 30 to 256, and time grows with their number
MIN_ROWS_PER_LIST, TRAINING_ROWS_PER_LIST = 39, 50
# fewer lists than this do not narrow a search down
MIN_LISTS = 8
# codes are learned on at least so many rows, if there are so many: 16 centroids a code settle long before
_CODE_TRAINING_ROWS = 16_384
_ID_BYTES = 8
# a fast scan stores the rows of a list in blocks of 32
_BLOCK = 32


def default_lists(rows: int) -> int:
    """4 √N, at least 8, but no list of fewer than 39 rows.

    >>> default_lists(20_000)
    512
    """
    return max(MIN_LISTS, min(round(4 * sqrt(rows)), rows // MIN_ROWS_PER_LIST))


def _inverted_parameters(rows: int, tuning: TuningParams) -> dict[str, int]:
    """By default nlist = 4 √N (FAISS wiki, "Guidelines to choose an index"), and nprobe = nlist / 16, at least 8.

    Texts lie off the pictures' manifold, so their neighbours are spread over more lists than a picture's are.
    """
    if rows < MIN_LISTS * MIN_ROWS_PER_LIST and tuning.nlist is None:
        raise UsageError(
            f"An index with lists needs at least {MIN_LISTS * MIN_ROWS_PER_LIST} rows, there are {rows}; "
            "use the kind flat, which is exact and quick at this size."
        )
    nlist = default_lists(rows) if tuning.nlist is None else tuning.nlist
    check_range("nlist", nlist, rows, "the number of rows")
    nprobe = min(nlist, max(8, nlist // 16)) if tuning.nprobe is None else tuning.nprobe
    check_range("nprobe", nprobe, nlist, "nlist")
    return {"nlist": nlist, "nprobe": nprobe, "seed": tuning.seed}


def _with_rerank(default: int) -> Callable[[int, TuningParams], dict[str, int]]:
    return lambda rows, tuning: _inverted_parameters(rows, tuning) | {"rerank": rerank_factor(tuning, default)}


def _prepare_ivf(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    """Rows as they are; scores are exact."""
    faiss, dimension = load_faiss(), rows.dimension
    quantizer = faiss.IndexFlatIP(dimension)
    return _train_ivf(
        faiss.IndexIVFFlat(quantizer, dimension, parameters["nlist"], faiss.METRIC_INNER_PRODUCT), rows, parameters, gpu
    )


def _prepare_ivfsq(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    """8 bits a dimension of the difference to the centroid, of one range for all dimensions (FAISS QT_8bit_uniform).

    A range for each dimension (QT_8bit) finds as many at the same re-ranking, but takes a fifth longer to scan.
    """
    faiss, dimension = load_faiss(), rows.dimension
    quantizer, code = faiss.IndexFlatIP(dimension), faiss.ScalarQuantizer.QT_8bit_uniform
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dimension, parameters["nlist"], code, faiss.METRIC_INNER_PRODUCT, True
    )
    return _train_ivf(index, rows, parameters, gpu)


def _prepare_ivfpq(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    """Product codes of 4 bits for every two dimensions (D / 4 bytes a row), scanned in registers.

    Product quantization: Jégou et al. 2011; the scan: André et al. 2015 (FAISS wiki, "Fast accumulation of PQ and
    AQ codes"). Of the same size, 8-bit codes over four dimensions need about a quarter of the re-ranking, but twenty
    times the training and twice the scan (measured at 20,000 × 64).
    """
    faiss, dimension, nlist = load_faiss(), rows.dimension, parameters["nlist"]
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(dimension), dimension, nlist, _subvectors(dimension), 4, faiss.METRIC_INNER_PRODUCT
    )
    return _train_ivf(index, rows, parameters, gpu)


def _prepare_rabitq(rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None) -> "faiss.Index":
    """One bit a dimension and two factors (RaBitQ: Gao and Long 2024), after the random rotation its bound rests on."""
    faiss, dimension = load_faiss(), rows.dimension
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFRaBitQ(quantizer, dimension, parameters["nlist"], faiss.METRIC_INNER_PRODUCT)
    rotation = faiss.RandomRotationMatrix(dimension, dimension)
    rotation.init(parameters["seed"])
    return _train_ivf(index, rows, parameters, gpu, rotation=rotation)


def _train_ivf(
    index: Any, rows: TrainingRows, parameters: dict[str, int], gpu: CopyToGpu | None, *, rotation: Any = None
) -> "faiss.Index":
    """The index with its centroids (spherical k-means) and codes, rotated if there is a rotation."""
    nlist, seed = parameters["nlist"], parameters["seed"]
    wanted = nlist * TRAINING_ROWS_PER_LIST
    training = rows.sample(max(wanted, _CODE_TRAINING_ROWS) if "rerank" in parameters else wanted, seed=seed)
    index.nprobe, index.cp.seed, index.cp.min_points_per_centroid = parameters["nprobe"], seed, 1
    logger.info(f"Training {nlist:,} lists on {len(training):,} rows.")
    whole = index if rotation is None else load_faiss().IndexPreTransform(rotation, index)
    train(whole, training, gpu)
    return whole


def _subvectors(dimension: int) -> int:
    """Half the dimensions; all of them where they are odd in number."""
    return dimension // 2 if dimension % 2 == 0 else dimension


def _ivf_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    return rows * (_FLOAT_BYTES * dimension + _ID_BYTES) + _centroid_bytes(dimension, parameters)


def _ivfsq_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    return rows * (dimension + _ID_BYTES) + _centroid_bytes(dimension, parameters)


def _ivfpq_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    """Codes padded to whole blocks: half a block a list."""
    padded = rows + parameters["nlist"] * _BLOCK // 2
    codebooks = 16 * dimension * _FLOAT_BYTES
    code_bytes = ceil(_subvectors(dimension) / 2)
    return padded * code_bytes + rows * _ID_BYTES + codebooks + _centroid_bytes(dimension, parameters)


def _rabitq_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    rotation = dimension * dimension * _FLOAT_BYTES
    row_bytes = ceil(dimension / 8) + 2 * _FLOAT_BYTES + _ID_BYTES
    return rows * row_bytes + rotation + _centroid_bytes(dimension, parameters)


def _centroid_bytes(dimension: int, parameters: Mapping[str, int]) -> int:
    return parameters["nlist"] * dimension * _FLOAT_BYTES


def _inverted_num_distances(rows: int, parameters: Mapping[str, int]) -> float:
    return parameters["nlist"] + parameters["nprobe"] * rows / parameters["nlist"]


def _ivf_type(
    name: str,
    prepare: Callable[[TrainingRows, dict[str, int], CopyToGpu | None], "faiss.Index"],
    resident_bytes: Callable[[int, int, Mapping[str, int]], int],
    *,
    rerank: int = 0,
) -> IndexType:
    return IndexType(
        name=name,
        parameters=_with_rerank(rerank) if rerank else _inverted_parameters,
        prepare=prepare,
        resident_bytes=resident_bytes,
        num_distances=_inverted_num_distances,
        tunable=("nlist", "nprobe", "rerank") if rerank else ("nlist", "nprobe"),
        effort="nprobe",
    )


# the factors are those at which recall@10 of text queries reached 0.999 on 20,000 × 64
IVF = _ivf_type("ivf", _prepare_ivf, _ivf_bytes)
IVFSQ = _ivf_type("ivfsq", _prepare_ivfsq, _ivfsq_bytes, rerank=4)
IVFPQ = _ivf_type("ivfpq", _prepare_ivfpq, _ivfpq_bytes, rerank=16)
RABITQ = _ivf_type("rabitq", _prepare_rabitq, _rabitq_bytes, rerank=16)


AUTO = "auto"
# below it an exact scan of 512 dimensions takes about 5 ms on one core, so there is nothing to win
FLAT_BELOW_ROWS = 50_000

INDEX_TYPES: dict[str, IndexType] = {kind.name: kind for kind in (FLAT, IVF, IVFSQ, IVFPQ, RABITQ, SQ8, HNSW)}


def search_params_dict(kind: str, *, effort: int | None, rerank: int) -> dict[str, int]:
    """The parameters of a kind that may change after the build, by their names.

    >>> search_params_dict("ivfsq", effort=40, rerank=2), search_params_dict("flat", effort=None, rerank=0)
    ({'nprobe': 40, 'rerank': 2}, {})
    """
    name = INDEX_TYPES[kind].effort
    found = {name: effort} if name is not None and effort is not None else {}
    return found | ({"rerank": rerank} if rerank else {})


def resolve_index_type(kind: str, num_rows: int) -> str:
    """The kind asked for; `auto` is flat below 50,000 rows and ivf from there on.

    >>> resolve_index_type("auto", 1000)
    'flat'

    Raises:
        UsageError: there is no such kind.
    """
    if kind == AUTO:
        return "flat" if num_rows < FLAT_BELOW_ROWS else "ivf"
    lookup(INDEX_TYPES, kind, "index kind")
    return kind
