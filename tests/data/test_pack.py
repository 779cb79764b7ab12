import errno
import io
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from tests.data.list_source import ListSource
from vlm.cli.main import main
from vlm.data.pack import PackConfig, pack, shards_at
from vlm.data.samples import Pair
from vlm.data.shards import expand_shards, shards_fingerprint
from vlm.data.sources.source import SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.data.tar import ShardReader
from vlm.errors import BadSample, UsageError, VlmError
from vlm.manifest import read_manifest


def interrupt(number):
    """What interrupts, once, before a number is read."""
    left = [number]

    def at(place):
        if place in left:
            left.remove(place)
            raise KeyboardInterrupt

    return at


@pytest.fixture
def pairs(make_image):
    """25 pairs, number 7 missing and number 24 damaged; some captions and pictures twice."""
    made: list = [
        Pair(key=f"k{number:02d}", image=make_image(number % 20), captions={"": (f"c{number % 22}",)})
        for number in range(25)
    ]
    made[7] = BadSample("missing file", "7.jpg")
    made[24] = Pair(key="k24", image=make_image(24)[:300], captions={"": ("cut",)})
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != "manifest.json" and not path.name.endswith(".vlm-index")
    }


def samples_of(url):
    return [
        reader.read(number) for reader in map(ShardReader, expand_shards(str(url))) for number in range(len(reader))
    ]


@pytest.mark.parametrize("kind", ["table", "classes", "shards", "scenes"])
def test_what_is_packed_is_read_back(tmp_path, make_image, kind):
    source_folder = tmp_path / "source"
    options = SourceOptions(scenes=SceneOptions(number=5))
    if kind == "table":
        source_folder.mkdir()
        for number in range(5):
            (source_folder / f"{number}.png").write_bytes(make_image(number, kind="PNG"))
        rows = [
            {"file": f"{number}.png", "captions": {"en": ["one"], "zh": ["一"]}, "n": number} for number in range(5)
        ]
        (source_folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "classes":
        for number in range(5):
            (source_folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
            (source_folder / f"class{number % 2}" / f"{number}.jpg").write_bytes(make_image(number))
    elif kind == "shards":
        captions = {"": ("a", "b"), "zh": ("狗",)}
        made = [Pair(key=f"k{n}", image=make_image(n), captions=captions, metadata={"n": n}) for n in range(5)]
        pack(ListSource(made), source_folder)
        (source_folder / "manifest.json").unlink()
    source = open_source("scenes" if kind == "scenes" else str(source_folder), options)
    summary = pack(source, tmp_path / "out", PackConfig(samples_per_shard=2))
    read = samples_of(tmp_path / "out")
    assert (summary.samples, summary.shards, summary.bad) == (5, 3, 0)
    assert [(s.key, s.image, s.captions) for s in read] == [
        (pair.key, pair.image, pair.captions) for pair in map(source.read, range(5))
    ]
    for sample, pair in zip(read, map(source.read, range(5)), strict=True):
        assert pair.metadata.items() <= sample.metadata.items()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_the_shards(tmp_path, pairs):
    pack(ListSource(pairs[:5]), tmp_path / "out", PackConfig(samples_per_shard=3))
    urls = expand_shards(str(tmp_path / "out"))
    dataset: Any = WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json", "__key__")
    rows = list(dataset)
    assert [(row[1], row[2], row[3]) for row in rows] == [
        (f"c{n}", {"captions": [f"c{n}"]}, f"k0{n}") for n in range(5)
    ]
    assert rows[0][0].size == (40, 30)


def test_the_manifest_says_what_is_there(tmp_path, pairs):
    config = PackConfig(samples_per_shard=10, max_bad_share=0.1)
    summary = pack(ListSource(pairs), tmp_path / "out", config)
    manifest = read_manifest(tmp_path / "out", "shards")
    assert manifest.counts == {"samples": 23, "bad": 2, "shards": 3}
    assert set(manifest.files) == {*(f"shard-0000{n}.tar" for n in range(3)), "rejected.jsonl"}
    assert manifest.details["rejected"] == {"missing file": 1, "unreadable image": 1}
    assert manifest.fingerprint == summary.fingerprint == shards_fingerprint(expand_shards(str(tmp_path / "out")))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(reject["number"], reject["reason"]) for reject in rejected] == [
        (7, "missing file"),
        (24, "unreadable image"),
    ]


@pytest.mark.parametrize("hold_out", [0, 6])
@pytest.mark.parametrize("stop_at", [0, 9, 10, 17, 23])
def test_an_interrupted_pack_goes_on_and_ends_with_the_same_bytes(tmp_path, pairs, hold_out, stop_at):
    config = PackConfig(samples_per_shard=4, hold_out=hold_out, max_bad_share=0.1)
    pack(ListSource(pairs), tmp_path / "whole", config)
    source = ListSource(pairs, at=interrupt(stop_at))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "broken", config)
    assert not [path for path in (tmp_path / "broken").iterdir() if path.name.endswith(".part")]
    with pytest.raises(UsageError, match="unfinished"):
        expand_shards(str(tmp_path / "broken"))
    pack(source, tmp_path / "broken", config)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_a_killed_pack_leaves_rubbish_that_is_cleared_away(tmp_path, pairs):
    config = PackConfig(samples_per_shard=4, max_bad_share=0.1)
    pack(ListSource(pairs), tmp_path / "whole", config)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        pack(ListSource(pairs, at=interrupt(14)), out, config)
    (out / ".shard-00003.tar.1.part").write_bytes(b"half")  # killed while writing a shard
    (out / "shard-00003.tar").write_bytes(b"renamed, but not yet in the journal")
    with (out / ".shards-done.jsonl").open("a") as journal:
        journal.write('{"name": "shard-000')  # killed while writing a line
    summary = pack(ListSource(pairs), out, config)
    assert content_of(out) == content_of(tmp_path / "whole")
    assert summary.samples == 23


def test_a_full_disk_leaves_no_half_written_tar_and_the_work_goes_on_later(tmp_path, pairs, monkeypatch):
    config = PackConfig(samples_per_shard=4, max_bad_share=0.1)
    pack(ListSource(pairs), tmp_path / "whole", config)
    free_bytes = 30_000

    class FileOnFullDisk(io.FileIO):
        def write(self, data):
            nonlocal free_bytes
            free_bytes -= len(data)
            if free_bytes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    plain_open = Path.open

    def open_on_full_disk(path, mode="r", *args, **kwargs):
        if ".tar." in path.name and path.name.endswith(".part"):
            return FileOnFullDisk(str(path), "wb")
        return plain_open(path, mode, *args, **kwargs)

    out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(OSError, match="No space left"):
            pack(ListSource(pairs), out, config)
    tars = sorted(path.name for path in out.iterdir() if ".tar" in path.name and not path.name.endswith("-index"))
    assert tars == ["shard-00000.tar"]
    assert (out / "shard-00000.tar").read_bytes() == (tmp_path / "whole" / "shard-00000.tar").read_bytes()
    pack(ListSource(pairs), out, config)
    assert content_of(out) == content_of(tmp_path / "whole")


def test_too_many_bad_pairs_end_the_work_with_the_first_of_them(tmp_path, pairs):
    out = tmp_path / "out"
    with pytest.raises(VlmError, match=r"1 of 25 pairs .* more than the 1.0% allowed. The first: number 7: missing"):
        pack(ListSource(pairs), out)
    assert not list(out.glob("*.tar"))
    assert pack(ListSource(pairs), out, PackConfig(max_bad_share=0.08)).bad == 2  # another limit may go on


def test_nothing_usable_is_an_error(tmp_path, pairs):
    with pytest.raises(VlmError, match="None of the 1 pairs"):
        pack(ListSource([pairs[7]]), tmp_path / "out", PackConfig(max_bad_share=1))


def test_a_folder_that_exists_is_left_alone(tmp_path, pairs):
    out = tmp_path / "out"
    pack(ListSource(pairs[:5]), out)
    before = content_of(out)
    with pytest.raises(UsageError, match="exists already and is complete"):
        pack(ListSource(pairs[:5]), out)
    assert content_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not empty"):
        pack(ListSource(pairs[:5]), tmp_path / "mine")
    with pytest.raises(KeyboardInterrupt):
        pack(ListSource(pairs, at=interrupt(3)), tmp_path / "other")
    with pytest.raises(UsageError, match="another input or configuration"):
        pack(ListSource(pairs[:5]), tmp_path / "other", PackConfig(samples_per_shard=7))


def test_the_split_keeps_groups_together_and_loses_nothing(tmp_path, pairs):
    config = PackConfig(samples_per_shard=5, hold_out=6, max_bad_share=0.1)
    summary = pack(ListSource(pairs), tmp_path / "out", config)
    train, val = samples_of(tmp_path / "out" / "train-*.tar"), samples_of(tmp_path / "out" / "val-*.tar")
    assert summary.splits == {"train": len(train), "val": len(val)}
    assert len(val) >= 6
    assert len(train) + len(val) == 23
    assert not {s.image for s in train} & {s.image for s in val}
    assert not {s.captions[""] for s in train} & {s.captions[""] for s in val}
    assert summary.held_out["merged_by_caption"] == 2
    assert summary.held_out["merged_by_picture"] == 4


@pytest.mark.parametrize(("kind", "extension"), [("GIF", "png"), ("BMP", "png"), ("TIFF", "png"), ("WEBP", "webp")])
def test_images_others_could_not_read_become_png(tmp_path, make_image, kind, extension):
    image = make_image(0, kind=kind)
    pack(ListSource([Pair(key="a", image=image, captions={"": ("x",)})]), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        member = tar.extractfile(f"a.{extension}")
        assert member is not None
        stored = member.read()
    if extension == "webp":
        assert stored == image
    else:
        shown, original = Image.open(io.BytesIO(stored)), Image.open(io.BytesIO(image))
        assert shown.convert("RGB").tobytes() == original.convert("RGB").tobytes()


def test_languages_are_kept_in_the_order_asked_for(tmp_path, make_image):
    captions = {"ar": ("كلب",), "de": ("Hund",), "en": ("dog",)}
    pair = Pair(key="a", image=make_image(0), captions=captions)
    pack(ListSource([pair]), tmp_path / "out", PackConfig(languages=("en", "de")))
    assert samples_of(tmp_path / "out")[0].captions == {"en": ("dog",), "de": ("Hund",)}
    with pytest.raises(VlmError, match="no caption: languages requested"):
        pack(ListSource([pair]), tmp_path / "none", PackConfig(languages=("fr",)))


def test_long_keys_and_other_scripts_survive(tmp_path, make_image):
    keys = ["k" * 180, "叙述-ключ", "with space"]
    made = [Pair(key=key, image=make_image(n), captions={"": ("x",)}) for n, key in enumerate(keys)]
    pack(ListSource(made), tmp_path / "out")
    assert [sample.key for sample in samples_of(tmp_path / "out")] == keys


def test_importing_it_does_not_import_torch():
    modules = "vlm.data.pack, vlm.data.sources.source_registry, vlm.data.inspection.inspection"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_shards_is_packed_once_into_the_cache(tmp_path, make_image):
    folder = tmp_path / "set"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{number}.jpg").write_bytes(make_image(number))
    (folder / "dog" / "broken.jpg").write_bytes(b"no image")
    shards = shards_at(str(folder))
    made = Path(shards[0]).stat().st_mtime_ns
    assert shards_at(str(folder)) == shards
    assert Path(shards[0]).stat().st_mtime_ns == made
    assert ShardReader(shards[0]).read(1).captions == {"": ("a photo of a dog.",)}
    assert shards_at(str(Path(shards[0]).parent)) == shards
    with pytest.raises(UsageError, match="There is no"):
        shards_at(str(tmp_path / "nothing"))


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_pair_without_words_has_no_text_member(tmp_path, make_image, size):
    made = [Pair(key=f"k{n}", image=make_image(n), captions={"": ("a dog",)} if n < size else {}) for n in range(5)]
    pack(ListSource(made), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        assert sum(name.endswith(".txt") for name in tar.getnames()) == size


def test_values_that_rows_of_one_image_lose_are_told(tmp_path, make_image):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        (source / f"{number:03d}.png").write_bytes(make_image(number))
    rows = ["sku,image,title,price", "A,000.png,one,1", "B,000.png,two,2", "C,001.png,three,3", "C,001.png,four,3"]
    (source / "goods.csv").write_text("\n".join(rows))
    summary = pack(open_source(str(source / "goods.csv")), tmp_path / "out")
    (warning,) = summary.warnings
    assert "1 row lost a value" in warning
    assert "sku (1), price (1); row 2 of goods.csv has 'B' as sku, and 000.png keeps 'A'" in warning
    # rows that differ in their captions alone lose nothing
    (source / "goods.csv").write_text("\n".join([rows[0], *rows[3:]]))
    assert pack(open_source(str(source / "goods.csv")), tmp_path / "other").warnings == ()


def test_the_next_command_can_be_run_as_it_is_shown(tmp_path, make_image, capsys):
    source = tmp_path / "source" / "dogs"
    source.mkdir(parents=True)
    for number in range(2):
        (source / f"{number}.png").write_bytes(make_image(number))
    out = tmp_path / "my shards"
    assert main(["pack", str(source.parent), str(out)]) == 0
    command = capsys.readouterr().err.partition("Next: vlm ")[2].partition("   or")[0]
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "my shards.html").is_file()
