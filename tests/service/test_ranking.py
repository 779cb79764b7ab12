"""Filters, words, duplicates and diversity, over vectors on a circle whose answers can be worked out by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.service.circle_fixture import OpenService, origin
from tests.service.paging_helper import pages, uids
from vlm.errors import UsageError
from vlm.service.search import Query


def test_only_rows_that_the_filter_chooses_answer(open_service: OpenService) -> None:
    service = open_service(range(0, 100, 10))
    assert uids(service.search(Query(texts=("0",), where="n >= 3 and n != 4", top=3))) == ["u3", "u5", "u6"]
    assert uids(service.search(Query(texts=("0",), where="key in ('u9', 'u2')"))) == ["u2", "u9"]
    assert uids(service.search(Query(texts=("0",), where="n > 100"))) == []


def test_a_wrong_filter_is_refused_before_the_model_is_loaded(open_service: OpenService) -> None:
    service = open_service([0, 1])

    def refuse(_: str) -> Any:
        raise AssertionError("the model was loaded")

    service.load = refuse
    for where, message in {"n >": "column 4", "m = 1": "'m'", "n = 'x'": "holds numbers"}.items():
        with pytest.raises(UsageError, match=message):
            service.search(Query(texts=("0",), where=where))


def test_an_item_finds_its_like_without_a_model(open_service: OpenService) -> None:
    service = open_service([0, 10, 80, 90])
    service.load = lambda _: pytest.fail("the model was loaded")
    assert uids(service.search(Query(items=("u3",), top=2))) == ["u3", "u2"]
    assert uids(service.search(Query(items=("u0", "u3"), weights=(1.0, 9.0), top=2))) == ["u2", "u3"]
    with pytest.raises(UsageError, match="no item 'u4'"):
        service.search(Query(items=("u0", "u4")))


def test_items_are_added_between_images_and_minus_terms(open_service: OpenService) -> None:
    service = open_service([0, 10, 80, 90])
    result = service.search(Query(texts=("0",), items=("u3",), minus=("180",), weights=(2.0, 3.0, 1.0), top=1))
    # 2 (1, 0) + 3 (0, 1) - (-1, 0) points to 45 degrees
    assert result.hits[0].score == pytest.approx(np.cos(np.radians(35)), abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"words": "nothing"}, {"duplicates": 0.9999}, {"diversity": 0.01}])
def test_no_answer_is_further_than_the_lowest_cosine(open_service: OpenService, options: dict[str, Any]) -> None:
    service = open_service([0, 10, 20, 30, 40, 180])
    query = Query(texts=("0",), at_least=float(np.cos(np.radians(25))), **options)
    result = service.search(query)
    assert uids(result) == ["u0", "u1", "u2"]
    assert result.next == ""
    assert pages(service, replace(query, top=1)) == ["u0", "u1", "u2"]
    assert uids(service.search(replace(query, at_least=-1.0, top=99)))[-1] == "u5"


CAPTIONED = [origin("a", "a dog"), origin("b", "a cat"), origin("c", "the dog", n=1), origin("d", "dog dog dog", n=1)]


def test_words_put_captions_that_hold_them_first(open_service: OpenService) -> None:
    service = open_service([50, 0, 60, 70], CAPTIONED)
    result = service.search(Query(texts=("0",), words="DOG"))
    assert [entry.uid for entry in service.index.catalogue.search_text("dog", 9)] == ["d", "a", "c"]
    # one dog in two words, as a and c have it, is one score, and so one rank
    by_vector, by_words = ["b", "a", "c", "d"], {"d": 1, "a": 2, "c": 2}
    expected = {
        uid: 1 / (61 + by_vector.index(uid)) + (1 / (60 + by_words[uid]) if uid in by_words else 0) for uid in by_vector
    }
    assert uids(result) == sorted(expected, key=lambda uid: -expected[uid])
    assert uids(result)[-1] == "b"
    assert [hit.fused for hit in result.hits] == pytest.approx(sorted(expected.values(), reverse=True))
    assert result.hits[-1].score == pytest.approx(1, abs=1e-3)


def test_equal_captions_share_a_rank_and_the_nearest_comes_first(open_service: OpenService) -> None:
    origins = [origin(f"u{number}", "a dog" if number % 2 else "a cat") for number in range(40)]
    # the nearest has the highest number, so that an order by number would be the reverse
    service = open_service(range(40, 0, -1), origins)
    odd = [f"u{number}" for number in range(39, 0, -2)]
    result = service.search(Query(texts=("0",), words="dog", top=20))
    assert uids(result) == odd
    assert result.hits[0].fused == pytest.approx(2 / 61)
    assert result.hits[1].fused == pytest.approx(1 / 63 + 1 / 61)
    # with fewer candidates than equal captions, those nearest to the query are candidates
    service.num_candidates = 3
    assert uids(service.search(Query(texts=("0",), words="dog", top=3))) == odd[:3]
    assert pages(service, Query(texts=("0",), words="dog", top=7))[:3] == odd[:3]


def test_an_exact_duplicate_has_a_cosine_of_at_least_one(open_service: OpenService) -> None:
    degrees = np.random.default_rng(0).uniform(0, 360, 200).tolist()
    service = open_service(degrees)
    for number in range(200):
        result = service.search(Query(items=(f"u{number}",), at_least=1.0))
        assert f"u{number}" in uids(result)
        assert all(1 - 2e-6 < hit.score <= 1 for hit in result.hits)
        assert service.search(Query(texts=(str(degrees[number]),), top=200)).hits[-1].score >= -1


def test_words_are_searched_among_the_filtered_rows_only(open_service: OpenService) -> None:
    service = open_service([50, 0, 60, 70], CAPTIONED)
    service.num_candidates = 1
    assert uids(service.search(Query(texts=("0",), words="dog", where="n = 1 and key != 'd'"))) == ["c"]
    assert uids(service.search(Query(texts=("0",), words="dog", where="key = 'b'"))) == ["b"]
    assert uids(service.search(Query(texts=("0",), words="nowhere \0 \ud800", top=1))) == ["b"]


def test_duplicates_are_counted_behind_the_best_of_them(open_service: OpenService) -> None:
    service = open_service([0, 1, 2, 40, 41, 90, 200])
    result = service.search(Query(texts=("0",), duplicates=float(np.cos(np.radians(3))), top=3))
    assert uids(result) == ["u0", "u3", "u5"]
    assert [hit.similar for hit in result.hits] == [2, 1, 0]
    assert result.hits[0].to_json()["similar"] == 2
    assert pages(service, replace(result.query, top=1)) == ["u0", "u3", "u5", "u6"]


def test_more_is_searched_until_enough_differ(open_service: OpenService) -> None:
    service = open_service([*np.linspace(0, 1, 300), 30, 60, 90])
    service.num_candidates = 4
    result = service.search(Query(texts=("0",), duplicates=0.99, top=3))
    assert uids(result) == ["u0", "u300", "u301"]
    assert result.hits[0].similar == 299


def test_diverse_answers_come_before_more_of_the_same(open_service: OpenService) -> None:
    service = open_service([-10, -9, 30, 90])
    assert uids(service.search(Query(texts=("0",), top=3))) == ["u1", "u0", "u2"]
    # after u1, with relevances 1, 0.997, 0.877, 0: 0.6 * 0.877 - 0.4 cos 39° is more than 0.6 * 0.997 - 0.4 cos 1°
    assert uids(service.search(Query(texts=("0",), diversity=0.4, top=3))) == ["u1", "u2", "u0"]
    assert uids(service.search(Query(texts=("0",), diversity=0.001, top=3))) == ["u1", "u0", "u2"]


def test_several_questions_are_embedded_together_and_answered_alike(
    open_service: OpenService,
) -> None:
    service = open_service(range(0, 90, 5))
    queries = [
        Query(texts=("0",)),
        Query(texts=("30", "50"), minus=("90",), weights=(1.0, 2.0, 0.5), top=3),
        Query(texts=("45",), where="n > 12", duplicates=0.99),
    ]
    model: Any = service.model
    together = service.search_many(queries)
    assert model.calls == 1
    alone = [service.search(query) for query in queries]
    assert [(uids(result), result.next) for result in together] == [(uids(result), result.next) for result in alone]
    assert [hit.score for hit in together[1].hits] == [hit.score for hit in alone[1].hits]
    assert service.search_many([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": " "}, "words of the query are empty"),
        ({"diversity": 1.5}, "outside 0 to 1"),
        ({"at_least": 1.01}, "in -1 to 1"),
        ({"diversity": float("nan")}, "outside 0 to 1"),
        ({"duplicates": 0.0}, "above 0 and at most 1"),
        ({"after": "rubbish"}, "is not a cursor"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    open_service: OpenService, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        open_service([0]).search(Query(texts=("0",), **options))
