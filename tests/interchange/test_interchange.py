"""Shards that we write are read with equal values by other libraries, and have the properties that this rests on."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from vlm.data.pack import PackConfig, pack
from vlm.data.shards import expand_shards
from vlm.data.sources.source_registry import open_source
from vlm.data.tar import ShardReader
from vlm.train.dataset_reinforcement import copy_with_arrays

READERS = Path(__file__).parent / "readers"
LIBRARIES = {
    "webdataset==0.2.86": "with_webdataset.py",
    "webdataset==1.0.2": "with_webdataset.py",
    "datasets==5.2.0": "with_datasets.py",
    "ray[data]==2.60.0": "with_ray.py",
    "megatron-energon==7.4.0": "with_energon.py",
}


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="JPEG")
    return file.getvalue()


def row(number: int) -> dict[str, Any]:
    """Whole numbers before fractions, keys that come late or only sometimes, objects in objects and in lists."""
    values: dict[str, Any] = {"file": f"{number}.jpg", "caption": f"caption {number}", "hash": 2**60 + number}
    values["score"] = 6 if number < 6 else number + 0.9
    values["size"] = {"w": number} if number < 7 else {"w": number / 2, "h": 3}
    values["parts"] = [{"a": 1}, {"b": 2.5}]
    if number >= 8:
        values |= {"late": "x", "label": number}
    return values | ({"url": None} if number % 3 == 0 else {"url": f"u{number}"})


def write_table(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    for number in range(len(rows)):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


def write_members(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def from_a_table(folder: Path) -> list[str]:
    pack(
        open_source(write_table(folder / "table", list(map(row, range(12))))),
        folder / "out",
        PackConfig(samples_per_shard=5),
    )
    return expand_shards(str(folder / "out"))


def from_a_split_table(folder: Path) -> list[str]:
    config = PackConfig(samples_per_shard=5, hold_out=3)
    pack(open_source(write_table(folder / "table", list(map(row, range(12))))), folder / "out", config)
    return expand_shards(str(folder / "out"))


def from_languages(folder: Path) -> list[str]:
    """Captions by language in some samples, without one in others, and in other languages later on."""
    captions = [{"en": ["a dog"]}, ["no language"], {"zh": ["狗"], "en": ["dog", "hound"]}, {"de": ["Hund"]}]
    rows = [{"file": f"{number}.jpg", "captions": captions[number % 4]} for number in range(12)]
    pack(open_source(write_table(folder / "table", rows)), folder / "out", PackConfig(samples_per_shard=5))
    return expand_shards(str(folder / "out"))


def from_shards_of_others(folder: Path) -> list[str]:
    """Shards that repeat keys at their borders, with endings in capitals and JSON of differing keys."""
    (folder / "theirs").mkdir()
    for shard, names in enumerate(("abc", "cde", "eab")):
        members: dict[str, bytes] = {}
        for number, name in enumerate(names):
            values = {"n": number} | ({"s": 0.5} if shard else {}) | ({"n": 1.5} if shard == 2 else {})
            members |= {f"{name}.JPG": jpeg(3 * shard + number), f"{name}.TXT": b"a dog"}
            members |= {f"{name}.Json": json.dumps(values).encode()}
        write_members(folder / "theirs" / f"{shard}.tar", members)
    pack(open_source(str(folder / "theirs")), folder / "out", PackConfig(samples_per_shard=4))
    return expand_shards(str(folder / "out"))


CORPORA = [from_a_table, from_a_split_table, from_languages, from_shards_of_others]


@pytest.fixture(params=CORPORA)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return request.param(tmp_path)


def ours(shards: list[str]) -> list[dict[str, Any]]:
    """What our reader gives, in the form of the scripts of other libraries."""
    rows: list[dict[str, Any]] = []
    for shard in shards:
        reader = ShardReader(shard)
        for number in range(len(reader)):
            sample = reader.read(number)
            text = next(iter(sample.captions.values()))[0]
            digest = hashlib.sha256(sample.image).hexdigest()
            rows.append({"key": sample.key, "image": digest, "json": sample.metadata, "txt": text})
    return rows


def names_in(shards: list[str]) -> list[str]:
    names: list[str] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    return names


def type_of(value: Any) -> Any:
    """The type of a value in all its parts, None where it says nothing."""
    if isinstance(value, dict):
        return {name: type_of(item) for name, item in value.items()}
    if isinstance(value, list):
        types = [type_of(item) for item in value]
        return [types[0]] if types else None
    return None if value is None else type(value).__name__


def agree(one: Any, other: Any) -> bool:
    """Whether two types go into one column of a table."""
    if one is None or other is None:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return agree(one[0], other[0])
    return one == other


def test_keys_are_unique_over_all_shards(shards: list[str]) -> None:
    keys = [sample["key"] for sample in ours(shards)]
    assert len(set(keys)) == len(keys)
    assert len(shards) > 1


def test_endings_are_in_lower_case(shards: list[str]) -> None:
    endings = {name.partition(".")[2] for name in names_in(shards)}
    assert endings == {"jpg", "json", "txt"}


def test_every_json_has_the_same_keys_and_types(shards: list[str]) -> None:
    first, *others = [type_of(sample["json"]) for sample in ours(shards)]
    assert all(agree(first, other) for other in others)


def test_values_stay_what_they_were(tmp_path: Path) -> None:
    read = ours(from_a_table(tmp_path))
    for number, sample in enumerate(read):
        expected = {name: value for name, value in row(number).items() if name != "caption"}
        assert sample["json"]["captions"] == [f"caption {number}"]
        assert sample["json"]["hash"] == 2**60 + number
        assert isinstance(sample["json"]["score"], float)
        for name, value in expected.items():
            if name not in ("size", "parts"):
                assert sample["json"][name] == value
    assert read[0]["json"]["size"] == {"w": 0.0, "h": None}
    assert read[0]["json"]["parts"] == [{"a": 1, "b": None}, {"a": None, "b": 2.5}]
    assert read[0]["json"]["late"] is None


def test_captions_keep_their_languages(tmp_path: Path) -> None:
    read = [ShardReader(shard).read(number).captions for shard in from_languages(tmp_path) for number in (0, 1)]
    assert read[:2] == [{"en": ("a dog",)}, {"": ("no language",)}]


def test_a_column_that_no_float_holds_stays_exact_and_is_said(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.jpg", "caption": "c", "n": n + 0.5 if n else 2**53 + 1} for n in range(3)]
    summary = pack(open_source(write_table(tmp_path / "table", rows)), tmp_path / "out")
    assert [sample["json"]["n"] for sample in ours(expand_shards(summary.out))] == [2**53 + 1, 1.5, 2.5]
    assert any("n (fractions beside whole numbers" in warning for warning in summary.warnings)


def test_an_object_of_very_many_keys_is_left_as_it_is(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.jpg", "caption": "c", "s": {f"{n}-{k}": 1 for k in range(600)}} for n in range(3)]
    summary = pack(open_source(write_table(tmp_path / "table", rows)), tmp_path / "out")
    assert [len(sample["json"]["s"]) for sample in ours(expand_shards(summary.out))] == [600, 600, 600]
    assert any("s (more than 1,000 keys)" in warning for warning in summary.warnings)


def test_what_was_packed_is_packed_again_alike(shards: list[str], tmp_path: Path) -> None:
    """Keys with null, and captions that are empty in some languages, mean what they did."""
    pack(open_source(str(Path(shards[0]).parent)), tmp_path / "again")
    again = ours(expand_shards(str(tmp_path / "again")))
    assert sorted(map(str, again)) == sorted(map(str, ours(shards)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_the_installed_webdataset_reads_equal_values(shards: list[str]) -> None:
    theirs: Any = webdataset
    expected = ours(shards)
    samples = list(theirs.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample["key"] for sample in expected]
    for sample, same in zip(samples, expected, strict=True):
        assert json.loads(sample["json"]) == same["json"]
        assert sample["txt"].decode() == same["txt"]
        assert hashlib.sha256(sample["jpg"]).hexdigest() == same["image"]


def test_shards_with_arrays_added_have_endings_in_lower_case(tmp_path: Path) -> None:
    write_members(tmp_path / "in.tar", {"A.JPG": jpeg(0), "A.Json": b"{}", "A.OTHER": b"", "c/D.JPEG": jpeg(1)})
    with (tmp_path / "out.tar").open("wb") as file:
        copy_with_arrays(str(tmp_path / "in.tar"), file, iter([{"x": np.zeros(2)}] * 2))
    names = names_in([str(tmp_path / "out.tar")])
    assert sorted(names) == ["A.jpg", "A.json", "A.other", "A.x.npy", "c/D.jpeg", "c/D.x.npy"]


def test_the_card_names_the_shards_of_each_split_and_the_types(tmp_path: Path) -> None:
    from_a_split_table(tmp_path)
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    card = dict(line.split(": ", 1) for line in lines[1:3])
    (configuration,) = json.loads(card["configs"])
    assert configuration["data_files"] == [
        {"split": "train", "path": "train-*.tar"},
        {"split": "val", "path": "val-*.tar"},
    ]
    features = {feature["name"]: feature for feature in json.loads(card["dataset_info"])["features"]}
    assert features.keys() == {"jpg", "json", "txt", "__key__", "__url__"}
    types = {column.pop("name"): column for column in features["json"]["struct"]}
    assert types["score"] == {"dtype": "float64"}
    assert types["hash"] == types["label"] == {"dtype": "int64"}
    assert types["captions"] == {"list": "string"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The interpreter of a new environment with a library; what it needs besides is taken from here if it fits."""

    def make(library: str) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(str(Path(np.__file__).parents[1]))
        install = [folder / "bin/python", "-m", "pip", "install", "--quiet", library]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no package index gives {library}: {done.stderr.strip().splitlines()[-1:]}")
        return folder / "bin/python"

    return make


@pytest.mark.slow
@pytest.mark.parametrize("library", list(LIBRARIES))
def test_other_libraries_read_equal_values(library: str, environment: Callable[[str], Path], tmp_path: Path) -> None:
    python = environment(library)
    for corpus in CORPORA:
        folder = tmp_path / corpus.__name__
        folder.mkdir()
        shards = corpus(folder)
        # datasets gives one split of several: the others are read whole
        shards = [shard for shard in shards if not Path(shard).name.startswith("val-")]
        done = subprocess.run(
            [python, READERS / LIBRARIES[library], *shards], capture_output=True, text=True, check=False, cwd=folder
        )
        assert done.returncode == 0, done.stderr[-3000:]
        read = [json.loads(line) for line in done.stdout.splitlines()]
        assert {tuple(sample.pop("endings")) for sample in read} == {("jpg", "json", "txt")}
        by_key = {sample["key"]: sample for sample in read}
        assert len(by_key) == len(read)
        assert by_key == {sample["key"]: sample for sample in ours(shards)}
