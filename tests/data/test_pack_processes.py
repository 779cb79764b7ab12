"""`vlm pack` by forked processes: the same bytes as by threads, and no process that stays."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.data.list_source import ListSource
from tests.waiting import wait_until
from vlm.data import pack as pack_module
from vlm.data.pack import PackConfig, pack
from vlm.data.samples import Pair
from vlm.data.sources.source import ForkableSource, SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.errors import BadSample, VlmError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
PAIRS = 120


class ForkableList(ListSource):
    """A list that forked processes may read."""

    is_fork_safe = True


@pytest.fixture
def forks(monkeypatch):
    """A function that makes every further pack use three processes; counted are the times that they were started."""
    started = []
    plain = pack_module.map_forked

    def count(*args, **options):
        started.append(options["processes"])
        return plain(*args, **options)

    def begin():
        monkeypatch.setattr(pack_module, "_MIN_FORKED_PAIRS", 1)
        monkeypatch.setattr(pack_module, "_MIN_PAIRS_OF_PROCESS", 1)
        monkeypatch.setattr(pack_module, "_MIN_TEXTS_OF_PROCESS", 1)
        monkeypatch.setattr(pack_module, "_TEXTS_AT_ONCE", 16)
        monkeypatch.setattr(pack_module, "_num_cores", lambda: 3)
        # pytest may have threads of its own
        monkeypatch.setattr(pack_module, "can_fork", lambda: True)
        monkeypatch.setattr(pack_module, "map_forked", count)
        return started

    return begin


@pytest.fixture
def pairs(make_image):
    """Pairs of which some cannot be used, for several reasons, and some are alike."""
    made: list = [
        Pair(key=f"k{n:03d}", image=make_image(n % 50), captions={"": (f"c{n % 70}",)}, metadata={"n": n, "x": n / 2})
        for n in range(PAIRS)
    ]
    for number in (0, 33, 64, PAIRS - 1):
        made[number] = BadSample("missing file", f"{number}.jpg")
    made[40] = Pair(key="k040", image=make_image(40)[:300], captions={"": ("cut",)})
    return made


def content_of(folder: Path) -> dict[str, object]:
    content: dict[str, object] = {}
    for path in folder.iterdir():
        if path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            content[path.name] = {name: value for name, value in manifest.items() if name not in ("made_at", "command")}
        elif not path.name.endswith(".vlm-index"):
            content[path.name] = path.read_bytes()
    return content


def _write_source(kind: str, folder: Path, make_image) -> tuple[str, SourceOptions]:
    """A source of this kind, one image of it damaged."""
    folder.mkdir()
    images = {f"{number:03d}": make_image(number) for number in range(PAIRS)}
    images["017"] = images["017"][:300]
    if kind == "scenes":
        return "scenes", SourceOptions(scenes=SceneOptions(number=PAIRS))
    if kind == "shards":
        made = [Pair(key=key, image=image, captions={"": (key,)}) for key, image in images.items()]
        pack(ForkableList(made), folder / "shards", PackConfig(samples_per_shard=50, verify=False))
        return str(folder / "shards" / "shard-*.tar"), SourceOptions()
    for number, (name, image) in enumerate(images.items()):
        path = folder / (f"class{number % 3}" if kind == "classes" else "photos") / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        if kind == "texts" and number != 23:
            path.with_suffix(".txt").write_text(f"photo {name}")
    rows = [
        {"file": f"photos/{name}.jpg", "caption": f"photo {name}", "split": "ab"[n % 2]}
        for n, name in enumerate(images)
    ]
    if kind in ("table", "split", "tar"):
        rows += [{"file": "photos/lost.jpg", "caption": "lost"}, {"file": "photos/001.jpg", "caption": "again"}]
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "annotations":
        listed = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(images)]
        captions = [{"id": n, "image_id": n, "caption": f"photo {n}"} for n in range(PAIRS)]
        (folder / "captions_val.json").write_text(json.dumps({"images": listed, "annotations": captions}))
    if kind == "tar":
        subprocess.run(["tar", "-cf", f"{folder}.tar", "-C", str(folder), "."], check=True)
        return f"{folder}.tar", SourceOptions()
    options = {"split": SourceOptions(split=("a",)), "images": SourceOptions(captions="none")}
    return str(folder), options.get(kind, SourceOptions())


@pytest.mark.parametrize(
    "kind", ["scenes", "shards", "annotations", "table", "tar", "split", "texts", "classes", "images"]
)
def test_every_kind_of_source_is_packed_to_the_same_bytes(tmp_path, make_image, forks, kind):
    address, options = _write_source(kind, tmp_path / "source", make_image)
    config = PackConfig(samples_per_shard=30, max_bad_share=0.1)
    by_threads = pack(open_source(address, options), tmp_path / "threads", config)
    started = forks()
    by_processes = pack(open_source(address, options), tmp_path / "processes", config)
    # for the texts, and for the shards
    assert started == [3, 3]
    assert content_of(tmp_path / "processes") == content_of(tmp_path / "threads")
    assert by_processes.warnings == by_threads.warnings


def test_columns_of_a_table_that_agree_on_little_are_the_same_by_processes(tmp_path, make_image, forks):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(PAIRS):
        (folder / f"{number}.jpg").write_bytes(make_image(number))
    rows: list[dict[str, object]] = []
    for number in range(PAIRS):
        row: dict[str, object] = {"file": f"{number}.jpg", "caption": f"photo {number}", f"key{number // 7}": number}
        row |= {"mixed": number if number < 90 else number / 2, "late": {"a": 1, f"b{number % 5}": [number]}}
        row |= {"captions_de": f"Foto {number}"} if number > 50 else {}
        rows.append(row)
    rows.append(rows[100] | {"mixed": 3, "caption": "another"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_threads = pack(open_source(str(folder)), tmp_path / "threads")
    forks()
    by_processes = pack(open_source(str(folder)), tmp_path / "processes")
    assert content_of(tmp_path / "processes") == content_of(tmp_path / "threads")
    assert by_processes.warnings == by_threads.warnings != ()


@pytest.mark.parametrize(("num_pairs", "processes"), [(1_999, []), (2_000, [16])])
def test_few_pairs_have_as_many_processes_as_there_are_cores(monkeypatch, num_pairs, processes):
    """Of large photos, which threads decode on all cores: 2,000 by two processes took eight times as long."""
    started = []
    monkeypatch.setattr(pack_module, "_num_cores", lambda: 16)
    monkeypatch.setattr(pack_module, "can_fork", lambda: True)
    monkeypatch.setattr(pack_module, "map_forked", lambda *_, **options: started.append(options["processes"]))
    places = range(num_pairs)
    pack_module._work_through(ForkableList(places), places, places, PackConfig(), lambda _: None)
    assert started == processes


def test_a_split_is_the_same_by_processes(tmp_path, pairs, forks):
    config = PackConfig(samples_per_shard=30, hold_out=15, max_bad_share=0.1)
    pack(ForkableList(pairs), tmp_path / "threads", config)
    started = forks()
    pack(ForkableList(pairs), tmp_path / "processes", config)
    # for the thumbnails, and for both splits
    assert started == [3, 3, 3]
    assert content_of(tmp_path / "processes") == content_of(tmp_path / "threads")


def test_bad_pairs_are_listed_in_their_order(tmp_path, pairs, forks):
    forks()
    pack(ForkableList(pairs), tmp_path / "out", PackConfig(samples_per_shard=30, max_bad_share=0.1))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(bad["number"], bad["reason"]) for bad in rejected] == [
        (0, "missing file"),
        (33, "missing file"),
        (40, "unreadable image"),
        (64, "missing file"),
        (PAIRS - 1, "missing file"),
    ]


def test_too_many_bad_pairs_end_the_work(tmp_path, pairs, forks):
    forks()
    with pytest.raises(VlmError, match=r"2 of 120 pairs cannot be used so far.*number 0: missing file"):
        pack(ForkableList(pairs), tmp_path / "out")


@pytest.mark.parametrize("at", [1, 29, 31, 75, PAIRS - 1])
def test_an_error_leaves_what_was_finished_before_it_and_the_work_is_resumed(tmp_path, pairs, forks, at):
    def fail(number):
        if number == at:
            raise OSError(5, "Input/output error", "disk")

    config = PackConfig(samples_per_shard=10, max_bad_share=0.1)
    pack(ForkableList(pairs), tmp_path / "whole", config)
    with pytest.raises(OSError, match="Input/output"):
        pack(ForkableList(pairs, fail), tmp_path / "threads", config)
    forks()
    with pytest.raises(OSError, match="Input/output"):
        pack(ForkableList(pairs, fail), tmp_path / "broken", config)
    # the journal among it
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "threads")
    pack(ForkableList(pairs), tmp_path / "broken", config)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_a_killed_process_ends_the_work_which_is_resumed(tmp_path, pairs, forks):
    def die(number):
        if number == 75:
            os.kill(os.getpid(), signal.SIGKILL)

    config = PackConfig(samples_per_shard=10, max_bad_share=0.1)
    pack(ForkableList(pairs), tmp_path / "whole", config)
    forks()
    with pytest.raises(VlmError, match="killed by signal 9, most likely out of memory"):
        pack(ForkableList(pairs, die), tmp_path / "out", config)
    assert not list((tmp_path / "out").glob(".*.part"))
    pack(ForkableList(pairs), tmp_path / "out", config)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


@pytest.mark.parametrize(("pixels", "cores", "expected"), [(40, 2, [2]), (900, 2, []), (900, 3, [3])])
def test_two_threads_keep_large_photos(tmp_path, make_image, forks, monkeypatch, pixels, cores, expected):
    started = forks()
    monkeypatch.setattr(pack_module, "_num_cores", lambda: cores)
    image = make_image(0, size=(pixels, pixels))
    assert (len(image) > 20_480) == (pixels == 900)
    made = [Pair(key=f"k{number}", image=image, captions={"": (f"c{number}",)}) for number in range(20)]
    pack(ForkableList(made), tmp_path / "out")
    assert started == expected


def test_images_inside_a_parquet_file_and_compressed_shards_stay_with_threads(tmp_path, make_image):
    import pyarrow as pa
    from pyarrow import parquet

    rows = pa.table({"image": [make_image(0)], "caption": ["a dog"]})
    parquet.write_table(rows, tmp_path / "photos.parquet")
    source = open_source(str(tmp_path / "photos.parquet"))
    assert isinstance(source, ForkableSource)
    assert not source.is_fork_safe

    pack(ForkableList([Pair(key="k", image=make_image(0), captions={"": ("a",)})]), tmp_path / "out")
    subprocess.run(["gzip", "-k", str(tmp_path / "out" / "shard-00000.tar")], check=True)
    for name, is_safe in (("shard-00000.tar", True), ("shard-00000.tar.gz", False)):
        source = open_source(str(tmp_path / "out" / name))
        assert isinstance(source, ForkableSource)
        assert source.is_fork_safe == is_safe


@pytest.fixture(scope="module")
def whole_scenes(tmp_path_factory):
    """What the command of the next test packs where nothing interrupts it."""
    folder = tmp_path_factory.mktemp("scenes") / "whole"
    pack(
        open_source("scenes", SourceOptions(scenes=SceneOptions(number=2500))),
        folder,
        PackConfig(samples_per_shard=200),
    )
    return content_of(folder)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGINT, True),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        (signal.SIGKILL, False),
    ],
)
def test_a_signal_leaves_no_process_and_the_work_is_resumed(tmp_path, whole_scenes, number, to_all):
    folder = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "vlm", "--quiet", "pack", "scenes", str(folder)]
    command += ["--scenes.number", "2500", "--samples-per-shard", "200"]
    started = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )
    wait_until(lambda: len(list(folder.glob("*.tar"))) > 1, process=started)
    workers = psutil.Process(started.pid).children()
    assert len(workers) >= 2
    (os.killpg if to_all else os.kill)(started.pid, number)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == (1 if number == signal.SIGINT else -number)
    assert errors == (
        "vlm: interrupted; finished work is kept. Rerun the same command to resume.\n"
        if number == signal.SIGINT
        else ""
    )
    wait_until(lambda: not any(map(_is_alive, workers)))
    assert len(list(folder.glob("*.tar"))) < 13
    subprocess.run(command, check=True, capture_output=True)
    assert content_of(folder) == whole_scenes


def _heed_interrupts() -> None:
    # a shell starts what goes on in the background with SIGINT ignored, as it may have started the tests
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
