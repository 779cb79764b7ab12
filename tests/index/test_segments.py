"""The short ways of a search give what the long ones give."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.index.index_fixture import MakeIndex, make_batch, vectors
from vlm.index.ann.faiss_search import graph_rows, load_faiss, rerank, to_float32, unwrap_transforms
from vlm.index.ann.index_types import INDEX_TYPES
from vlm.index.build import build_index
from vlm.index.embeddings_folder import normalize_rows
from vlm.index.index_files import open_array
from vlm.index.reader import Index
from vlm.index.segments import ScoredRows, merge
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter


def reranked_one_by_one(rows: np.ndarray, queries: np.ndarray, positions: np.ndarray, top: int) -> ScoredRows:
    """The definition: each query's candidates alone, by numpy's own conversion, sorted by score and position."""
    scores = np.full((len(queries), min(top, positions.shape[1])), -np.inf, np.float32)
    found = np.full(scores.shape, -1, np.int64)
    for number, (query, candidates) in enumerate(zip(queries, positions, strict=True)):
        near = {int(position): rows[position].astype(np.float32) for position in candidates if position >= 0}
        cosines = {position: row @ query / np.linalg.norm(row) for position, row in near.items()}
        best = sorted(cosines, key=lambda position: (-cosines[position], position))[:top]
        scores[number, : len(best)], found[number, : len(best)] = [cosines[each] for each in best], best
    return scores, found


def test_every_float16_comes_back_as_it_is() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(to_float32(halves), halves.astype(np.float32))
    assert to_float32(halves[:0]).shape == (0,)
    np.testing.assert_array_equal(to_float32(halves.reshape(256, 256)[:, ::2]), halves.reshape(256, 256)[:, ::2])
    singles = np.ones((2, 3), np.float32)
    assert to_float32(singles) is singles


def test_rows_of_a_file_are_converted_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.eye(3, dtype=np.float16))
    rows = open_array(tmp_path / "rows.npy", np.dtype(np.float16), (3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(to_float32(rows[1:]), np.eye(3)[1:])
    assert not rows.flags.writeable
    assert type(rows) is np.ndarray


@pytest.mark.parametrize("values_at_once", [1, 30 * 16 * 3, 2**20])
@pytest.mark.parametrize("top", [1, 7, 50])
def test_reranking_in_blocks_equals_one_by_one(values_at_once: int, top: int) -> None:
    rng = np.random.default_rng(4)
    rows, queries = vectors(200, 1).astype(np.float16), vectors(11, 2)
    rows[100:] = rows[:100]
    positions = np.stack([rng.permutation(200)[:30] for _ in queries])
    positions[2, 20:], positions[3] = -1, -1
    scores, found = rerank(rows, queries, positions, top, values_at_once=values_at_once)
    expected, truth = reranked_one_by_one(rows, queries, positions, top)
    np.testing.assert_array_equal(found, truth)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_several_answers_are_merged_by_score_and_then_by_row() -> None:
    one = np.array([[3, 1], [5, 4]], np.float32), np.array([[7, 8], [1, 2]])
    other = np.array([[3, 2], [6, 5]], np.float32), np.array([[4, 9], [3, 0]])
    assert merge([one], 2) is one
    scores, rows = merge([one, other], 3)
    assert scores.tolist() == [[3, 3, 2], [6, 5, 5]]
    assert rows.tolist() == [[4, 7, 9], [3, 0, 1]]


def test_a_query_of_unit_length_is_taken_as_it_is_and_any_other_scaled(make_index: MakeIndex) -> None:
    index, query = Index.open(make_index(200, kind="flat")), vectors(1, 3)
    scores, rows = index.nearest(query, 5)
    for factor in (1 + 4e-7, 0.5, 1e-12, 1e12):
        scaled, same = index.nearest(query * np.float32(factor), 5)
        np.testing.assert_allclose(scaled, scores, atol=1e-6)
        np.testing.assert_array_equal(same, rows)


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
@pytest.mark.parametrize("changed", [False, True])
def test_questions_alone_and_together_get_the_same_rows(make_index: MakeIndex, kind: str, changed: bool) -> None:
    folder, queries = make_index(1500, kind=kind), vectors(40, 8)
    if changed:
        with IndexWriter(folder) as writer:
            writer.delete([f"k{n}" for n in range(0, 1500, 10)])
            writer.add(make_batch(100, 1))
    index = Index.open(folder)
    scores, rows = index.nearest(queries, 10)
    alone = [index.nearest(query[None], 10) for query in queries]
    np.testing.assert_array_equal(np.concatenate([each for _, each in alone]), rows)
    np.testing.assert_allclose(np.concatenate([each for each, _ in alone]), scores, atol=1e-6)
    assert (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.parametrize("kind", ["flat", "sq8", "hnsw"])
def test_ties_of_one_segment_are_ordered_by_row(tmp_path: Path, embed_vectors: Callable[..., Path], kind: str) -> None:
    build_index(embed_vectors(np.tile(vectors(20, 0), (3, 1))), tmp_path / "i", kind=kind)
    _, rows = Index.open(tmp_path / "i").nearest(vectors(20, 0), 3)
    assert rows.tolist() == [[n, n + 20, n + 40] for n in range(20)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_questions_of_any_precision_are_asked_as_float32(make_index: MakeIndex, dtype: type) -> None:
    index, queries = Index.open(make_index(300)), (vectors(5, 8) * 3).astype(dtype)
    scores, rows = index.nearest(queries, 4)
    assert scores.dtype == np.float32
    truth = normalize_rows(queries) @ vectors(300, 0).T
    np.testing.assert_array_equal(rows, np.argsort(-truth, axis=1)[:, :4])
    assert index.nearest(queries[:0], 4)[1].shape == (0, 4)


def test_an_index_with_a_graph_of_whole_rows_as_older_versions_built_it_is_read(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = replace(INDEX_TYPES["hnsw"], factory="HNSW{links}", keeps_float16=False)
    with monkeypatch.context() as patches:
        patches.setitem(INDEX_TYPES, "hnsw", older)
        folder = make_index(800, kind="hnsw")
    index = Index.open(folder)
    assert isinstance(index.snapshot.views[0].segment.index, load_faiss().IndexHNSWFlat)
    scores = index.nearest(vectors(20, 5), 10)[0]
    np.testing.assert_allclose(scores[:, 0], (vectors(20, 5) @ vectors(800, 0).T).max(axis=1), atol=1e-3)
    assert not check_index(folder).faults


@pytest.mark.parametrize("kind", list(INDEX_TYPES))
def test_asking_without_faiss_wrapper_gives_what_it_gives(make_index: MakeIndex, kind: str) -> None:
    segment = Index.open(make_index(800, kind=kind)).snapshot.views[0].segment
    every_other = vectors(20, 5)[::2]
    for answers in (1, 10):
        scores, positions = segment.faiss_search(every_other, answers)
        expected, truth = segment.index.search(every_other, answers)
        np.testing.assert_array_equal(positions, truth)
        if kind == "hnsw":
            order = load_faiss().vector_to_array(segment.index.id_map)
            np.testing.assert_array_equal(graph_rows(unwrap_transforms(segment.index)), segment.vectors.stored[order])
            # of the float16 rows FAISS gives inner products, which are not quite cosines
            np.testing.assert_allclose(scores, expected, atol=2e-4)
            expected = np.einsum("qd,qkd->qk", every_other, segment.vectors.take(positions.ravel()).reshape(10, -1, 16))
            np.testing.assert_allclose(scores, expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(scores, expected)
    with pytest.raises(ValueError, match="dimensions"):
        segment.faiss_search(every_other[:, 1:], 10)
