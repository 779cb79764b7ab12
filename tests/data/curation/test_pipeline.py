import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm.data.curation.pipeline import render_curation_report
from vlm.data.curation.sample_table import RequiredColumn, scan
from vlm.data.selection import intersect_selections, read_selection, subtract_selection, write_selection
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, VlmError

ALL_RULES = (
    "size:min=8",
    "words:min=2",
    "language:any=en",
    "exact-duplicates",
    "near-duplicates",
    "repeated-caption:max=2",
    "sample:share=0.6",
    "weight:times=1.5",
)


@pytest.fixture(scope="module")
def shards(scene_shards):
    return expand_shards(str(scene_shards / "train"))


def test_rules_go_one_after_the_other_and_tell_what_they_did(make_shard, make_image, apply):
    image = make_image(0)
    shard = make_shard([{"image": image}, {"image": image, "captions": ["a dog"]}, {"image": b"x"}, {}])
    first = apply(shard, "exact-duplicates", "words:min=2")
    assert first.selection.times[0].tolist() == [0, 0, 0, 0]
    other = apply(shard, "words:min=2", "exact-duplicates")
    assert other.selection.times[0].tolist() == [0, 1, 0, 0]
    begin, words, duplicates = other.selection.lineage
    assert begin == {"step": "curate", "seed": 0, "samples": 4, "corrupt": {"unreadable image": 1}}
    assert (words["rule"], words["before"], words["kept"], words["visits"]) == ("words", 3, 1, 1)
    assert words["parameters"] == {"min": 2, "max": None, "languages": [], "of": "any"}
    assert (duplicates["rule"], duplicates["before"], duplicates["kept"]) == ("exact-duplicates", 1, 1)


def test_the_same_seed_gives_the_same_selection_whatever_the_workers(shards, apply):
    alone = apply(shards, *ALL_RULES, seed=3)
    again = apply(shards, *ALL_RULES, seed=3, workers=2)
    assert again.selection.fingerprint == alone.selection.fingerprint
    assert again.selection.lineage == alone.selection.lineage
    assert apply(shards, *ALL_RULES, seed=4).selection.fingerprint != alone.selection.fingerprint


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(filters=st.lists(st.sampled_from(ALL_RULES), max_size=4), seed=st.integers(0, 3))
def test_times_multiply_and_counts_agree_for_any_rules(filters, seed, shards, apply):
    curated = apply(shards, *filters, seed=seed)
    before = 96
    for step in curated.steps:
        assert step.before == before
        assert step.kept <= step.before
        assert step.visits >= step.kept
        before = step.kept
    assert curated.selection.kept == before
    assert [len(times) for times in curated.selection.times] == [40, 40, 16]
    assert curated.selection.fingerprint == apply(shards, *filters, seed=seed).selection.fingerprint


def test_curated_selections_are_written_and_compose(tmp_path, shards, apply):
    one, other = apply(shards, "sample:share=0.5").selection, apply(shards, "sample:share=0.5", seed=1).selection
    write_selection(tmp_path / "one.selection", one)
    one = read_selection(tmp_path / "one.selection")
    assert intersect_selections(one, other).kept + subtract_selection(one, other).kept == one.kept
    assert [step["step"] for step in intersect_selections(one, other).lineage] == ["curate", "rule", "and"]


def test_the_scan_finds_out_only_what_is_asked(shards):
    assert scan(shards, []).table.column_names == ["key", "reason", "bytes"]
    sample_table = scan(shards, [RequiredColumn.CAPTIONS, RequiredColumn.SIZE])
    assert set(sample_table.table.column_names) == {"key", "reason", "bytes", "captions", "width", "height"}
    assert sample_table.where(41) == (shards[1], 1)
    assert (sample_table.areas == 32 * 32).all()
    positions, languages, texts = sample_table.captions(["de"])
    assert set(languages.to_pylist()) == {"de"}
    assert len(positions) == len(texts) > 0
    assert positions.max() > 80
    assert (positions[1:] >= positions[:-1]).all()


def test_a_cut_tar_and_a_tar_given_twice_are_refused(tmp_path, make_shard, apply):
    shard = make_shard([{}, {}])
    copy = tmp_path / "b.tar"
    copy.write_bytes((tmp_path / "a.tar").read_bytes())
    with pytest.raises(UsageError, match=r"same keys and sizes, so they count as the same tar.*curate each alone"):
        apply([shard, str(copy)], "exact-duplicates")
    copy.write_bytes(copy.read_bytes()[:3000])
    with pytest.raises(VlmError, match="damaged"):
        apply(str(copy))


def test_the_page_shows_what_was_dropped_and_why(make_shard, make_image, apply):
    samples = [{"image": make_image(0), "captions": ["<b>a dog"]}] * 2 + [{"image": b"x"}]
    page = render_curation_report(apply(make_shard(samples), "words:min=1", "exact-duplicates"), title="a & b")
    assert "a &amp; b" in page
    assert "&lt;b&gt;a dog" in page
    assert "Nothing was dropped." in page
    assert "the same file as s00000" in page
    assert "scan: 1 unreadable image" in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
