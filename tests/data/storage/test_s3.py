import logging

import pytest

from tests.data.storage.faulty import Fault, FaultyServer, proxy_answer, serving
from tests.data.storage.test_fetch import read_all
from vlm.data.shards import ShardReader, count_samples, expand_shards
from vlm.data.storage import remote
from vlm.data.storage.retry import Patience
from vlm.errors import UsageError, VlmError

pytest.importorskip("moto", reason="the S3 emulator moto is not installed: pip install 'moto[server]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'vlm[remote]'")

BUCKET = "pictures"


@pytest.fixture(scope="module")
def s3():
    """An S3 emulator behind a faulty server."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    emulator = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    emulator.start()
    try:
        with serving(proxy_answer(*emulator.get_host_and_port())) as server:
            yield server
    finally:
        emulator.stop()


@pytest.fixture
def bucket(s3: FaultyServer, served, write_shards, monkeypatch):
    """Three shards in `s3://pictures/set/`; their names."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3.faults = []
    names = write_shards(served, 3)
    system, _ = remote.open_system(f"s3://{BUCKET}/set/0.tar")
    if not system.exists(BUCKET):
        system.mkdir(BUCKET)
    for name in (*names, "readme.txt"):
        system.pipe_file(f"{BUCKET}/set/{name}", (served / name).read_bytes() if name in names else b"hello")
    s3.requests.clear()
    return names


def test_a_bucket_is_listed(bucket):
    wanted = [f"s3://{BUCKET}/set/{name}" for name in bucket]
    assert expand_shards(f"s3://{BUCKET}/set") == wanted
    assert expand_shards(f"s3://{BUCKET}/set/*.tar") == wanted
    with pytest.raises(UsageError, match=r"Nothing can be listed at .*nowhere"):
        expand_shards(f"s3://{BUCKET}/nowhere/")


@pytest.mark.parametrize(
    "faults",
    [[], [Fault(path=".tar", cut=4000)], [Fault(path=".tar", status=500, times=2)], [Fault(path=".tar", pause=0.01)]],
    ids=["none", "cut", "errors", "slow"],
)
def test_faults_of_s3_are_survived_with_the_same_samples(s3, bucket, served, make_cache, monkeypatch, faults):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 5000)
    s3.faults = [Fault(**vars(fault)) for fault in faults]
    addresses, cache = [f"s3://{BUCKET}/set/{name}" for name in bucket], make_cache()
    assert count_samples(addresses, cache=cache) == [4, 4, 4]
    for address, name in zip(addresses, bucket, strict=True):
        assert read_all(address, cache) == read_all(str(served / name))
    assert all(fault.times == 0 for fault in s3.faults)


def test_what_s3_does_not_have_or_give_is_named(s3, bucket, make_cache):
    address = f"s3://{BUCKET}/set/{bucket[0]}"
    with pytest.raises(UsageError, match=r"There is no shard 's3://pictures/set/9\.tar'"):
        ShardReader(f"s3://{BUCKET}/set/9.tar", make_cache())
    s3.faults = [Fault(path=".tar", status=403, methods=("GET", "HEAD"), times=100)]
    with pytest.raises(VlmError, match=rf"{address} may not be read: .*check the credentials"):
        ShardReader(address, make_cache())


def test_giving_up_on_s3_names_the_address(s3, bucket, make_cache):
    address = f"s3://{BUCKET}/set/{bucket[0]}"
    cache = make_cache(patience=Patience(attempts=1))  # s3fs itself tries each request several times
    s3.faults = [Fault(path=".tar", cut=10, times=1000)]
    with pytest.raises(VlmError, match=rf"{address} cannot be read: .*Given up after 1 attempts"):
        cache.local_path(address)
    s3.faults = []
    assert len(read_all(address, cache)) == 4
