import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vlm.data.sources.source import HAS_HEIF, FolderFiles, SceneOptions, SourceOptions, TarFiles
from vlm.data.sources.source_registry import open_source
from vlm.data.sources.table import unique_keys
from vlm.errors import BadSample, UsageError, VlmError


def write_images(folder: Path, make_image, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(number))


def write_csv(path: Path, rows, *, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def tar_of(folder: Path, path: Path):
    with tarfile.open(path, "w") as tar:
        for inner in sorted(folder.rglob("*")):
            if inner.is_file():
                tar.add(inner, inner.relative_to(folder).as_posix())


def write_shard(path: Path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


ROWS = [
    {"file": "images/a.jpg", "title": "a dog, running", "year": 2011, "code": "007", "price": "1.50"},
    {"file": "images/b.v2.jpg", "title": "zwei\nZeilen", "year": 2012, "code": "12", "price": "3"},
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("is_archive", [False, True])
def test_each_kind_of_table_gives_the_same_pairs(tmp_path, make_image, ending, is_archive):
    source = tmp_path / "source"
    write_images(source, make_image, ["images/a.jpg", "images/b.v2.jpg"])
    table = source / f"captions.{ending}"
    if ending in ("csv", "tsv"):
        rows = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
        write_csv(table, rows, delimiter="," if ending == "csv" else "\t")
    elif ending == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), table)
    if is_archive:
        (tmp_path / "inside").mkdir()
        tar_of(source, tmp_path / "inside" / "all.tar")
        source = tmp_path / "inside"
    pairs = open_source(str(source))
    first, second = pairs.read(0), pairs.read(1)
    assert len(pairs) == 2
    assert (first.key, second.key) == ("a", "b_v2")
    assert first.image == make_image(0)
    assert first.captions == {"": ("a dog, running",)}
    assert second.captions == {"": ("zwei\nZeilen",)}
    assert first.metadata["year"] == 2011
    assert first.metadata["code"] == "007"
    assert first.metadata["price"] == (1.5 if ending in ("csv", "tsv") else "1.50")
    assert first.metadata["file"] == "images/a.jpg"
    assert "title" not in first.metadata


def test_the_table_itself_can_be_the_source(tmp_path, make_image):
    write_images(tmp_path, make_image, ["1.jpg"])
    write_csv(tmp_path / "train.csv", [["Image", "Caption"], ["1.jpg", "one"]])
    write_csv(tmp_path / "test.csv", [["Image", "Caption"], ["1.jpg", "two"]])
    assert open_source(str(tmp_path / "test.csv")).read(0).captions == {"": ("two",)}
    with pytest.raises(UsageError, match=r"test.csv, train.csv"):
        open_source(str(tmp_path))


def test_rows_of_one_image_are_one_pair_with_all_its_captions(tmp_path, make_image):
    write_images(tmp_path, make_image, ["1.jpg", "2.jpg"])
    rows = [["image", "caption"], ["1.jpg", "one"], ["2.jpg", "two"], ["1.jpg", "uno"], ["1.jpg", "one"]]
    write_csv(tmp_path / "captions.csv", rows)
    pairs = open_source(str(tmp_path))
    assert [pairs.read(number).captions[""] for number in range(len(pairs))] == [("one", "uno"), ("two",)]


def test_captions_may_be_lists_and_have_languages(tmp_path, make_image):
    write_images(tmp_path, make_image, ["1.jpg", "2.jpg"])
    rows = [
        {"file": "1.jpg", "names": {"en": "dog", "de": ["Hund", "Köter"], "fr": None}, "captions_zh": ["狗"]},
        {"file": "2.jpg", "names": ["cat", "kitten"]},
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = open_source(str(tmp_path))
    assert pairs.read(0).captions == {"en": ("dog",), "de": ("Hund", "Köter"), "zh": ("狗",)}
    assert pairs.read(1).captions == {"": ("cat", "kitten")}


def test_equal_stems_are_told_apart_by_their_folders(tmp_path, make_image):
    write_images(tmp_path, make_image, ["x/1.jpg", "y/1.jpg", "y/2.jpg"])
    write_csv(tmp_path / "captions.csv", [["file", "text"], ["x/1.jpg", "a"], ["y/1.jpg", "b"], ["y/2.jpg", "c"]])
    pairs = open_source(str(tmp_path))
    assert [pairs.read(number).key for number in range(3)] == ["x-1", "y-1", "2"]


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (["picturefile", "caption"], {}, r"no image column.*--image-column.*picturefile, caption"),
        (["file", "captoin"], {}, r"no caption column: perhaps 'captoin' is meant; name it with --caption-column"),
        (["file", "title"], {"caption_column": "titel"}, r"no column 'titel'; did you mean 'title'\?"),
    ],
)
def test_missing_columns_are_named_with_the_nearest_and_the_option(tmp_path, header, options, message):
    write_csv(tmp_path / "captions.csv", [header, ["1.jpg", "one"]])
    with pytest.raises(UsageError, match=message):
        open_source(str(tmp_path), SourceOptions(**options))


def test_a_row_that_cannot_be_used_is_a_bad_sample(tmp_path, make_image):
    write_images(tmp_path, make_image, ["1.jpg"])
    lines = ['{"file": "1.jpg", "text": "one"}', '{"file": "gone.jpg", "text": "two"}', "{oops", '{"text": "three"}']
    lines += ['{"file": "../1.jpg", "text": "out"}', '{"file": "/etc/hostname", "text": "out"}', '{"file": "1b.jpg"}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    pairs = open_source(str(tmp_path))
    assert pairs.read(0).key == "1"
    reasons = []
    for number in range(1, len(pairs)):
        with pytest.raises(BadSample) as error:
            pairs.read(number)
        reasons.append(error.value.reason)
    outside = "outside the source"
    assert reasons == ["missing file", "unreadable row", "no image named", outside, outside, "no caption"]


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "C:\\x.jpg", "..\\x.jpg", "http://host/x.jpg"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    tar_of(tmp_path, tmp_path / "empty.tar")
    for files in (FolderFiles(tmp_path), TarFiles(tmp_path / "empty.tar")):
        with pytest.raises(BadSample, match="outside the source"):
            files.read(name)


def test_a_broken_row_of_a_csv_is_a_bad_sample_and_its_neighbours_are_read(tmp_path, make_image):
    write_images(tmp_path, make_image, ["1.jpg", "3.jpg"])
    (tmp_path / "captions.csv").write_text("file,title\n1.jpg,one\n2.jpg\n3.jpg,three\n4.jpg,four, five\n")
    pairs = open_source(str(tmp_path))
    assert len(pairs) == 4
    assert [pairs.read(number).captions[""] for number in (0, 2)] == [("one",), ("three",)]
    for number, message in ((1, "row 2 has 1 fields, 2 are named"), (3, "row 4 has 3 fields.* ',' stands in quotes")):
        with pytest.raises(BadSample, match=message):
            pairs.read(number)


def test_class_folders_become_captions_through_the_template(tmp_path, make_image):
    names = ["train/ice_cream/1.jpg", "train/dog/1.jpg", "test/dog/1.jpg", "train/dog/.hidden.jpg"]
    write_images(tmp_path, make_image, names)
    options = SourceOptions(folder="train", template="a {} here.")
    pairs = open_source(str(tmp_path), options)
    found = {pair.key: (pair.captions[""], pair.metadata) for pair in map(pairs.read, range(len(pairs)))}
    assert found == {
        "dog-1": (("a dog here.",), {"label": "dog", "file": "dog/1.jpg"}),
        "ice_cream-1": (("a ice cream here.",), {"label": "ice_cream", "file": "ice_cream/1.jpg"}),
    }
    assert pairs.captions_are_labels
    with pytest.raises(UsageError, match=r"has no \{\} for the class"):
        open_source(str(tmp_path), SourceOptions(template="a photo"))
    with pytest.raises(UsageError, match="no folder 'val'"):
        open_source(str(tmp_path), SourceOptions(folder="val"))


def test_img2dataset_output_is_read_with_its_failures(tmp_path, make_image):
    for shard in range(2):
        members = []
        for number in range(2):
            status = "success" if (shard, number) != (1, 1) else "failed_to_resize"
            content = {"caption": f"c{shard}{number}", "url": "http://x", "status": status, "width": 40}
            key = f"{number:09d}"
            members += [(f"{key}.jpg", make_image(number)), (f"{key}.txt", content["caption"].encode())]
            members.append((f"{key}.json", json.dumps(content).encode()))
        write_shard(tmp_path / f"0000{shard}.tar", members)
        parquet.write_table(pa.table({"url": ["http://x"]}), tmp_path / f"0000{shard}.parquet")
    pairs = open_source(str(tmp_path))
    keys = [pairs.read(number).key for number in range(3)]
    assert keys == ["000000000", "000000001", "000000000-2"]
    assert pairs.read(2).captions == {"": ("c10",)}
    assert pairs.read(2).metadata == {"url": "http://x", "status": "success", "width": 40}
    with pytest.raises(BadSample, match=r"not downloaded: status 'failed_to_resize'"):
        pairs.read(3)


def samples_of(make_image, number):
    return [m for n in range(number) for m in [(f"{n}.jpg", make_image(n)), (f"{n}.txt", b"a thing")]]


def test_shards_are_recognised_compressed_in_capitals_and_behind_empty_or_damaged_ones(tmp_path, make_image):
    write_shard(tmp_path / "whole.tar", samples_of(make_image, 2))
    whole = (tmp_path / "whole.tar").read_bytes()
    write_shard(tmp_path / "none.tar", [])
    nothing = (tmp_path / "none.tar").read_bytes()
    zipped = gzip.compress(whole)
    folders = {
        "capitals": {"A.TAR": whole, "B.TAR": whole},
        "zipped": {"a.tar.gz": zipped, "b.TGZ": zipped},
        "one": {"a.tar.gz": zipped},
        "cut": {"a.tar.gz": zipped[:-30]},
        "behind": {"a.tar": b"no tar" * 200, "b.tar": nothing, "c.tar.gz": b"\x1f\x8b", "d.tar": whole[:-3000]},
    }
    for name, files in folders.items():
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
    assert [len(open_source(str(tmp_path / name))) for name in ("capitals", "zipped", "one")] == [4, 4, 2]
    with pytest.raises(VlmError, match=r"gzip is cut short.*--allow-damage"):
        open_source(str(tmp_path / "cut"))
    with pytest.raises(VlmError, match=r"a\.tar is not a tar"):
        open_source(str(tmp_path / "behind"))


def test_of_a_tar_cut_short_the_whole_samples_are_read_where_that_is_allowed(tmp_path, make_image):
    write_shard(tmp_path / "cut.tar", samples_of(make_image, 3))
    with (tmp_path / "cut.tar").open("r+b") as file:
        file.truncate(len(make_image(0)) + len(make_image(1)) + 4 * 512)
    for kind in (None, "shards"):
        with pytest.raises(VlmError, match=r"is damaged: .*--allow-damage"):
            open_source(str(tmp_path / "cut.tar"), SourceOptions(kind=kind))
        pairs = open_source(str(tmp_path / "cut.tar"), SourceOptions(kind=kind, allow_damage=True))
        assert pairs.read(0).image == make_image(0)
    assert TarFiles(tmp_path / "cut.tar", allow_damage=True).names() == ["0.jpg", "0.txt"]


def test_scenes_are_the_same_each_time_and_speak_four_languages():
    options = SourceOptions(scenes=SceneOptions(split="val", number=5, seed=3))
    one, other = open_source("scenes", options), open_source("scenes", options)
    assert len(one) == 5
    assert one.read(4) == other.read(4)
    assert one.read(4).key == "val-000004"
    assert list(one.read(4).captions) == ["en", "de", "es", "zh"]
    assert set(one.read(4).metadata["scene"]) == {"shape", "colour", "size", "count", "position", "background"}
    assert one.fingerprint() != open_source("scenes").fingerprint()
    with pytest.raises(UsageError, match="distinct scenes asked"):
        open_source("scenes", SourceOptions(scenes=SceneOptions(number=10**6, is_distinct=True)))


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"it is empty\). Looked for: .*captions.csv.*CLASS/image.jpg.*--kind shards"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="There is no"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(UsageError, match=r"it holds notes\.md"):
        open_source(str(tmp_path))


def test_the_fingerprint_follows_the_content(tmp_path, make_image):
    write_images(tmp_path, make_image, ["a/1.jpg"])
    before = open_source(str(tmp_path)).fingerprint()
    assert open_source(str(tmp_path)).fingerprint() == before
    (tmp_path / "a" / "1.jpg").write_bytes(make_image(2) + b"more")
    assert open_source(str(tmp_path)).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "options", "number", "key"),
    [
        ("fashion", {}, 8383, "12229"),
        ("emoji", {"caption_column": "names"}, 8038, "noto-1f004"),
        ("cifar10", {"folder": "test"}, 2000, "airplane-0000"),
        ("clothing", {}, 341, "014b2a1b-c5a0-469b-b115-bc02b2001db5"),
        ("flickr8k", {}, 7000, "466956675_a2fb6bf901"),
    ],
)
def test_the_real_datasets_are_recognised(datasets, name, options, number, key):
    pairs = open_source(str(datasets / name), SourceOptions(**options))
    assert len(pairs) == number
    assert key in {pairs.read(place).key for place in range(4)}


@pytest.mark.skipif(HAS_HEIF, reason="pillow-heif is installed")
def test_a_folder_of_heic_images_names_the_package_that_reads_them(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")
    with pytest.raises(UsageError, match="pip install pillow-heif"):
        open_source(str(tmp_path))


def test_names_of_slashes_and_dots_make_keys_of_their_number():
    assert unique_keys([None, None, "k"], ["/", ".", "a.jpg"]).to_pylist() == ["row-1", "row-2", "k"]
