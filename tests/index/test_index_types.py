import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.errors import UsageError, VlmError
from vlm.index.ann.faiss_search import (
    CopyToGpu,
    effort_limit,
    graph_rows,
    load_faiss,
    make_search_function,
    map_index,
    num_candidates,
    rerank,
    search_parameters,
    stored_to_float32,
    unwrap_transforms,
)
from vlm.index.ann.index_types import INDEX_TYPES, TuningParams, fill_index, resolve_index_type
from vlm.index.embeddings_folder import normalize_rows

WITH_LISTS = ("ivf", "ivfsq", "ivfpq", "rabitq")


class RandomRows:
    """Rows of any number, of which only the sample exists."""

    def __init__(self, count: int, dimension: int = 4) -> None:
        self.count, self.dimension = count, dimension

    def __len__(self) -> int:
        return self.count

    def sample(self, count: int, *, seed: int) -> np.ndarray:
        """As many as there are."""
        number = min(count, self.count)
        return normalize_rows(np.random.default_rng(seed).standard_normal((number, self.dimension)).astype(np.float32))


def filled(kind: str, vectors: np.ndarray, gpu: CopyToGpu | None = None, /, **wishes: int) -> Any:
    """A kind prepared for these vectors, and holding them."""
    rows = RandomRows(len(vectors), vectors.shape[1])
    rows.sample = lambda count, *, seed: vectors[:count]  # pyright: ignore[reportAttributeAccessIssue]
    prepared = INDEX_TYPES[kind](rows, TuningParams(**wishes), gpu)
    assert list(fill_index(prepared.index, lambda: [vectors], len(vectors), None)) == [len(vectors)]
    return prepared


def search_of(index: Any, queries: np.ndarray, top: int, parameters: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positions of one search."""
    return make_search_function(index)(queries, top, parameters)


def blocks_of(vectors: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """The rows cut into blocks."""
    return np.split(vectors, np.cumsum(sizes)[:-1])


def without_order(index: Any) -> Any:
    """An index, of a graph without the order of its rows: FAISS adds none to an index with ids."""
    return unwrap_transforms(index) if isinstance(index, load_faiss().IndexIDMap) else index


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return RandomRows(2000, 16).sample(2000, seed=3)


@pytest.mark.parametrize(("rows", "kind"), [(1, "flat"), (49_999, "flat"), (50_000, "ivf")])
def test_auto_is_flat_while_an_exact_scan_is_quick(rows: int, kind: str) -> None:
    assert resolve_index_type("auto", rows) == kind


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'flat'"):
        resolve_index_type("flatt", 10)


@pytest.mark.parametrize(
    ("rows", "nlist", "nprobe"), [(312, 8, 8), (1000, 25, 8), (20_000, 512, 32), (40_000, 800, 50)]
)
@pytest.mark.parametrize("kind", WITH_LISTS)
def test_lists_are_four_root_n_of_at_least_39_rows(kind: str, rows: int, nlist: int, nprobe: int) -> None:
    parameters = INDEX_TYPES[kind].parameters_for(rows, TuningParams())
    assert {name: parameters[name] for name in ("nlist", "nprobe", "seed")} == {
        "nlist": nlist,
        "nprobe": nprobe,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("kind", "rows", "tuning", "message"),
    [
        ("ivf", 311, TuningParams(), "at least 312 rows, there are 311; use the index type flat"),
        ("ivf", 50, TuningParams(nlist=51), "nlist = 51 is out of range: it must be 1 to 50"),
        ("rabitq", 50, TuningParams(nlist=5, nprobe=6), "nprobe = 6 is out of range: it must be 1 to 5"),
        ("flat", 50, TuningParams(nprobe=6), "type flat has no nprobe: it has no parameters"),
        ("ivf", 400, TuningParams(rerank=2), "type ivf has no rerank: it has nlist, nprobe"),
        ("sq8", 50, TuningParams(rerank=0), "rerank = 0 is out of range"),
        ("hnsw", 50, TuningParams(links=1), "links = 1 is out of range: it must be 2 to 256"),
        ("hnsw", 50, TuningParams(ef_search=5000), "ef_search = 5,000 is out of range"),
        ("hnsw", 50, TuningParams(nlist=8), "type hnsw has no nlist: it has links"),
    ],
)
def test_parameters_out_of_range_are_refused(kind: str, rows: int, tuning: TuningParams, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        INDEX_TYPES[kind](RandomRows(rows), tuning)


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_every_kind_is_prepared_empty_with_the_parameters_it_names(kind: str) -> None:
    rows = RandomRows(400)
    prepared = INDEX_TYPES[kind](rows, TuningParams())
    assert (prepared.index.is_trained, prepared.index.ntotal) == (True, 0)
    assert prepared.parameters == INDEX_TYPES[kind].parameters_for(400, TuningParams())
    assert prepared.rerank == prepared.parameters.get("rerank", 0)


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_with_all_effort_and_reranking_every_kind_gives_what_a_scan_gives(kind: str, vectors: np.ndarray) -> None:
    prepared, queries = filled(kind, vectors), RandomRows(20, 16).sample(20, seed=8)
    parameters = search_parameters(prepared.index, effort=effort_limit(prepared.index))
    wanted = 10 * (60 if prepared.rerank else 1)
    scores, positions = search_of(prepared.index, queries, wanted, parameters)
    if prepared.rerank:
        scores, positions = rerank(vectors.astype(np.float16), queries, positions, 10)
    exact = np.sort(queries @ vectors.T, axis=1)[:, :-11:-1]
    if kind == "hnsw":
        # its rows are those that the index folder stores
        exact = np.sort(queries @ normalize_rows(vectors.astype(np.float16).astype(np.float32)).T, axis=1)[:, :-11:-1]
    np.testing.assert_allclose(scores, exact, atol=1e-3 if prepared.rerank else 1e-6)
    np.testing.assert_allclose(np.einsum("qd,qkd->qk", queries, vectors[positions]), exact, atol=1e-3)


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_an_index_that_is_filled_with_its_memory_reserved_has_the_bytes_of_one_that_grows(
    kind: str, vectors: np.ndarray
) -> None:
    faiss = load_faiss()
    threads = faiss.omp_get_max_threads()
    # a graph built by several threads is not reproducible
    faiss.omp_set_num_threads(1)
    try:
        first, second = filled(kind, vectors[:1000]).index, filled(kind, vectors[:1000]).index
        grown, reserved = without_order(first), without_order(second)
        grown.reset()
        reserved.reset()
        blocks = blocks_of(vectors, [700, 1, 1299])
        for block in blocks:
            grown.add(block)
        assert list(fill_index(reserved, lambda: blocks, len(vectors), None)) == [700, 1, 1299]
    finally:
        faiss.omp_set_num_threads(threads)
    assert reserved.ntotal == len(vectors)
    np.testing.assert_array_equal(faiss.serialize_index(grown), faiss.serialize_index(reserved))


def mean_link_length(graph: Any) -> float:
    """Rows between two that are linked, on average."""
    links = load_faiss().vector_to_array(graph.hnsw.neighbors)
    begins = load_faiss().vector_to_array(graph.hnsw.offsets)[:-1].astype(np.int64)
    linked = links[begins[:, None] + np.arange(graph.hnsw.nb_neighbors(0))]
    lengths = np.abs(linked - np.arange(len(linked))[:, None])
    return float(lengths[linked >= 0].mean())


def test_a_graph_holds_the_rows_as_stored_with_linked_ones_near_each_other() -> None:
    # 100 clusters, whose rows lie all over the index
    generator = np.random.default_rng(3)
    centres = generator.standard_normal((100, 16)).astype(np.float32)
    vectors = normalize_rows(centres.repeat(20, axis=0) + generator.normal(0, 0.2, (2000, 16)).astype(np.float32))
    stored = vectors[generator.permutation(2000)].astype(np.float16)
    vectors = stored.astype(np.float32)
    prepared = filled("hnsw", vectors, links=4)
    graph, order = unwrap_transforms(prepared.index), load_faiss().vector_to_array(prepared.index.id_map)
    assert sorted(order.tolist()) == list(range(2000))
    np.testing.assert_array_equal(graph_rows(graph), stored[order])
    unordered = load_faiss().IndexHNSWFlat(16, 4, load_faiss().METRIC_INNER_PRODUCT)
    unordered.add(vectors)
    assert mean_link_length(graph) < 0.8 * mean_link_length(unordered)


def test_a_graph_of_whole_rows_as_older_indexes_have_it_is_searched_as_before(vectors: np.ndarray) -> None:
    faiss = load_faiss()
    older, queries = faiss.IndexHNSWFlat(16, 32, faiss.METRIC_INNER_PRODUCT), RandomRows(20, 16).sample(20, seed=8)
    older.add(vectors)
    older.hnsw.efSearch = 200
    expected, truth = older.search(queries, 10)
    scores, positions = search_of(older, queries, 10, search_parameters(older))
    np.testing.assert_array_equal(positions, truth)
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_an_index_that_is_mapped_finds_what_it_finds_in_memory(kind: str, vectors: np.ndarray, tmp_path: Path) -> None:
    index = filled(kind, vectors).index
    load_faiss().write_index(index, str(tmp_path / "i.faiss"))
    mapped: Any = map_index(str(tmp_path / "i.faiss"), has_array_lists=INDEX_TYPES[kind].has_array_lists)
    # what is open may be removed
    (tmp_path / "i.faiss").unlink()
    for found, expected in zip(mapped.search(vectors[:20], 5), index.search(vectors[:20], 5), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_stored_rows_are_the_same_numbers_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch, if it is loaded, has an instruction for it
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    every = np.arange(65_536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    converted = stored_to_float32(finite)
    # bits, because 0 equals -0
    np.testing.assert_array_equal(converted.view(np.uint32), finite.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(stored_to_float32(finite[:9]), finite[:9].astype(np.float32))


def test_a_search_of_a_mapped_graph_copies_the_rows_that_it_found_alone(vectors: np.ndarray, tmp_path: Path) -> None:
    """FAISS maps rows and order where the file has them, at odd addresses, and numpy copies such arrays whole."""
    load_faiss().write_index(filled("hnsw", vectors).index, str(tmp_path / "i.faiss"))
    mapped = map_index(str(tmp_path / "i.faiss"))
    search = make_search_function(mapped)
    search(vectors[:1], 10)
    tracemalloc.start()
    search(vectors[1:2], 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    order_bytes = 8 * len(vectors)
    assert peak < order_bytes


def test_lists_that_do_not_lie_within_their_file_are_refused(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "i.faiss"
    load_faiss().write_index(filled("ivf", vectors).index, str(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="exceeds mapped file size"):
        map_index(str(path), has_array_lists=True)


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_a_selector_keeps_all_others_out_of_every_kind(kind: str, vectors: np.ndarray) -> None:
    prepared, chosen = filled(kind, vectors), np.arange(0, 2000, 7)
    selector = load_faiss().IDSelectorBatch(chosen)
    parameters = search_parameters(prepared.index, selector=selector, effort=effort_limit(prepared.index))
    found = search_of(prepared.index, vectors[:5], 20, parameters)[1]
    assert set(found.ravel().tolist()) <= {*chosen.tolist(), -1}
    assert 0 in found[0]


@pytest.mark.parametrize("kind", [kind for kind in INDEX_TYPES if INDEX_TYPES[kind].effort])
def test_effort_is_that_of_the_file_unless_given(kind: str, vectors: np.ndarray) -> None:
    few = filled(kind, vectors, **{str(INDEX_TYPES[kind].effort): 1})
    queries = vectors[:100]
    stored = search_of(few.index, queries, 10)[1]
    as_stored = search_of(few.index, queries, 10, search_parameters(few.index))[1]
    more = search_of(few.index, queries, 10, search_parameters(few.index, effort=effort_limit(few.index)))[1]
    np.testing.assert_array_equal(stored, as_stored)
    assert (more != stored).any()


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_memory_by_formula_is_that_of_the_file(kind: str, vectors: np.ndarray) -> None:
    wishes = {"nlist": 10} if kind in WITH_LISTS else {}
    prepared = filled(kind, vectors, **wishes)
    measured = len(load_faiss().serialize_index(prepared.index))
    assert INDEX_TYPES[kind].resident_bytes(2000, 16, prepared.parameters) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("kind", [*WITH_LISTS, "sq8"])
def test_the_same_seed_gives_the_same_index(kind: str, vectors: np.ndarray) -> None:
    one, same, other = (
        load_faiss().serialize_index(filled(kind, vectors, seed=seed).index).tobytes() for seed in (5, 5, 6)
    )
    assert one == same
    assert (one != other) == (kind != "sq8")


def test_work_grows_with_what_is_read() -> None:
    lists = {"nlist": 100, "nprobe": 10}
    assert INDEX_TYPES["flat"].num_distances(1000, {}) == 1000
    assert INDEX_TYPES["ivf"].num_distances(1000, lists) == 200
    assert INDEX_TYPES["hnsw"].num_distances(1024, {"ef_search": 16}) == 160


def test_reranking_is_by_exact_cosine_with_ties_by_position() -> None:
    rows = np.array([[1, 0], [0, 2], [0.6, 0.8], [0, 1], [-1, 0]], np.float16)
    scores, positions = rerank(rows, np.array([[0, 1]], np.float32), np.array([[4, 3, 2, 1, -1]]), 4)
    assert positions.tolist() == [[1, 3, 2, 4]]
    np.testing.assert_allclose(scores, [[1, 1, 0.8, 0]], atol=1e-3)


def test_reranking_says_what_it_could_not_fill() -> None:
    scores, positions = rerank(np.eye(2, dtype=np.float16), np.eye(2, dtype=np.float32)[:1], np.array([[1, -1, -1]]), 2)
    assert positions.tolist() == [[1, -1]]
    assert scores.tolist() == [[0, -np.inf]]


def test_one_answer_has_as_many_candidates_as_ten() -> None:
    assert [num_candidates(top, 4) for top in (1, 10, 11)] == [40, 40, 44]
    assert num_candidates(3, 0) == 3


def test_a_missing_faiss_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(VlmError, match="pip install faiss-cpu"):
        load_faiss()
