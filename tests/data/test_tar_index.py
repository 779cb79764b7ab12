import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data import tar_index
from vlm.data.tar_index import Span, open_index
from vlm.errors import UsageError, VlmError


def tar_bytes(members, **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def members_of(number: int):
    return [
        member
        for place in range(number)
        for member in [(f"k{place}.jpg", b"picture" * place), (f"k{place}.txt", b"text"), (f"k{place}.json", b"{}")]
    ]


@pytest.fixture
def write_tar(tmp_path):
    def write(data: bytes, name="0.tar") -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def entries_of(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def read(address: str, span: Span | None) -> bytes | None:
    with open(address, "rb") as file:
        return None if span is None else file.seek(span.offset) * b"" + file.read(span.size)


def test_each_part_lies_where_the_index_says(write_tar):
    address = write_tar(tar_bytes(members_of(5)))
    index = open_index(address)
    assert (len(index), index.damage, index.sample_keys()) == (5, "", [f"k{n}" for n in range(5)])
    assert read(address, index[3].image) == b"picture" * 3
    assert read(address, index[3].text) == b"text"
    assert index.image_bytes() == 7 * (1 + 2 + 3 + 4)


def test_the_key_ends_at_the_first_dot_and_keeps_its_folder(write_tar):
    names = ["a/1.jpg", "a/1.seg.png", "a/1.json", "b/1.JPEG", "b/2.webp", "b/2.cls", ".hidden.jpg", "plain"]
    index = open_index(write_tar(tar_bytes([(name, name.encode()) for name in names])))
    assert index.sample_keys() == ["a/1", "b/1", "b/2"]
    assert index[0].image is not None
    assert index[0].image.size == len("a/1.jpg")
    assert index[0].text is None
    assert index[1].image is not None


def test_long_and_foreign_names_are_whole(write_tar):
    names = ["x" * 150 + ".jpg", "folder/" * 30 + "y.jpg", "写真.jpg"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        index = open_index(write_tar(tar_bytes([(name, b"1") for name in names], format=form), f"{form}.tar"))
        assert index.sample_keys() == [name.removesuffix(".jpg") for name in names]


def test_links_and_folders_are_no_samples(write_tar):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in [("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.DIRTYPE)]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    assert len(open_index(write_tar(file.getvalue()))) == 0


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0.001, 0.999))
def test_a_tar_cut_anywhere_is_damaged_and_what_is_before_the_cut_is_kept(tmp_path_factory, share):
    whole = tar_bytes(members_of(6))
    end = entries_of(whole)[-1].offset_data + 512  # then come the end marks
    cut = int(share * end)
    path = tmp_path_factory.mktemp("cut") / "0.tar"
    path.write_bytes(whole[:cut])
    if cut < 512:
        with pytest.raises(VlmError, match="damaged from the start"):
            open_index(str(path))
        return
    index = open_index(str(path))
    assert index.damage
    assert index.sample_keys() == [f"k{n}" for n in range(len(index))]
    assert len(index) >= (cut - 512) // (3 * 1024)


def test_a_header_that_cannot_be_read_is_damage_not_the_end(write_tar):
    data = bytearray(tar_bytes(members_of(6)))
    header = entries_of(bytes(data))[9].offset
    data[header : header + 100] = b"\xff" * 100
    index = open_index(write_tar(bytes(data)))
    assert (index.damage, len(index)) == (f"unreadable header at byte {header:,}", 3)


def test_what_is_no_tar_is_refused(write_tar, tmp_path):
    with pytest.raises(VlmError, match="is not a tar"):
        open_index(write_tar(b"never a tar" * 200))
    with pytest.raises(UsageError, match="unpack it with gunzip"):
        open_index(write_tar(gzip.compress(tar_bytes(members_of(2))), "1.tar"))
    with pytest.raises(UsageError, match="There is no shard"):
        open_index(str(tmp_path / "none.tar"))


def test_the_index_is_scanned_once_and_again_when_the_tar_changes(write_tar, monkeypatch):
    scans = []
    plain_scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *arguments: scans.append(1) or plain_scan(*arguments))
    address = write_tar(tar_bytes(members_of(3)))
    assert len(open_index(address)) == 3
    tar_index._open_version.cache_clear()
    assert open_index(address).sample_keys() == ["k0", "k1", "k2"]
    assert len(scans) == 1
    write_tar(tar_bytes(members_of(4)))
    assert len(open_index(address)) == 4
    assert len(scans) == 2


def test_a_damaged_cache_is_replaced(write_tar, tmp_path):
    address = write_tar(tar_bytes(members_of(3)))
    open_index(address)
    tar_index._open_version.cache_clear()
    (tmp_path / ".0.tar.vlm-index").write_bytes(b"rubbish")
    assert len(open_index(address)) == 3


def test_a_read_only_folder_gets_its_index_elsewhere(write_tar, tmp_path):
    address = write_tar(tar_bytes(members_of(3)))
    tmp_path.chmod(0o555)
    try:
        assert len(open_index(address)) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    finally:
        tmp_path.chmod(0o755)
