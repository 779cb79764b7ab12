"""Shards of others are read by us, and ours by them."""

import gzip
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.selection_fixture import select_all
from tests.data.tar_fixture import write_tar
from vlm.data.pack import pack
from vlm.data.selection import Selection, write_selection
from vlm.data.shards import count_samples, expand_shards
from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.data.tar import ShardReader


@pytest.fixture
def written_by_webdataset(tmp_path, make_image):
    """Two shards of webdataset's own ShardWriter, its encoders used: pictures as arrays, metadata as objects."""
    import webdataset

    theirs: Any = webdataset
    with theirs.ShardWriter(str(tmp_path / "wds-%06d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(5):
            image = np.asarray(Image.open(io.BytesIO(make_image(number))))
            parts = {"png": image, "txt": f"caption {number}", "json": {"n": number}, "cls": number}
            writer.write({"__key__": f"sample{number:03d}"} | parts)
    return sorted(map(str, tmp_path.glob("wds-*.tar")))


def test_shards_of_webdatasets_writer_are_read(written_by_webdataset, make_image):
    assert count_samples(written_by_webdataset) == [3, 2]
    sample = ShardReader(written_by_webdataset[1]).read(1)
    assert (sample.key, sample.captions, sample.metadata) == ("sample004", {"": ("caption 4",)}, {"n": 4})
    ours, theirs = (np.asarray(Image.open(io.BytesIO(data))) for data in (sample.image, make_image(4)))
    assert np.array_equal(ours, theirs)


@pytest.fixture
def written_like_img2dataset(tmp_path, make_image):
    """A shard as img2dataset's webdataset writer lays it out: failed downloads are only in the parquet beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from webdataset.writer import TarWriter

    folder = tmp_path / "img2dataset"
    folder.mkdir()
    rows = []
    with TarWriter(str(folder / "00000.tar"), encoder=False) as tar:
        for number in range(6):
            status = "failed_to_download" if number == 2 else "success"
            told: dict[str, Any] = {"url": f"http://host/{number}.jpg", "key": f"00000{number:04d}", "status": status}
            told |= {
                "error_message": "404" if number == 2 else None,
                "width": 40,
                "height": 30,
                "caption": f"alt {number}",
            }
            rows.append(told)
            if status == "success":
                extension = "webp" if number == 3 else "jpg"
                image = make_image(number, kind="WEBP" if number == 3 else "JPEG")
                texts = {"txt": told["caption"].encode(), "json": json.dumps(told, indent=4).encode()}
                tar.write({"__key__": told["key"], extension: image} | texts)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    stats = {"count": 6, "successes": 5, "failed_to_download": 1}
    (folder / "00000_stats.json").write_text(json.dumps(stats))
    return folder


def test_a_folder_of_img2dataset_is_read_as_it_is(written_like_img2dataset, make_image):
    shards = expand_shards(str(written_like_img2dataset))
    assert count_samples(shards) == [5]
    reader = ShardReader(shards[0])
    read = [reader.read(number) for number in range(5)]
    assert [sample.key for sample in read] == [f"00000{number:04d}" for number in (0, 1, 3, 4, 5)]
    assert read[2].captions == {"": ("alt 3",)}
    assert read[2].image == make_image(3, kind="WEBP")
    assert read[2].metadata["url"] == "http://host/3.jpg"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_what_we_pack(written_like_img2dataset, make_image, tmp_path):
    import webdataset

    pack(open_source(str(written_like_img2dataset)), tmp_path / "ours")
    (shard,) = expand_shards(str(tmp_path / "ours"))
    reader: Any = webdataset
    pipeline = reader.WebDataset(shard, shardshuffle=False)
    read = list(pipeline.decode("pil").to_tuple("__key__", "jpg;webp", "txt", "json"))
    assert [key for key, *_ in read] == [f"00000{number:04d}" for number in (0, 1, 3, 4, 5)]
    assert [text for _, _, text, _ in read] == [f"alt {number}" for number in (0, 1, 3, 4, 5)]
    expected = Image.open(io.BytesIO(make_image(1))).convert("RGB")
    assert np.array_equal(np.asarray(read[1][1]), np.asarray(expected))
    assert read[1][3]["captions"] == ["alt 1"]


def test_a_selection_while_streaming_is_the_same_as_its_subset_packed(written_by_webdataset, tmp_path):
    shards = written_by_webdataset
    whole = select_all(shards)
    times = (np.array([1, 0, 1], np.uint16), np.array([0, 1], np.uint16))
    chosen = Selection(shards=whole.shards, times=times, lineage=({"step": "rule", "rule": "by hand"},))
    write_selection(tmp_path / "some.selection", chosen)
    options = SourceOptions(selection=tmp_path / "some.selection")
    pack(open_source("::".join(shards), options), tmp_path / "subset")
    (packed,) = expand_shards(str(tmp_path / "subset"))
    kept = [ShardReader(packed).read(number) for number in range(3)]
    assert [sample.key for sample in kept] == ["sample000", "sample002", "sample004"]
    manifest = json.loads((tmp_path / "subset" / "manifest.json").read_text())
    assert "by hand" in json.dumps(manifest)


def test_a_compressed_shard_is_packed_like_a_plain_one(tmp_path):
    write_tar(tmp_path / "0.tar", [""] * 3)
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    pack(open_source(str(tmp_path / "0.tar.gz")), tmp_path / "packed")
    (shard,) = expand_shards(str(tmp_path / "packed"))
    assert [ShardReader(shard).read(number).key for number in range(3)] == ["0-0", "0-1", "0-2"]
