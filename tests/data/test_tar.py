import contextlib
import gzip
import io
import re
import subprocess
import sys
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.tar import ShardReader, Span, open_index
from vlm.data.tar_entries import TarEntries
from vlm.errors import BadSample, UsageError, VlmError


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


def read(url: str, span: Span | None) -> bytes | None:
    with open(url, "rb") as file:
        return None if span is None else file.seek(span.offset) * b"" + file.read(span.size)


def test_each_part_lies_where_the_index_says(write_tar):
    url = write_tar(tar_bytes(members_of(5)))
    index = open_index(url)
    assert (len(index), index.damage, index.sample_keys()) == (5, "", [f"k{n}" for n in range(5)])
    assert read(url, index[3].image) == b"picture" * 3
    assert read(url, index[3].text) == b"text"
    assert index.image_bytes() == 7 * (1 + 2 + 3 + 4)


def test_the_key_ends_at_the_first_dot_and_keeps_its_folder(write_tar):
    names = ["a/1.jpg", "a/1.seg.png", "a/1.json", "b/1.JPEG", "b/2.webp", "b/2.cls", ".hidden.jpg", "plain"]
    index = open_index(write_tar(tar_bytes([(name, name.encode()) for name in names])))
    assert index.sample_keys() == ["a/1", "b/1", "b/2"]
    assert index[0].image is not None
    assert index[0].image.size == len("a/1.jpg")
    assert index[0].text is None
    assert index[1].image is not None


def test_members_of_one_name_side_by_side_are_samples_of_one_key(write_tar):
    names = ["a.jpg", "a.txt", "a.jpg", "a.txt", "a.txt", "b.json", "b.v.npy", "b.jpg", "b.v.npy", "b.cls", "b.cls"]
    url = write_tar(tar_bytes([(name, f"{number}".encode()) for number, name in enumerate(names)]))
    index = open_index(url)
    parts = [[read(url, span) for span in (*index[n][1:4], index[n].arrays.get("v"))] for n in range(len(index))]
    assert index.sample_keys() == ["a", "a", "a", "b", "b"]
    assert parts == [
        [b"0", b"1", None, None],
        [b"2", b"3", None, None],
        [None, b"4", None, None],
        [b"7", None, b"5", b"6"],
        [None, None, None, b"8"],
    ]


def test_of_images_under_several_extensions_the_first_is_the_samples(write_tar):
    names = ["a.jpg", "a.png", "a.txt", "a.jpg", "a.png", "a.txt", "b.WEBP", "b.jpg", "b.webp"]
    url = write_tar(tar_bytes([(name, f"{number}".encode()) for number, name in enumerate(names)]))
    index = open_index(url)
    assert index.sample_keys() == ["a", "a", "b", "b"]
    assert [read(url, index[number].image) for number in range(4)] == [b"0", b"3", b"6", b"8"]


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
    with pytest.raises(UsageError, match=r"rename it to end in \.tar\.gz, or unpack it with gunzip"):
        TarEntries(io.BytesIO(gzip.compress(tar_bytes(members_of(2)))), "1.tar")
    with pytest.raises(UsageError, match="There is no shard"):
        open_index(str(tmp_path / "none.tar"))


def header(name: str, size: int = 0, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


def signed(block: bytes) -> bytes:
    """A header with its checksum made right again."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def with_size(block: bytes, field: bytes) -> bytes:
    return signed(block[:124] + field.ljust(12, b"\0") + block[136:])


GOOD = tar_bytes(members_of(1))[: 3 * 1024 - 512]
NEGATIVE = b"\xff" * 12
HUGE = b"\x80" + b"\x7f" * 11


@pytest.mark.parametrize(
    "rest",
    [
        with_size(header("x.jpg"), HUGE),
        with_size(header("x.jpg"), NEGATIVE),
        with_size(header("x", kind=tarfile.XHDTYPE), NEGATIVE),
        with_size(header("x", kind=tarfile.GNUTYPE_LONGNAME), NEGATIVE),
        with_size(header("x", kind=tarfile.GNUTYPE_LONGNAME), HUGE),
        header("x", 7 << 30, kind=tarfile.XHDTYPE) + bytes(4096),
        header("x", 7 << 30, kind=tarfile.XGLTYPE) + bytes(4096),
        header("x", 512, kind=tarfile.XHDTYPE) + b"30 path=".ljust(512, b"\xfe") + header("y.jpg"),
        header("x", 512, kind=tarfile.XHDTYPE) + b"13 size=-512\n".ljust(512, b"\0") + header("y.jpg"),
        header("x", 512, kind=tarfile.XHDTYPE) + b"0 path=x\n".ljust(512, b"\0") + header("y.jpg"),
        header("x", 512, kind=tarfile.XHDTYPE) * 3000,
        header("x", 512, kind=tarfile.XHDTYPE) + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
        + header("y.jpg", 512) + b"99999999999\n".ljust(512, b"1"),
        signed(header("x", kind=b"S")[:386] + b"\xff" * 96 + b"\1" + header("x")[483:]) * 3,
        with_size(header("x.jpg"), b"zzzz"),
        bytes(512) + b"rubbish" * 100,
    ],
)  # fmt: skip
def test_absurd_headers_are_damage_at_most(write_tar, rest):
    url = write_tar(GOOD + rest)
    index = open_index(url)
    assert index.sample_keys()[0] == "k0"
    assert index[0].image is not None
    assert index[0].image.offset == 512
    alone = write_tar(rest, "alone.tar")
    with contextlib.suppress(VlmError):
        assert len(open_index(alone)) <= 1


def test_names_are_only_names(write_tar):
    names = ["../../etc/passwd.jpg", "/etc/shadow.jpg", "a\\b.jpg"]
    assert open_index(write_tar(tar_bytes([(name, b"1") for name in names]))).sample_keys() == [
        "../../etc/passwd", "/etc/shadow", "a\\b"
    ]  # fmt: skip


def test_names_that_are_no_text_stay_distinct(write_tar):
    data = b"".join(
        signed(header("xx.jpg", 1).replace(b"xx.jpg", b"\xff%c.jpg" % letter, 1)) + b"1".ljust(512, b"\0")
        for letter in b"\x80\x81"
    )
    index = open_index(write_tar(data + bytes(1024)))
    assert (index.damage, index.sample_keys()) == ("", ["\\udcff\\udc80", "\\udcff\\udc81"])


def test_devices_pipes_and_sparse_files_are_no_samples(write_tar):
    kinds = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
    data = b"".join(header(f"{place}.jpg", kind=kind) for place, kind in enumerate(kinds))
    index = open_index(write_tar(GOOD + data + bytes(1024)))
    assert index.sample_keys() in (["k0"], ["k0", "4"])  # a kind of file nobody knows counts as plain


@st.composite
def mutated_tars(draw) -> bytes:
    """A tar of three samples in which a few pieces, mostly of headers, are something else."""
    whole = bytearray(tar_bytes(members_of(3), format=draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(whole) - 1))
        piece = draw(st.binary(min_size=1, max_size=16))
        whole[start : start + len(piece)] = piece
        if draw(st.booleans()):
            block = start // 512 * 512
            whole[block : block + 512] = signed(bytes(whole[block : block + 512]).ljust(512, b"\0"))
    return bytes(whole)


def entries_and_damage(data: bytes, skipped: int = 0) -> tuple[list[tuple[str, int, int]], str]:
    """Name, place and size of each entry, and the damage without numbers, which tell places."""
    entries = TarEntries(io.BytesIO(data), "0.tar")
    try:
        read = [(name, offset - skipped, size) for name, offset, size in entries]
    except VlmError:
        return [], "from the start"
    return read, re.sub(r"[0-9,]+", "", entries.damage)


@settings(deadline=None, max_examples=300)
@given(whole=mutated_tars())
def test_headers_read_the_fast_way_say_what_tarfile_says(whole):
    entries, damage = entries_and_damage(whole)
    # behind a folder, which is no plain header, tarfile reads all of them
    expected, expected_damage = entries_and_damage(header("folder/", kind=tarfile.DIRTYPE) + whole, skipped=512)
    assert entries == expected
    assert damage == expected_damage or (not entries and expected_damage)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_entries_of_a_sound_tar_are_those_of_tarfile(form):
    names = ["a.jpg", "folder/b.jpg", "n" * 100, "d" * 90 + "/" + "n" * 90] + (["ü" * 80] if form else [])
    data = tar_bytes([(name, name.encode() * place) for place, name in enumerate(names)], format=form)
    entries = TarEntries(io.BytesIO(data), "0.tar")
    assert list(entries) == [(entry.name, entry.offset_data, entry.size) for entry in entries_of(data)]
    assert entries.damage == ""


@settings(deadline=None, max_examples=150)
@given(whole=mutated_tars())
def test_mutated_tars_end_in_an_index_or_a_clear_error(tmp_path_factory, whole):
    path = tmp_path_factory.mktemp("mutated") / "0.tar"
    path.write_bytes(whole)
    with contextlib.suppress(VlmError):
        reader = ShardReader(str(path))
        for number in range(len(reader)):
            with contextlib.suppress(BadSample):
                assert reader.read(number).key == reader.key_and_offset(number)[0]
        reader.close()


def test_the_index_is_scanned_once_and_again_when_the_tar_changes(write_tar, tmp_path):
    def written() -> tuple[int, int]:
        status = (tmp_path / ".0.tar.vlm-index").stat()
        return status.st_ino, status.st_mtime_ns

    url = write_tar(tar_bytes(members_of(3)))
    assert len(open_index(url)) == 3
    first = written()
    assert open_index(respelled(url)).sample_keys() == ["k0", "k1", "k2"]
    assert written() == first
    write_tar(tar_bytes(members_of(4)))
    assert len(open_index(url)) == 4
    assert written() != first


def test_a_damaged_cache_is_replaced(write_tar, tmp_path):
    url = write_tar(tar_bytes(members_of(3)))
    open_index(url)
    (tmp_path / ".0.tar.vlm-index").write_bytes(b"rubbish")
    assert len(open_index(respelled(url))) == 3


def respelled(url: str) -> str:
    """The path of the same file in other letters, so that what this process remembers of it does not serve."""
    folder, _, name = url.rpartition("/")
    return f"{folder}/./{name}"


def test_a_read_only_folder_gets_its_index_elsewhere(write_tar, tmp_path):
    url = write_tar(tar_bytes(members_of(3)))
    tmp_path.chmod(0o555)
    try:
        assert len(open_index(url)) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    finally:
        tmp_path.chmod(0o755)


def test_an_index_is_made_and_read_without_pandas(write_tar):
    code = (
        "import sys; from vlm.data.tar import open_index; print(len(open_index(sys.argv[1])), 'pandas' in sys.modules)"
    )
    path = write_tar(tar_bytes(members_of(3)))
    for _ in range(2):  # made by the first process, read by the second
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["3", "False"]
