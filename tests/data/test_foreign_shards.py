"""Shards as other tools and people write them: odd names, odd images, other encodings, nothing at all."""

import io
import json
import tarfile

import pyarrow as pa
import pytest

from vlm.data.decode import EncodedImage
from vlm.data.inspection.findings import contact_sheet
from vlm.data.inspection.inspection import inspect_shards
from vlm.data.pack import PackConfig, pack
from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import open_source, recognise_source
from vlm.data.tar import ShardReader, TarIndex
from vlm.errors import BadSample, UsageError


@pytest.fixture
def write_tar(tmp_path):
    def write(name, members) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return str(path)

    return write


def why_unusable(url: str, number: int) -> str:
    reader = ShardReader(url)
    with pytest.raises(BadSample) as error:
        reader.read(number)
    reader.close()
    return str(error.value)


def test_names_with_dots_are_named_as_the_cause_and_packed_on_request(write_tar, make_image):
    names = ["235342 Track 2.0 (Clean)", "img_v1.2_001", "img_v1.2_002"]
    members = []
    for number, name in enumerate(names):
        members += [(f"{name}.jpg", make_image(number)), (f"{name}.txt", name.encode())]
    url = write_tar("dots.tar", members)
    told = why_unusable(url, 0)
    assert "no image: key '235342 Track 2'" in told
    assert "'0 (clean).jpg', '0 (clean).txt': a key ends at the first dot of the name" in told
    assert "vlm pack --kind texts" in told
    pairs = open_source(url, SourceOptions(kind="texts"))
    captions = [text for number in range(len(pairs)) for text in pairs.read(number).captions[""]]
    assert captions == names


def test_of_several_images_a_sample_each_is_named(write_tar, make_image):
    url = write_tar("0.tar", [("7.depth.png", make_image(1)), ("7.image.png", make_image(2)), ("7.json", b"{}")])
    assert "but 'depth.png', 'image.png', 'json'" in why_unusable(url, 0)


def test_one_of_several_images_a_sample_is_packed_by_its_name(write_tar, make_image, tmp_path):
    lefts, rights = [make_image(0), make_image(1)], [make_image(2), make_image(3)]
    members = []
    for number in range(2):
        members += [(f"{number}.LEFT.JPG", lefts[number]), (f"{number}.right.jpg", rights[number])]
        members += [(f"{number}.txt", f"jug {number}".encode())]
    # of another sample the same name comes twice, which begins a sample of its own
    members += [("2.txt", b"a cat"), ("2.txt", b"a dog"), ("2.right.png", rights[0])]
    url = write_tar("several.tar", members)
    assert "vlm pack --image-name left takes 0.left.… as the image of 0" in why_unusable(url, 0)
    with pytest.raises(UsageError, match="--image-name left"):
        open_source(url)
    for name, images in (("left", lefts), ("right", [*rights, rights[0]])):
        pairs, _ = recognise_source(url, SourceOptions(image_name=name))
        assert len(pairs) == 4
        summary = pack(pairs, tmp_path / name, PackConfig(max_bad_share=1))
        packed = open_source(str(tmp_path / name))
        samples = [packed.read(number) for number in range(len(packed))]
        assert [sample.image for sample in samples] == images
        assert [sample.captions[""] for sample in samples][:2] == [("jug 0",), ("jug 1",)]
        assert summary.bad == 4 - len(images)
    assert samples[2].captions[""] == ("a dog",)


def test_a_name_that_no_image_has_is_said(write_tar, make_image):
    url = write_tar("0.tar", [("7.left.jpg", make_image(1)), ("7.txt", b"a jug")])
    with pytest.raises(BadSample, match=r"key '7' has no image 7\.top\.jpg"):
        open_source(url, SourceOptions(image_name="top")).read(0)
    one = open_source(url, SourceOptions(image_name="left"))
    assert one.fingerprint() != open_source(url, SourceOptions(kind="shards")).fingerprint()
    with pytest.raises(UsageError, match="of samples of shards"):
        SourceOptions(image_name="left", kind="texts")


def test_images_that_no_shard_may_hold_are_named(write_tar, make_image):
    url = write_tar("0.tar", [("7.jp2", b"?"), ("7.txt", b"a dog"), ("8.txt", b"a cat"), ("9.jpg", make_image(0))])
    assert "but 'jp2', 'txt'. vlm pack --kind texts converts" in why_unusable(url, 0)
    assert why_unusable(url, 1).endswith("but 'txt'")


@pytest.mark.parametrize(
    ("extension", "kind"),
    [("tif", "TIFF"), ("TIFF", "TIFF"), ("bmp", "BMP"), ("jfif", "JPEG"), ("jpe", "JPEG"), ("pjpeg", "JPEG")],
)
def test_every_image_that_loading_decodes_is_a_samples(write_tar, make_image, tmp_path, extension, kind):
    url = write_tar("0.tar", [(f"a.{extension}", make_image(3, kind=kind)), ("a.txt", b"a dog")])
    reader = ShardReader(url)
    assert EncodedImage(reader.read(0).image).pixels().shape == (30, 40, 3)
    reader.close()
    assert inspect_shards([url]).formats == {kind: 1}
    assert pack(open_source(url), tmp_path / "out").samples == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_a_shard_without_samples_is_reported_before_training_refuses_it(write_tar, make_image, is_first):
    empty, whole = write_tar("0.tar", []), write_tar("1.tar", [("a.jpg", make_image(0)), ("a.txt", b"a dog")])
    inspection = inspect_shards([empty, whole] if is_first else [whole, empty])
    assert [(bad.shard, bad.reason) for bad in inspection.damaged] == [(empty, "no samples")]
    assert inspection.samples == 1


def test_members_that_no_sample_uses_are_counted(write_tar, make_image, tmp_path):
    members = []
    for number in range(3):
        image = make_image(number)
        members += [(f"{number}.jpg", image), (f"{number}.left.jpg", image), (f"{number}.png", image)]
        members += [(f"{number}.cls", b"1"), (f"{number}.a.npy", b""), (f"{number}.txt", b"a dog")]
    url = write_tar("0.tar", [*members, ("README", b"hello"), (".hidden", b"")])
    inspection = inspect_shards([url])
    assert inspection.unused_members == {"left.jpg": 3, "png": 3, "cls": 3}
    assert "members not used" in contact_sheet(inspection, title="unused")
    cached = pa.ipc.open_file(tmp_path / ".0.tar.vlm-index").read_all()
    assert TarIndex(cached).unused == inspection.unused_members


def test_member_names_that_come_twice_are_counted_and_named(write_tar, make_image, tmp_path, logged):
    twice = [("a.jpg", make_image(0)), ("a.txt", b"one"), ("a.jpg", make_image(1)), ("a.txt", b"two")]
    alone = [("b.jpg", make_image(2)), ("b.txt", b"three"), ("c.jpg", make_image(3)), ("c.txt", b"four")]
    url = write_tar("0.tar", [*twice, *alone])
    inspection = inspect_shards([url])
    assert (inspection.samples, inspection.num_repeated_members) == (4, 1)
    assert inspection.repeated_members == {"0.tar: a": 1}
    assert "member names that come twice" in contact_sheet(inspection, title="twice")
    summary = pack(open_source(url), tmp_path / "out")
    assert f"In 1 samples a member name comes twice, the first in {url}: a" in logged.text
    reader = ShardReader(str(tmp_path / "out" / "shard-00000.tar"))
    samples = [reader.read(number) for number in range(summary.samples)]
    reader.close()
    assert [(sample.key, sample.captions[""]) for sample in samples] == [
        ("a", ("one",)),
        ("a-2", ("two",)),
        ("b", ("three",)),
        ("c", ("four",)),
    ]


TEXTS = {"0": "Café à la crème", "1": "ein Hügel", "2": "a dog"}


@pytest.fixture
def latin(write_tar, make_image):
    """Captions in Latin-1: two in texts, one in a JSON."""
    members = []
    for number, (key, text) in enumerate(TEXTS.items()):
        content = json.dumps({"caption": text}, ensure_ascii=False) if number == 1 else text
        ending = "json" if number == 1 else "txt"
        members += [(f"{key}.jpg", make_image(number)), (f"{key}.{ending}", content.encode("latin-1"))]
    return write_tar("latin.tar", members)


def test_captions_in_another_encoding_are_counted_and_read_on_request(latin, tmp_path):
    inspection = inspect_shards([latin])
    assert inspection.garbled_captions == 1
    assert inspection.reasons == {"unreadable json": 1}
    assert "captions not in UTF-8" in contact_sheet(inspection, title="garbled")
    source = open_source(latin, SourceOptions(encoding="latin-1"))
    assert [source.read(number).captions[""] for number in range(3)] == [(text,) for text in TEXTS.values()]
    assert source.fingerprint() != open_source(latin).fingerprint()


def test_packing_captions_in_another_encoding_is_warned_of(write_tar, make_image, tmp_path, latin):
    members = [("0.jpg", make_image(0)), ("0.txt", "Hügel".encode("latin-1")), ("1.jpg", make_image(1))]
    url = write_tar("0.tar", [*members, ("1.txt", "Hügel".encode())])
    (warning,) = pack(open_source(url), tmp_path / "out").warnings
    assert warning == (
        "1 image with captions that hold bytes that are not UTF-8; name their encoding, as in --encoding latin-1."
    )
    assert pack(open_source(latin, SourceOptions(encoding="latin-1")), tmp_path / "other").warnings == ()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_captions_are_read_by_their_byte_order_mark(write_tar, make_image, encoding):
    reader = ShardReader(write_tar("0.tar", [("0.jpg", make_image(0)), ("0.txt", "Łódź 🐕".encode(encoding))]))
    assert reader.read(0).captions == {"": ("Łódź 🐕",)}
    reader.close()


@pytest.mark.parametrize("encoding", ["nonsense", "hex"])
def test_an_encoding_that_is_none_is_refused(encoding):
    with pytest.raises(UsageError, match=rf"encoding = '{encoding}' is not a text encoding.*such as latin-1"):
        SourceOptions(encoding=encoding)
