"""Pages of answers, over vectors on a circle: every row once, however far the pages go."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.index.index_fixture import insert_batch
from tests.index.origin_fixture import make_origin
from tests.service.circle_fixture import SPACE, OpenService, origin, points
from tests.service.paging_helper import pages, uids
from vlm.errors import UsageError
from vlm.index.writer import IndexWriter
from vlm.service.query import Cursor
from vlm.service.search import Query


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": "n >= 5 and n < 90"},
        {"words": "row"},
        {"duplicates": 0.9999},
        {"diversity": 0.5},
        {"words": "row", "duplicates": 0.9999, "diversity": 0.5, "where": "n != 7"},
    ],
)
def test_pages_put_together_are_the_one_long_answer(open_service: OpenService, options: dict[str, Any]) -> None:
    # a hundred rows at few angles: equals have an order too
    degrees = np.random.default_rng(0).integers(0, 36, 100) * 5
    captions = ["row" if number % 3 else "other" for number in range(100)]
    service = open_service(degrees, [origin(f"u{n}", caption, n=n) for n, caption in enumerate(captions)])
    query = Query(texts=("33",), **options)
    whole = service.search(replace(query, top=1000))
    assert whole.next == ""
    assert len(set(uids(whole))) == len(whole.hits) > 50 * (not options.get("duplicates"))
    for top in (1, 7, 99):
        assert pages(service, replace(query, top=top)) == uids(whole)


def test_a_page_goes_on_behind_its_last_answer_when_the_index_has_changed(
    open_service: OpenService,
) -> None:
    service = open_service([0, 10, 20, 30, 40])
    query = Query(texts=("0",), top=2)
    first = service.search(query)
    with IndexWriter(service.index.folder) as writer:
        added = [5, 25, *np.linspace(1, 4, 30)]
        writer.add(insert_batch(points(added), [origin(f"n{n}") for n in range(len(added))], SPACE))
        writer.delete(["u1", "u2"])
    second = service.search(replace(query, after=first.next))
    assert uids(first) == ["u0", "u1"]
    assert uids(second) == ["n1", "u3"]
    assert second.generation == first.generation + 2
    assert uids(service.search(replace(query, after=second.next))) == ["u4"]


def test_a_page_that_ended_among_equal_scores_goes_on_there_when_the_index_has_changed(
    open_service: OpenService,
) -> None:
    service = open_service([0, 10, 10, 10, 30])
    query = Query(texts=("0",), top=2)
    first = service.search(query)
    with IndexWriter(service.index.folder) as writer:
        writer.add(insert_batch(points([20]), [origin("n0")], SPACE))
    second = service.search(replace(query, after=first.next))
    third = service.search(replace(query, after=second.next))
    assert [uids(page) for page in (first, second, third)] == [["u0", "u1"], ["u2", "u3"], ["n0", "u4"]]


def test_a_page_whose_order_the_change_may_have_touched_is_refused(
    open_service: OpenService,
) -> None:
    service = open_service([0, 10, 20, 30, 40])
    query = Query(texts=("0",), top=2, diversity=0.5)
    first = service.search(query)
    with IndexWriter(service.index.folder) as writer:
        writer.delete(["u1"])
    with pytest.raises(UsageError, match="version 1 to 2 since the last page"):
        service.search(replace(query, after=first.next))


def test_a_cursor_of_another_question_is_refused(open_service: OpenService) -> None:
    service = open_service([0, 10, 20])
    after = service.search(Query(texts=("0",), top=1)).next
    assert uids(service.search(Query(texts=("0",), top=2, after=after))) == ["u1", "u2"]
    for other in (Query(texts=("1",), after=after), Query(texts=("0",), where="n < 9", after=after)):
        with pytest.raises(UsageError, match="belongs to another query"):
            service.search(other)


@pytest.mark.parametrize("token", ["x", "ä", "AAAA", "", "=" * 32])
def test_a_word_that_is_no_cursor_is_named(token: str) -> None:
    with pytest.raises(UsageError, match="is not a cursor"):
        Cursor.from_token(token)


DEGREES = np.random.default_rng(2).uniform(0, 360, 3000)
HASTY = {"ivf": {"nlist": 60, "nprobe": 1}, "ivfsq": {"nlist": 60, "nprobe": 1, "rerank": 1}, "hnsw": {"ef_search": 2}}


@pytest.mark.parametrize("kind", HASTY)
@pytest.mark.parametrize("options", [{}, {"where": "n < 2900"}, {"words": "row"}, {"diversity": 0.5}])
def test_pages_of_an_index_that_misses_rows_show_every_row_once(
    open_service: OpenService, kind: str, options: dict[str, Any]
) -> None:
    origins = [origin(f"u{n}", "row" if n % 2 else "other", n=n) for n in range(3000)]
    service = open_service(DEGREES, origins, kind=kind, **HASTY[kind])
    for top in (90, 500):
        found = pages(service, Query(texts=("100",), top=top, **options))
        assert len(found) == len(set(found)) == (2900 if "where" in options else 3000)


def test_pages_of_different_length_show_every_row_once_too(open_service: OpenService) -> None:
    service = open_service(DEGREES, kind="ivf", **HASTY["ivf"])
    result = service.search(Query(texts=("100",), top=5))
    found = uids(result)
    for top in np.random.default_rng(0).integers(1, 400, 1000).tolist():
        assert result.hits == tuple(sorted(result.hits, key=lambda hit: -hit.score))
        if not result.next:
            break
        result = service.search(replace(result.query, after=result.next, top=top))
        found += uids(result)
    assert sorted(found) == sorted(f"u{n}" for n in range(3000))


@pytest.mark.parametrize(
    "options",
    [{"words": "row"}, {"diversity": 1.0}, {"words": "row", "diversity": 1.0}, {"words": "row", "at_least": 0}],
)
def test_no_answer_is_short_where_more_are_asked_for_than_are_fused_or_turned(
    open_service: OpenService, options: dict[str, Any]
) -> None:
    service = open_service(DEGREES[:200], [origin(f"u{n}", "row" if n % 2 else "other", n=n) for n in range(200)])
    service.num_candidates = 10
    plain = Query(texts=("100",), top=1000, at_least=options.get("at_least"))
    query = replace(plain, **options)
    result = service.search(query)
    assert sorted(uids(result)) == sorted(uids(service.search(plain)))
    assert uids(result) != uids(service.search(plain))
    assert pages(service, replace(query, top=7)) == uids(result)
    if "diversity" not in options:
        fused = [hit.fused for hit in result.hits]
        assert None not in fused[:10]
        assert set(fused[20:]) == {None}


def test_a_long_answer_has_the_recall_of_a_short_one(open_service: OpenService) -> None:
    degrees = np.random.default_rng(2).uniform(0, 360, 20_000).tolist()
    service = open_service(
        degrees, [make_origin(f"u{n}", {}, {}) for n in range(20_000)], kind="ivf", nlist=200, nprobe=3
    )
    queries, rows = points([10, 123, 300]), points(degrees)
    truth = np.argsort(-(queries @ rows.T), axis=1)

    def recall(top: int) -> float:
        found = service.index.nearest(queries, top)[1]
        return float(np.mean([len(set(had) & set(want[:top])) / top for had, want in zip(found, truth, strict=True)]))

    assert recall(100) >= 0.9
    assert recall(390) >= 0.9
    assert recall(401) == pytest.approx(
        1, abs=0.02
    )  # all rows are compared; those of nearly equal cosine may change places
