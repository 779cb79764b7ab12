import numpy as np
import pytest

from tests.index.index_fixture import MakeIndex, make_batch, vectors
from vlm.errors import UsageError
from vlm.index.filter_language import parse_filter
from vlm.index.reader import Index
from vlm.index.segments import nearest
from vlm.index.writer import IndexWriter


@pytest.mark.parametrize("kind", ["flat", "ivf", "sq8", "hnsw", "ivfpq"])
@pytest.mark.parametrize(("number", "top"), [(3, 10), (60, 20), (600, 50), (1900, 1000)])
def test_a_filtered_search_is_complete_and_true_for_every_kind(
    make_index: MakeIndex, kind: str, number: int, top: int
) -> None:
    folder = make_index(2000, kind=kind)
    with IndexWriter(folder) as writer:
        writer.delete([f"k{n}" for n in range(0, 2000, 100)])
        writer.add(make_batch(50, 1))
    index, rows, queries = Index.open(folder), vectors(2000, 0), vectors(4, 8)
    allowed_rows = index.catalogue.where(parse_filter(f"split = 'first' and number < {number}"))
    allowed = [n for n in range(number) if n % 100]
    assert list(allowed_rows) == allowed
    # few rows are enough for a FAISS search here, so that not every filter is answered by a scan
    all_scores, all_rows = nearest(index.snapshot.views, queries, top, allowed_rows, exact_rows=10)
    for query, scores, numbers in zip(queries, all_scores, all_rows.tolist(), strict=True):
        assert len(set(numbers)) == len(numbers) == min(top, len(allowed))
        assert set(numbers) <= set(allowed)
        assert np.allclose(scores, rows[numbers] @ query, atol=1e-3)
        best = np.sort(rows[allowed] @ query)[::-1][: len(scores)]
        assert np.mean(scores >= best[-1] - 1e-3) >= (1.0 if kind == "flat" else 0.8)


def test_a_filter_that_leaves_few_rows_is_answered_exactly_by_a_lossy_kind(make_index: MakeIndex) -> None:
    folder = make_index(2000, kind="ivfpq")
    index, query = Index.open(folder), vectors(1, 8)
    allowed_rows = index.catalogue.where(parse_filter("number < 500"))
    _, rows = index.nearest(query, 30, allowed_rows)
    truth = np.argsort(-(vectors(2000, 0)[:500] @ query[0]))[:30]
    assert len(set(rows[0]) & set(truth)) >= 29
    assert index.nearest(query, 30, np.array([], np.int64))[1].shape == (1, 0)
    with pytest.raises(UsageError, match="distinct and ascending"):
        index.nearest(query, 30, np.array([3, 1]))
