"""Equal scores come in the order of their rows, for every number of results, index type, filter and segment."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.index.index_fixture import insert_batch, origins, vectors
from vlm.index.ann.index_types import INDEX_TYPES
from vlm.index.duplicate_rows import DuplicateRows, find_duplicate_rows
from vlm.index.embeddings_folder import normalize_rows
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter

KINDS = list(INDEX_TYPES)
GROUPS = vectors(12, 3)


def repeated_rows(count: int, seed: int, *, repeated: int = 300) -> np.ndarray:
    """Unit rows of which so many are copies of twelve, spread at random among the others."""
    rng = np.random.default_rng(seed)
    rows = vectors(count, seed)
    places = rng.permutation(count)[:repeated]
    rows[places] = GROUPS[rng.integers(0, len(GROUPS), repeated)]
    return rows


@pytest.fixture(scope="module")
def index_of_copies(tmp_path_factory: pytest.TempPathFactory):
    """An index of each type with 1,200 rows in two segments, some copied in both, some deleted and inserted anew."""
    from vlm.index.build import build_index

    made: dict[str, Path] = {}

    def make(kind: str, make_embeddings) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("ties") / kind
            build_index(make_embeddings(repeated_rows(800, 1)), folder, kind=kind)
            with IndexWriter(folder) as writer:
                writer.delete([f"k{number}" for number in range(0, 800, 7)])
                writer.add(insert_batch(repeated_rows(400, 2), origins([f"n{number}" for number in range(400)])))
            made[kind] = folder
        return made[kind]

    return make


def exact_order(index: Index, query: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """All rows by cosine, then row, and their cosines."""
    rows = index.catalogue.rows() if allowed is None else allowed
    cosines = (index.snapshot.vectors(rows).astype(np.float64) @ query.astype(np.float64)).round(6)
    order = np.lexsort((rows, -cosines))
    return rows[order], cosines[order]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_filtered", [False, True])
def test_equal_rows_come_by_number_for_every_number_of_results(
    index_of_copies, embed_vectors, kind: str, is_filtered: bool
) -> None:
    index = Index.open(index_of_copies(kind, embed_vectors))
    allowed = index.catalogue.rows()[::2] if is_filtered else None
    for query in GROUPS:
        query = normalize_rows(query[None])
        expected, cosines = exact_order(index, query[0], allowed)
        copies = expected[cosines == cosines[0]]
        assert len(copies) > 8
        for top in (1, 2, 5, 8, len(copies)):
            _, found = index.nearest(query, top, *([allowed] if is_filtered else []))
            assert found[0].tolist() == copies[:top].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_few_results_are_the_first_of_many(index_of_copies, embed_vectors, kind: str) -> None:
    index = Index.open(index_of_copies(kind, embed_vectors))
    for query in np.concatenate([GROUPS, normalize_rows(GROUPS + 0.05 * vectors(12, 9))]):
        _, many = index.nearest(query[None], 50)
        for top in (1, 3, 5, 20):
            _, few = index.nearest(query[None], top)
            # by codes a search for few results compares fewer candidates: what it finds is in the same order
            if INDEX_TYPES[kind].tunable and "rerank" in INDEX_TYPES[kind].tunable:
                places = [many[0].tolist().index(row) for row in few[0].tolist() if row in many[0]]
                assert places == sorted(places)
            else:
                assert few[0].tolist() == many[0, :top].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_or_code_with_hundreds_of_copies_of_one_row_gives_all(tmp_path: Path, embed_vectors, kind: str) -> None:
    from vlm.index.build import build_index

    rows = vectors(1500, 4)
    copies = np.sort(np.random.default_rng(5).permutation(1500)[:600])
    rows[copies] = rows[copies[0]]
    build_index(embed_vectors(rows), tmp_path / "i", kind=kind)
    index = Index.open(tmp_path / "i")
    for top in (5, 50, 600):
        scores, found = index.nearest(rows[copies[:1]], top)
        assert found[0].tolist() == copies[:top].tolist()
        assert len(set(scores[0].tolist())) == 1


def test_mirrored_rows_of_equal_score_come_by_number(tmp_path: Path, embed_vectors) -> None:
    from vlm.index.build import build_index

    rows = np.zeros((64, 4), np.float32)
    rows[:, 0], rows[:, 1] = 0.6, np.where(np.arange(64) % 2, 0.8, -0.8)
    rows[:, 2] = 0
    build_index(embed_vectors(rows), tmp_path / "i", kind="flat")
    index = Index.open(tmp_path / "i")
    for top in (1, 5, 20, 64):
        assert index.nearest(np.eye(4, dtype=np.float32)[:1], top)[1][0].tolist() == list(range(top))


@given(
    codes=st.lists(st.integers(0, 5), max_size=40),
    results=st.integers(1, 8),
    seed=st.integers(0, 99),
    dimension=st.sampled_from([1, 3, 16, 17, 40]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_groups_of_equal_rows_are_those_of_all_pairs(codes: list[int], results: int, seed: int, dimension: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((6, dimension)).astype(np.float16)
    # some agree in all but the last value
    kinds[1, :-1], kinds[5] = kinds[0, :-1], 0
    rows = kinds[np.array(codes, np.int64)].reshape(-1, dimension)
    table = find_duplicate_rows(rows)
    first = {row.tobytes(): place for place, row in reversed(list(enumerate(rows)))}
    keys = [row.tobytes() for row in rows]
    expected = [[place, first[key]] for place, key in enumerate(keys) if keys.count(key) > 1]
    assert table.tolist() == expected
    if not len(table):
        return
    duplicates = DuplicateRows(table)
    mask = rng.random(len(rows)) < 0.7
    found = rng.permutation(np.flatnonzero(mask))[:results][None]
    scores = np.array([[float(first[keys[place]]) for place in found[0]]], np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    _, completed = duplicates.complete(scores, found, mask.__getitem__)
    groups = {keys[place] for place in found[0]}
    equals = [place for place in np.flatnonzero(mask).tolist() if keys[place] in groups]
    equals.sort(key=lambda place: (-first[keys[place]], place))
    assert completed[0].tolist() == equals[: found.shape[1]]
