"""Inverted lists: rows by nearest centroid, of which a search reads the nearest lists; four ways to store the rows."""

from collections.abc import Callable, Mapping
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

from vlm.console import say
from vlm.errors import UsageError
from vlm.index.kinds.gpu import train
from vlm.index.kinds.kind import Copy, Kind, Rows, Tuning, check_range, load_faiss
from vlm.index.kinds.scalar import rerank_of

if TYPE_CHECKING:
    import faiss

# FAISS's k-means warns below 39 points a centroid; its wiki advises 30 to 256, and time grows with their number
MIN_ROWS_PER_LIST, TRAINING_ROWS_PER_LIST = 39, 50
# fewer lists than this do not narrow a search down
MIN_LISTS = 8
# codes are learned on at least so many rows, if there are so many: 16 centroids a code settle long before
_CODE_TRAINING_ROWS = 16_384
_FLOAT_BYTES, _ID_BYTES = 4, 8
# a fast scan stores the rows of a list in blocks of 32
_BLOCK = 32


def default_lists(rows: int) -> int:
    """4 √N, at least 8, but no list of fewer than 39 rows.

    >>> default_lists(20_000)
    512
    """
    return max(MIN_LISTS, min(round(4 * sqrt(rows)), rows // MIN_ROWS_PER_LIST))


def _parameters(rows: int, tuning: Tuning) -> dict[str, int]:
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


def _with_rerank(default: int) -> Callable[[int, Tuning], dict[str, int]]:
    return lambda rows, tuning: _parameters(rows, tuning) | {"rerank": rerank_of(tuning, default)}


def _prepare_ivf(rows: Rows, parameters: dict[str, int], gpu: Copy | None) -> "faiss.Index":
    """Rows as they are; scores are exact."""
    faiss, dimension = load_faiss(), rows.dimension
    quantizer = faiss.IndexFlatIP(dimension)
    return _trained(
        faiss.IndexIVFFlat(quantizer, dimension, parameters["nlist"], faiss.METRIC_INNER_PRODUCT), rows, parameters, gpu
    )


def _prepare_ivfsq(rows: Rows, parameters: dict[str, int], gpu: Copy | None) -> "faiss.Index":
    """8 bits a dimension of the difference to the centroid, of one range for all dimensions (FAISS QT_8bit_uniform).

    A range for each dimension (QT_8bit) finds as many at the same re-ranking, but takes a fifth longer to scan.
    """
    faiss, dimension = load_faiss(), rows.dimension
    quantizer, code = faiss.IndexFlatIP(dimension), faiss.ScalarQuantizer.QT_8bit_uniform
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dimension, parameters["nlist"], code, faiss.METRIC_INNER_PRODUCT, True
    )
    return _trained(index, rows, parameters, gpu)


def _prepare_ivfpq(rows: Rows, parameters: dict[str, int], gpu: Copy | None) -> "faiss.Index":
    """Product codes of 4 bits for every two dimensions (D / 4 bytes a row), scanned in registers.

    Product quantization: Jégou et al. 2011; the scan: André et al. 2015 (FAISS wiki, "Fast accumulation of PQ and
    AQ codes"). Of the same size, 8-bit codes over four dimensions need about a quarter of the re-ranking, but twenty
    times the training and twice the scan (measured at 20,000 × 64).
    """
    faiss, dimension, nlist = load_faiss(), rows.dimension, parameters["nlist"]
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(dimension), dimension, nlist, _subvectors(dimension), 4, faiss.METRIC_INNER_PRODUCT
    )
    return _trained(index, rows, parameters, gpu)


def _prepare_rabitq(rows: Rows, parameters: dict[str, int], gpu: Copy | None) -> "faiss.Index":
    """One bit a dimension and two factors (RaBitQ: Gao and Long 2024), after the random rotation its bound rests on."""
    faiss, dimension = load_faiss(), rows.dimension
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFRaBitQ(quantizer, dimension, parameters["nlist"], faiss.METRIC_INNER_PRODUCT)
    rotation = faiss.RandomRotationMatrix(dimension, dimension)
    rotation.init(parameters["seed"])
    return _trained(index, rows, parameters, gpu, rotation=rotation)


def _trained(
    index: Any, rows: Rows, parameters: dict[str, int], gpu: Copy | None, *, rotation: Any = None
) -> "faiss.Index":
    """The index with its centroids (spherical k-means) and codes, rotated if there is a rotation."""
    nlist, seed = parameters["nlist"], parameters["seed"]
    wanted = nlist * TRAINING_ROWS_PER_LIST
    training = rows.sample(max(wanted, _CODE_TRAINING_ROWS) if "rerank" in parameters else wanted, seed=seed)
    index.nprobe, index.cp.seed, index.cp.min_points_per_centroid = parameters["nprobe"], seed, 1
    say(f"Training {nlist:,} lists on {len(training):,} rows.")
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


def _work(rows: int, parameters: Mapping[str, int]) -> float:
    return parameters["nlist"] + parameters["nprobe"] * rows / parameters["nlist"]


def _kind(
    name: str,
    prepare: Callable[[Rows, dict[str, int], Copy | None], "faiss.Index"],
    resident_bytes: Callable[[int, int, Mapping[str, int]], int],
    *,
    rerank: int = 0,
) -> Kind:
    return Kind(
        name=name,
        parameters=_with_rerank(rerank) if rerank else _parameters,
        prepare=prepare,
        resident_bytes=resident_bytes,
        work=_work,
        wishes=("nlist", "nprobe", "rerank") if rerank else ("nlist", "nprobe"),
        effort="nprobe",
    )


# the factors are those at which recall@10 of text queries reached 0.999 on 20,000 × 64
IVF = _kind("ivf", _prepare_ivf, _ivf_bytes)
IVFSQ = _kind("ivfsq", _prepare_ivfsq, _ivfsq_bytes, rerank=4)
IVFPQ = _kind("ivfpq", _prepare_ivfpq, _ivfpq_bytes, rerank=16)
RABITQ = _kind("rabitq", _prepare_rabitq, _rabitq_bytes, rerank=16)
