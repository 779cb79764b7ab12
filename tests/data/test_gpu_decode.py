import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.tar_fixture import without_tables
from vlm.data.decode import EncodedImage
from vlm.data.gpu_decode import PreparedView, check_decoder, decode_views_on_device, prepare_view
from vlm.data.samples import SampleRng
from vlm.data.tar import ShardReader
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import BadSample, UsageError

CPU = torch.device("cpu")


def prepare(image, view, rng):
    """The view drawn by these random numbers, prepared."""
    encoded_image = EncodedImage(image)
    return prepare_view(encoded_image, view.draw(encoded_image.width, encoded_image.height, rng), view)


def views_of(images, view, device=CPU):
    prepared = [prepare(image, view, SampleRng(0, 0, str(number))) for number, image in enumerate(images)]
    return prepared, decode_views_on_device(prepared, view, device)


def random_views(images, view):
    return np.stack([view(image, SampleRng(0, 0, str(number))) for number, image in enumerate(images)])


def noisy(size=(96, 64), kind="JPEG", **options) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize(size).save(file, format=kind, **options)
    return file.getvalue()


def test_the_device_shows_what_the_random_view_shows(make_image):
    view = RandomResizedCrop(size=48, scale=(0.3, 1.0), flip=0.5)
    images = [make_image(number, size=(60 + 11 * number, 130)) for number in range(12)]
    prepared, found = views_of(images, view)
    assert all(one.encoded for one in prepared)
    assert not found.damaged
    assert (found.images.shape, found.images.dtype) == ((12, 3, 48, 48), torch.uint8)
    errors = np.abs(found.images.numpy().astype(int) - random_views(images, view))
    assert errors.mean() < 1.5


def test_real_photos_agree_to_38_decibels(datasets):
    reader = ShardReader(str(datasets / "flickr8k" / "val-00000.tar"))
    images = [reader.read(number).image for number in range(40)]
    reader.close()
    for size in (112, 48):
        view = RandomResizedCrop(size=size, flip=0.5)
        errors = views_of(images, view)[1].images.numpy().astype(int) - random_views(images, view)
        assert 10 * np.log10(255**2 / np.mean(np.square(errors))) > 38


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_shown_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    view = RandomResizedCrop(size=32, scale=(0.3, 0.6))
    images = [noisy(exif=exif, quality=95, subsampling=0)]
    found = views_of(images, view)[1].images.numpy().astype(int)
    assert np.abs(found - random_views(images, view)).mean() < 1.5


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_other_kinds_are_decoded_by_the_workers_and_stand_in_their_rows(make_image, kind):
    view = RandomResizedCrop(size=32)
    images = [noisy(), noisy(kind=kind), make_image(0, mode="CMYK"), noisy((64, 64))]
    prepared, found = views_of(images, view)
    assert [one.shown is None for one in prepared] == [True, False, False, True]
    expected = random_views(images, view)
    assert (found.images[1:3].numpy() == expected[1:3]).all()
    assert np.abs(found.images.numpy().astype(int) - expected).mean() < 1.5


def test_a_cut_jpeg_is_found_by_the_worker():
    view = RandomResizedCrop(size=32)
    with pytest.raises(BadSample, match="unreadable image"):
        prepare(noisy()[:-200], view, np.random.default_rng(0))


def test_the_end_of_a_image_embedded_in_the_header_is_not_taken_for_the_end_of_the_file():
    view = RandomResizedCrop(size=32)
    whole = noisy(comment=b"ends \xff\xd9 here")
    assert prepare(whole, view, np.random.default_rng(0)).encoded == whole
    assert prepare(whole + bytes(2000), view, np.random.default_rng(0)).encoded
    with pytest.raises(BadSample, match="truncated"):
        prepare(whole[:-200], view, np.random.default_rng(0))


def test_damage_that_only_the_decoder_finds_changes_no_pixel_of_the_other_rows(make_image):
    view = RandomResizedCrop(size=32)
    images = [make_image(number) for number in range(5)]
    expected = views_of(images, view)[1].images
    images[3] = without_tables(images[3])
    found = views_of(images, view)[1]
    assert {row: error.reason for row, error in found.damaged.items()} == {3: "unreadable image"}
    expected[3] = 0
    assert torch.equal(found.images, expected)


def test_a_device_without_a_decoder_is_refused():
    check_decoder(CPU)

    def refuse(images, device):
        raise RuntimeError("not compiled with nvJPEG support\nat line 1")

    with pytest.raises(
        UsageError, match=r"on cpu here: not compiled with nvJPEG support\. Install .*--decode-on-device"
    ):
        check_decoder(CPU, refuse)


def test_damage_that_only_the_decoder_finds_is_named_by_its_row_and_harms_no_other():
    view = RandomResizedCrop(size=32)
    whole = noisy()
    prepared, expected = views_of([whole, whole, whole], view)

    def refuse(images, device):
        raise RuntimeError("one of them is damaged")

    cut = whole[: len(whole) // 2]
    broken = PreparedView(crop=prepared[1].crop, encoded=cut)
    found = decode_views_on_device([prepared[0], broken, prepared[2]], view, CPU, refuse)
    assert list(found.damaged) == [1]
    assert found.damaged[1].reason == "unreadable image"
    assert not found.images[1].any()
    errors = (found.images[::2].int() - expected.images[::2].int()).abs()
    assert errors.float().mean() < 1.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_shows_what_the_cpu_shows():
    view = RandomResizedCrop(size=64, flip=0.5)
    images = [noisy((96 + 8 * number, 128)) for number in range(8)]
    there = views_of(images, view, torch.device("cuda"))[1].images.cpu().int()
    assert (there - views_of(images, view)[1].images.int()).abs().float().mean() < 2
