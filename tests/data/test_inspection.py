import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.data.tar_fixture import tiny_image
from vlm.data.dedup import DigestList
from vlm.data.inspection.findings import contact_sheet, distribution_of_counts, log_distribution
from vlm.data.inspection.inspection import inspect_shards
from vlm.data.inspection.statistics import BoundedCounter, image_traits, metadata_columns, token_lengths
from vlm.data.pack import encode_pair
from vlm.data.samples import Pair
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError
from vlm.files import content_digest
from vlm.pages import format_aspect


@pytest.fixture
def shards(tmp_path, make_image):
    """Two whole shards of ten, with one key, one picture and three captions twice, and three corrupt samples."""
    from webdataset.writer import TarWriter

    for shard in range(2):
        with TarWriter(str(tmp_path / f"{shard}.tar"), encoder=False, mtime=0) as tar:
            for number in range(10):
                place = shard * 10 + number
                captions = {"en": (f"caption number {place % 17}", "two words"), "zh": ("一只狗",)}
                pair = Pair(key=f"k{place}", image=make_image(place, size=(30 + place, 20)), captions=captions)
                sample = encode_pair(pair)
                if place == 3:
                    sample["jpg"] = sample["jpg"][:200]
                if place == 4:
                    del sample["jpg"]
                if place == 12:
                    sample["json"] = b"{"
                if place == 15:
                    sample["jpg"] = encode_pair(Pair(key="", image=make_image(14, size=(44, 20)), captions=captions))[
                        "jpg"
                    ]
                if place == 18:
                    sample["__key__"] = "k0"
                tar.write(sample)
    return [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]


def test_everything_is_counted_and_the_corrupt_are_named(shards):
    found = inspect_shards(shards)
    assert (found.shards, found.samples, found.looked_at) == (2, 20, 20)
    assert [(bad.shard, bad.key, bad.reason) for bad in found.corrupt] == [
        (shards[0], "k3", "unreadable image"),
        (shards[0], "k4", "no image"),
        (shards[1], "k12", "unreadable json"),
    ]
    assert found.unusable == 3
    assert found.reasons == {"unreadable image": 1, "no image": 1, "unreadable json": 1}
    assert (found.duplicate_pictures, found.duplicate_keys) == (1, 1)
    assert found.formats == {"JPEG": 17}
    assert found.widths is not None
    assert (found.widths.least, found.widths.most, sum(found.widths.counts)) == (30, 49, 17)
    assert set(found.languages) == {"en", "zh"}
    assert found.languages["en"].per_picture.median == 2
    assert found.languages["en"].words.most == 3
    assert found.languages["zh"].characters.median == 3
    assert found.repeated_captions["two words"] == 18
    assert json.loads(json.dumps(found.to_json()))["samples"] == 20


def test_a_damaged_shard_is_reported_and_the_others_are_read(shards, tmp_path):
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.tar").write_bytes(b"this was never a tar" * 100)
    found = inspect_shards([*shards, str(tmp_path / "2.tar"), str(tmp_path / "none.tar")])
    assert [(bad.shard, bad.reason) for bad in found.damaged] == [
        (shards[0], "ends early"),
        (str(tmp_path / "2.tar"), "unreadable"),
        (str(tmp_path / "none.tar"), "unreadable"),
    ]
    assert 10 < found.samples < 20
    assert found.shards == 4


def test_a_part_is_looked_at_evenly(shards):
    found = inspect_shards(shards, sample=5, images=2)
    assert (found.samples, found.looked_at, len(found.shown)) == (20, 5, 2)
    assert found.shown[0].key == "k0"


def test_a_bad_sample_is_named_with_its_place_in_the_tar(shards):
    with tarfile.open(shards[0]) as tar:
        begins = {entry.name.partition(".")[0]: entry.offset_data for entry in reversed(tar.getmembers())}
    found = inspect_shards(shards)
    assert {bad.key: bad.offset for bad in found.corrupt[:2]} == {"k3": begins["k3"], "k4": begins["k4"]}


def test_any_number_of_processes_finds_the_same(shards, scene_tokenizer):
    alone = inspect_shards(shards, tokenizer=str(scene_tokenizer))
    assert inspect_shards(shards, tokenizer=str(scene_tokenizer), workers=2) == alone


def test_a_selection_says_what_is_looked_at(shards):
    from tests.data.selection_fixture import select_all

    whole = select_all(shards)
    times = tuple(np.where(np.arange(10) % 2, 3, 0).astype(np.uint16) for _ in shards)
    found = inspect_shards(shards, selection=replace(whole, times=times))
    assert (found.samples, found.selected, found.looked_at) == (20, 10, 10)
    assert [bad.key for bad in found.corrupt] == ["k3"]
    assert "the selection keeps 10" in contact_sheet(found, title="some")


def test_tokens_are_counted_uncut_and_those_over_the_context_told(shards, scene_tokenizer):
    tokenizer = open_tokenizer(str(scene_tokenizer), 512)
    expected = [
        token_lengths(tokenizer, [f"caption number {place % 17}"])[0] for place in range(20) if place not in (4, 12)
    ]
    found = inspect_shards(shards, tokenizer=str(scene_tokenizer), context_length=min(expected))
    english = found.languages["en"]
    assert english.tokens is not None
    assert english.tokens.most == max(expected)
    assert english.cut == sum(length > min(expected) for length in expected)
    assert found.context_length == min(expected)
    assert "Tokens" in contact_sheet(found, title="tokens")
    assert inspect_shards(shards).languages["en"].tokens is None


def test_token_lengths_count_start_and_end(scene_tokenizer):
    tokenizer = open_tokenizer(str(scene_tokenizer), 64)
    pieces = [
        len([token for token in row if token != tokenizer.pad_token]) for row in tokenizer.encode(["a", "a red star"])
    ]
    assert token_lengths(tokenizer, ["a", "a red star"]) == pieces
    assert token_lengths(tokenizer, []) == []


@pytest.mark.parametrize(
    "numbers", [{"workers": -1}, {"sample": 0}, {"images": -1}, {"near_limit": -1}, {"context_length": -3}]
)
def test_numbers_out_of_range_are_refused(shards, numbers):
    with pytest.raises(UsageError, match=r"= (-?\d) is outside its range; give [01] or more"):
        inspect_shards(shards, **numbers)


def test_a_image_encoded_anew_looks_like_the_first(tmp_path, make_image):
    from webdataset.writer import TarWriter

    first = make_image(1, size=(120, 90))
    again = io.BytesIO()
    Image.open(io.BytesIO(first)).save(again, format="JPEG", quality=60)
    with TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as tar:
        for number, image in enumerate([first, make_image(2, size=(120, 90)), again.getvalue()]):
            tar.write({"__key__": str(number), "jpg": image, "txt": b"a thing"})
    found = inspect_shards([str(tmp_path / "0.tar")])
    assert (found.duplicate_pictures, found.near_duplicates) == (0, 1)
    assert inspect_shards([str(tmp_path / "0.tar")], near_limit=2).near_duplicates is None


@pytest.mark.parametrize(
    ("mode", "kind", "traits"),
    [
        ("RGB", "JPEG", ()),
        ("CMYK", "JPEG", ("CMYK",)),
        ("L", "PNG", ("grey",)),
        ("RGBA", "PNG", ("alpha",)),
        ("P", "PNG", ("palette",)),
        ("I;16", "PNG", ("grey", "16-bit")),
    ],
)
def test_what_is_special_about_a_image_is_told_from_its_header(mode, kind, traits):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, format=kind)
    assert image_traits(Image.open(file)) == traits


def test_animated_and_turned_images_are_told():
    file = io.BytesIO()
    frames = [Image.new("L", (8, 8), 80 * number) for number in range(3)]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
    assert "animated" in image_traits(Image.open(file))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), format="JPEG", exif=exif)
    assert image_traits(Image.open(file)) == ("turned by EXIF",)


def test_columns_of_the_metadata_are_counted(tmp_path, make_image):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as tar:
        for number in range(6):
            metadata = {"tags": ["dog", "wet"] if number % 2 else ["dog"], "url": f"u{number}", "width": 3}
            pair = Pair(key=f"k{number}", image=make_image(number), captions={"": ("a",)}, metadata=metadata)
            tar.write(encode_pair(pair))
    found = inspect_shards([str(tmp_path / "0.tar")])
    assert found.columns["tags"].most == {"dog": 6, "wet": 3}
    assert (found.columns["url"].distinct, found.columns["url"].most) == (6, {})
    assert (found.columns["width"].samples, found.columns["width"].distinct) == (6, 0)
    assert "dog" in contact_sheet(found, title="tags")


def test_captions_are_no_columns():
    assert metadata_columns({"caption": "a", "captions": ["b"], "captions_zh": ["c"], "caption_weights": [1]}) == {}


def test_repeats_are_found_by_digest():
    texts = ["a", "b", "a", "c", "b", "a"]
    digests = DigestList()
    for text in texts:
        digests.add(content_digest(text))
    assert digests.distinct() == 3
    assert digests.distinct(np.array([True, False, True, False, False, False])) == 1
    assert digests.most_repeated(5) == [(0, 3), (1, 2)]
    assert [digests[place] for place in range(6)] == [content_digest(text) for text in texts]
    assert DigestList().most_repeated(5) == []


def test_a_bounded_counter_keeps_the_frequent():
    counter = BoundedCounter(limit=10)
    for number in range(100):
        counter.add("often")
        counter.add(f"once {number}")
    assert counter.most_common(1) == {"often": 100}
    assert len(counter) <= 10
    assert not counter.is_exact


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [0.5, 1.0, 2.0, 250.0], [3.0, 7.0]])
def test_a_log_spread_counts_every_value_once(values):
    found = log_distribution(np.array(values))
    assert sum(found.counts) == len(values)
    assert (found.least, found.most, found.median) == (min(values), max(values), np.median(values))


def test_counted_values_are_distributed_like_the_values_themselves():
    values = np.random.default_rng(0).integers(0, 300, 1000)
    distribution = distribution_of_counts(Counter(values.tolist()))
    assert (distribution.least, distribution.most) == (values.min(), values.max())
    assert distribution.median == np.median(values)
    assert list(distribution.counts) == np.histogram(values, bins=distribution.edges)[0].tolist()


def test_aspects_are_read_either_way():
    assert (format_aspect(1.5), format_aspect(1 / 1.5), format_aspect(1.0)) == ("1.5 : 1", "1 : 1.5", "1 : 1")


@pytest.mark.parametrize("values", [[5], [1, 1, 2, 4], list(range(1000)), [0, 10**6]])
def test_a_spread_counts_every_value_once(values):
    found = distribution_of_counts(Counter(values))
    assert sum(found.counts) == len(values)
    assert len(found.edges) == len(found.counts) + 1
    assert len(found.counts) <= 24
    assert found.median == np.median(values)


class Tags(HTMLParser):
    """What a page opens and what it points to."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_contact_sheet_needs_no_other_file_and_escapes_captions(tmp_path, make_image):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as tar:
        for number in range(4):
            captions = {"": ("<script>alert(1)</script>", "tail")}
            tar.write(encode_pair(Pair(key=f"k{number}", image=make_image(number), captions=captions)))
    page = contact_sheet(inspect_shards([str(tmp_path / "0.tar")]), title="<shards>")
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.opened
    assert tags.opened.count("img") == 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in tags.addresses)
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;shards&gt;" in page
    assert "&lt;script&gt;" in page


def test_the_contact_sheet_shows_what_is_wrong(shards, tmp_path):
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:5000])
    page = contact_sheet(inspect_shards(shards), title="broken")
    assert "Damaged shards" in page
    assert "cut short" in page or "ends early" in page
    assert "unreadable json" in page
    partly = contact_sheet(inspect_shards([*shards, str(tmp_path / "none.tar")]), title="partly")
    assert "There is no shard" in partly


def test_captions_of_several_lines_are_counted_as_if_each_line_were_one(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(3):
            for name, data in ((f"{number}.jpg", tiny_image(number)), (f"{number}.txt", b"a jug\na pot\n\nthe pot\n")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    inspection = inspect_shards([str(tmp_path / "0.tar")])
    assert inspection.languages[""].captions == 3
    assert inspection.caption_lines == {"samples": 3, "captions": 9}
