import json
from html.parser import HTMLParser

import numpy as np
import pytest

from vlm.data.contact_sheet import contact_sheet
from vlm.data.encode import encode_pair
from vlm.data.inspection import inspect_shards, spread
from vlm.data.samples import Pair


@pytest.fixture
def shards(tmp_path, make_picture):
    """Two whole shards of ten, with one key, one picture and three captions twice, and three corrupt samples."""
    from webdataset.writer import TarWriter

    for shard in range(2):
        with TarWriter(str(tmp_path / f"{shard}.tar"), encoder=False, mtime=0) as tar:
            for number in range(10):
                place = shard * 10 + number
                captions = {"en": (f"caption number {place % 17}", "two words"), "zh": ("一只狗",)}
                pair = Pair(key=f"k{place}", image=make_picture(place, size=(30 + place, 20)), captions=captions)
                sample = encode_pair(pair)
                if place == 3:
                    sample["jpg"] = sample["jpg"][:200]
                if place == 4:
                    del sample["jpg"]
                if place == 12:
                    sample["json"] = b"{"
                if place == 15:
                    sample["jpg"] = encode_pair(Pair(key="", image=make_picture(14, size=(44, 20)), captions=captions))[
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
        (shards[0], "k3", "unreadable picture"),
        (shards[0], "k4", "no picture"),
        (shards[1], "k12", "unreadable json"),
    ]
    assert (found.duplicate_pictures, found.duplicate_keys) == (1, 1)
    assert found.formats == {"JPEG": 17}
    assert found.widths is not None
    assert (found.widths.least, found.widths.most, sum(found.widths.counts)) == (30, 49, 17)
    assert set(found.languages) == {"en", "zh"}
    assert found.languages["en"].per_picture.median == 2
    assert found.languages["en"].words.most == 3
    assert found.languages["zh"].characters.median == 3
    assert found.repeated_captions["two words"] == 18
    assert json.loads(json.dumps(found.facts()))["samples"] == 20


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
    found = inspect_shards(shards, sample=5, pictures=2)
    assert (found.samples, found.looked_at, len(found.shown)) == (20, 5, 2)
    assert found.shown[0].key == "k0"


@pytest.mark.parametrize("values", [[5], [1, 1, 2, 4], list(range(1000)), [0, 10**6]])
def test_a_spread_counts_every_value_once(values):
    found = spread(np.array(values))
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


def test_the_contact_sheet_needs_no_other_file_and_escapes_captions(tmp_path, make_picture):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as tar:
        for number in range(4):
            captions = {"": ("<script>alert(1)</script>", "tail")}
            tar.write(encode_pair(Pair(key=f"k{number}", image=make_picture(number), captions=captions)))
    page = contact_sheet(inspect_shards([str(tmp_path / "0.tar")]), title="<shards>")
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.opened
    assert tags.opened.count("img") == 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in tags.addresses)
    assert "http" not in page
    assert "&lt;shards&gt;" in page
    assert "&lt;script&gt;" in page


def test_the_contact_sheet_shows_what_is_wrong(shards, tmp_path):
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:5000])
    page = contact_sheet(inspect_shards(shards), title="broken")
    assert "Damaged shards" in page
    assert "cut short" in page or "ends early" in page
    assert "unreadable json" in page
    nothing = contact_sheet(inspect_shards([str(tmp_path / "none.tar")]), title="nothing")
    assert "There is no shard" in nothing
