import pytest

from vlm import storage as urls
from vlm.data.shards import expand_shards
from vlm.data.tar import ShardReader
from vlm.errors import UsageError
from vlm.storage import is_compressed, is_remote, local_path, needs_cache, sibling_url, url_basename


@pytest.mark.parametrize("url", ["http://h/a.tar", "https://h/a.tar", "s3://b/a.tar", "gs://b/a.tar", "hf://x/a.tar"])
def test_allowed_protocols_are_remote(url):
    assert is_remote(url)
    assert needs_cache(url)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe://cat.tar",
        "ssh://host/a.tar",
        "sftp://host/a.tar",
        "ftp://host/a.tar",
        "zip://a.tar::http://h/a.zip",
        "simplecache::s3://bucket/a.tar",
        "github://owner:repo@/a.tar",
        "data:text/plain,x.tar",
        "HDFS://host/a.tar",
    ],
)
def test_other_protocols_are_refused_by_name(url):
    for use in (expand_shards, ShardReader):
        with pytest.raises(UsageError, match=r"(?i)The protocol '\w+' of .*http://, https://, s3://"):
            use(url)


def test_files_of_this_machine_stay_local_whatever_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:2024.tar").touch()
    (tmp_path / "ftp:old").mkdir()
    for url in ("data:2024.tar", "ftp:old/a.tar", "/data/a.tar", "file:///data/a.tar", "train:1.tar", "C:/a.tar"):
        assert not is_remote(url)
    assert local_path("file:///data/a%20b.tar") == "/data/a b.tar"
    assert expand_shards(f"file://{tmp_path}/data:2024.tar") == [f"{tmp_path}/data:2024.tar"]


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(urls.PROTOCOLS, "s3", "no_such_package")
    with pytest.raises(UsageError, match=r"no_such_package; install it with: pip install no_such_package"):
        ShardReader("s3://bucket/a.tar")


def test_the_parts_of_web_addresses_end_at_their_query():
    url = "https://host/a/B.TAR.GZ?key=1/2.tar"
    assert url_basename(url) == "B.TAR.GZ"
    assert is_compressed(url)
    assert sibling_url(url, "manifest.json") == "https://host/a/manifest.json"
    assert url_basename("s3://bucket/a?b.tar") == "a?b.tar"


def test_hosts_may_be_numbers_with_colons():
    found = expand_shards("http://[::1]:80/0.tar::http://[fe80::2]/{0..1}.tar")
    assert found == ["http://[::1]:80/0.tar", "http://[fe80::2]/0.tar", "http://[fe80::2]/1.tar"]


def test_addresses_that_pathlib_writes_are_read_back(tmp_path):
    folder = tmp_path / "my data #1 100% [x]"
    folder.mkdir()
    shard = folder / "sh ard é.tar"
    shard.write_bytes(b"")
    assert expand_shards(folder.as_uri()) == expand_shards(shard.as_uri()) == expand_shards(str(shard)) == [str(shard)]
