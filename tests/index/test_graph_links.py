"""Links of a graph from text queries: which are added, what they gain, and that an index keeps them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.index.embeddings_fixture import write
from vlm.errors import UsageError
from vlm.index.ann.faiss_search import load_faiss, make_search_function, search_parameters, unwrap_transforms
from vlm.index.ann.graph_links import link_answers
from vlm.index.ann.index_types import INDEX_TYPES, TuningParams, fill_index
from vlm.index.autotune.query_sampling import SampledRows, sample_queries
from vlm.index.autotune.trial import TuningTarget
from vlm.index.backward_compat import upgrade_index
from vlm.index.build import build_autotuned, build_index
from vlm.index.embeddings_folder import Embeddings, normalize_rows
from vlm.index.engine_writer import InsertBatch
from vlm.index.index_files import LINK_QUERIES
from vlm.index.interop.exporter import FAISS_FILE, export_index
from vlm.index.reader import Index
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter
from vlm.manifest import read_manifest
from vlm.models.variants import CompatibilityProjection

DIMENSION = 32
ANSWERS = 32


def draw(count: int, seed: int) -> np.ndarray:
    """Unit rows around a hundred centres."""
    centres = np.random.default_rng(0).standard_normal((100, DIMENSION))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 100, count)] + 0.7 * rng.standard_normal((count, DIMENSION))
    return normalize_rows(rows.astype(np.float32))


def draw_texts(count: int, seed: int) -> np.ndarray:
    """Texts far from all rows, between two centres each: rows of both answer them."""
    gap = np.random.default_rng(1).standard_normal(DIMENSION)
    return normalize_rows((draw(count, seed) + draw(count, seed + 1) + 0.3 * gap).astype(np.float32))


def make_graph(rows: np.ndarray, **wishes: int) -> Any:
    """A graph of these rows."""
    index = INDEX_TYPES["hnsw"](SampledRows(rows), TuningParams(**wishes)).index
    for _ in fill_index(index, lambda: [rows], len(rows), None):
        pass
    return index


def links_of(index: Any) -> list[list[int]]:
    """The links of each node at the lowest level."""
    faiss = load_faiss()
    hnsw = unwrap_transforms(index).hnsw
    begins, links = faiss.vector_to_array(hnsw.offsets), faiss.vector_to_array(hnsw.neighbors)
    slots = [links[begin : begin + hnsw.nb_neighbors(0)] for begin in begins[:-1]]
    # a search stops at the first free slot
    assert all((taken >= 0).tolist() == sorted((taken >= 0).tolist(), reverse=True) for taken in slots)
    return [taken[taken >= 0].tolist() for taken in slots]


def answers_of(index: Any, queries: np.ndarray) -> np.ndarray:
    """The nodes that answer each query, best first, as `link_answers` finds them."""
    graph = unwrap_transforms(index)
    return make_search_function(graph)(queries, ANSWERS, search_parameters(graph, effort=200))[1]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return draw(4000, seed=2)


def test_each_answer_but_the_best_is_linked_from_a_better_one(rows: np.ndarray) -> None:
    index, queries = make_graph(rows), draw_texts(5, seed=3)
    before, answers_of_all = links_of(index), answers_of(index, queries)
    added = link_answers(index, queries)
    after = links_of(index)
    assert added == sum(map(len, after)) - sum(map(len, before)) > 0
    # what was there stays, in its order
    assert all(new[: len(old)] == old for old, new in zip(before, after, strict=True))
    assert all(len(set(links)) == len(links) for links in after)
    num_unreached = 0
    for answers in answers_of_all.tolist():
        for rank, answer in enumerate(answers[1:], 1):
            better = answers[:rank]
            if not any(answer in after[row] for row in better):
                # there was no room for the link
                assert any(len(after[row]) == 32 for row in better)
                num_unreached += 1
    assert num_unreached < 0.05 * answers_of_all.size


def test_a_new_link_comes_from_the_nearest_better_answer(rows: np.ndarray) -> None:
    index, query = make_graph(rows), draw_texts(1, seed=3)
    before, (answers,) = links_of(index), answers_of(index, query).tolist()
    link_answers(index, query)
    after = links_of(index)
    stored = unwrap_transforms(index).storage.reconstruct_n(0, len(rows))
    for source, (old, new) in enumerate(zip(before, after, strict=True)):
        for target in new[len(old) :]:
            better = [row for row in answers[: answers.index(target)] if len(before[row]) < 32]
            assert source == better[int((stored[better] @ stored[target]).argmax())]


def test_a_graph_without_free_slots_stays_as_it_is(rows: np.ndarray) -> None:
    index, queries = make_graph(rows, links=2), draw_texts(3000, seed=3)
    link_answers(index, queries)
    links = links_of(index)
    taken = [len(each) for each in links]
    assert max(taken) == 4
    answers = answers_of(index, queries[-200:])
    # so many ask that hardly a slot of an answer is free
    assert np.mean([taken[answer] for answer in answers.ravel().tolist()]) > 3.9
    link_answers(index, queries)
    assert all(new[: len(old)] == old and len(new) <= 4 for old, new in zip(links, links_of(index), strict=True))


def test_texts_not_linked_are_answered_better_with_the_same_candidates(rows: np.ndarray) -> None:
    plain, linked = make_graph(rows), make_graph(rows)
    link_answers(linked, draw_texts(2000, seed=3))
    queries = draw_texts(500, seed=11)
    truth = np.argsort(-queries @ rows.T, axis=1)[:, :10]

    def recall(index: Any) -> float:
        _, found = make_search_function(index)(queries, 10, search_parameters(index, effort=16))
        return float(np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)])) / 10

    misses = 1 - recall(plain), 1 - recall(linked)
    assert misses[0] > 0.02
    assert misses[1] < 0.8 * misses[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_or_no_queries_are_no_trouble(count: int) -> None:
    rows = draw(count, seed=2)
    index = make_graph(rows)
    link_answers(index, draw_texts(3, seed=3))
    assert link_answers(index, draw_texts(3, seed=3)[:0]) == 0
    _, found = make_search_function(index)(draw_texts(2, seed=5), count)
    assert sorted(found[0].tolist()) == list(range(count))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> tuple[Path, Path]:
    """Embeddings of images and of 1,000 texts."""
    folder = tmp_path_factory.mktemp("linked")
    write(folder / "images", rows, modality="image")
    write(folder / "texts", draw_texts(1000, seed=5), modality="text")
    return folder / "images", folder / "texts"


def test_queries_that_measure_recall_link_nothing(folders: tuple[Path, Path]) -> None:
    images, texts = map(Embeddings.open, folders)
    sample = sample_queries(images, [texts], max_rows=4000, max_queries=50, seed=0)
    everything = np.concatenate(list(texts.blocks()))
    samples = np.array([origin.number for origin in texts.origins()])
    used = {
        name: set(samples[(vectors[:, None] == everything[None]).all(-1).argmax(1)].tolist())
        for name, vectors in (
            ("tune", sample.tuning_queries),
            ("evaluate", sample.eval_queries["text→image"]),
            ("link", sample.link_queries),
        )
    }
    assert not used["link"] & (used["tune"] | used["evaluate"])
    assert len(sample.link_queries) == np.isin(samples, list(used["tune"] | used["evaluate"]), invert=True).sum() > 0
    # all are needed to measure with
    assert not len(sample_queries(images, [texts], max_rows=4000, max_queries=1000, seed=0).link_queries)
    assert not len(sample_queries(images, [], max_rows=4000, max_queries=50, seed=0).link_queries)


def test_an_autotuned_graph_is_linked_by_the_texts_that_are_left(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, texts = folders
    built = build_autotuned(images, tmp_path / "index", TuningTarget(recall=0.5), texts=texts, kind="hnsw")
    # 1,000 texts are too few to leave any
    assert built.plan.linked_with == 0
    assert LINK_QUERIES not in read_manifest(tmp_path / "index", "index").files
    many = write(tmp_path / "many", draw_texts(5000, seed=5), modality="text")
    built = build_autotuned(images, tmp_path / "linked", TuningTarget(recall=0.5), texts=many, kind="hnsw")
    manifest = read_manifest(tmp_path / "linked", "index")
    kept = np.load(tmp_path / "linked" / LINK_QUERIES)
    assert len(kept) == built.plan.linked_with == manifest.details["evidence"]["linked_with"] > 300
    np.testing.assert_array_equal(kept, built.plan.link_queries.astype(np.float16))
    flat = build_autotuned(images, tmp_path / "flat", TuningTarget(recall=0.5), texts=many, kind="flat")
    assert flat.plan.linked_with == 0
    assert LINK_QUERIES not in read_manifest(tmp_path / "flat", "index").files


def num_links(index: Path) -> int:
    """The links at the lowest level of the graph of an index."""
    opened = Index.open(index)
    (view,) = opened.snapshot.views
    count = sum(map(len, links_of(view.segment.index)))
    opened.close()
    return count


@pytest.fixture
def linked_and_plain(folders: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Two indexes of the images, one with links from 300 texts."""
    build_index(folders[0], tmp_path / "index", kind="hnsw", link_queries=draw_texts(300, seed=3))
    build_index(folders[0], tmp_path / "plain", kind="hnsw")
    assert num_links(tmp_path / "index") > num_links(tmp_path / "plain")
    return tmp_path / "index", tmp_path / "plain"


def test_a_compaction_links_the_answers_again(linked_and_plain: tuple[Path, Path], folders: tuple[Path, Path]) -> None:
    uids = [origin.uid for origin in Embeddings.open(folders[0]).origins()]
    linked = linked_and_plain[0]
    kept = (linked / LINK_QUERIES).read_bytes()
    for change in ("delete some", "update all", "flat and back"):
        for folder in linked_and_plain:
            with IndexWriter(folder) as writer:
                if change == "delete some":
                    writer.delete(uids[:100])
                elif change == "update all":
                    writer.update(InsertBatch.from_folder(folders[0]))
                else:
                    writer.compact(kind="flat")
                writer.compact(kind="hnsw")
            assert check_index(folder).faults == ()
        assert num_links(linked) > num_links(linked_and_plain[1])
        assert (linked / LINK_QUERIES).read_bytes() == kept
    with IndexWriter(linked) as writer:
        writer.rollback()
    assert check_index(linked).faults == ()


def test_an_exported_graph_of_some_rows_is_linked(
    linked_and_plain: tuple[Path, Path], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    gone = next(Embeddings.open(folders[0]).origins()).uid
    counts = []
    for folder in linked_and_plain:
        with IndexWriter(folder) as writer:
            writer.delete([gone])
        export_index(folder, tmp_path / f"{folder.name}-exported", to="faiss")
        index = load_faiss().read_index(str(tmp_path / f"{folder.name}-exported" / FAISS_FILE))
        counts.append(sum(map(len, links_of(index))))
    assert counts[0] > counts[1]


def test_an_upgraded_graph_is_linked(linked_and_plain: tuple[Path, Path], tmp_path: Path) -> None:
    head = CompatibilityProjection(
        matrix=torch.eye(DIMENSION + 8), old_dimension=DIMENSION, old="drawn", new="new", model="new"
    )
    upgraded = [tmp_path / f"{folder.name}-upgraded" for folder in linked_and_plain]
    for folder, out in zip(linked_and_plain, upgraded, strict=True):
        upgrade_index(folder, out, head, head_spec=str(tmp_path / "head"))
    assert num_links(upgraded[0]) > num_links(upgraded[1])
    assert np.load(upgraded[0] / LINK_QUERIES).shape == (300, DIMENSION + 8)
    with IndexWriter(upgraded[0]) as writer:
        writer.compact(kind="hnsw")
    assert num_links(upgraded[0]) > num_links(upgraded[1])


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.eye(16), r"shape \(16, 16\); \(queries, 32\)"),
        (2 * np.eye(DIMENSION), r"link_queries\[0\] has length 2"),
        (np.full((1, DIMENSION), np.nan), "has length nan"),
    ],
)
def test_queries_that_fit_no_row_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, queries: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_index(folders[0], tmp_path / "index", kind="hnsw", link_queries=queries.astype(np.float32))
    assert not (tmp_path / "index").exists()
