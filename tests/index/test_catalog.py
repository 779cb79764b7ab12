import contextlib
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.index.origin_fixture import make_origin
from vlm.data.samples import Captions
from vlm.errors import VlmError
from vlm.index.catalog import Catalogue, copy_catalogue, roll_back_catalogue, update_catalogue, write_catalogue
from vlm.index.embeddings_folder import Origin


def origin(number: int, captions: Captions, *, uid: str = "") -> Origin:
    return Origin(
        uid=uid or f"u{number}",
        key=f"k{number}",
        shard=f"/shards/{number % 2}.tar",
        number=number,
        image_offset=512 * number,
        image_size=100,
        caption_number=None,
        captions=captions,
        metadata={"number": number, "tags": ["a"]},
    )


CAPTIONS: list[Captions] = [
    {"": ("A dog runs through water", "wet dog")},
    {"": ("two cats",), "zh": ("一只狗在水中奔跑",)},
    {"de": ("Ein Hündchen läuft",)},
    {},
    {"": ("a dog", "a dog", "the dog and a cat")},
    {"pl": ("Łódź, ulica",), "de": ("Eine Straße bei Nacht",), "da": ("Smørrebrød på bordet",)},
    {"ja": ("東京タワーの夜景", "ﾃﾚﾋﾞを見る人々")},
    {"ko": ("강아지가 달린다",), "": ("ＦＵＬＬ width ﬁsh",), "th": ("หมาวิ่งบนชายหาด",)},
]


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    write_catalogue(tmp_path / "c.sqlite", enumerate(origin(n, captions) for n, captions in enumerate(CAPTIONS)))
    return Catalogue(tmp_path / "c.sqlite")


def test_entries_are_the_origins_in_the_order_asked(catalogue: Catalogue) -> None:
    entries = catalogue.entries([3, 0, 3])
    assert [entry.row for entry in entries] == [3, 0, 3]
    assert asdict(entries[1]) == asdict(origin(0, CAPTIONS[0])) | {"row": 0}
    assert len(catalogue) == len(CAPTIONS)


def test_an_entry_is_found_by_its_uid(catalogue: Catalogue) -> None:
    found = catalogue.find("u2")
    assert found is not None
    assert found.row == 2
    assert catalogue.find("nobody") is None


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("dog", [4, 0]),
        ("DOG water", [0]),
        ("dog cat", [4]),
        ("Hundchen", [2]),
        ("狗", [1]),
        ("水中", [1]),
        ("中水", []),
        ("dog !", [4, 0]),
        ("lodz", [5]),
        ("ŁÓDŹ", [5]),
        ("strasse", [5]),
        ("STRASSE Nacht", [5]),
        ("straße", [5]),
        ("smorrebrod", [5]),
        ("smørrebrød", [5]),
        ("夜", [6]),
        ("夜景", [6]),
        ("タワー", [6]),
        ("テレビ", [6]),
        ("人々", [6]),
        ("京東", []),
        ("강아지", [7]),
        ("fish full", [7]),
        ("หมา", [7]),
        ("＂dog＂", [4, 0]),
        ('dog" OR "cats', []),
        ("cats NOT dog", []),
        ("text:dog", []),
        ("", []),
        ('" *', []),
        ("dog\0", [4, 0]),
        ("\ud800 dog", [4, 0]),
        ("\0", []),
    ],
)
def test_words_find_the_captions_that_hold_all_of_them(catalogue: Catalogue, words: str, rows: list[int]) -> None:
    assert [entry.row for entry in catalogue.search_text(words, 10)] == rows


@pytest.fixture
def unfolded(tmp_path: Path) -> Path:
    """A catalogue as versions before the folding of words wrote it."""
    path = tmp_path / "old.sqlite"
    write_catalogue(path, [])
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 0")
    update_catalogue(
        path,
        generation=1,
        inserted=((n, origin(n, captions)) for n, captions in enumerate(CAPTIONS)),
        deleted=np.zeros(0, np.int64),
    )
    return path


def test_a_catalogue_of_before_finds_its_words_as_before_until_it_is_compacted(tmp_path: Path, unfolded: Path) -> None:
    old = Catalogue(unfolded)
    for words, rows in {"dog": [4, 0], "水中": [1], "Łódź": [5], "łodz": [5], "straße": [5], "夜景": [6]}.items():
        assert [entry.row for entry in old.search_text(words, 10)] == rows
    for words in ("lodz", "strasse"):
        assert old.search_text(words, 10) == []
    copy_catalogue(unfolded, tmp_path / "new.sqlite", old.rows(), seen=1, generation=2)
    new = Catalogue(tmp_path / "new.sqlite", 2)
    for words in ("lodz", "strasse", "straße"):
        assert [entry.row for entry in new.search_text(words, 10)] == [5]


def test_no_more_entries_are_given_than_asked_for(catalogue: Catalogue) -> None:
    assert len(catalogue.search_text("dog", 1)) == 1


def test_two_origins_with_one_uid_are_refused(tmp_path: Path) -> None:
    twice = [origin(0, {}, uid="same"), origin(1, {}, uid="same")]
    with pytest.raises(VlmError, match="same uid"):
        write_catalogue(tmp_path / "c.sqlite", enumerate(twice))


def test_a_file_that_is_no_catalogue_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"rubbish" * 1000)
    with pytest.raises(VlmError, match=r"c\.sqlite cannot be read"):
        len(Catalogue(path))
    with pytest.raises(VlmError, match="cannot be read"):
        Catalogue(tmp_path / "none.sqlite")


@pytest.fixture
def changed(tmp_path: Path) -> Catalogue:
    """Generation 2 of a catalogue with rows born and dead, before it and after it, and some taken back."""
    path, nobody = tmp_path / "changed.sqlite", np.zeros(0, np.int64)
    write_catalogue(path, enumerate(origin(n, captions) for n, captions in enumerate(CAPTIONS[:5])))
    again = origin(1, CAPTIONS[4], uid="u1")
    update_catalogue(path, generation=2, inserted=[(5, again), (6, origin(6, CAPTIONS[0]))], deleted=np.array([1, 3]))
    update_catalogue(path, generation=3, inserted=[(7, origin(7, {}))], deleted=np.array([0]))
    roll_back_catalogue(path, generation=2)
    update_catalogue(path, generation=3, inserted=[(8, origin(8, {}))], deleted=nobody)
    return Catalogue(path, 2)


def test_a_copy_is_what_writing_its_living_rows_gives(tmp_path: Path, changed: Catalogue) -> None:
    rows = changed.rows()
    assert rows.tolist() == [0, 2, 4, 5, 6]
    copy_catalogue(changed.path, tmp_path / "copy.sqlite", rows, seen=2, generation=3)
    write_catalogue(tmp_path / "new.sqlite", ((entry.row, entry) for entry in changed.entries(rows.tolist())))
    copy, new = Catalogue(tmp_path / "copy.sqlite", 3), Catalogue(tmp_path / "new.sqlite")
    assert copy.entries(copy.rows().tolist()) == new.entries(new.rows().tolist())
    assert copy.metadata_fields(rows.tolist()) == new.metadata_fields(rows.tolist())
    assert list(copy.faults()) == []
    assert len(copy) == 5
    assert copy.count_hidden() == 0
    assert len(copy.at(2)) == 0
    for words in ("dog", "狗", "cat", "nobody"):
        assert copy.search_text(words, 10) == new.search_text(words, 10)
    update_catalogue(copy.path, generation=4, inserted=[(9, origin(9, {}))], deleted=np.array([0]))
    assert copy.at(4).rows().tolist() == [2, 4, 5, 6, 9]


def test_a_copy_of_other_rows_than_the_segments_have_is_refused(tmp_path: Path, changed: Catalogue) -> None:
    with pytest.raises(VlmError, match="different rows"):
        copy_catalogue(changed.path, tmp_path / "copy.sqlite", np.array([0, 2, 4, 5]), seen=2, generation=3)


THREADS = """
import sys, threading
from pathlib import Path
from vlm.index.catalog import Catalogue
from vlm.index.filter_language import parse_filter
catalogue = Catalogue(Path(sys.argv[1]))
filters = ["t > '2024-05-01T00:00Z'", "s in ('w1', 'w2')", "s != 'w1' and t > '2024-09-01T00:00Z'"]
expected = [len(catalogue.where(parse_filter(text))) for text in filters]
answers = []
def ask(first):
    for number in range(first, first + 40):
        answers.append(len(catalogue.where(parse_filter(filters[number % 3]))) == expected[number % 3])
threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(answers), all(answers))
"""


def test_filters_with_times_answer_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.sqlite"
    origins = []
    for number in range(1_000):
        time = f"2024-{number % 12 + 1:02}-{number % 28 + 1:02}T{number % 24:02}:00:00+09:00"
        origins.append((number, make_origin(f"u{number}", {"t": time, "s": f"w{number % 7}"})))
    write_catalogue(path, origins)
    # in a process of its own: threads that wait for each other's locks cannot be ended
    command = [sys.executable, "-c", THREADS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["160", "True"]
