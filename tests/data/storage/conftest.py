import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.storage.faulty_server import FaultyServer, folder_answer, proxy_answer, serving
from vlm import storage as remote
from vlm.data import shard_cache
from vlm.data.shard_cache import ShardCache
from vlm.storage import RetryPolicy

BUCKET = "pictures"
QUICK = RetryPolicy(attempts=4, seconds=20, first_wait=0.01, longest_wait=0.05)


@pytest.fixture
def served(tmp_path) -> Path:
    """The folder that `faulty_server` serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def faulty_server(served) -> Iterator[FaultyServer]:
    """A web server over the folder `served`; put faults into `.faults`, see what came in `.requests`."""
    with serving(folder_answer(served)) as server:
        yield server


@pytest.fixture
def make_cache(tmp_path):
    """Caches that give up soon; those of the same name share a folder."""

    def make(max_bytes: int = 1 << 30, *, name: str = "cache", retry_policy: RetryPolicy = QUICK, **more) -> ShardCache:
        return ShardCache(tmp_path / name, max_bytes, retry_policy, **more)

    return make


@pytest.fixture
def write_shards(make_image):
    """Write `number` shards of `samples` each into a folder, each picture with so many bytes after it; their names."""

    def write(folder: Path, number: int, *, samples: int = 4, padding: int = 0) -> list[str]:
        names = [f"{place:02d}.tar" for place in range(number)]
        for place, name in enumerate(names):
            members: list[tuple[str, bytes]] = []
            for sample in range(samples):
                key, image = f"{place}-{sample}", make_image(place * samples + sample)
                members += [(f"{key}.jpg", image + bytes(padding)), (f"{key}.txt", f"c{sample}".encode())]
            with tarfile.open(folder / name, "w") as tar:
                for member, data in members:
                    entry = tarfile.TarInfo(member)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        return names

    return write


@pytest.fixture(autouse=True)
def fresh_memory() -> None:
    """No test knows of files another one saw."""
    remote.clear_identity_cache()
    shard_cache.clear_manifest_cache()


@pytest.fixture(scope="session")
def s3() -> Iterator[FaultyServer]:
    """An S3 emulator behind a faulty server."""
    pytest.importorskip("moto", reason="the S3 emulator is not installed: pip install 'moto[s3]' flask flask-cors")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    emulator = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    emulator.start()
    try:
        with serving(proxy_answer(*emulator.get_host_and_port())) as server:
            remote.clear_file_systems()  # xdist may tear a session's fixture down and set it up again, at another port
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
