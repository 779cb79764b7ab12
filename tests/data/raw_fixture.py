"""A raw photo as a camera writes it: a DNG with a JPEG preview, a turn, EXIF, and a small sensor image."""

import io
import struct

import numpy as np
from PIL import Image

_SENSOR_PIXELS = 64
_BYTE, _ASCII, _SHORT, _LONG, _RATIONAL, _SIGNED_RATIONAL = 1, 2, 3, 4, 5, 10
_FORMATS = {_BYTE: "B", _SHORT: "H", _LONG: "I", _RATIONAL: "I", _SIGNED_RATIONAL: "i"}
_NUMBERS_EACH = {_RATIONAL: 2, _SIGNED_RATIONAL: 2}
_IDENTITY = (1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1)


def make_dng(preview: bytes, *, orientation: int = 1, taken: str = "2024:05:17 10:22:31") -> bytes:
    """The bytes of the file. preview: a JPEG, stored as it is. orientation: as of EXIF."""
    image = Image.open(io.BytesIO(preview))
    sensor = np.random.default_rng(0).integers(0, 4095, (_SENSOR_PIXELS, _SENSOR_PIXELS)).astype("<u2").tobytes()

    def tables(places: tuple[int, int, int, int]) -> list[bytes]:
        at_sensor, at_exif, at_preview, at_pixels = places
        main = {
            254: (_LONG, 1),
            256: (_LONG, image.width),
            257: (_LONG, image.height),
            258: (_SHORT, 8, 8, 8),
            259: (_SHORT, 7),
            262: (_SHORT, 6),
            271: (_ASCII, "Acme"),
            272: (_ASCII, "Acme One"),
            273: (_LONG, at_preview),
            274: (_SHORT, orientation),
            277: (_SHORT, 3),
            278: (_LONG, image.height),
            279: (_LONG, len(preview)),
            306: (_ASCII, taken),
            330: (_LONG, at_sensor),
            34665: (_LONG, at_exif),
            50706: (_BYTE, 1, 4, 0, 0),
            50708: (_ASCII, "Acme One"),
            50721: (_SIGNED_RATIONAL, *_IDENTITY),
            50728: (_RATIONAL, 1, 1, 1, 1, 1, 1),
            50778: (_SHORT, 21),
        }
        raw = {
            254: (_LONG, 0),
            256: (_LONG, _SENSOR_PIXELS),
            257: (_LONG, _SENSOR_PIXELS),
            258: (_SHORT, 16),
            259: (_SHORT, 1),
            262: (_SHORT, 32803),
            273: (_LONG, at_pixels),
            277: (_SHORT, 1),
            278: (_LONG, _SENSOR_PIXELS),
            279: (_LONG, len(sensor)),
            33421: (_SHORT, 2, 2),
            33422: (_BYTE, 0, 1, 1, 2),
            50714: (_SHORT, 0),
            50717: (_LONG, 4095),
        }
        exif = {0x9003: (_ASCII, taken)}
        written: list[bytes] = []
        offset = 8
        for fields in (main, raw, exif):
            written.append(_table(fields, offset))
            offset += len(written[-1])
        return written

    lengths = [len(table) for table in tables((0, 0, 0, 0))]
    padded = preview + bytes(len(preview) % 2)
    at_preview = 8 + sum(lengths)
    places = (8 + lengths[0], 8 + lengths[0] + lengths[1], at_preview, at_preview + len(padded))
    return b"".join([b"II*\0", struct.pack("<I", 8), *tables(places), padded, sensor])


def _table(fields: dict[int, tuple], offset: int) -> bytes:
    """An image file directory of TIFF, with the values that do not fit into its entries behind it."""
    entries = struct.pack("<H", len(fields))
    behind = b""
    at_behind = offset + 2 + 12 * len(fields) + 4
    for tag, (kind, *values) in sorted(fields.items()):
        if kind == _ASCII:
            packed, count = values[0].encode() + b"\0", len(values[0]) + 1
        else:
            packed, count = (
                struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values),
                len(values) // _NUMBERS_EACH.get(kind, 1),
            )
        entries += struct.pack("<HHI", tag, kind, count)
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack("<I", at_behind + len(behind))
            behind += packed + bytes(len(packed) % 2)
    return entries + struct.pack("<I", 0) + behind
