import sqlite3

import pytest

from tests.index.metadata_fixture import Metadata, chosen, open_bitmaps, open_facts
from vlm.errors import UsageError
from vlm.index.filter_language import LONGEST_FILTER, And, Compare, IsIn, IsNull, Like, Not, Or, parse_filter

IMAGES: list[Metadata] = [
    {"width": 640, "language": "en", "tags": ["dog", "wet"], "date": "2024-05-31", "exif": {"iso": 100}},
    {"width": 512, "language": "en", "tags": "cat", "date": "2023-01-02", "good": True},
    {"width": 300.5, "language": "de", "tags": ["Dog"], "note": 'it\'s 100%_sure \\ "x"'},
    {"width": "wide", "language": ["en", "zh"], "good": False, "my field": 1},
    {},
]


@pytest.fixture(scope="module")
def images() -> sqlite3.Connection:
    return open_facts(IMAGES)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("language = 'en'", [0, 1, 3]),
        ("language = 'en' and width >= 512 and tags has 'dog'", [0]),
        ("width > 300", [0, 1, 2]),
        ("width < 512", [2]),
        ("width <= 512.0", [1, 2]),
        ("width = 512.0", [1]),
        ("width = +5.12e2", [1]),
        ("width > -1", [0, 1, 2]),
        ("width >= 'a'", [3]),
        ("width < 'zzz'", [3]),
        ("language != 'en'", [2]),
        ("language == 'en' and width==640", [0]),
        ('language = "en"', [0, 1, 3]),
        ('"language" == "en" and "my field" = 1', [3]),
        ("language in (\"zh\", 'de')", [2, 3]),
        ('language like "E%"', [0, 1, 3]),
        ('note like "%""x"""', [2]),
        ("not language = 'en'", [2, 4]),
        ("language not in ('en', 'de')", []),
        ("language in ('zh','de')", [2, 3]),
        ("width in (640, 'wide')", [0, 3]),
        ("tags has 'dog'", [0]),
        ("tags not has 'dog'", [1, 2]),
        ("tags like 'DO%'", [0, 2]),
        ("tags like '%o%'", [0, 2]),
        ("tags like 'd'", []),
        ("tags not like 'd%'", [1]),
        ("note like '%100%_sure%'", [2]),
        ("note like '%100%-sure%'", []),
        ("note like '%\\ \"x\"'", [2]),
        ("note = 'it''s 100%_sure \\ \"x\"'", [2]),
        ("width like 'w%'", [3]),
        ("date >= '2024-01-01'", [0]),
        ("date < '2024'", [1]),
        ("good = true", [1]),
        ("good = FALSE", [3]),
        ("good is missing", [0, 2, 4]),
        ("good IS NOT Missing", [1, 3]),
        ("exif.iso = 100", [0]),
        ('"my field" = 1', [3]),
        ('"exif.iso" < 101', [0]),
        ("key = 'k4'", [4]),
        ("key is not missing", [0, 1, 2, 3, 4]),
        ("key is missing", []),
        ("good = true or good = false and width = 'wide'", [1, 3]),
        ("(good = true or good = false) and width = 'wide'", [3]),
        ("not good = true and not good = false", [0, 2, 4]),
        ("not (good = true and width = 1)", [0, 1, 2, 3, 4]),
        ("not not good = true", [1]),
        ("width = 1 and not width = 2", []),
    ],
)
def test_a_filter_chooses_rows(images: sqlite3.Connection, text: str, rows: list[int]) -> None:
    assert chosen(images, text) == rows


TIMES: list[Metadata] = [
    {"at": "2025-12-01T08:30:00+09:00"},
    {"at": "2025-11-30T23:30:00Z"},
    {"at": "2025-11-30T23:30:00.000000001+00:00"},
    {"at": "2025-11-30T18:00-05:00"},
    {"at": "2025-12-01 09:00:00"},
    {"at": "2025-12-01"},
    {"at": "soon"},
    {"at": ["2025-12-02T00:00:00+14:00", 7]},
    {},
]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("at = '2025-11-30T23:30:00Z'", [0, 1]),
        ("at = '2025-12-01T08:30+0900'", [0, 1]),
        ("at != '2025-11-30T23:30:00Z'", [2, 3, 4, 5, 6, 7]),
        ("at < '2025-11-30T23:30:00Z'", [3]),
        ("at <= '2025-11-30T23:30:00.000000001Z'", [0, 1, 2, 3]),
        ("at > '2025-11-30T23:30:00Z'", [2, 4, 5, 7]),
        ("at >= '2025-12-01T00:00:00Z'", [4, 5, 7]),
        ("at in ('2025-11-30T23:30:00Z', 'soon', 7)", [0, 1, 6, 7]),
        ("at > '2025-11-30T23:30:00Z' and at < '2025-12-01T01:00:00Z'", [2, 5]),
        ("at < '2025-12-01'", [1, 2, 3]),
        ("at = '2025-11-31T23:30:00Z'", []),
    ],
)
def test_times_with_a_zone_are_compared_as_instants(text: str, rows: list[int]) -> None:
    """Texts alone, 08:30+09:00 and 23:30Z of the day before would differ, and sort by the clock on the wall."""
    database = open_bitmaps(TIMES, facts_per_bitmap=3)
    assert chosen(database, text) == chosen(database, text, use_bitmaps=True) == rows


def test_a_filter_is_read_as_it_is_meant() -> None:
    both = And((IsIn(field="a", values=(1,)), IsIn(field="b", values=("x",))))
    less = Compare(field="c", operator="<", value=2)
    assert parse_filter("a = 1 and b has 'x' or not (c < 2)") == Or((both, Not(less)))
    assert parse_filter('"AND" is missing') == IsNull(field="AND")
    assert parse_filter('"a""b" like \'%\'') == Like(field='a"b', pattern="%")
    assert parse_filter("größe.x_1>=.5") == Compare(field="größe.x_1", operator=">=", value=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected the name of a field, found its end"),
        ("   ", "column 4: expected the name of a field, found its end"),
        ("width", "column 6: expected one of = != .*, found its end"),
        ("width >=", "column 9: expected a number, true, false or a text in quotes, found its end"),
        ("width === 5", "column 9: expected a number, .* found '='"),
        ("language = 'en\"", r"column 12, .*a text lacks its closing quote"),
        ("language = en", "column 12: expected .* text in quotes, found 'en'"),
        ("width = 5 width = 6", "column 11: expected and, or, or the end, found 'width'"),
        ("(width = 5", r"column 11: expected \), found its end"),
        ("width = 5)", r"column 10: expected and, or, or the end, found '\)'"),
        ("width in 5", r"column 10: expected \(, found '5'"),
        ("width in ()", "column 11: expected a number, .* found"),
        ("width like 5", "column 12: expected a text in quotes, found '5'"),
        ("width is 5", "column 10: expected missing, found '5'"),
        ("width not = 5", "column 11: expected one of = !="),
        ("'width' = 5", "column 1: expected the name of a field, found 'width'"),
        ("and = 5", "column 1: expected the name of a field, which if it is and needs \"quotes\", found 'and'"),
        ("language = 'en", r"column 12, .*lacks its closing quote"),
        ('"language = 5', r"column 1, .*a name or a text lacks its closing quote"),
        ("a = 5; drop table facts", r"column 6, '; drop table facts': names that hold more"),
        ("a-b = 5", "column 2, '-b = 5': names that hold more"),
        ("a = 12abc", "column 5, '12abc'"),
        ("a = 1.2.3", "column 5, '1.2.3'"),
        ("a = 'x\0y'", "character at column 5 or soon after"),
        ("a = '\ud800'", "character at column 5 or soon after"),
        ("(" * 51 + "a = 1" + ")" * 51, "nested more than 50 deep at column 51"),
        ("not " * 5000, "14,000|20,000 characters; at most 10,000"),
        ("not " * 60 + "a = 1", "nested more than 50 deep"),
        (f"a = '{'x' * 1000}'", "column 5 of the filter has 1,000 characters"),
    ],
)
def test_a_malformed_filter_names_the_column(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht > 5", r"'widht' \(column 1 of the filter\); did you mean 'width'\? known: date, exif.iso, good"),
        ("width > 5 and not x.y.z = 1", r"'x.y.z' \(column 19 of the filter\); known: date, exif.iso"),
        ("zzz is missing", "'zzz'"),
        ("language = 5", r"'language' \(column 1 of the filter\) holds texts, and 5 is a number; texts need quotes"),
        ("good = 'true'", r"'good' .* holds numbers, and 'true' is a text; numbers have no quotes"),
        ("good like 't%'", "holds numbers"),
        ("good in (1, 'x')", "'x' is a text"),
        ("good < 'x'", "'x' is a text"),
    ],
)
def test_a_filter_that_fits_no_field_says_which_there_are(images: sqlite3.Connection, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(images, text)


def test_a_filter_cannot_write(images: sqlite3.Connection) -> None:
    before = images.total_changes
    chosen(images, "language = 'x''; DELETE FROM facts; --' or language like '%''; DROP TABLE facts; --'")
    assert images.total_changes == before


def test_the_longest_filter_is_read() -> None:
    values = ",".join(["1"] * ((LONGEST_FILTER - 8) // 2))
    assert chosen(open_facts([{"x": 1}, {"x": 2}]), f"x in ({values})") == [0]


def test_a_field_that_rows_had_once_is_missing_in_all_that_are_left() -> None:
    database = open_facts([{"mark": 1}, {"x": 2}])
    database.execute("DELETE FROM facts WHERE row = 0")
    assert chosen(database, "mark is missing") == [1]
    assert chosen(database, "mark is not missing") == []


def test_a_field_that_is_null_in_every_row_is_missing_in_all() -> None:
    database = open_facts([{"note": None, "captions_x": None}, {"note": None, "x": 2}])
    assert chosen(database, "note is missing") == [0, 1]
    assert chosen(database, "note is missing and x = 2") == [1]
    with pytest.raises(UsageError, match="captions_x"):
        chosen(database, "captions_x is missing")


def test_of_no_rows_every_filter_chooses_none() -> None:
    assert chosen(open_facts([]), "whatever = 'x' or not y is missing") == []


@pytest.mark.parametrize(
    "number", ["9223372036854775808", "18446744073709551615", "-9223372036854775809", "1e19", "9" * 5000]
)
def test_numbers_that_sqlite_would_round_are_refused_instead_of_choosing_their_neighbours(number):
    for test in (f"hash = {number}", f"hash in (1, {number})", f"hash < {number}"):
        with pytest.raises(UsageError, match=r"2\^63"):
            parse_filter(test)
