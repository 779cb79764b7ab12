from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.service.query import Query, read_queries


def test_a_line_is_a_text_or_an_object_and_the_rest_is_as_asked() -> None:
    lines = [
        "a dog\n",
        "\n",
        '{"texts": ["a", "b"], "minus": ["c"], "weights": [1, 2, 3], "top": 3, "where": "x = 1"}',
        '  {"images": ["q.png"], "words": "w", "duplicates": 0.9, "diversity": 0, "after": "z"}  ',
        '{"vectors": [[1, 2.5]], "texts": [], "rerank_top": 0}',
        "[1] is a text",
    ]
    defaults = Query(top=7, where="y = 2")
    assert list(read_queries(lines, defaults)) == [f"Line {n} of the queries" for n in (1, 3, 4, 5, 6)]
    assert list(read_queries(lines, defaults).values()) == [
        Query(texts=("a dog",), top=7, where="y = 2"),
        Query(texts=("a", "b"), minus=("c",), weights=(1.0, 2.0, 3.0), top=3, where="x = 1"),
        Query(images=(Path("q.png"),), top=7, where="y = 2", words="w", duplicates=0.9, after="z"),
        Query(vectors=((1.0, 2.5),), top=7, where="y = 2"),
        Query(texts=("[1] is a text",), top=7, where="y = 2"),
    ]
    assert read_queries([], defaults) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"texts": ["a"', "Line 2 of the queries: it begins like a JSON object"),
        ("{" + '"a":{' * 100_000, "Line 2 .* begins like a JSON object"),
        ('{"text": ["a"]}', "no 'text'; did you mean 'texts'?"),
        ('{"texts": {"a": 1}}', "texts must be a text or a list of texts, given: {'a': 1}"),
        ('{"texts": [1]}', "texts must be a text or a list of texts"),
        ('{"texts": ["a"], "top": 1.5}', "top must be a whole number, given: 1.5"),
        ('{"texts": ["a"], "top": true}', "top must be a whole number"),
        ('{"texts": ["a"], "top": NaN}', "top must be a whole number"),
        ('{"texts": ["a"], "top": Infinity}', "top must be a whole number"),
        ('{"texts": ["a"], "top": 0}', "Line 2 .* top = 0 is out of range"),
        ('{"texts": ["a"], "weights": [1, "x"]}', "weights must be a list of numbers"),
        ('{"vectors": [1, 2]}', "vectors must be a list of lists of numbers"),
        ('{"texts": ["a"], "rerank_top": 1.5}', "rerank_top must be a whole number"),
        ('{"texts": ["a"], "where": 1}', "where must be a text"),
        ('{"texts": ["a"], "duplicates": null}', "duplicates must be a number"),
        ('{"texts": ["a"], "diversity": 7}', "diversity = 7.0 is outside"),
        ("{}", "Line 2 .* needs a text, image"),
    ],
)
def test_a_line_that_is_not_a_query_is_named(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_queries(["a dog", line], Query())


def test_one_text_is_one_term_and_not_its_letters():
    query = Query(texts="red handbag", items="a/7", minus=["snow"])
    assert (query.texts, query.items, query.minus) == (("red handbag",), ("a/7",), ("snow",))
    assert query == Query(texts=("red handbag",), items=("a/7",), minus=("snow",))
    assert query.describe() == "red handbag + a/7 − snow"
    assert read_queries(['{"texts": "red handbag"}'], Query())["Line 1 of the queries"].texts == ("red handbag",)
