import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.data.storage.faulty_server import Fault
from tests.waiting import wait_until
from vlm.data.shards import count_samples, expand_shards
from vlm.data.tar import ShardReader
from vlm.errors import UsageError, VlmError
from vlm.files import sha256_file
from vlm.storage import RetryPolicy, clear_identity_cache

FAULTS = {
    "none": [],
    "cut in the body": [Fault(path=".tar", cut=5000)],
    "cut again and again": [Fault(path=".tar", cut=9000, times=3)],
    "cut at once": [Fault(path=".tar", cut=0, times=3)],
    "errors at first": [Fault(path=".tar", status=500), Fault(path=".tar", status=503, times=2)],
    "errors of the size": [Fault(path=".tar", status=500, methods=("HEAD", "GET"), times=4)],
    "too many requests": [Fault(path=".tar", status=429, times=2)],
    "slow": [Fault(path=".tar", pause=0.02)],
    "promises too much": [Fault(path=".tar", length=1000)],
    "promises too little": [Fault(path=".tar", length=-1000)],
}


def read_all(url, cache=None):
    reader = ShardReader(url, cache)
    samples = [reader.read(number) for number in range(len(reader))]
    reader.close()
    return samples


@pytest.mark.parametrize("ignores_range", [False, True], ids=["with ranges", "without ranges"])
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_each_fault_is_survived_with_the_same_samples(
    faulty_server, served, write_shards, make_cache, faults, ignores_range
):
    (name,) = write_shards(served, 1)
    faulty_server.faults = [Fault(**vars(fault)) for fault in faults]
    faulty_server.ignores_range = ignores_range
    cache = make_cache()
    assert read_all(f"{faulty_server.url}/{name}", cache) == read_all(str(served / name))
    assert cache.local_path(f"{faulty_server.url}/{name}").read_bytes() == (served / name).read_bytes()
    assert all(fault.times == 0 for fault in faulty_server.faults)


def test_after_a_cut_only_the_rest_is_asked_for(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    faulty_server.faults = [Fault(path=name, cut=5000)]
    make_cache().local_path(f"{faulty_server.url}/{name}")
    assert [seen.start for seen in faulty_server.gets(name)] == [None, 5000]


def test_giving_up_names_address_cause_attempts_and_cure(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    url = f"{faulty_server.url}/{name}"
    faulty_server.faults = [Fault(path=name, cut=5000), Fault(path=name, status=503, times=10)]
    with pytest.raises(VlmError, match=rf"{url} cannot be read: .*503.*after 4 attempts.*run again: .* kept"):
        make_cache().local_path(url)
    assert [seen.start for seen in faulty_server.gets(name)] == [None, 5000, 5000, 5000]
    faulty_server.faults.clear()
    make_cache().local_path(url)
    assert faulty_server.gets(name)[-1].start == 5000


def test_giving_up_counts_time_too(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    faulty_server.faults = [Fault(path=name, methods=("GET", "HEAD"), status=500, times=1000)]
    retry_policy = RetryPolicy(attempts=1000, seconds=0.2, first_wait=0.02, longest_wait=0.02)
    with pytest.raises(VlmError, match=r"500.*Given up after \d+ attempts in 0 s"):
        ShardReader(f"{faulty_server.url}/{name}", make_cache(retry_policy=retry_policy))


def test_a_server_that_is_not_there_is_named(make_cache, free_port):
    url = f"http://127.0.0.1:{free_port()}/0.tar"
    with pytest.raises(VlmError, match=f"{url} cannot be read: .*Connect.*Given up after 4 attempts"):
        ShardReader(url, make_cache())


@pytest.mark.parametrize(
    ("status", "kind", "said"), [(404, UsageError, "There is no shard"), (403, VlmError, "may not be read")]
)
def test_what_is_absent_or_forbidden_is_not_tried_again(
    faulty_server, served, write_shards, make_cache, status, kind, said
):
    (name,) = write_shards(served, 1)
    faulty_server.faults = [Fault(path=name, methods=("GET", "HEAD"), status=status, times=100)]
    with pytest.raises(kind, match=said):
        ShardReader(f"{faulty_server.url}/{name}", make_cache())
    assert len(faulty_server.requests) == 2  # HEAD, then GET for servers that know no HEAD


KILLED = """
import sys
from pathlib import Path
from vlm.data.shard_cache import ShardCache
ShardCache(Path(sys.argv[1]), 1 << 30).local_path(sys.argv[2])
"""


def test_a_killed_fetch_is_resumed(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1, padding=50_000)
    url, cache = f"{faulty_server.url}/{name}", make_cache()
    faulty_server.faults = [Fault(path=name, pause=0.05)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(cache.folder), url])
    wait_until(lambda: any(part.stat().st_size > 20_000 for part in cache.folder.glob("*.part")), seconds=20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = cache.folder.glob("*.part")
    have = part.stat().st_size
    assert cache.local_path(url).read_bytes() == (served / name).read_bytes()
    assert [seen.start for seen in faulty_server.gets(name)] == [None, have]


def test_a_changed_file_is_fetched_anew(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    url, cache = f"{faulty_server.url}/{name}", make_cache()
    assert len(read_all(url, cache)) == 4
    write_shards(served, 1, samples=6)
    assert len(read_all(url, cache)) == 4  # a run sees one version
    clear_identity_cache()
    assert read_all(url, cache) == read_all(str(served / name))


def test_a_half_fetched_file_that_changed_is_not_gone_on_with(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    url, cache = f"{faulty_server.url}/{name}", make_cache()
    faulty_server.faults = [Fault(path=name, cut=5000), Fault(path=name, status=500, times=3)]
    with pytest.raises(VlmError, match="Given up after 4"):
        cache.local_path(url)
    os.utime(served / name, ns=(1, 1))
    clear_identity_cache()
    faulty_server.requests.clear()
    cache.local_path(url)
    assert [seen.start for seen in faulty_server.gets(name)] == [None]


def test_a_file_that_changes_during_a_run_is_refused(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    url, cache = f"{faulty_server.url}/{name}", make_cache()
    reader = ShardReader(url, cache)
    for path in cache.folder.glob("*.tar"):
        path.unlink()
    os.utime(served / name, ns=(1, 1))
    with pytest.raises(VlmError, match=rf"{url} changed since it was first looked at .*start again"):
        reader.read(0)
    assert not list(cache.folder.glob("*.part"))


def write_manifest_of(folder, name, sha256):
    record = {"bytes": (folder / name).stat().st_size, "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps({"kind": "shards", "files": {name: record}}))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_wrong_bytes_are_found_by_their_checksum_and_fetched_again(
    faulty_server, served, write_shards, make_cache, suffix
):
    (name,) = write_shards(served, 1)
    name, data = name + suffix, (served / name).read_bytes()
    (served / name).write_bytes(gzip.compress(data) if suffix else data)
    write_manifest_of(served, name, sha256_file(served / name))
    url = f"{faulty_server.url}/{name}"
    faulty_server.faults = [Fault(path=name, flip=3000)]
    assert make_cache().local_path(url).read_bytes() == data
    assert [seen.start for seen in faulty_server.gets(name)] == [None, None]


def test_bytes_that_stay_wrong_are_an_error(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    write_manifest_of(served, name, "0" * 64)
    url, cache = f"{faulty_server.url}/{name}", make_cache()
    with pytest.raises(VlmError, match=rf"{url} came twice with the checksum \w+, where 0{{64}} .* copy it again"):
        cache.local_path(url)
    assert not list(cache.folder.glob("*.part"))
    assert not list(cache.folder.glob("*.tar"))


def test_a_manifest_is_asked_for_once_and_believed_for_its_size_alone(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 3)
    write_manifest_of(served, names[0], "0" * 64)
    with open(served / names[0], "ab") as file:
        file.write(bytes(512))
    for name in names:
        make_cache().local_path(f"{faulty_server.url}/{name}")
    assert len(faulty_server.gets("manifest.json")) == 1


def test_a_page_instead_of_a_manifest_or_an_index_is_no_harm(faulty_server, served, write_shards, make_cache):
    (name,) = write_shards(served, 1)
    for other in ("manifest.json", f".{name}.vlm-index"):
        (served / other).write_text("<html>welcome</html>")
    assert len(read_all(f"{faulty_server.url}/{name}", make_cache())) == 4


def test_an_index_beside_a_remote_tar_spares_fetching_it(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 2)
    for name in names:
        ShardReader(str(served / name)).close()
    os.truncate(served / names[1], (served / names[1]).stat().st_size - 512)  # its index is now of another size
    urls = [f"{faulty_server.url}/{name}" for name in names]
    assert count_samples(urls, cache=make_cache()) == [4, 4]
    assert not faulty_server.gets(f"/{names[0]}")
    assert faulty_server.gets(f"/{names[1]}")


def test_remote_folders_are_listed(faulty_server, served, write_shards):
    (served / "set").mkdir()
    names = write_shards(served / "set", 3)
    (served / "set" / "manifest.json").write_text("{}")
    wanted = [f"{faulty_server.url}/set/{name}" for name in names]
    assert expand_shards(f"{faulty_server.url}/set/") == wanted
    assert expand_shards(f"{faulty_server.url}/set/0[01]*.tar") == wanted[:2]
    assert expand_shards(f"{faulty_server.url}/set/{{00..02}}.tar") == wanted
    with pytest.raises(UsageError, match=r"Nothing can be listed at .*give the shards by name"):
        expand_shards(f"{faulty_server.url}/other/")
    (served / "set" / "manifest.json").rename(served / "set" / "progress.json")
    with pytest.raises(UsageError, match="is unfinished"):
        expand_shards(f"{faulty_server.url}/set/")


def test_many_remote_shards_are_counted_together(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 9, samples=2)
    faulty_server.faults = [Fault(path=names[4], cut=3000), Fault(path=names[7], status=500, methods=("HEAD", "GET"))]
    assert count_samples([f"{faulty_server.url}/{name}" for name in names], cache=make_cache()) == [2] * 9
    clear_identity_cache()
    (served / names[5]).unlink()
    with pytest.raises(UsageError, match=f"There is no shard .*{names[5]}"):
        count_samples([f"{faulty_server.url}/{name}" for name in names], cache=make_cache())


def test_an_unknown_host_is_told_at_once(monkeypatch, capsys):
    import socket

    from vlm.storage import fetch_identity

    def unknown(*arguments, **named):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    # no name server is asked, whatever network there is
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    pauses = RetryPolicy(first_wait=0.01)
    with pytest.raises(VlmError, match=r"the name of its server is not known .*no network, or the URL is misspelt"):
        fetch_identity("http://nowhere.invalid/00000.tar", pauses)


def test_the_hub_is_not_asked_again_and_again_while_it_is_switched_off(monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    from vlm.storage import Retry

    retry = Retry("hf://datasets/a/b/00000.tar", RetryPolicy())
    with pytest.raises(VlmError, match="HF_HUB_OFFLINE is set"):
        retry.after(OfflineModeIsEnabled("offline"))
    assert retry.num_failures == 0


@pytest.mark.parametrize("verb", ["inspect", "train"])
def test_verbs_fail_at_once_while_the_hub_is_switched_off(verb, monkeypatch, tmp_path, capsys):
    from vlm.cli.main import main

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vlm.storage.Retry.wait", lambda *arguments: pytest.fail("it waits for another attempt"))
    words = {"inspect": ["inspect"], "train": ["train", "tiny", "--run", str(tmp_path / "run"), "--data"]}[verb]
    assert main([*words, "hf://datasets/someone/nothing/{00000..00003}.tar"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
