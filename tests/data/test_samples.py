import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.pack import captions_to_json
from vlm.data.samples import SampleRng, parse_captions, parse_words, select_languages, shuffled
from vlm.errors import BadSample

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4))
def test_metadata_is_what_pythons_reader_makes_of_it(metadata):
    text = json.dumps(metadata, ensure_ascii=False)
    assert repr(parse_words(b"", text.encode(errors="replace"), "")[1]) == repr(json.loads(text))


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 18446744073709551616, "b": -9223372036854775809, "c": 9007199254740993, "d": -0, "e": -0.0}',
        b'{"a": NaN, "b": -Infinity, "c": 1e400, "d": 1e-400, "e": 1E5, "f": 2.2250738585072011e-308}',
        b'{"a": 1, "a": "\\ud83d\\ude00\\u0000\\/", "\\u0061": 2}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "\u72d7"}'.encode("utf-16"),
        b' \n{"a": ["\x7f"]}\t\r ',
        b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}",
    ],
)
def test_unusual_json_is_what_pythons_reader_makes_of_it(content):
    assert repr(parse_words(b"", content, "")[1]) == repr(json.loads(content))


@pytest.mark.parametrize("content", [b"[1]", b"{", b'{"a": 1} x', b'{"a": "\t"}', b'{"a": "\xff"}', b"[" * 9999, b""])
def test_what_is_no_json_object_is_a_bad_sample(content):
    with pytest.raises(BadSample, match="unreadable json"):
        parse_words(b"", content, "")


@pytest.mark.parametrize(
    ("text", "metadata", "captions"),
    [
        ("a dog", {}, {"": ("a dog",)}),
        ("a dog", {"captions": ["one", " two ", "", 3]}, {"": ("one", "two")}),
        (None, {"captions": ["a dog"], "captions_zh": ["狗"]}, {"": ("a dog",), "zh": ("狗",)}),
        ("a dog", {"captions": {"en": "dog", "de": ["Hund"], "fr": []}}, {"en": ("dog",), "de": ("Hund",)}),
        (None, {"caption": "from img2dataset"}, {"": ("from img2dataset",)}),
        ("a dog", {"captions": {}}, {"": ("a dog",)}),
        ("a dog", {"captions": {"en": [], "de": None}, "captions_zh": ["狗"]}, {"": ("a dog",), "zh": ("狗",)}),
        ("", {"captions": {"en": []}, "caption": "a dog"}, {"": ("a dog",)}),
        ("", {"caption": None}, {}),
        (None, {"captions": 7}, {}),
    ],
)
def test_captions_are_found_where_others_put_them(text, metadata, captions):
    assert parse_captions(text, metadata) == captions


texts = st.text(min_size=1).map(str.strip).filter(bool)
languages = st.sampled_from(["", "en", "de", "zh"])


@given(st.dictionaries(languages, st.lists(texts, min_size=1).map(tuple), min_size=1))
def test_written_captions_are_read_back(captions):
    assert parse_captions("ignored", captions_to_json(captions)) == captions


def test_languages_are_selected_in_the_order_asked_for():
    captions = {"en": ("dog",), "de": ("Hund",), "zh": ("狗",)}
    assert select_languages(captions, ()) == {"en": ("dog",)}
    assert list(select_languages(captions, ("zh", "en"))) == ["zh", "en"]
    assert select_languages({"": ("dog",)}, ("en", "de")) == {"en": ("dog",)}
    with pytest.raises(BadSample, match=r"languages requested \('fr',\)"):
        select_languages(captions, ("fr",))


def test_chance_depends_on_seed_epoch_key_repeat_and_purpose():
    visits = [(1, 2, "key"), (2, 2, "key"), (1, 3, "key"), (1, 2, "kez"), (1, 2, "key", 1), (1, 2, "key", 0, "local")]
    numbers = [[chance.random() for _ in range(20)] for chance in [SampleRng(*visit) for visit in visits]]
    assert len({number for some in numbers for number in some}) == 20 * len(visits)
    again = SampleRng(1, 2, "key")
    assert [again.random() for _ in range(20)] == numbers[0]


def test_chance_is_even_over_samples_and_over_draws():
    chances = [SampleRng(0, 0, str(number)) for number in range(3000)]
    by_sample = np.array([[chance.random() for _ in range(12)] for chance in chances])
    assert by_sample.min() >= 0
    assert by_sample.max() < 1
    counts = np.apply_along_axis(lambda column: np.histogram(column, 10, (0, 1))[0], 0, by_sample)
    # 9 degrees of freedom: past 33.7 once in ten thousand
    assert (((counts - 300) ** 2 / 300).sum(axis=0) < 33.7).all()
    assert np.abs(np.corrcoef(by_sample.T) - np.eye(12)).max() < 0.08


def test_any_order_comes_out_of_shuffling_equally_often():
    orders = Counter(tuple(shuffled("abc", SampleRng(0, 0, str(number)))) for number in range(6000))
    assert set(map("".join, orders)) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert all(850 < count < 1150 for count in orders.values())
    two = Counter(tuple(shuffled("abc", SampleRng(0, 0, str(number)), 2)) for number in range(6000))
    assert len(two) == 6
    assert all(850 < count < 1150 for count in two.values())
    assert sorted(shuffled("abc", SampleRng(0, 0, "k"), 9)) == ["a", "b", "c"]
    assert shuffled((), SampleRng(0, 0, "k"), 2) == []
