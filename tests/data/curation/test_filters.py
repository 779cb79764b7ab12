import numpy as np
import pytest

from vlm.data.curation.caption_filters import script_share
from vlm.data.curation.filter import parse_filter
from vlm.data.curation.pipeline import FILTERS
from vlm.errors import UsageError


def captioned(*captions):
    return [{"captions": list(texts) if isinstance(texts, tuple) else texts} for texts in captions]


def test_size_looks_at_the_shorter_side_for_min_and_the_longer_for_max(make_shard, make_image, times_by):
    sizes = [(40, 30), (30, 40), (30, 29), (100, 30)]
    shard = make_shard([{"image": make_image(n, size=size)} for n, size in enumerate(sizes)])
    assert times_by(shard, "size:min=30") == [1, 1, 0, 1]
    assert times_by(shard, "size:min=30,max=40") == [1, 1, 0, 0]


def test_aspect_drops_the_long_and_narrow(make_shard, make_image, times_by):
    shard = make_shard([{"image": make_image(n, size=size)} for n, size in enumerate([(90, 30), (30, 91), (30, 30)])])
    assert times_by(shard, "aspect:max=3") == [1, 0, 1]


def test_words_count_characters_where_there_are_no_spaces(make_shard, times_by):
    shard = make_shard(
        captioned(("a red dog",), ("dog",), {"zh": ["一只红狗"]}, ("dog", "two dogs"), ("a b c d e f",), ())
    )
    assert times_by(shard, "words:min=2,max=5") == [1, 0, 1, 1, 0, 0]
    assert times_by(shard, "words:min=2,max=5,of=all") == [1, 0, 1, 0, 0, 0]
    assert times_by(shard, "words:min=2,languages=zh") == [0, 0, 1, 0, 0, 0]


def test_characters_are_counted_not_bytes(make_shard, times_by):
    shard = make_shard(captioned(("äöü",), ("abcd",), {"zh": ["狗"]}))
    assert times_by(shard, "characters:min=2,max=3") == [1, 0, 0]


def test_a_language_is_believed_only_in_its_script(make_shard, times_by):
    shard = make_shard(
        captioned(
            {"en": ["a dog"]},
            {"en": ["собака"]},
            {"de": ["ein Hund"]},
            {"zh": ["狗"]},
            ("a cat",),
            {"xx": ["?"]},
            {"en": ["7"]},
        )
    )
    assert times_by(shard, "language:any=en+zh") == [1, 0, 0, 1, 1, 0, 1]
    assert times_by(shard, "language:any=en,script=0") == [1, 1, 0, 0, 1, 0, 1]
    assert script_share("собака dog", ("LATIN",)) == pytest.approx(3 / 9)


def test_no_caption_is_kept_more_often_than_asked(make_shard, times_by):
    shard = make_shard(captioned(*[("A  dog",), ("a dog", "my dog")] * 10, ("a cat",)))
    times = np.array(times_by(shard, "repeated-caption:max=3"))
    assert times[:20].sum() == 3
    assert times[20] == 1
    assert times_by(shard, "repeated-caption:max=3", seed=1) != times.tolist()
    assert times_by(shard, "repeated-caption:max=3") == times.tolist()


def test_what_a_file_of_keys_names_is_kept(make_shard, times_by, tmp_path):
    first = make_shard([{"key": "a"}, {"key": "b@c"}, {"key": "d e"}], name="x/0.tar")
    second = make_shard([{"key": "a"}, {"key": "f"}, {"key": "f"}], name="y/0.tar")
    keys = tmp_path / "keys, of mine.txt"

    def kept(text):
        keys.write_text(text, encoding="utf-8")
        return times_by([first, second], f"listed:keys={keys}")

    assert kept("b@c\nd e\nnobody\n") == [0, 1, 1, 0, 0, 0]
    assert kept("a\n") == [1, 0, 0, 1, 0, 0]
    # as an index names samples that share a key
    assert kept("a@y/0\n") == [0, 0, 0, 1, 0, 0]
    assert kept("f@y/0:2") == [0, 0, 0, 0, 0, 1]
    with pytest.raises(UsageError, match="None of the 1 keys of"):
        kept("nobody\n")
    with pytest.raises(UsageError, match="nowhere"):
        times_by(first, f"listed:keys={tmp_path / 'nowhere'}")


def test_exact_duplicates_keep_the_first(make_shard, make_image, times_by):
    images = [make_image(number) for number in (0, 1, 0, 2, 1, 0)]
    shard = make_shard([{"image": image} for image in images])
    assert times_by(shard, "exact-duplicates") == [1, 1, 0, 1, 0, 0]


def test_near_duplicates_keep_the_largest(make_shard, make_image, apply):
    small, large = (160, 120), (320, 240)
    images = [make_image(0, size=small), make_image(0, size=large), make_image(1, size=small)]
    images.append(make_image(0, size=small, kind="PNG"))
    curated = apply(make_shard([{"image": image} for image in images]), "near-duplicates")
    assert curated.selection.times[0].tolist() == [0, 1, 1, 0]
    result = curated.steps[0].result
    assert result.duplicates_of is not None
    assert result.duplicates_of.tolist() == [1, -1, -1, 1]
    assert result.why(0) == "the same image as s00001"
    assert (result.record["groups"], result.record["largest_group"]) == (1, 3)


def test_a_share_is_drawn_and_a_weight_repeats(make_shard, make_image, times_by):
    shard = make_shard([{"image": make_image(0)}] * 400)
    drawn = times_by(shard, "sample:share=0.25")
    assert set(drawn) == {0, 1}
    assert 65 <= sum(drawn) <= 135
    assert times_by(shard, "weight:times=2") == [2] * 400
    assert times_by(shard, "weight:times=2", "weight:times=3") == [6] * 400


def test_decontamination_drops_what_the_evaluation_set_holds(make_shard, make_image, apply):
    train = make_shard(
        [
            {"image": make_image(0, size=(160, 120))},
            {"image": make_image(1, size=(320, 240))},
            {"image": make_image(2)},
        ]
    )
    held = make_shard([{"image": make_image(n, size=(160, 120))} for n in (0, 1, 3)], name="val.tar")
    curated = apply(train, f"decontaminate:against={held}")
    assert curated.selection.times[0].tolist() == [0, 0, 1]
    record = curated.steps[0].result.record
    assert (record["same_files"], record["same_pictures"], record["same_embeddings"]) == (1, 1, 0)


def test_usable_finds_what_only_decoding_shows(make_shard, make_image, apply):
    whole = make_image(0, size=(200, 200))
    shard = make_shard([{"image": whole}, {"image": whole[: len(whole) // 2]}, {"image": b"no image"}])
    assert apply(shard, "size:min=10").corrupt == {"unreadable image": 1}
    curated = apply(shard, "usable")
    assert curated.selection.times[0].tolist() == [1, 0, 0]
    assert curated.selection.lineage[0]["corrupt"] == {"unreadable image": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("siz:min=2", "did you mean 'size'"),
        ("size:mim=2", "did you mean 'min'"),
        ("size:min=x", "valid integer.*size:min=…,max=…"),
        ("size:min=0", "greater than or equal to 1"),
        ("size", "min=… or max=…"),
        ("size:min=9,max=3", "no image fits"),
        ("size:min", "lacks a value"),
        ("sample:share=1.5", "less than or equal to 1"),
        ("balance:cap=3", "concepts"),
        ("similarity:min=0.2,top=0.3", "give one"),
        ("similarity:min=nan", "finite number"),
        ("near:min=inf", "finite number"),
        ("size:min=10,min=5000", "gives min= twice; give it once"),
        ("language:any=", "no language"),
        ("near-duplicates:distance=16", "less than or equal to 15"),
    ],
)
def test_a_rule_given_wrongly_is_refused_with_the_cure(text, expected):
    with pytest.raises(UsageError, match=f"(?s){expected}"):
        parse_filter(text, FILTERS)


def test_a_rule_is_shown_as_it_was_written():
    assert parse_filter("language:any=en+de", FILTERS).shown() == "language:any=en+de,script=0.5"
    assert parse_filter("decontaminate:against={a,b}.tar,distance=4", FILTERS).parameters.against == "{a,b}.tar"
