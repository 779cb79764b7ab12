import gzip
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import preloaded
from tests.data.storage.faulty_server import Fault
from tests.data.storage.test_fetch import read_all
from vlm.data.shard_cache import ShardCache, default_cache
from vlm.data.shards import count_samples, expand_shards
from vlm.data.tar import ShardReader
from vlm.errors import UsageError, VlmError


class Watch:
    """Measures a folder again and again in a thread."""

    def __init__(self, folder) -> None:
        self.folder, self.largest, self.looks = folder, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.largest, self.looks = max(self.largest, folder_bytes(self.folder)), self.looks + 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def folder_bytes(folder) -> int:
    """Bytes the folder held at one moment: of files seen before and after it, since they come and go while one looks.

    Files only grow, so the sizes seen before are no more than those of the moment; one that shrank is another with the
    name and inode of a removed one.
    """
    before, after = sizes_in(folder), sizes_in(folder)
    return sum(size for file, size in before.items() if after.get(file, -1) >= size)


def sizes_in(folder) -> dict[tuple[str, int], int]:
    """Bytes by name and inode."""
    sizes = {}
    for file in os.scandir(folder) if folder.exists() else []:
        try:
            found = file.stat()
        except FileNotFoundError:
            continue
        sizes[file.name, found.st_ino] = found.st_size
    return sizes


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_pass_over_more_than_fits_keeps_the_bound_and_loses_nothing(
    faulty_server, served, write_shards, make_cache, suffix
):
    names = write_shards(served, 8, padding=60_000)
    if suffix:
        for name in names:
            (served / f"{name}.gz").write_bytes(gzip.compress((served / name).read_bytes()))
    urls = [f"{faulty_server.url}/{name}{suffix}" for name in names]
    size = (served / names[0]).stat().st_size
    faulty_server.faults = [Fault(path=f"{names[n]}{suffix}", pause=0.001) for n in range(8)]
    cache = make_cache(int(2.5 * size))
    with Watch(cache.folder) as watch:
        readers = [ShardReader(url, cache) for url in urls]
        found = [reader.read(number).key for _ in range(2) for reader in readers for number in range(4)]
    assert found == [f"{place}-{number}" for _ in range(2) for place in range(8) for number in range(4)]
    assert watch.looks > 10
    assert size < watch.largest <= cache.max_bytes
    assert faulty_server.gets(f"{names[0]}{suffix}")[1:], "the first shard had to make room and come again"


def test_the_least_recently_used_shard_goes_first(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 4)
    size = (served / names[0]).stat().st_size
    cache = make_cache(int(3.7 * size))
    urls = [f"{faulty_server.url}/{name}" for name in names]
    for url in (*urls[:3], urls[0], urls[3]):
        cache.local_path(url)
    assert [cache.touch(url) for url in urls] == [True, False, True, True]


def test_a_reader_goes_on_when_its_shard_made_room(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    reader = ShardReader(f"{faulty_server.url}/{name}", cache := make_cache())
    first = reader.read(0)
    for path in cache.folder.glob("*.tar"):
        path.unlink()
    assert reader.read(0) == first
    assert len(faulty_server.gets(name)) == 2
    assert not [link for link in os.listdir("/proc/self/fd") if str(cache.folder) in link_of(link)]


def link_of(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def test_a_shard_that_never_fits_is_refused_with_both_sizes(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    size = (served / name).stat().st_size
    with pytest.raises(UsageError, match=rf"{name} has {size:,} bytes, but the cache .* may hold 5,000.*VLM_CACHE_GB"):
        ShardReader(f"{faulty_server.url}/{name}", make_cache(5000))
    assert not faulty_server.gets(f"/{name}")


def test_shards_unpacked_side_by_side_in_too_little_room_all_get_their_turn(
    faulty_server, served, write_shards, make_cache
):
    names = write_shards(served, 9, padding=20_000)
    for name in names:  # they unpack to far more than the first guess
        (served / f"{name}.gz").write_bytes(gzip.compress((served / name).read_bytes()))
    cache = make_cache(int(2.5 * (served / names[0]).stat().st_size))
    with Watch(cache.folder) as watch:
        counts = count_samples([f"{faulty_server.url}/{name}.gz" for name in names], cache=cache)
    assert counts == [4] * 9
    assert watch.largest <= cache.max_bytes


def _read_in_child(urls, cache, found):
    readers = [ShardReader(url, cache) for url in urls]
    found.put([reader.read(number).key for number in range(4) for reader in readers])


READ_ALL = """
import sys
from pathlib import Path
from vlm.data.tar import ShardReader
from vlm.data.shard_cache import ShardCache
cache = ShardCache(Path(sys.argv[1]), int(sys.argv[2]))
readers = [ShardReader(address, cache) for address in sys.argv[3:]]
print(" ".join(reader.read(n).key for reader in readers for n in range(len(reader))))
"""


def test_who_waits_long_for_another_to_fetch_says_so(
    faulty_server, served, write_shards, make_cache, monkeypatch, caplog
):
    (name,) = write_shards(served, 1, padding=20_000)
    faulty_server.faults = [Fault(path=name, pause=0.05)]
    monkeypatch.setattr("vlm.data.shard_cache._QUIET_SECONDS", 0.1)
    cache = make_cache()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(cache.local_path, [f"{faulty_server.url}/{name}"] * 2))
    assert found[0] == found[1]
    assert found[0].is_file()
    assert [name in record.message for record in caplog.records if "waiting for it" in record.message] == [True]


def test_two_processes_share_one_download_of_each_shard(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 4, padding=20_000)
    faulty_server.faults = [Fault(path=name, pause=0.01) for name in names]
    arguments = [str(make_cache().folder), str(1 << 30), *(f"{faulty_server.url}/{name}" for name in names)]
    command = [sys.executable, "-c", READ_ALL, *arguments]
    processes = [preloaded.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert outputs == [[f"{place}-{number}" for place in range(4) for number in range(4)]] * 2
    assert [len(faulty_server.gets(f"/{name}")) for name in names] == [1] * 4


def test_processes_that_fight_for_too_little_room_all_finish(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 4, padding=20_000)
    size = (served / names[0]).stat().st_size
    cache = make_cache(int(1.5 * size))
    urls = [f"{faulty_server.url}/{name}" for name in names]
    forking = multiprocessing.get_context("fork")
    found = forking.Queue()
    with Watch(cache.folder) as watch:
        for order in (urls, urls[::-1]):
            forking.Process(target=_read_in_child, args=(order, cache, found), daemon=True).start()
        outputs = [found.get(timeout=60) for _ in range(2)]
    assert sorted(outputs[0]) == sorted(outputs[1]) == sorted(f"{s}-{n}" for s in range(4) for n in range(4))
    assert watch.largest <= cache.max_bytes


def test_what_dead_processes_left_makes_room(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 2)
    size = (served / names[0]).stat().st_size
    urls = [f"{faulty_server.url}/{name}" for name in names]
    cache = make_cache(int(1.5 * size))
    faulty_server.faults = [Fault(path=names[0], cut=9000), Fault(path=names[0], status=500, times=3)]
    with pytest.raises(VlmError):
        cache.local_path(urls[0])
    assert list(cache.folder.glob("*.part"))
    assert len(read_all(urls[1], cache)) == 4
    assert not list(cache.folder.glob("*.part"))
    assert len(list(cache.folder.glob("[!.]*.lock"))) == 1


def test_files_of_others_in_the_folder_are_left_alone(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 3)
    cache = make_cache(int(1.5 * (served / names[0]).stat().st_size))
    cache.folder.mkdir()
    (cache.folder / "thesis.tar").write_bytes(bytes(1 << 20))
    for name in names:
        cache.local_path(f"{faulty_server.url}/{name}")
    assert (cache.folder / "thesis.tar").stat().st_size == 1 << 20


@pytest.mark.parametrize("beside", [None, '{"captions": 3}', "[1]", "not JSON"])
def test_originals_named_as_cached_files_are_never_made_room_of(
    faulty_server, served, write_shards, make_cache, beside
):
    names = write_shards(served, 3)
    size = (served / names[0]).stat().st_size
    cache = make_cache(int(1.5 * size))
    originals = [cache.folder / f"{number:016x}.tar" for number in range(3)]
    cache.folder.mkdir()
    for original in originals:
        original.write_bytes(bytes(size))
        if beside is not None:
            original.with_suffix(".json").write_text(beside)
    for name in names:
        assert len(read_all(f"{faulty_server.url}/{name}", cache)) == 4
    assert [original.stat().st_size for original in originals] == [size] * 3
    cached = [path for path in cache.folder.glob("*.tar") if path not in originals]
    assert len(cached) == 1


def test_a_full_disk_is_told_and_not_taken_for_the_network(
    faulty_server, served, write_shards, make_cache, monkeypatch
):
    (name,) = write_shards(served, 1)

    def refuse(_):
        raise OSError(28, "No space left on device")

    cache, url = make_cache(), f"{faulty_server.url}/{name}"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(VlmError, match=rf"{url} cannot be kept in the cache at .*No space left.*VLM_CACHE"):
            cache.local_path(url)
    assert not faulty_server.gets(f"/{name}")
    assert cache.local_path(url).is_file()


def test_a_cache_that_is_no_folder_is_told(faulty_server, served, write_shards, make_cache, tmp_path):
    (name,) = write_shards(served, 1)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(VlmError, match="cannot be kept in the cache"):
        make_cache().local_path(f"{faulty_server.url}/{name}")


def test_a_cache_travels_to_workers(make_cache):
    cache = make_cache(12345)
    assert pickle.loads(pickle.dumps(cache)) == cache
    assert hash(cache) == hash(make_cache(12345))


def test_the_environment_names_the_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("VLM_CACHE", raising=False)
    monkeypatch.delenv("VLM_CACHE_GB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == ShardCache(tmp_path / "vlm" / "shards", 50_000_000_000)
    monkeypatch.setenv("VLM_CACHE", "/scratch/x")
    monkeypatch.setenv("VLM_CACHE_GB", "0.5")
    assert default_cache() == ShardCache(tmp_path.__class__("/scratch/x"), 500_000_000)
    for wrong in ("none", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("VLM_CACHE_GB", wrong)
        with pytest.raises(UsageError, match=f"VLM_CACHE_GB is '{wrong}'"):
            default_cache()


def test_threads_of_one_process_share_a_download(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    faulty_server.faults = [Fault(path=name, pause=0.01)]
    cache, url, found = make_cache(), f"{faulty_server.url}/{name}", []
    threads = [threading.Thread(target=lambda: found.append(cache.local_path(url))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(set(found)) == 1
    assert len(found) == 5
    assert len(faulty_server.gets(f"/{name}")) == 1


def test_use_is_noticed_to_the_moment(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    reader = ShardReader(f"{faulty_server.url}/{name}", cache := make_cache())
    (path,) = cache.folder.glob("*.tar")
    os.utime(path, ns=(1, 1))
    reader.read(0)
    assert time.time_ns() - path.stat().st_mtime_ns < 10**10


def test_signed_addresses_are_kept_whole_and_need_no_head(faulty_server, served, write_shards, make_cache):
    """Object stores sign an address for GET alone; its query holds every sign that patterns and shells know."""
    (name,) = write_shards(served, 1)
    query = "?X-Amz-Credential=AK%2F20250915%2Fs3&X-Amz-Signature=" + "a" * 400 + "&t=[1]&x-id=GetObject"
    faulty_server.faults = [Fault(path=name, methods=("HEAD",), times=float("inf"), status=403)]
    url = f"{faulty_server.url}/{name}{query}"
    assert expand_shards(url) == [url]
    assert len(read_all(url, make_cache())) == 4


def test_shards_of_one_name_in_several_folders_are_kept_apart(faulty_server, served, write_shards, make_cache):
    for number, folder in enumerate(("cats", "dogs"), start=2):
        (served / folder).mkdir()
        write_shards(served / folder, 1, samples=number)
    cache = make_cache()
    urls = expand_shards(f"{faulty_server.url}/{{cats,dogs}}/00.tar")
    assert count_samples(urls, cache=cache) == [2, 3]
    assert [len(read_all(url, cache)) for url in urls] == [2, 3]
