import io

import numpy as np
import pytest
from PIL import Image

from vlm.data.decode import MAX_PIXELS, EncodedImage, open_image, to_rgb, upright_size
from vlm.errors import BadSample


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def decoded(data: bytes, **options) -> np.ndarray:
    return np.asarray(to_rgb(open_image(data), **options))


@pytest.fixture
def halves():
    """Left red, right blue, 40×20."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(halves, orientation):
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = halves.transpose(turns[orientation]) if orientation in turns else halves
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    assert upright_size(open_image(data)) == (40, 20)
    assert (decoded(data) == np.asarray(halves)).all()
    assert (EncodedImage(data).pixels() == np.asarray(halves)).all()
    jpeg = EncodedImage(encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0))
    assert (jpeg.width, jpeg.height, jpeg.is_jpeg, jpeg.orientation) == (40, 20, True, orientation)
    assert np.abs(jpeg.pixels().astype(int) - np.asarray(halves)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(kind):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = decoded(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert pixels[4, 1].tolist() == [0, 0, 255]
    assert pixels[4, 6].tolist() == [255, 255, 255]


def test_transparent_palettes_and_grey_with_alpha_are_laid_on_white():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (0, 0, 4, 8))
    pixels = decoded(encoded(palette, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [200, 100, 50]
    assert pixels[0, 7].tolist() == [255, 255, 255]
    assert decoded(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG"))[0, 0].tolist() == [127, 127, 127]


def test_sixteen_bits_become_the_upper_eight():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decoded(encoded(Image.fromarray(values), "PNG"))
    assert (pixels == (values >> 8).astype(np.uint8)[..., None]).all()


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("YCbCr", "JPEG")])
def test_other_colour_spaces_become_rgb(mode, kind):
    image = Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
    pixels = decoded(encoded(image, kind))
    assert pixels.shape == (16, 16, 3)
    expected = np.asarray(image.convert("RGB"), dtype=int)
    assert np.abs(pixels.astype(int) - expected).max() <= 6


def test_a_jpeg_is_decoded_no_larger_than_needed(make_image):
    data = make_image(0, size=(800, 600))
    assert decoded(data).shape == (600, 800, 3)
    assert decoded(data, resolution=0.5).shape == (300, 400, 3)
    assert decoded(data, resolution=0.3).shape == (300, 400, 3)
    assert decoded(data, resolution=0.1).shape == (75, 100, 3)
    whole = np.asarray(to_rgb(open_image(data)).resize((100, 75), Image.Resampling.BOX), dtype=int)
    assert np.abs(whole - decoded(data, resolution=0.1)).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_images_are_bad_samples(make_image, kind):
    data = make_image(0, size=(200, 200), kind=kind)
    for broken in (data[: len(data) // 2], data[:30], b"", b"no picture at all"):
        with pytest.raises(BadSample, match="unreadable image"):
            decoded(broken)
        if kind == "JPEG":
            with pytest.raises(BadSample, match="unreadable image"):
                decoded(broken, resolution=1 / 8)


def test_bombs_are_refused_by_their_header():
    width = MAX_PIXELS // 10_000 + 1
    bomb = encoded(Image.new("1", (width, 10_000)), "PNG")
    with pytest.raises(BadSample, match="too large"):
        open_image(bomb)
    with pytest.raises(BadSample, match="too narrow"):
        open_image(encoded(Image.new("L", (1, 2000)), "PNG"))


@pytest.mark.parametrize("size", [(800, 600), (801, 599), (17, 33), (8, 8), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_the_fast_way_decodes_what_pillow_decodes(make_image, size, options):
    image = Image.open(io.BytesIO(make_image(1, size=size, kind="PNG")))
    data = encoded(image, "JPEG", quality=90, **options)
    encoded_image = EncodedImage(data)
    assert encoded_image.is_jpeg
    assert (encoded_image.width, encoded_image.height) == size
    for resolution in (1.0, 0.45, 0.2, 0.1, 0.01):
        pixels, expected = encoded_image.pixels(resolution=resolution), decoded(data, resolution=resolution)
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 1.5


def test_grey_and_rgb_jpegs_take_the_fast_way_and_four_colours_do_not(make_image):
    grey = EncodedImage(make_image(0, mode="L"))
    assert grey.is_jpeg
    assert (np.ptp(grey.pixels(), axis=2) == 0).all()
    assert EncodedImage(encoded(Image.new("RGB", (9, 9), "red"), "JPEG", keep_rgb=True)).is_jpeg
    inks = make_image(0, mode="CMYK")
    assert not EncodedImage(inks).is_jpeg
    assert (EncodedImage(inks).pixels() == decoded(inks)).all()


def test_what_libjpeg_might_read_otherwise_than_we_is_left_to_pillow(make_image):
    """A marker without a length hides a frame of other size from who takes the next two bytes for one."""
    plain = make_image(0, size=(40, 30))
    frame = next(plain.find(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in plain)
    small = bytearray(plain[frame : frame + 19])
    small[5:9] = 0, 4, 0, 4
    odd = plain[:2] + b"\xff\x01" + plain[2:]
    hidden = plain[:2] + b"\xff\x01\x00\x02" + bytes(small) + plain[2:]
    twice = plain[:frame] + bytes(small) + plain[frame:]
    unscanned = plain[: plain.find(b"\xff\xda")]
    for data in (odd, hidden, unscanned):
        with pytest.raises(BadSample, match="unreadable image"):
            EncodedImage(data).pixels()
    assert not EncodedImage(twice).is_jpeg
    assert EncodedImage(plain).is_jpeg


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "AVIF"])
def test_of_an_animation_the_first_image_is_taken(kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(EncodedImage(data).pixels().astype(int) - [255, 0, 0]).max() <= 6


def test_pixels_may_be_written_to(make_image):
    for kind in ("JPEG", "PNG"):
        assert EncodedImage(make_image(0, kind=kind)).pixels().flags.writeable


@pytest.mark.parametrize("cut", [1, 2, 40, 2000])
def test_a_jpeg_cut_anywhere_is_a_bad_sample(cut):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    image = EncodedImage(data[:-cut])
    for resolution in (1.0, 0.125):
        with pytest.raises(BadSample, match="unreadable image"):
            image.pixels(resolution=resolution)


def test_what_libjpeg_only_warns_of_passes_as_it_does_with_pillow(make_image):
    data = make_image(0, size=(200, 200))
    padded = data[:-2] + b"\x00" * 9 + data[-2:]  # extraneous bytes before the end marker
    assert np.abs(EncodedImage(padded).pixels().astype(int) - decoded(data)).max() <= 8


def test_a_header_that_promises_more_than_the_file_can_hold_is_refused(make_image):
    data = bytearray(make_image(0, size=(64, 64)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (9_000).to_bytes(2, "big") * 2
    for read in (EncodedImage, open_image):
        with pytest.raises(BadSample, match="9000×9000 pixels cannot lie in a JPEG of"):
            read(bytes(data))


def test_limits_hold_for_jpegs_on_the_fast_way(monkeypatch, make_image):
    with pytest.raises(BadSample, match="too narrow"):
        EncodedImage(encoded(Image.new("L", (1, 2000)), "JPEG"))
    monkeypatch.setattr("vlm.data.decode.MAX_PIXELS", 1000)
    with pytest.raises(BadSample, match="too large"):
        EncodedImage(make_image(0, size=(40, 30)))


def test_postscript_is_not_given_to_ghostscript():
    with pytest.raises(BadSample, match="unreadable image"):
        open_image(encoded(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("float32", 1 / 111), ("float32", 1.0), ("int32", 1), ("int32", 255), ("int32", 10**6), ("uint16", 1)],
)
def test_grey_values_of_any_type_are_scaled_by_their_range_and_never_black(kind, scale):
    ramp = np.add.outer(np.arange(48), np.arange(64)) * scale
    pixels = decoded(encoded(Image.fromarray(ramp.astype(kind)), "TIFF"))[..., 0].astype(int)
    assert np.ptp(pixels) > 90
    assert (np.diff(pixels, axis=1) >= 0).all()


def test_signed_values_reach_from_black_to_white_and_infinite_ones_are_refused():
    ramp = np.linspace(-5, 5, 48 * 64).reshape(48, 64)
    for kind in ("float32", "int32"):
        pixels = decoded(encoded(Image.fromarray((ramp * 1000).astype(kind)), "TIFF"))
        assert (pixels.min(), pixels.max()) == (0, 255)
    with pytest.raises(BadSample, match="not finite"):
        decoded(encoded(Image.fromarray(np.where(ramp > 0, ramp, np.nan).astype("float32")), "TIFF"))


@pytest.mark.parametrize("size", [(100, 100), (101, 75), (799, 601), (17, 33)])
def test_a_size_that_does_not_divide_is_decoded_at_the_smallest_scale_that_serves(make_image, size):
    inks = make_image(0, size=size, mode="CMYK")
    for step in (2, 4, 8):
        assert decoded(inks, resolution=1 / step).shape[:2] == tuple(-(-side // step) for side in size[::-1])
