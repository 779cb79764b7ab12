import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from vlm.console import log_to_stderr
from vlm.data.inspection.inspection import inspect_shards
from vlm.data.pack import encode_pair
from vlm.data.samples import Pair
from vlm.data.shards import count_samples, expand_shards, shards_fingerprint
from vlm.data.tar import ShardReader
from vlm.errors import BadSample, UsageError, VlmError


@pytest.fixture
def write_shard(tmp_path):
    from webdataset.writer import TarWriter

    def write(name, samples) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with TarWriter(str(path), encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
        return str(path)

    return write


@pytest.fixture
def some(make_image):
    def make(number, *, prefix="k"):
        return [
            encode_pair(Pair(key=f"{prefix}{n}", image=make_image(n), captions={"": (f"c{n}",)}, metadata={"n": n}))
            for n in range(number)
        ]

    return make


def test_addresses_name_shards_in_order(write_shard, some, tmp_path):
    made = [write_shard(f"train-{n:05d}.tar", some(1)) for n in (2, 0, 1)]
    (tmp_path / "._train-00000.tar").write_bytes(b"left by another system")
    in_order = sorted(made)
    assert expand_shards(str(tmp_path)) == in_order
    assert expand_shards(f"{tmp_path}/train-{{00000..00002}}.tar") == in_order
    assert expand_shards(f"{tmp_path}/train-*.tar") == in_order
    assert expand_shards(f"{in_order[2]}::{in_order[0]}") == [in_order[2], in_order[0]]
    assert expand_shards("http://host/{0..1}.tar") == ["http://host/0.tar", "http://host/1.tar"]


@pytest.mark.parametrize("url", ["", "none.tar", "none-{0..3}.tar", "none-*.tar"])
def test_an_address_without_shards_is_refused(tmp_path, url):
    with pytest.raises(UsageError, match=r"[Nn]o shard"):
        expand_shards(f"{tmp_path}/{url}")


def test_samples_are_read_in_any_order(write_shard, some, make_image):
    reader = ShardReader(write_shard("0.tar", some(4)))
    for number in (3, 0, 2):
        sample = reader.read(number)
        assert (sample.key, sample.image) == (f"k{number}", make_image(number))
        assert (sample.captions, sample.metadata["n"]) == ({"": (f"c{number}",)}, number)
    reader.close()
    reader.close()


def test_a_byte_order_mark_is_no_part_of_the_caption(write_shard, make_image):
    reader = ShardReader(write_shard("0.tar", [{"__key__": "1", "jpg": make_image(0), "txt": "\ufeffa dog".encode()}]))
    assert reader.read(0).captions == {"": ("a dog",)}
    reader.close()


def test_a_sample_that_cannot_be_used_says_why(write_shard, some):
    samples = some(4)
    del samples[0]["jpg"]
    samples[1]["json"] = b"[]"
    samples[2]["json"] = b"{oops"
    url = write_shard("0.tar", samples)
    with tarfile.open(url) as tar:
        in_last_image = next(entry for entry in tar if entry.name == "k3.jpg").offset_data + 50
    with open(url, "r+b") as file:
        file.truncate(in_last_image)
    reader = ShardReader(url)
    for number, reason in enumerate(["no image", "unreadable json", "unreadable json", "cut short"]):
        with pytest.raises(BadSample) as error:
            reader.read(number)
        assert error.value.reason == reason
    reader.close()


def test_a_shard_cut_short_is_refused_unless_allowed(write_shard, some):
    url = write_shard("0.tar", some(4))
    with open(url, "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(VlmError, match=r"is damaged: .*; whole samples before it: at least 2\. .*--allow-damage"):
        count_samples([url])
    assert 1 <= count_samples([url], allow_damage=True)[0] < 4
    with pytest.raises(VlmError, match="holds no samples"):
        count_samples([write_shard("1.tar", [])])


def test_the_fingerprint_follows_content_and_order_but_not_the_place(write_shard, some, tmp_path):
    shards = [write_shard("0.tar", some(3)), write_shard("1.tar", some(3, prefix="x"))]
    original = shards_fingerprint(shards)
    shutil.copytree(tmp_path, tmp_path.with_name("moved"), ignore=shutil.ignore_patterns(".*"))
    moved = [str(tmp_path.with_name("moved") / name) for name in ("0.tar", "1.tar")]
    assert shards_fingerprint(moved) == original
    assert shards_fingerprint(shards[::-1]) != original
    assert shards_fingerprint(shards[:1]) != original
    changed = some(3)
    changed[1]["txt"] = b"another caption"
    assert shards_fingerprint([write_shard("0.tar", changed), shards[1]]) != original


def test_captions_of_a_foreign_shard_are_found_in_its_json(write_shard, make_image):
    content = {"captions": ["a man", "A person ."], "captions_zh": ["人"], "width": 40}
    sample = {"__key__": "1", "jpg": make_image(0), "txt": b"a man", "json": json.dumps(content).encode()}
    reader = ShardReader(write_shard("0.tar", [sample]))
    assert reader.read(0).captions == {"": ("a man", "A person ."), "zh": ("人",)}
    reader.close()


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_stored_arrays_come_when_asked_for(write_shard, make_image):
    teacher, seeds = np.arange(12, dtype=np.float16).reshape(3, 4), np.asfortranarray(np.ones((2, 3), np.uint64))
    sample = {
        "__key__": "1",
        "jpg": make_image(0),
        "txt": b"a",
        "teacher_image.npy": npy(teacher),
        "s.npy": npy(seeds),
    }
    reader = ShardReader(write_shard("0.tar", [sample]))
    assert reader.read(0).arrays == {}
    found = reader.read(0, arrays=("s", "teacher_image")).arrays
    assert list(found) == ["s", "teacher_image"]
    assert (found["teacher_image"].dtype, found["teacher_image"].tolist()) == (np.float16, teacher.tolist())
    assert (found["s"].dtype, found["s"].tolist()) == (np.uint64, seeds.tolist())
    with pytest.raises(BadSample, match=r"no array: key '1' has no text\.npy"):
        reader.read(0, arrays=("text",))
    reader.close()


HEADER = b"\x93NUMPY\x01\x00"


def with_header(text: str, data: bytes = b"") -> bytes:
    return HEADER + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not numpy",
        npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        npy(np.arange(9))[:-1],
        npy(np.arange(9)) + b"x",
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"),
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 0)}"),
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': __import__('os')}"),
        with_header("(" * 9000),
        HEADER + b"\xff\xff",
        b"PK\x03\x04" + bytes(40),
        pickle.dumps(np.arange(3)),
    ],
)
def test_arrays_that_are_none_are_refused_without_being_run(write_shard, make_image, data):
    reader = ShardReader(write_shard("0.tar", [{"__key__": "1", "jpg": make_image(0), "a.npy": data}]))
    with pytest.raises(BadSample, match=r"unreadable array: 1\.a\.npy"):
        reader.read(0, arrays=("a",))
    reader.close()


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"n": ' + b"9" * 100_000 + b"}", b'{"a": "\xff"}', b"\x00", b""])
def test_json_bombs_are_bad_samples(write_shard, make_image, data):
    reader = ShardReader(write_shard("0.tar", [{"__key__": "1", "jpg": make_image(0), "json": data}]))
    with pytest.raises(BadSample, match="unreadable json"):
        reader.read(0)
    reader.close()


def test_half_of_a_surrogate_pair_becomes_text(write_shard, make_image):
    content = b'{"captions": ["a \\ud83d dog", "\\ud83d\\ude00"], "\\udc00": "\\udc00"}'
    reader = ShardReader(write_shard("0.tar", [{"__key__": "1", "jpg": make_image(0), "json": content}]))
    sample = reader.read(0)
    assert sample.captions == {"": ("a ? dog", "\U0001f600")}
    json.dumps(sample.metadata, ensure_ascii=False).encode()
    reader.close()


def test_a_sample_has_a_place_for_messages(write_shard, some):
    url = write_shard("0.tar", some(3))
    reader = ShardReader(url)
    with tarfile.open(url) as tar:
        firsts = {entry.name.partition(".")[0]: entry.offset_data for entry in reversed(tar.getmembers())}
    assert [reader.key_and_offset(number) for number in range(3)] == list(firsts.items())[::-1]
    reader.close()


def test_a_size_beyond_the_tar_takes_no_memory(write_shard, some):
    url = write_shard("0.tar", some(2))
    with tarfile.open(url) as tar:
        last = tar.getmembers()[-1]
    last.size = 1 << 45
    with open(url, "r+b") as file:
        file.seek(last.offset)
        file.write(last.tobuf(tarfile.GNU_FORMAT))
    reader = ShardReader(url)
    assert "cut short" in reader.index.damage
    with pytest.raises(BadSample, match="cut short: 35,184,372,088,832 bytes"):
        reader.read(1)
    assert reader.read(0).key == "k0"
    reader.close()


def test_flickr8k_is_read_as_it_is(datasets):
    shards = expand_shards(f"{datasets}/flickr8k/train-{{00000..00011}}.tar")
    assert sum(count_samples(shards)) == 6000
    reader = ShardReader(shards[3])
    sample = reader.read(17)
    assert len(sample.captions[""]) == 5
    assert len(sample.captions["zh"]) == 5
    reader.close()


def test_patterns_reach_over_folders_and_name_folders(write_shard, some, tmp_path, monkeypatch):
    for part in ("a", "b"):
        (tmp_path / "parts" / part).mkdir(parents=True)
    made = [write_shard(f"parts/{part}/{number}.tar", some(1)) for part in "ab" for number in (0, 1)]
    (tmp_path / "parts" / "notes").mkdir()
    for pattern in ("parts/*/*.tar", "parts/{a,b}", "parts/**/*.tar", "parts/{a,b}/*.tar", "parts/*"):
        assert expand_shards(f"{tmp_path}/{pattern}") == made
    assert expand_shards(f"{tmp_path}/parts/*/0.tar") == made[::2]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards("~/parts/a") == made[:2]


def test_a_name_that_holds_the_signs_of_patterns_is_taken_as_it_is(write_shard, some, tmp_path):
    for folder in ("set [new]", "set{1}"):
        (tmp_path / folder).mkdir()
        made = write_shard(f"{folder}/x{{y}}.tar", some(1))
        assert expand_shards(str(tmp_path / folder)) == expand_shards(made) == [made]


@pytest.mark.parametrize("delay", [0.0, 60.0])
def test_indexing_many_local_shards_shows_progress_once_it_takes_long(write_shard, some, capsys, monkeypatch, delay):
    urls = [write_shard(f"{number}.tar", some(2)) for number in range(5)]
    monkeypatch.setattr("vlm.data.shards.INDEXING_DELAY_SECONDS", delay)
    with log_to_stderr():
        assert count_samples(urls) == [2] * 5
        assert inspect_shards(urls).samples == 10
    drawn = capsys.readouterr().err.count("indexing shards: 100%")
    assert drawn == (2 if delay == 0 else 0)


def test_a_folder_of_folders_of_shards_is_refused_with_the_pattern_that_names_them(write_shard, some, tmp_path):
    for part in ("part0", "part1"):
        (tmp_path / "set" / part).mkdir(parents=True)
        write_shard(f"set/{part}/00000.tar", some(2))
    with pytest.raises(UsageError, match=r"No shards.*Its tars lie deeper.*set/\*\*/\*\.tar'"):
        expand_shards(f"{tmp_path}/set/")
    assert count_samples(expand_shards(f"{tmp_path}/set/**/*.tar")) == [2, 2]


@pytest.mark.parametrize("pattern", ["out/*", "out/**", "*", "**"])
def test_of_a_pattern_the_tars_alone_are_shards(write_shard, some, tmp_path, pattern):
    """img2dataset writes a table and statistics next to each tar, and vlm pack a manifest and a card."""
    (tmp_path / "README.md").write_text("# a card")
    shard = write_shard("out/00000.tar", some(2))
    for name in ("00000.parquet", "00000_stats.json", "manifest.json", "README.md"):
        (tmp_path / "out" / name).write_text("{}")
    assert expand_shards(f"{tmp_path}/{pattern}") == [shard]
