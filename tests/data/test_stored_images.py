"""The quick check of an image refuses what Pillow refuses, no more and no less, and for the same reason."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlm.data.decode import open_image, packable_formats, storable_image, to_rgb
from vlm.errors import BadSample

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {
    "plain": {},
    "progressive": {"progressive": True, "quality": 40},
    "whole chroma": {"subsampling": 0, "optimize": True},
    "restart markers": {"restart_marker_blocks": 2},
    "profile": {"icc_profile": PROFILE, "comment": b"a comment"},
    "turned": {"exif": TURNED.tobytes()},
    "broken exif": {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"},
    "grey": {},
    "cmyk": {},
}


def jpeg(kind: str) -> bytes:
    rng = np.random.default_rng(len(kind))
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((61, 45))
    noisy = Image.blend(coarse, Image.fromarray(rng.integers(0, 256, (45, 61, 3), dtype=np.uint8)), 0.3)
    file = io.BytesIO()
    noisy.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")).save(file, "JPEG", **KINDS[kind])
    return file.getvalue()


def verdict(data: bytes) -> tuple[str, str] | str:
    """What packing makes of an image: its extension, or reason and detail."""
    try:
        return storable_image(data, verify=True)[0]
    except BadSample as error:
        return error.reason, error.detail


def verdict_of_pillow(data: bytes) -> tuple[str, str] | str:
    try:
        to_rgb(open_image(data, formats=packable_formats()), resolution=1 / 8)
    except BadSample as error:
        return error.reason, error.detail
    return "jpg"


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_cut_or_changed_anywhere_is_refused_where_pillow_refuses_it(kind):
    whole = jpeg(kind)
    assert verdict(whole) == "jpg"
    rng = np.random.default_rng(0)
    scan = whole.index(b"\xff\xda")
    damaged = [whole[:end] for end in rng.integers(3, len(whole), 60)]
    damaged += [whole[: len(whole) - lost] for lost in range(1, 6)]
    damaged.append(whole + b"rubbish behind it")
    for number in range(200):
        changed = bytearray(whole)
        # half of them in the headers, half in the coded picture
        first, last = (2, scan + 14) if number % 2 else (scan + 14, len(whole))
        for place in rng.integers(first, last, rng.integers(1, 5)):
            changed[place] = rng.choice([rng.integers(256), 0, 0xFF, 0xD9])
        damaged.append(bytes(changed))
    verdicts = [verdict(data) for data in damaged]
    assert verdicts == [verdict_of_pillow(data) for data in damaged]
    assert 30 < verdicts.count("jpg") < len(damaged) - 30


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0II*\0"),
        (0xE1, b"Exif\0\0MM"),
        (0xED, b"Photoshop 3.0\0008BIM\x03"),
        (0xDB, b"\1\2\3"),
        (0xFE, b""),
    ],
)
def test_a_segment_that_pillow_stumbles_over_is_left_to_it(marker, content):
    whole = jpeg("plain")
    segment = bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content
    changed = whole[:2] + segment + whole[2:]
    assert verdict(changed) == verdict_of_pillow(changed)


def test_what_only_begins_like_a_jpeg_is_refused():
    for data in (b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xda\0\2", b"GIF\xff\xda\0\2" + bytes(9)):
        assert isinstance(verdict(data), tuple)
        assert verdict(data) == verdict_of_pillow(data)


def test_without_the_check_a_damaged_jpeg_is_kept():
    cut = jpeg("plain")[:-200]
    assert verdict(cut)[0] == "unreadable image"
    assert storable_image(cut, verify=False) == ("jpg", cut)
