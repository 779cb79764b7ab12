"""The images of shards: checked, and kept as they are or turned into what every reader of shards knows."""

import io

from vlm.data.decode import EncodedImage, open_image, packable_formats, to_rgb
from vlm.errors import BadSample

# MPO is a JPEG with more images behind the first, as phones write it
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_VERIFIED_RESOLUTION = 1 / 8


def storable_image(image: bytes, *, verify: bool) -> tuple[str, bytes]:
    """Extension and bytes: JPEG, PNG and WebP, which all readers know, as they are, the rest upright, in RGB, as PNG.

    Raises:
        BadSample: it cannot be decoded.
    """
    if verify and _is_sound_jpeg(image):
        return "jpg", image
    pil_image = open_image(image, formats=packable_formats())
    extension = _KEPT_FORMATS.get(pil_image.format or "")
    if extension is not None:
        if verify:
            # JPEGs decode at an eighth for a fraction of the time, and still read all of their bytes
            to_rgb(pil_image, resolution=_VERIFIED_RESOLUTION)
        return extension, image
    file = io.BytesIO()
    to_rgb(pil_image).save(file, format="PNG")
    return "png", file.getvalue()


# JPEG's segments before the first scan of which Pillow reads the content, and the least bytes that it needs of them;
# of a shorter one it makes no image, which libjpeg does. EXIF and Photoshop's settings are for Pillow to judge.
_BEGINS, _SCAN = b"\xff\xd8\xff", 0xDA
_LEAST_BYTES = {0xE0: 16, 0xEE: 14, 0xE1: 1 << 16, 0xED: 1 << 16}
_PROFILES, _PROFILE, _LEAST_PROFILE_BYTES = 0xE2, b"ICC_PROFILE\0", 16


def _is_sound_jpeg(image: bytes) -> bool:
    """Whether it is a JPEG of nothing unusual that decodes without a warning; if not, Pillow says whether it is usable.

    libjpeg warns of all that makes Pillow refuse a file, and of more; it takes a third of the time that Pillow does.
    """
    if not _has_usual_segments(image):
        return False
    try:
        EncodedImage(image).pixels(resolution=_VERIFIED_RESOLUTION)
    except BadSample:
        return False
    return True


def _has_usual_segments(image: bytes) -> bool:
    place = 2 if image.startswith(_BEGINS) else len(image)
    while image[place : place + 1] == b"\xff" and place + 3 < len(image):
        marker = image[place + 1]
        if marker == _SCAN:
            return True
        size = image[place + 2] << 8 | image[place + 3]
        if size < _LEAST_BYTES.get(marker, 2):
            return False
        if marker == _PROFILES and not (image.startswith(_PROFILE, place + 4) and size >= _LEAST_PROFILE_BYTES):
            return False
        place += 2 + size
    return False
