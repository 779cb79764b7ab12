from collections import Counter

import numpy as np
import pytest
from webdataset.writer import TarWriter

from vlm.data.caption_sampler import CaptionSampler, split_sentences, warn_of_unseen_fields
from vlm.data.pack import encode_pair
from vlm.data.samples import Pair, Sample, parse_captions, parse_tags
from vlm.data.tar import ShardReader
from vlm.errors import BadSample, UsageError


def sample_of(**metadata):
    return Sample(key="k", image=b"", captions=parse_captions(None, metadata), metadata=metadata, arrays={})


def drawn(sample, times=4000, **options):
    rng = np.random.default_rng(0)
    return Counter(
        (c.language, c.number, c.text) for c in (CaptionSampler(**options)(sample, rng) for _ in range(times))
    )


def shares(counts):
    total = sum(counts.values())
    return {key: count / total for key, count in counts.items()}


MANY = {"captions": {"en": ["dog", "hound", "pet"], "de": ["Hund"]}}


def test_a_language_is_drawn_evenly_then_a_caption_of_it():
    found = shares(drawn(sample_of(**MANY), languages=("en", "de")))
    assert found[("de", 3, "Hund")] == pytest.approx(0.5, abs=0.05)
    assert found[("en", 1, "hound")] == pytest.approx(1 / 6, abs=0.05)


def test_without_a_wish_the_first_language_is_taken():
    assert {language for language, _, _ in drawn(sample_of(**MANY), times=50)} == {"en"}


def test_languages_and_captions_are_drawn_by_their_weights():
    weighted = sample_of(**MANY, caption_weights={"en": [6, 3, 1]})
    found = shares(drawn(weighted, languages=("en", "de"), language_weights=(0.9, 0.1)))
    assert found[("de", 3, "Hund")] == pytest.approx(0.1, abs=0.03)
    assert found[("en", 0, "dog")] == pytest.approx(0.54, abs=0.05)
    assert found[("en", 2, "pet")] == pytest.approx(0.09, abs=0.03)


def test_a_named_group_of_captions_is_asked_for_like_a_language():
    mixed = sample_of(captions=["alt text"], captions_synthetic=["a dog"])
    found = drawn(mixed, languages=("en", "synthetic"), language_weights=(0, 1), times=50)
    assert set(found) == {("synthetic", 1, "a dog")}
    assert set(drawn(mixed, languages=("en",), times=50)) == {("en", 0, "alt text")}


def test_tags_are_shown_in_a_drawn_order():
    tagged = sample_of(captions=["a dog"], tags=["dog", "wet"])
    assert set(drawn(tagged, languages=("tags",), times=50)) == {("tags", -1, "dog, wet"), ("tags", -1, "wet, dog")}
    assert parse_tags({"tags": "dog, wet ,"}) == ("dog", "wet")
    assert parse_tags({"tags": 3}) == ()


def test_values_of_fields_are_shown_as_tags():
    sold = sample_of(captions=["a jug"], colour="Blue", made={"year": 2011}, uses=["tea", None, "milk"], new=True)
    sampler = CaptionSampler(languages=("en", "tags"), tag_fields=("colour", "made.year", "uses", "new", "none"))
    assert sampler.tags_of(sold.metadata) == ("Blue", "2011", "tea", "milk")
    both = drawn(sold, languages=("en", "tags"), tag_fields=("colour", "made.year"), times=50)
    assert set(both) == {("en", 0, "a jug"), ("tags", -1, "Blue, 2011"), ("tags", -1, "2011, Blue")}
    # a sample without any of the fields keeps its captions
    assert set(drawn(sold, languages=("en", "tags"), tag_fields=("none",), times=9)) == {("en", 0, "a jug")}
    tagged = sample_of(captions=["a jug"], tags="blue, tea", colour="blue")
    assert sampler.tags_of(tagged.metadata) == ("blue", "tea")
    with pytest.raises(UsageError, match="give --languages en tags"):
        CaptionSampler(languages=("en",), tag_fields=("colour",))


def test_a_number_that_a_table_lacks_is_not_shown():
    sampler = CaptionSampler(languages=("en", "tags"), tag_fields=("year", "sizes"))
    assert sampler.tags_of({"year": float("nan"), "sizes": [1.5, float("inf")]}) == ("1.5",)


def test_a_misspelt_field_is_told(tmp_path, make_image, caplog, monkeypatch):
    shard = tmp_path / "s.tar"
    with TarWriter(str(shard), encoder=False) as tar:
        for number, colour in enumerate(("", "blue")):
            captions = {"en": ("A jug.",)}
            pair = Pair(key=f"{number}", image=make_image(number), captions=captions, metadata={"colour": colour})
            tar.write(encode_pair(pair))
    # of a shard without the field all samples are looked at, but not their images
    monkeypatch.setattr(ShardReader, "read", None)
    warn_of_unseen_fields(("colour",), str(shard))
    assert not caplog.records
    warn_of_unseen_fields(("colour", "color"), str(shard))
    (record,) = caplog.records
    assert "has a text or number in the field 'color', which --tag-fields names" in record.message
    assert "its fields are " in record.message
    assert "colour" in record.message.split("its fields are")[1]


def test_a_long_caption_is_shown_a_sentence_at_a_time():
    long = sample_of(captions=["A dog runs. It is wet! 狗在跑。水很冷。"])
    found = {text for _, _, text in drawn(long, sentences=True, times=200)}
    assert found == {"A dog runs.", "It is wet!", "狗在跑。", "水很冷。"}
    assert split_sentences("no end mark") == ["no end mark"]
    assert split_sentences("a 3.5 inch disk.") == ["a 3.5 inch disk."]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("你好！再见？好。", ["你好！", "再见？", "好。"]),
        ("真的？！是。。。 对", ["真的？！", "是。。。", "对"]),
        ("Wow!!! Great?! Yes...", ["Wow!!!", "Great?!", "Yes..."]),
        ("click here?x=1 now!important", ["click here?x=1 now!important"]),
        ("Dr. Smith", ["Dr.", "Smith"]),
    ],
)
def test_sentences_end_with_all_their_marks(text, sentences):
    assert split_sentences(text) == sentences


def test_sentences_are_those_of_all_captions_in_the_languages_asked_for_each_once():
    sample = sample_of(
        captions={"en": ["A dog runs. It is wet!", "It is wet! Look."], "de": ["Ein Hund."], "zh": ["狗。"]},
        tags=["wet"],
    )
    english = ["A dog runs.", "It is wet!", "Look."]
    assert CaptionSampler().sentences_of(sample) == english
    assert CaptionSampler(languages=("de", "tags", "en")).sentences_of(sample) == ["Ein Hund.", *english]
    weighted = CaptionSampler(languages=("en", "zh"), language_weights=(0, 1))
    assert weighted.sentences_of(sample) == ["狗。"]
    assert CaptionSampler(languages=("tags",)).sentences_of(sample) == []
    assert CaptionSampler(languages=("tags", "fr")).sentences_of(sample) == []


@pytest.mark.parametrize(
    "weights", [[1], [0, 0, 0], [1, -1, 1], "much", ["a", "b", "c"], [1, 2, float("inf")], [10**400, 1, 1]]
)
def test_weights_that_do_not_fit_make_a_bad_sample(weights):
    with pytest.raises(BadSample, match="bad caption weights"):
        drawn(sample_of(captions=["a", "b", "c"], caption_weights=weights), times=1)


def test_no_caption_in_the_languages_asked_makes_a_bad_sample():
    with pytest.raises(BadSample, match="no caption"):
        drawn(sample_of(**MANY), languages=("fr",))
    with pytest.raises(BadSample, match="weight 0"):
        drawn(sample_of(captions={"de": ["Hund"]}), languages=("en", "de"), language_weights=(1, 0))


@pytest.mark.parametrize("weights", [(1,), (0, 0), (2, -1), (float("nan"), 1), (float("inf"), 1)])
def test_language_weights_that_cannot_work_are_refused(weights):
    with pytest.raises(UsageError, match="language_weights"):
        CaptionSampler(languages=("en", "de"), language_weights=weights)
