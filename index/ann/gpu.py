"""A GPU that FAISS sees: it trains lists, assigns new rows to them, and searches whole segments.

An index on disk is always one for CPUs. A GPU changes the time, and the scores only by float32 sums in another order.
CUDA_VISIBLE_DEVICES= hides it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlm.index.ann.faiss_search import CopyToGpu, load_faiss, unwrap_transforms
from vlm.tensor_types import Array, Float32

if TYPE_CHECKING:
    import faiss


MAX_GPU_RESULTS = 2048
"""Of one query, in any index on a GPU (FAISS wiki, "Faiss on the GPU")."""
# the most lists it reads for a query
_MAX_GPU_LISTS = 2048


def train(index: "faiss.Index", rows: Float32[Array, "N D"], copy: CopyToGpu | None) -> None:
    """Train an index; if it has lists, a flat index on the GPU finds the centroid of each row."""
    ivf = extract_ivf(index)
    if copy is None or ivf is None:
        index.train(rows)
        return
    # FAISS holds only its address, so this name must keep it alive
    centroid_index = copy(load_faiss().IndexFlatIP(ivf.d))
    ivf.clustering_index = centroid_index
    try:
        index.train(rows)
    finally:
        ivf.clustering_index = None


def make_add_function(index: "faiss.Index", copy: CopyToGpu) -> Callable[[Float32[Array, "N D"]], None]:
    """A function that adds rows to a trained index; if it has lists, the GPU assigns the rows to them.

    The index itself encodes and stores them. FAISS has no such way for codes in blocks (ivfpq).
    """
    faiss = load_faiss()
    ivf = extract_ivf(index)
    if ivf is None or isinstance(ivf, faiss.IndexIVFFastScan):
        return index.add
    quantizer = copy(ivf.quantizer)
    transforms = _transforms(index)

    def add(rows: Float32[Array, "N D"]) -> None:
        for transform in transforms:
            rows = transform.apply(rows)
        _, lists = quantizer.search(rows, 1)
        ivf.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(lists))
        # a wrapping transform does not see rows that are added behind it
        index.ntotal = ivf.ntotal

    return add


def gpu_unsupported_reason(index: "faiss.Index") -> str:
    """Why FAISS cannot search this index on a GPU; empty if it can."""
    faiss = load_faiss()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexIDMap):
        inner = unwrap_transforms(inner)
    if isinstance(inner, faiss.IndexFlat):
        return ""
    if not isinstance(inner, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        return f"FAISS has no {type(inner).__name__} for GPUs"
    return (
        "" if inner.nprobe <= _MAX_GPU_LISTS else f"it reads {inner.nprobe:,} lists, a GPU at most {_MAX_GPU_LISTS:,}"
    )


def extract_ivf(index: "faiss.Index") -> Any:
    """The IVF index inside an index, as FAISS's own class; None if there is none."""
    inner = unwrap_transforms(index)
    return inner if isinstance(inner, load_faiss().IndexIVF) else None


def _transforms(index: "faiss.Index") -> list[Any]:
    faiss = load_faiss()
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(outer.chain.at(place)) for place in range(outer.chain.size())]
