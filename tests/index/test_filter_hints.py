import time
from pathlib import Path

import pytest

from tests.index.origin_fixture import make_origin
from vlm.errors import UsageError
from vlm.index.catalog import Catalogue, update_catalogue, write_catalogue
from vlm.index.engine_base import row_numbers
from vlm.index.filter_hints import explain_no_match
from vlm.index.filter_language import parse_filter


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    rows = []
    for number in range(30):
        colour = ("Red", "Navy Blue", "Green")[number % 3]
        metadata = {"baseColour": colour, "year": 2000 + number, "sku": f"s{number:03}", "size": number % 4}
        rows.append((number, make_origin(f"k{number}", metadata)))
    path = tmp_path / "catalogue.sqlite"
    write_catalogue(path, rows)
    gone = make_origin("gone", {"baseColour": "Purple"})
    update_catalogue(path, generation=2, inserted=[(30, gone)], deleted=Catalogue(path).rows()[:0])
    only_purple = Catalogue(path).where(parse_filter("baseColour = 'Purple'"))
    update_catalogue(path, generation=3, deleted=row_numbers(only_purple))
    return Catalogue(path, 3)


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("baseColour = 'red'", "'Red' is a value of baseColour, 'red' is not."),
        ('baseColour == "navyblue" and year > 2001', "'Navy Blue' is a value of baseColour, 'navyblue' is not."),
        ("baseColour in ('gren', 'black')", "'Green' is a value of baseColour, 'gren' is not; 'black' is not a value"),
        ("baseColour = 'purple'", "'purple' is not a value of baseColour; its values are 'Green', 'Navy Blue', "),
        ("year > 2001 and year >= 2040", "no value of year is >= 2040; its values go from 2000 to 2029."),
        ("size = 9", "9 is not a value of size; its values are 0, 1, 2, 3."),
        (
            "sku like 'x%'",
            "no value of sku is like 'x%'; its first values are 's000', 's001', 's002', 's003', 's004' …",
        ),
        ("sku = 'S003'", "'s003' is a value of sku, 'S003' is not."),
        ("baseColour = 'Red' and size = 0 and year = 2001", "but no row matches all of them."),
        ("not (year > 1)", "no row matches a part of the filter"),
    ],
)
def test_the_part_that_matches_nothing_is_named_with_what_is_near(catalogue: Catalogue, where: str, hint: str) -> None:
    assert not len(catalogue.where(parse_filter(where)))
    explained = explain_no_match(catalogue, where)
    assert explained.startswith("0 rows match: ")
    assert hint in explained


def test_a_field_that_no_row_has_is_refused_with_the_near_one(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match="did you mean 'baseColour'"):
        explain_no_match(catalogue, "basecolour = 'Red'")


def test_an_index_without_rows_says_so(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "empty.sqlite", [])
    assert explain_no_match(Catalogue(tmp_path / "empty.sqlite"), "x = 1") == ("0 rows match: the index has no rows.")


def test_among_very_many_values_the_near_one_is_found_at_once(tmp_path: Path) -> None:
    rows = [(number, make_origin(f"k{number}", {"sku": f"s_{number}"})) for number in range(12_000)]
    write_catalogue(tmp_path / "many.sqlite", rows)
    many = Catalogue(tmp_path / "many.sqlite")
    started = time.perf_counter()
    assert "'s_9999' is a value of sku, 'S_9999' is not." in explain_no_match(many, "sku = 'S_9999'")
    assert "its first values are 's_0', 's_1', 's_10'" in explain_no_match(many, "sku = 'none at all'")
    assert many.values_like("sku", "s%", 5) == []
    # it took minutes when each value cost a scan
    assert time.perf_counter() - started < 20
