import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.encode import written_captions
from vlm.data.samples import captions_of, sample_rng, select_languages
from vlm.errors import BadSample


@pytest.mark.parametrize(
    ("text", "metadata", "captions"),
    [
        ("a dog", {}, {"": ("a dog",)}),
        ("a dog", {"captions": ["one", " two ", "", 3]}, {"": ("one", "two")}),
        (None, {"captions": ["a dog"], "captions_zh": ["狗"]}, {"": ("a dog",), "zh": ("狗",)}),
        ("a dog", {"captions": {"en": "dog", "de": ["Hund"], "fr": []}}, {"en": ("dog",), "de": ("Hund",)}),
        (None, {"caption": "from img2dataset"}, {"": ("from img2dataset",)}),
        ("", {"caption": None}, {}),
        (None, {"captions": 7}, {}),
    ],
)
def test_captions_are_found_where_others_put_them(text, metadata, captions):
    assert captions_of(text, metadata) == captions


texts = st.text(min_size=1).map(str.strip).filter(bool)
languages = st.sampled_from(["", "en", "de", "zh"])


@given(st.dictionaries(languages, st.lists(texts, min_size=1).map(tuple), min_size=1))
def test_written_captions_are_read_back(captions):
    assert captions_of("ignored", written_captions(captions)) == captions


def test_languages_are_selected_in_the_order_asked_for():
    captions = {"en": ("dog",), "de": ("Hund",), "zh": ("狗",)}
    assert select_languages(captions, ()) == {"en": ("dog",)}
    assert list(select_languages(captions, ("zh", "en"))) == ["zh", "en"]
    assert select_languages({"": ("dog",)}, ("en", "de")) == {"en": ("dog",)}
    with pytest.raises(BadSample, match=r"languages asked \('fr',\)"):
        select_languages(captions, ("fr",))


def test_chance_depends_on_seed_epoch_and_key():
    first = sample_rng(1, 2, "key").integers(1 << 60)
    assert sample_rng(1, 2, "key").integers(1 << 60) == first
    others = [sample_rng(2, 2, "key"), sample_rng(1, 3, "key"), sample_rng(1, 2, "kez"), sample_rng(1, 2, "key", 1)]
    assert first not in [rng.integers(1 << 60) for rng in others]
