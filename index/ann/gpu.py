"""A GPU that FAISS sees: lists are learned on it and found for new rows, and whole segments searched on it.

An index on disk is always one for CPUs. A GPU changes how long it takes, and answers no further than sums of float32
in another order do. CUDA_VISIBLE_DEVICES= hides it.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from vlm.index.ann.index_type import CopyToGpu, load_faiss, unwrap_transforms
from vlm.tensors import Array, Float32

if TYPE_CHECKING:
    import faiss


MAX_GPU_RESULTS = 2048
"""To one question, of any index on a GPU (FAISS wiki, "Faiss on the GPU")."""
# the most lists it reads for a question
_MAX_GPU_LISTS = 2048


def gpu_unavailable_reason() -> str:
    """Why FAISS has no GPU here; empty if it has one."""
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        return (
            "this FAISS is built for CPUs alone; in an environment without faiss-cpu, pip install faiss-gpu brings CUDA"
        )
    return "" if faiss.get_num_gpus() else "this FAISS is built for GPUs, but sees none"


def find_gpu() -> CopyToGpu | None:
    """The way to the first GPU that FAISS sees, if it sees one."""
    if gpu_unavailable_reason():
        return None
    return lambda index: load_faiss().index_cpu_to_gpu(_resources(), 0, index)


@cache
def _resources() -> Any:
    """Working memory on the GPU, more than a gigabyte of it: taken with the first copy, and once in a process."""
    return load_faiss().StandardGpuResources()


def train(index: "faiss.Index", rows: Float32[Array, "N D"], copy: CopyToGpu | None) -> None:
    """Train an index; where it has lists, a copy of a flat one finds the centroid of each row."""
    lists = extract_ivf(index)
    if copy is None or lists is None:
        index.train(rows)
        return
    finder = copy(load_faiss().IndexFlatIP(lists.d))
    lists.clustering_index = finder  # held there by its address alone
    try:
        index.train(rows)
    finally:
        lists.clustering_index = None


def make_add_function(index: "faiss.Index", copy: CopyToGpu | None) -> Callable[[Float32[Array, "N D"]], None]:
    """What adds rows to a trained index; where it has lists, a copy of its quantizer finds those of new rows.

    They are encoded and kept by the index itself. FAISS leaves no door open to do so for codes in blocks (ivfpq).
    """
    faiss, lists = load_faiss(), extract_ivf(index)
    if copy is None or lists is None or isinstance(lists, faiss.IndexIVFFastScan):
        return index.add
    finder, chain = copy(lists.quantizer), _transforms(index)

    def add(rows: Float32[Array, "N D"]) -> None:
        for transform in chain:
            rows = transform.apply(rows)
        _, found = finder.search(rows, 1)
        lists.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(found))
        index.ntotal = lists.ntotal

    return add


def gpu_unsupported_reason(index: "faiss.Index") -> str:
    """Why FAISS cannot search this index on a GPU; empty if it can."""
    faiss = load_faiss()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexFlat):
        return ""
    if not isinstance(inner, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        return f"FAISS has no {type(inner).__name__} for GPUs"
    return (
        "" if inner.nprobe <= _MAX_GPU_LISTS else f"it reads {inner.nprobe:,} lists, a GPU at most {_MAX_GPU_LISTS:,}"
    )


def extract_ivf(index: "faiss.Index") -> Any:
    """The index with lists inside an index, as FAISS's own class; None if there is none."""
    inner = unwrap_transforms(index)
    return inner if isinstance(inner, load_faiss().IndexIVF) else None


def _transforms(index: "faiss.Index") -> list[Any]:
    faiss = load_faiss()
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(outer.chain.at(place)) for place in range(outer.chain.size())]
