import multiprocessing
import threading
import time

from tests.data.storage.faulty_server import Fault
from tests.data.storage.test_fetch import read_all
from tests.waiting import wait_until
from vlm.data.shard_cache import Prefetcher
from vlm.data.shards import count_samples
from vlm.data.tar import ShardReader


def cached(cache, urls):
    return [cache.touch(url) for url in urls]


def test_wanted_shards_are_there_before_they_are_read(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 6)
    urls, cache = [f"{faulty_server.url}/{name}" for name in names], make_cache()
    with Prefetcher(cache, urls) as prefetcher:
        prefetcher.request([4, 1])
        wait_until(lambda: cached(cache, urls) == [False, True, False, False, True, False], seconds=20)
        prefetcher.request([1, 0])
        wait_until(lambda: cache.touch(urls[0]), seconds=20)
    assert read_all(urls[4], cache) == read_all(str(served / names[4]))
    assert len(faulty_server.gets(f"/{names[4]}")) == 1


def test_no_more_is_fetched_than_fits_and_the_next_comes_when_there_is_room(
    faulty_server, served, write_shards, make_cache
):
    names = write_shards(served, 6)
    urls = [f"{faulty_server.url}/{name}" for name in names]
    cache = make_cache(int(3.7 * (served / names[0]).stat().st_size))
    with Prefetcher(cache, urls) as prefetcher:
        prefetcher.request(range(6))
        wait_until(lambda: cached(cache, urls[:3]) == [True] * 3, seconds=20)
        time.sleep(0.1)
        assert cached(cache, urls) == [True] * 3 + [False] * 3
        prefetcher.request(range(2, 6))
        wait_until(lambda: cached(cache, urls[2:5]) == [True] * 3, seconds=20)
    assert not faulty_server.gets(f"/{names[5]}")
    assert [len(faulty_server.gets(f"/{name}")) for name in names[:5]] == [1] * 5


def test_failures_are_left_to_the_reader(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 3)
    urls, cache = [f"{faulty_server.url}/{name}" for name in names], make_cache()
    (served / names[0]).rename(served / "away.tar")
    with Prefetcher(cache, urls, threads=1) as prefetcher:
        prefetcher.request([0, 1])
        wait_until(lambda: cache.touch(urls[1]), seconds=20)
        (served / "away.tar").rename(served / names[0])
        assert len(read_all(urls[0], cache)) == 4


def test_closing_calls_off_what_is_slow_and_keeps_it(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1, padding=200_000)
    url, cache = f"{faulty_server.url}/{name}", make_cache()
    faulty_server.faults = [Fault(path=name, pause=0.05)]
    prefetcher = Prefetcher(cache, [url])
    prefetcher.request([0])
    wait_until(lambda: any(part.stat().st_size > 10_000 for part in cache.folder.glob("*.part")), seconds=20)
    started = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - started < 4
    prefetcher.request([0])
    assert cache.local_path(url).read_bytes() == (served / name).read_bytes()
    assert [seen.start is None for seen in faulty_server.gets(name)] == [True, False]


def test_shards_of_this_machine_cost_no_thread(served, write_shards, make_cache):
    names = write_shards(served, 2)
    with Prefetcher(make_cache(), [str(served / name) for name in names]) as prefetcher:
        prefetcher.request([0, 1])
        assert not [thread for thread in threading.enumerate() if thread.name == "vlm-prefetch"]


def _read_in_child(urls, cache, found):
    found.put([sample.key for url in urls for sample in read_all(url, cache)])


def test_forked_workers_read_while_the_parent_fetches(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 8, padding=20_000)
    urls, cache = [f"{faulty_server.url}/{name}" for name in names], make_cache()
    faulty_server.faults = [Fault(path=name, pause=0.002) for name in names]
    wanted = [f"{place}-{number}" for place in range(8) for number in range(4)]
    forking = multiprocessing.get_context("fork")
    with Prefetcher(cache, urls) as prefetcher:
        prefetcher.request(range(8))
        ShardReader(urls[0], cache)  # the event loop of fsspec runs by now
        found = forking.Queue()
        children = [forking.Process(target=_read_in_child, args=(urls, cache, found)) for _ in range(2)]
        for child in children:
            child.start()
        assert [found.get(timeout=60) for _ in children] == [wanted] * 2
        for child in children:
            child.join(20)
            assert child.exitcode == 0
    assert count_samples(urls, cache=cache) == [4] * 8
    assert [len(faulty_server.gets(f"/{name}")) for name in names] == [1] * 8
