"""The ways to a GPU. Where FAISS sees none, a copy on the CPU stands for one on a GPU: it is asked the same."""

from typing import Any

import faiss
import numpy as np
import pytest

from tests.index.test_index_types import WITH_LISTS, filled
from vlm.index.ann import gpu
from vlm.index.ann.faiss_search import find_gpu, gpu_unavailable_reason
from vlm.index.ann.index_types import INDEX_TYPES, fill_index
from vlm.index.embeddings_folder import normalize_rows
from vlm.index.reader import Index
from vlm.index.segments import SegmentReader
from vlm.index.writer import IndexWriter


class Copies:
    """Copies on the CPU, which count what they are asked."""

    def __init__(self) -> None:
        self.made: list[faiss.Index] = []

    def __call__(self, index: faiss.Index) -> faiss.Index:
        self.made.append(faiss.clone_index(index))
        return self.made[-1]


class Answering:
    """Counts the questions it passes on to an index."""

    def __init__(self, index: faiss.Index) -> None:
        self.index, self.asked = index, 0

    def search(self, questions: np.ndarray, top: int):
        self.asked += len(questions)
        return self.index.search(questions, top)  # pyright: ignore[reportCallIssue]


@pytest.fixture
def rows() -> np.ndarray:
    return normalize_rows(np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32))


@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_rows_whose_lists_a_copy_found_are_where_the_index_itself_puts_them(kind, rows):
    own, other = filled(kind, rows).index, filled(kind, rows[:0] if kind == "flat" else rows).index
    other.reset()
    copies = Copies()
    has_copy = kind in WITH_LISTS and kind != "ivfpq"
    # a graph is filled as a whole, to be put in order
    if kind != "hnsw":
        add = gpu.make_add_function(other, copies)
        add(rows[:1700])
        add(rows[1700:])
        assert other.ntotal == own.ntotal == len(rows)
        np.testing.assert_array_equal(own.search(rows[:50], 10)[1], other.search(rows[:50], 10)[1])
        assert len(copies.made) == has_copy
        other.reset()
    assert list(fill_index(other, lambda: [rows[:1700], rows[1700:]], len(rows), copies)) == [1700, 1300]
    np.testing.assert_array_equal(own.search(rows[:50], 10)[1], other.search(rows[:50], 10)[1])
    assert len(copies.made) == 2 * has_copy


@pytest.mark.parametrize("kind", WITH_LISTS)
def test_lists_learned_by_a_copy_are_those_learned_without_it(kind, rows):
    own, copies = filled(kind, rows).index, Copies()
    index = filled(kind, rows, copies).index
    lists = gpu.extract_ivf(index)
    centroids = lists.quantizer.reconstruct_n()
    np.testing.assert_allclose(centroids, gpu.extract_ivf(own).quantizer.reconstruct_n(), atol=1e-6)
    assert copies.made[0].ntotal == len(centroids), "the copy held the centroids"
    assert lists.clustering_index is None


@pytest.mark.parametrize("kind", INDEX_TYPES)
def test_each_kind_is_searched_on_a_gpu_or_says_why_not(kind, rows):
    reason = gpu.gpu_unsupported_reason(filled(kind, rows).index)
    assert (reason == "") == (kind in ("flat", "ivf", "ivfsq"))
    assert not reason or "FAISS has no Index" in reason


def test_more_lists_than_a_gpu_reads_are_said(rows):
    index = filled("ivf", rows, nlist=2500, nprobe=2400).index
    assert gpu.gpu_unsupported_reason(index) == "it reads 2,400 lists, a GPU at most 2,048"


def test_a_copy_answers_where_all_may_and_the_segment_itself_where_not(make_index):
    folder = make_index(400, kind="ivf")
    index = Index.open(folder, gpu=Answering)  # pyright: ignore[reportArgumentType]
    plain = Index.open(folder)
    copy: Any = index.snapshot.views[0].segment.on_gpu
    questions = normalize_rows(np.random.default_rng(1).standard_normal((5, plain.details.space.dimension)).astype("f"))
    np.testing.assert_array_equal(index.nearest(questions, 3)[1], plain.nearest(questions, 3)[1])
    assert copy.asked == 5
    some = np.arange(0, 400, 2)
    np.testing.assert_array_equal(index.nearest(questions, 3, some)[1], plain.nearest(questions, 3, some)[1])
    assert copy.asked == 5


def test_a_newer_generation_is_copied_too_and_what_was_there_is_not_copied_again(make_index):
    folder, copies = make_index(400, kind="ivf"), Copies()
    index = Index.open(folder, gpu=copies)
    with IndexWriter(folder) as writer:
        writer.delete(["k3"])
    assert index.refresh()
    assert len(copies.made) == 1
    vectors = index.snapshot.vectors(np.array([5]))
    assert index.nearest(vectors, 1)[1].tolist() == [[5]]


def test_a_copy_that_finds_no_room_leaves_the_segment_where_it_is(make_index, logged):
    def refuse(_: faiss.Index) -> faiss.Index:
        raise RuntimeError("out of memory\nat some place")

    index = Index.open(make_index(40), gpu=refuse)
    assert "Segment 0 is searched on the CPU: it cannot be copied there: out of memory." in logged.text
    assert index.nearest(index.snapshot.vectors(np.array([7])), 1)[1].tolist() == [[7]]


def test_what_is_missing_is_said():
    assert (find_gpu() is None) == bool(gpu_unavailable_reason())


@pytest.mark.skipif(bool(gpu_unavailable_reason()), reason=f"no GPU for FAISS: {gpu_unavailable_reason()}")
@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfsq"])
def test_a_gpu_builds_and_answers_as_the_cpu_does(kind, rows, make_index):
    copy = find_gpu()
    assert copy is not None
    folder = make_index(4000, kind=kind)
    index, plain = Index.open(folder, gpu=copy), Index.open(folder)
    segment: SegmentReader = index.snapshot.views[0].segment
    assert segment.on_gpu is not None
    questions = normalize_rows(
        np.random.default_rng(1).standard_normal((50, plain.details.space.dimension)).astype("f")
    )
    same = index.nearest(questions, 10)[1] == plain.nearest(questions, 10)[1]
    assert same.mean() > 0.99
