import pytest

from tests.data.storage.conftest import BUCKET
from tests.data.storage.faulty_server import Fault
from tests.data.storage.test_fetch import read_all
from tests.index.conftest import ColourModel
from vlm.data.curation.filter import parse_filter
from vlm.data.curation.pipeline import FILTERS, curate
from vlm.data.selection import write_selection
from vlm.data.shards import count_samples, expand_shards
from vlm.data.tar import ShardReader
from vlm.errors import UsageError, VlmError
from vlm.index.embed import EmbedOptions, embed_into
from vlm.storage import RetryPolicy


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
def test_faults_of_s3_are_survived_with_the_same_samples(s3, bucket, served, make_cache, faults):
    s3.faults = [Fault(**vars(fault)) for fault in faults]
    urls, cache = [f"s3://{BUCKET}/set/{name}" for name in bucket], make_cache(block_bytes=5000)
    assert count_samples(urls, cache=cache) == [4, 4, 4]
    for url, name in zip(urls, bucket, strict=True):
        assert read_all(url, cache) == read_all(str(served / name))
    assert all(fault.times == 0 for fault in s3.faults)


def test_what_s3_does_not_have_or_give_is_named(s3, bucket, make_cache):
    url = f"s3://{BUCKET}/set/{bucket[0]}"
    with pytest.raises(UsageError, match=r"There is no shard 's3://pictures/set/9\.tar'"):
        ShardReader(f"s3://{BUCKET}/set/9.tar", make_cache())
    s3.faults = [Fault(path=".tar", status=403, methods=("GET", "HEAD"), times=100)]
    with pytest.raises(VlmError, match=rf"{url} may not be read: .*check the credentials"):
        ShardReader(url, make_cache())


def test_giving_up_on_s3_names_the_address(s3, bucket, make_cache):
    url = f"s3://{BUCKET}/set/{bucket[0]}"
    cache = make_cache(retry_policy=RetryPolicy(attempts=1))  # s3fs itself tries each request several times
    s3.faults = [Fault(path=".tar", cut=10, times=1000)]
    with pytest.raises(VlmError, match=rf"{url} cannot be read: .*Given up after 1 attempts"):
        cache.local_path(url)
    s3.faults = []
    assert len(read_all(url, cache)) == 4


def test_a_bucket_is_curated_and_embedded_as_the_folder_is(s3, bucket, served, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    places = {"near": str(served), "far": f"s3://{BUCKET}/set"}
    for place, shards in places.items():
        filters = [parse_filter("near-duplicates", FILTERS)]
        write_selection(tmp_path / f"{place}.selection", curate(expand_shards(shards), filters).selection)
        options = EmbedOptions(model_spec="colours", batch_size=3)
        embed_into(ColourModel(), expand_shards(shards), {"image": tmp_path / place}, options)
    assert (tmp_path / "near.selection").read_bytes() == (tmp_path / "far.selection").read_bytes()
    for number in range(len(bucket)):
        vectors = [(tmp_path / place / "parts" / f"part-{number:05d}.npy").read_bytes() for place in places]
        assert vectors[0] == vectors[1]
    assert any(request.path.endswith(".tar") for request in s3.requests)
