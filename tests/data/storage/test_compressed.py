import gzip
import io
import os
import tarfile
import zlib

import pytest

from tests.data.storage.faulty_server import Fault
from tests.data.storage.test_fetch import read_all
from vlm.data.shard_cache import Inflater
from vlm.data.shards import count_samples, expand_shards, shards_fingerprint
from vlm.data.sources.source_registry import open_source
from vlm.data.tar import ShardReader, open_index
from vlm.errors import UsageError, VlmError


@pytest.fixture
def packed(served, write_shards):
    """A shard of 4 samples, its plain bytes, and a function that compresses it beside itself."""
    (name,) = write_shards(served, 1)
    data = (served / name).read_bytes()

    def write(content: bytes, as_name: str = f"{name}.gz") -> str:
        (served / as_name).write_bytes(content)
        return as_name

    return name, data, write


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_compressed_shards_hold_the_same_samples(faulty_server, served, packed, make_cache, suffix, place):
    plain, data, write = packed
    name = write(gzip.compress(data), f"x{suffix}")
    url = f"{faulty_server.url}/{name}" if place == "remote" else str(served / name)
    faulty_server.faults = [Fault(path=name, cut=1000), Fault(path=name, status=500)]
    cache = make_cache()
    assert expand_shards(url) == [url]
    assert count_samples([url], cache=cache) == [4]
    assert read_all(url, cache) == read_all(str(served / plain))
    assert open_index(url, cache).fingerprint == shards_fingerprint_of(served / plain)
    if place == "remote":
        assert [seen.start for seen in faulty_server.gets(name)] == [None, 1000, 1000]


def shards_fingerprint_of(path) -> str:
    return open_index(str(path)).fingerprint


def test_the_default_cache_serves_readers_that_name_none(served, packed, monkeypatch, tmp_path):
    plain, data, write = packed
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "mine"))
    url = str(served / write(gzip.compress(data)))
    assert read_all(url) == read_all(str(served / plain))
    assert shards_fingerprint([url]) == shards_fingerprint([str(served / plain)])
    assert len(list((tmp_path / "mine").glob("*.tar"))) == 1


def test_files_of_several_gzip_members_and_padding_are_read_through(served, packed, make_cache):
    _, data, write = packed
    parts = [gzip.compress(data[start : start + 5000]) for start in range(0, len(data), 5000)]
    url = str(served / write(b"".join(parts) + bytes(700)))
    cache = make_cache()
    assert cache.local_path(url).read_bytes() == data
    assert open_index(url, cache).damage == ""


def test_a_gzip_cut_short_keeps_what_is_whole_and_says_so(served, packed, make_cache):
    _, data, write = packed
    compressed = gzip.compress(data)
    url = str(served / write(compressed[: len(compressed) // 2]))
    cache = make_cache()
    with pytest.raises(VlmError, match=r"damaged: its gzip is cut short at byte .*--allow-damage"):
        count_samples([url], cache=cache)
    assert 1 <= count_samples([url], allow_damage=True, cache=cache)[0] < 4
    assert ShardReader(url, cache).read(0).key == "0-0"


def test_flipped_bytes_in_a_gzip_are_damage_even_if_the_tar_looks_whole(served, packed, make_cache):
    _, data, write = packed
    compressed = bytearray(gzip.compress(data))
    compressed[-6] ^= 1  # in the checksum at its end
    url = str(served / write(bytes(compressed)))
    cache = make_cache()
    assert "incorrect data check" in open_index(url, cache).damage
    assert cache.local_path(url).read_bytes() == data[:-1]  # zlib gives no last byte without its check
    assert count_samples([url], allow_damage=True, cache=cache) == [4]


@pytest.mark.parametrize("content", [b"never a gzip" * 100, b"", gzip.compress(b"x" * 1000, mtime=0)[:10]])
def test_what_is_no_gzip_is_refused(served, packed, make_cache, content):
    *_, write = packed
    url = str(served / write(content))
    cache = make_cache()
    with pytest.raises(VlmError, match=r"0\.tar\.gz is not gzip, or damaged from the start"):
        open_index(url, cache)
    assert not list(cache.folder.glob("*.part"))


def test_bombs_are_refused_by_their_ratio_and_by_the_bound(served, packed, make_cache):
    *_, write = packed
    url = str(served / write(gzip.compress(bytes(64 << 20))))
    cache = make_cache()
    with pytest.raises(VlmError, match="more than 100 times its size"):
        open_index(url, cache)
    small = make_cache(1 << 20, name="small")
    with pytest.raises(UsageError, match=r"00\.tar\.gz has [\d,]+ bytes, but the cache .* may hold 1,048,576"):
        open_index(url, small)
    for folder in (cache.folder, small.folder):
        assert not [path for path in folder.iterdir() if path.suffix in (".part", ".tar")]


def test_a_tar_that_hides_its_compression_is_read_where_its_bytes_show_it(
    faulty_server, served, packed, monkeypatch, tmp_path
):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "mine"))
    plain, data, write = packed
    hidden = str(served / write(gzip.compress(data), "hidden.tar"))
    assert read_all(hidden) == read_all(str(served / plain))
    assert shards_fingerprint([hidden]) == shards_fingerprint([str(served / plain)])
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "hidden.tar").write_bytes(gzip.compress(data))
    assert len(open_source(str(alone))) == len(open_source(str(alone / "hidden.tar"))) == 4
    with pytest.raises(UsageError, match=r"rename it to end in \.tar\.gz, or unpack it with gunzip"):
        open_index(f"{faulty_server.url}/hidden.tar")


def test_folders_find_compressed_shards_but_not_the_same_one_twice(served, packed):
    plain, data, write = packed
    write(gzip.compress(data), "01.tar.gz")
    write(gzip.compress(data), "02.tgz")
    write(gzip.compress(data), "._03.tar.gz")
    names = [plain, "01.tar.gz", "02.tgz"]
    assert expand_shards(str(served)) == [str(served / name) for name in names]
    assert expand_shards(f"{served}/*gz") == [str(served / name) for name in names[1:]]
    write(gzip.compress(data), f"{plain}.gz")
    with pytest.raises(UsageError, match=rf"holds {plain}.* in more than one form"):
        expand_shards(str(served))


def test_what_came_before_an_error_inside_a_block_is_kept():
    plain = os.urandom(300_000)
    compressed = bytearray(zlib.compress(plain, wbits=31))
    compressed[200_000:200_100] = bytes(100)
    inflater = Inflater("x")
    found = b"".join(inflater.feed(bytes(compressed)))
    assert inflater.damage
    assert len(found) > 190_000
    assert found[:190_000] == plain[:190_000]


def test_data_pending_inside_zlib_is_not_lost():
    plain = bytes(3_000_000) + os.urandom(1000)
    inflater, found = Inflater("x"), io.BytesIO()
    compressed = zlib.compress(plain, wbits=31)
    for start in range(0, len(compressed), 7):
        for piece in inflater.feed(compressed[start : start + 7]):
            found.write(piece)
    inflater.finish()
    assert (inflater.damage, found.getvalue()) == ("", plain)


def test_a_tar_of_many_equal_bytes_is_no_bomb(served, packed, make_cache):
    *_, write = packed
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size = 8 << 20
        tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    url = str(served / write(gzip.compress(file.getvalue())))
    assert len(open_index(url, make_cache(64 << 20))) == 1
