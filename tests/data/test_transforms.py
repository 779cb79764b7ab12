import ctypes
import io
import mmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm.data
from vlm.data import transforms
from vlm.data.decode import EncodedImage, open_image, to_rgb
from vlm.data.samples import SampleRng
from vlm.data.tar import ShardReader
from vlm.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Crop,
    EvalTransform,
    RandomResizedCrop,
    TokenGrid,
    resize_antialiased,
)
from vlm.errors import BadSample, UsageError

SIZES = [(40, 30), (31, 57), (224, 224), (225, 224), (97, 301), (640, 427), (333, 500), (12, 9), (1, 3)]


def png_of(size, number=0) -> bytes:
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_fixed_view_is_open_clips_pixel_for_pixel(resize_mode, interpolation):
    from open_clip.transform import image_transform

    for size, fill in [(224, 0), (65, 128)]:
        reference: Any = image_transform(
            size, is_train=False, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill
        )
        view = EvalTransform(size=size, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill)
        for number, shape in enumerate(SIZES):
            image = png_of(shape, number)
            expected = reference(Image.open(io.BytesIO(image)))
            pixels = expected.numpy() * np.array(CLIP_STD)[:, None, None] + np.array(CLIP_MEAN)[:, None, None]
            assert (view(image) == np.round(pixels * 255).astype(np.uint8)).all(), shape


def test_the_longest_side_is_rounded_as_open_clip_rounds_it():
    from open_clip.transform import ResizeKeepRatio

    for width in range(1, 400, 7):
        for height in range(1, 400, 11):
            if max(width, height) > 250 * min(width, height):
                continue
            lines, columns = ResizeKeepRatio.get_params(Image.new("1", (width, height)), (224, 224), 1.0)
            pil_image = EvalTransform(resize_mode="longest", fill_color=0)(white_of(width, height))
            assert (pil_image.max(axis=(0, 2)) > 0).sum() == max(lines, 1)
            assert (pil_image.max(axis=(0, 1)) > 0).sum() == max(columns, 1)


def white_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, format="BMP")
    return file.getvalue()


def test_preprocessing_is_written_and_read_back():
    view = EvalTransform(size=64, resize_mode="longest", mean=(0.5, 0.5, 0.5), fill_color=7)
    assert EvalTransform.from_preprocess(view.to_preprocess()) == view
    assert EvalTransform.from_preprocess({"size": [32, 32], "mode": "RGB"}) == EvalTransform(size=32)
    with pytest.raises(UsageError, match="only square"):
        EvalTransform.from_preprocess({"size": [32, 64]})


ASPECT = EvalTransform(size=132, resize_mode="aspect", patch=12, tokens=64)


def test_a_grid_has_the_shape_of_its_image_and_wastes_few_tokens():
    padding: list[float] = []
    for number in range(61):
        ratio = 2 ** (number / 30 - 1)
        rows, columns = TokenGrid(patch=16, tokens=196).cells(round(1000 * ratio), 1000)
        assert rows * columns <= 196
        assert columns / rows == pytest.approx(ratio, rel=0.1)
        assert max(rows, columns) * 16 <= TokenGrid(patch=16, tokens=196).side
        padding.append(1 - rows * columns / 196)
    assert np.mean(padding) < 0.05
    # a panorama is squeezed to the longest grid there is
    assert TokenGrid(patch=16, tokens=196).cells(5000, 500) == (10, 19)
    assert TokenGrid(patch=16, tokens=196).cells(500, 5000) == (19, 10)
    with pytest.raises(UsageError, match="0 patches of 16 pixels show nothing"):
        TokenGrid(patch=16, tokens=0)


def test_an_image_that_keeps_its_shape_fills_its_grid_and_nothing_else():
    for size, (height, width) in (((400, 300), (84, 108)), ((300, 400), (108, 84)), ((97, 97), (96, 96))):
        image = png_of(size)
        pixels = ASPECT(image)
        whole = Image.open(io.BytesIO(image)).resize((width, height), Image.Resampling.BICUBIC)
        assert (pixels[:, :height, :width] == np.asarray(whole).transpose(2, 0, 1)).all()
        assert pixels.shape == (3, 132, 132)
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()


def test_a_random_view_of_the_whole_image_is_the_fixed_one_that_keeps_its_shape():
    image = png_of((400, 300))
    crop = RandomResizedCrop.of_view(ASPECT, scale=(1.0, 1.0), flip=0.0)
    assert np.abs(crop(image, SampleRng(0, 0, "key")).astype(int) - ASPECT(image)).max() <= 2


def test_crops_keep_the_shape_of_their_image_but_for_the_usual_stretch():
    crop = RandomResizedCrop.of_view(ASPECT, scale=(0.3, 0.6), flip=0.5)
    stretches: list[float] = []
    for number in range(200):
        drawn = crop.draw(400, 300, SampleRng(0, number, "key"))
        assert drawn.shown == (84, 108)
        stretches.append(drawn.width / drawn.height / (108 / 84))
    assert 0.74 < min(stretches) < 0.8
    assert 1.25 < max(stretches) < 1.35
    # a mirrored crop is mirrored inside its grid
    image = png_of((400, 300))
    plain, mirrored = (crop.show(EncodedImage(image), Crop(0, 0, 400, 300, flip, (84, 108))) for flip in (False, True))
    assert (plain[:, :84, :108] == mirrored[:, :84, 107::-1]).all()
    assert not mirrored[:, :, 108:].any()


def test_grids_change_neither_crops_nor_identities_of_squares():
    square = EvalTransform(size=96)
    assert square.identity() == (
        "FixedView(size=96, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), "
        "interpolation='bicubic', resize_mode='shortest', fill_color=0)"
    )
    assert not {"patch", "tokens"} & square.to_preprocess().keys()
    assert EvalTransform.from_preprocess(ASPECT.to_preprocess()) == ASPECT
    assert "patch=12, tokens=64" in ASPECT.identity()
    of_squares = RandomResizedCrop.of_view(square, scale=(0.3, 0.6), flip=0.5)
    of_grids = RandomResizedCrop.of_view(ASPECT, scale=(0.3, 0.6), flip=0.5)
    for number in range(20):
        drawn = of_grids.draw(300, 300, SampleRng(0, number, "key"))
        assert drawn._replace(shown=None) == of_squares.draw(300, 300, SampleRng(0, number, "key"))


def test_a_canvas_of_another_size_is_refused():
    with pytest.raises(UsageError, match=r"at most 64 patches of 12 px lie on a canvas of 132 px, not 96"):
        EvalTransform(size=96, resize_mode="aspect", patch=12, tokens=64)


def test_a_view_without_pixels_is_refused():
    for size in (0, -3):
        with pytest.raises(UsageError, match=rf"size = {size} pixels show nothing; give 1 or more"):
            RandomResizedCrop(size=size)


def test_a_random_view_is_a_function_of_its_generator(make_image):
    image = make_image(0, size=(120, 90))
    view = RandomResizedCrop(size=48, scale=(0.3, 1.0), flip=0.5)
    first = view(image, SampleRng(0, 0, "key"))
    assert (first.shape, first.dtype) == ((3, 48, 48), np.uint8)
    assert (view(image, SampleRng(0, 0, "key")) == first).all()
    assert (view(image, SampleRng(0, 1, "key")) != first).any()


@pytest.mark.parametrize("size", [(800, 600), (801, 599), (1201, 333), (333, 1201)])
def test_a_view_of_a_reduced_jpeg_shows_what_the_whole_image_shows(make_image, size):
    jpeg = make_image(0, size=size)
    png = io.BytesIO()
    to_rgb(open_image(jpeg)).save(png, format="PNG")  # cannot be reduced while decoding
    view = RandomResizedCrop(size=64, scale=(0.2, 1.0), flip=0.5)
    for number in range(20):
        reduced = view(jpeg, SampleRng(0, number, "key")).astype(int)
        whole = view(png.getvalue(), SampleRng(0, number, "key")).astype(int)
        assert np.abs(reduced - whole).mean() < 1
        assert np.abs(reduced - whole).max() < 12


def test_a_turned_jpeg_gives_the_view_of_the_upright_one():
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = io.BytesIO(), io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, format="JPEG", quality=95, exif=exif)
    upright.save(plain, format="JPEG", quality=95)
    for number in range(10):
        views = [
            RandomResizedCrop(size=64, scale=(0.2, 1.0))(data.getvalue(), SampleRng(0, number, "k")).astype(int)
            for data in (turned, plain)
        ]
        assert np.abs(views[0] - views[1]).mean() < 2


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [(901, 601), (640, 427), (333, 1201)])
def test_a_turned_jpeg_of_any_size_is_shown_where_the_upright_one_is(make_image, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned, upright = io.BytesIO(), io.BytesIO()
    Image.open(io.BytesIO(make_image(1, size=size))).save(turned, format="JPEG", quality=95, exif=exif)
    to_rgb(open_image(turned.getvalue())).save(upright, format="PNG")
    for view in (RandomResizedCrop(size=64, scale=(0.5, 1.0)), RandomResizedCrop(size=40, scale=(0.2, 1.0), flip=0.5)):
        for number in range(6):
            reduced, whole = (
                view(data.getvalue(), SampleRng(0, number, "k")).astype(int) for data in (turned, upright)
            )
            assert np.abs(reduced - whole).mean() < 1
            assert np.abs(reduced - whole).max() < 12


def test_crops_keep_their_share_and_ratio():
    view = RandomResizedCrop(size=60, scale=(0.25, 0.5), ratio=(0.8, 1.25))
    rng = np.random.default_rng(0)
    for _ in range(500):
        crop = view.draw(300, 200, rng)
        assert crop.left >= 0
        assert crop.top >= 0
        assert crop.left + crop.width <= 300
        assert crop.top + crop.height <= 200
        assert 0.24 < crop.width * crop.height / 60_000 < 0.51
        assert 0.78 < crop.width / crop.height < 1.28


def test_a_crop_that_never_fits_becomes_the_middle():
    view = RandomResizedCrop(size=10, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert view.draw(400, 20, np.random.default_rng(0)) == Crop(left=190, top=0, width=20, height=20)


@pytest.mark.parametrize("width", [1, 2, 25, 29, 50, 51, 58, 100, 201])
def test_no_size_breaks_the_reduced_crop(make_image, width):
    image = make_image(0, size=(width, 200))
    for number in range(5):
        assert RandomResizedCrop(size=6, scale=(1.0, 1.0))(image, SampleRng(0, number, "k")).shape == (3, 6, 6)


def test_crops_lie_on_whole_pixels_of_the_reduced_jpeg():
    view = RandomResizedCrop(size=20, scale=(0.25, 0.5))
    rng = np.random.default_rng(0)
    for side, step in [(50, 1), (100, 2), (200, 4), (400, 8)]:
        for _ in range(50):
            crop = view.draw(side, side, rng)
            shorter = min(crop.width, crop.height)
            assert shorter >= 20
            fitting = step if shorter >= step * 20 else step // 2
            assert not any(edge % fitting for edge in (crop.left, crop.top, crop.width, crop.height))


def test_what_is_drawn_does_not_depend_on_the_kind_of_image(make_image):
    view = RandomResizedCrop(size=40, scale=(0.2, 1.0), flip=0.5)
    shown, rngs = [], []
    for kind in ("JPEG", "PNG", "WEBP"):
        rng = SampleRng(0, 3, "key")
        shown.append(view(make_image(0, size=(400, 300), kind=kind), rng).astype(int))
        rngs.append(rng.random())
    assert len(set(rngs)) == 1
    assert max(np.abs(shown[0] - other).mean() for other in shown[1:]) < 1.5


def test_flips_are_as_frequent_as_asked_and_mirror_the_crop(make_image):
    image = EncodedImage(make_image(0, size=(90, 70)))
    view = RandomResizedCrop(size=32, flip=0.25)
    rng = np.random.default_rng(0)
    crops = [view.draw(90, 70, rng) for _ in range(2000)]
    assert 0.21 < np.mean([crop.is_flipped for crop in crops]) < 0.29
    plain = view.show(image, crops[0]._replace(is_flipped=False))
    mirrored = view.show(image, crops[0]._replace(is_flipped=True))
    assert (mirrored == plain[..., ::-1]).all()
    for shown in (plain, mirrored):  # channels last in memory
        assert shown.transpose(1, 2, 0).flags.c_contiguous


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(224, 224), (61, 97), (301, 90), (2, 3), (1, 1)])
def test_resizing_is_that_of_pillow(shape, interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), filters[interpolation]))
    found = np.empty((48, 48, 3), np.uint8)
    resize_antialiased(pixels, found, interpolation=interpolation)
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.fixture(params=[512, 256], ids=["AVX-512", "AVX2"])
def compiled(request, monkeypatch):
    """The compiled filter with vectors of so many bits."""
    if request.param > transforms.compiled_filter():
        pytest.skip("no such filter here")
    monkeypatch.setattr(transforms, "compiled_filter", lambda: request.param)
    return request.param


def by_torch(pixels, shape, interpolation):
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    shown = torch.nn.functional.interpolate(batch, shape, mode=interpolation, antialias=True)
    return shown[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_compiled_filter_is_torchs_to_the_bit(compiled, interpolation):
    rng = np.random.default_rng(0)
    for number in range(150):
        shape = [int(size) for size in rng.choice([1, 7, 16, 33, 64, 96, 132, 224, 225], 2)]
        height, width = (max(1, int(size * rng.uniform(0.02, 3.6))) for size in shape)
        pixels = rng.integers(0, 256, (height + 3, width + 5, 3), dtype=np.uint8)
        if number % 2:  # the steepest edges there are, whose sums leave the range of a byte
            pixels = pixels // 128 * 255
        crop = pixels[2 : 2 + height, 1 : 1 + width]
        found = np.zeros((*shape, 3), np.uint8)
        resize_antialiased(crop, found, interpolation=interpolation)
        expected = by_torch(crop, shape, interpolation)
        assert (found == expected).all(), (crop.shape, shape)
        resize_antialiased(crop, found, interpolation=interpolation, is_mirrored=True)
        assert (found == expected[:, ::-1]).all(), (crop.shape, shape)


def test_what_the_compiled_filter_cannot_do_torch_does(compiled):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 300, 3), dtype=np.uint8)
    for turned, shape in (
        (pixels, (60, 20)),  # shrunk to a fifteenth
        (pixels[:, :4], (60, 20)),  # rows shorter than a vector of AVX2
        (pixels, (90, 90)),
        (pixels[::-1, ::-1], (48, 200)),
        (pixels.transpose(1, 0, 2), (200, 48)),
        (pixels[::-1], (48, 200)),
    ):
        found = np.zeros((*shape, 3), np.uint8)
        resize_antialiased(turned, found, interpolation="bicubic")
        assert (found == by_torch(turned, shape, "bicubic")).all()
    from vlm.data import antialias

    with pytest.raises(ValueError, match="begins in the image"):
        antialias.axis(np.array([5], np.int32), np.array([[1]], np.int16), 5, 8, compiled)
    with pytest.raises(ValueError, match="below 2\\^28 pixels"):
        antialias.axis(np.array([0], np.int32), np.array([[1]], np.int16), 1 << 28, 8, compiled)
    axis = antialias.axis(np.array([0], np.int32), np.array([[256]], np.int16), 1, 8, compiled)
    assert not antialias.resize(np.zeros((1, 2, 3), np.uint8), np.zeros((1, 1, 3), np.uint8), axis, axis)
    with pytest.raises(ValueError, match="PyCapsule"):
        antialias.resize(pixels, pixels, axis, None)


def test_a_row_at_the_end_of_memory_is_not_read_past_it(compiled):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    # the second page may not be touched
    address = np.frombuffer(memory, np.uint8).ctypes.data
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
    for height, width in ((30, 40), (200, 6), (400, 1)):
        pixels = np.frombuffer(memory, np.uint8)[page - height * width * 3 : page].reshape(height, width, 3)
        found = np.ones((64, 64, 3), np.uint8)
        resize_antialiased(pixels, found, interpolation="bicubic")
        assert not found.any()


def test_weights_that_reach_too_far_are_not_read_off(monkeypatch):
    # of a banner shrunk to an icon they would take seconds and gigabytes
    monkeypatch.setattr(transforms, "_filter_taps", None)
    axis = transforms._filter_axis.__wrapped__
    assert axis(20_000, 32, "bicubic", 512) is None
    assert axis(20_000, 1, "bilinear", 256) is None


@pytest.mark.parametrize("module", [SimpleNamespace(), SimpleNamespace(vector_bits=lambda: 512, axis=lambda one: one)])
def test_a_compiled_filter_of_an_earlier_version_is_not_used(monkeypatch, module):
    transforms._filter_axis.cache_clear()
    monkeypatch.setattr(vlm.data, "antialias", module, raising=False)
    assert transforms.compiled_filter.__wrapped__() == 0


def test_a_single_row_of_an_image_turned_upright(monkeypatch):
    monkeypatch.setattr(transforms, "compiled_filter", lambda: 0)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 3), dtype=np.uint8)
    found = np.zeros((2, 48, 48, 3), np.uint8)
    # numpy holds one row for contiguous whichever way its stride goes, torch does not
    resize_antialiased(pixels[::-1][3:4], found[0], interpolation="bicubic")
    resize_antialiased(pixels[5:6], found[1], interpolation="bicubic")
    assert (found[0] == found[1]).all()


def test_without_the_compiled_filter_views_are_the_same(monkeypatch, make_image):
    image = EncodedImage(make_image(0, size=(90, 70)))
    view = RandomResizedCrop(size=48)
    crop = view.draw(90, 70, np.random.default_rng(0))
    crops = crop, crop._replace(is_flipped=True)
    shown, mirrored = (view.show(image, crop) for crop in crops)
    assert (mirrored == shown[..., ::-1]).all()
    monkeypatch.setattr(transforms, "compiled_filter", lambda: 0)
    assert (view.show(image, crops[0]) == shown).all()
    assert (view.show(image, crops[1]) == mirrored).all()


def test_views_of_real_photos_are_close_to_those_of_the_whole_decoding(datasets):
    reader = ShardReader(str(datasets / "flickr8k" / "val-00000.tar"))
    for size, least in [(96, 45), (48, 38)]:
        view, rng = RandomResizedCrop(size=size), np.random.default_rng(0)
        errors = []
        for number in range(40):
            image = reader.read(number).image
            pil_image = EncodedImage(image)
            crop = view.draw(pil_image.width, pil_image.height, rng)
            box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
            whole = to_rgb(open_image(image)).resize((size, size), Image.Resampling.BICUBIC, box=box)
            errors.append(view.show(pil_image, crop).transpose(1, 2, 0).astype(int) - np.asarray(whole))
        assert 10 * np.log10(255**2 / np.mean(np.square(errors))) > least
    reader.close()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF"])
def test_mutated_images_are_shown_or_refused(make_image, kind):
    rng = np.random.default_rng(0)
    whole = make_image(0, size=(80, 60), kind=kind)
    views = [RandomResizedCrop(size=32, scale=(0.2, 1.0)), RandomResizedCrop(size=8)]
    refused = 0
    for number in range(150):
        image = mutated(whole, rng)
        try:
            assert views[number % 2](image, rng).dtype == np.uint8
        except BadSample:
            refused += 1
    assert refused > 30


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    first, last = sorted(int(place) for place in rng.integers(len(data), size=2))
    match int(rng.integers(4)):
        case 0:
            return data[:first]
        case 1:
            for place in rng.integers(len(data), size=5):
                changed[place] = rng.integers(256)
        case 2:
            del changed[first:last]
        case _:
            changed[2 : 2 + int(rng.integers(40))] = rng.bytes(int(rng.integers(60)))
    return bytes(changed)
