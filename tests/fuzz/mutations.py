"""Fixture: tars and images as an attacker, or a failing disk, would deliver them."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Rng = np.random.Generator
BLOCK = 512
FORMATS = ("JPEG", "progressive", "CMYK", "grey", "PNG", "16-bit", "palette", "WEBP", "GIF", "AVIF")


def pil_image(kind: str, rng: Rng) -> tuple[str, bytes]:
    """Extension and bytes of an image of one of `FORMATS`."""
    size = (int(rng.integers(8, 90)), int(rng.integers(8, 90)))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size)
    file = io.BytesIO()
    match kind:
        case "progressive":
            coarse.save(file, "JPEG", progressive=True)
        case "CMYK" | "grey":
            coarse.convert("CMYK" if kind == "CMYK" else "L").save(file, "JPEG")
        case "16-bit":
            Image.fromarray(np.asarray(coarse.convert("L")).astype(np.uint16) << 8).save(file, "PNG")
        case "palette":
            coarse.convert("P").save(file, "PNG", transparency=0)
        case "GIF":
            coarse.save(file, "GIF", save_all=True, append_images=[coarse.rotate(90)])
        case _:
            coarse.save(file, kind)
    extension = {"PNG": "png", "16-bit": "png", "palette": "png", "WEBP": "webp", "GIF": "gif", "AVIF": "avif"}
    return extension.get(kind, "jpg"), file.getvalue()


def whole_tar(rng: Rng) -> bytes:
    """A sound tar of a few samples of all kinds, with stored arrays."""
    file = io.BytesIO()
    form = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[int(rng.integers(3))]
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number in range(int(rng.integers(1, 7))):
            kind = FORMATS[int(rng.integers(len(FORMATS)))]
            extension, image = pil_image(kind, rng)
            key = f"sample-{number}" + ("-ü" * 60 if form != tarfile.USTAR_FORMAT and rng.random() < 0.1 else "")
            text = {"captions": [f"a {kind} picture", "another caption"]}
            array = io.BytesIO()
            np.save(array, rng.random((2, 3)).astype(np.float32))
            for name, data in (
                (f"{key}.{extension}", image),
                (f"{key}.json", json.dumps(text).encode()),
                (f"{key}.text_embedding.npy", array.getvalue()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def cut(data: bytearray, rng: Rng) -> bytearray:
    """The end is missing."""
    return data[: int(rng.integers(0, len(data)))]


def flip(data: bytearray, rng: Rng) -> bytearray:
    """A few bytes anywhere are something else."""
    for offset in rng.integers(0, len(data), int(rng.integers(1, 40))):
        data[int(offset)] ^= int(rng.integers(1, 256))
    return data


def lose_a_piece(data: bytearray, rng: Rng) -> bytearray:
    """Some bytes in the middle are missing, or there twice."""
    first, length = int(rng.integers(0, len(data))), int(rng.integers(1, 3000))
    return data[:first] + (data[first + length :] if rng.random() < 0.5 else data[max(0, first - length) :])


def wrong_size(data: bytearray, rng: Rng) -> bytearray:
    """A header tells a size that is not its member's: octal, base-256, negative, or no number."""
    at = _header(data, rng) + 124
    said = [
        b"%011o\0" % int(rng.integers(0, 1 << 33)),
        b"\x80" + int(rng.integers(0, 1 << 62)).to_bytes(11, "big"),
        b"\xff" * 12,
        b"\xff" * 4 + int(rng.integers(0, 1 << 62)).to_bytes(8, "big"),
        b"not a size!\0",
        bytes(12),
    ]
    data[at : at + 12] = said[int(rng.integers(len(said)))]
    return _with_checksum(data, at - 124, rng)


def absurd_header(data: bytearray, rng: Rng) -> bytearray:
    """A member becomes a link, a device, a sparse file, a pax or long-name header, or something unknown."""
    at = _header(data, rng)
    data[at + 156] = b"0123456789gxLKSXVANDMZ\x00\xff"[int(rng.integers(24))]
    if rng.random() < 0.5:
        data[at + 157 : at + 257] = b"/etc/passwd".ljust(100, b"\0")
    return _with_checksum(data, at, rng)


def evil_name(data: bytearray, rng: Rng) -> bytearray:
    """A name that leads out of the folder, is absolute, empty, endless, or no text."""
    at = _header(data, rng)
    names = [
        b"../../evil.jpg",
        b"/tmp/evil.jpg",
        b"",
        b"\xff\xfe.jpg",
        b"a\nb.jpg",
        b"." * 99,
        b"x" * 100,
        b"C:\\evil.jpg",
    ]
    data[at : at + 100] = names[int(rng.integers(len(names)))].ljust(100, b"\0")
    return _with_checksum(data, at, rng)


def pax_rubbish(data: bytearray, rng: Rng) -> bytearray:
    """A pax header before a member that promises gigabytes, sparse maps or other sizes."""
    records = [
        b"999999999999 size=1\n",
        b"20 size=99999999999\n",
        b"-5 a=b\n",
        b"0 =\n",
        b"35 GNU.sparse.size=9999999999999\n",
    ]
    records += [b"30 GNU.sparse.major=1\n", b"13 path=../x\n", b"no record", b"25 GNU.sparse.map=0,99999\n"]
    body = b"".join(records[int(n)] for n in rng.integers(0, len(records), 3))
    entry = tarfile.TarInfo("pax")
    entry.type, entry.size = tarfile.XHDTYPE, len(body)
    if rng.random() < 0.2:
        entry.size = int(rng.integers(1 << 20, 1 << 40))
    at = _header(data, rng)
    header = entry.tobuf(tarfile.GNU_FORMAT)
    return data[:at] + header + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0") + data[at:]


def hurt_image(data: bytearray, rng: Rng) -> bytearray:
    """Bytes of one image change, mostly in its headers; the tar stays valid."""
    at = _header(data, rng, kinds=(b".jpg", b".png", b".webp", b".gif", b".avif"))
    said = bytes(data[at + 124 : at + 135]).split(b"\0")[0]
    size = int(said, 8) if said.isdigit() and b"8" not in said and b"9" not in said else 0  # another mutation was here
    size = min(size, len(data) - at - BLOCK)
    for _ in range(int(rng.integers(1, 30))):
        reach = size if rng.random() < 0.5 else min(size, 80)
        if reach > 0:
            data[at + BLOCK + int(rng.integers(reach))] = int(rng.integers(256))
    return data


def hurt_text(data: bytearray, rng: Rng) -> bytearray:
    """A JSON of another shape: endlessly nested, gigantic numbers, wrong types, no text."""
    texts = [
        b"[" * 100_000,
        b'{"captions": ' + b"9" * 10_000 + b"}",
        b'{"captions": [1, null, {}]}',
        b'{"captions": {"en": 3}, "caption_weights": "x"}',
        b'{"captions": ["a"], "caption_weights": [1e999]}',
        b"\xff\xfe\x00",
        b"null",
        b'{"captions": ["' + b"word " * 50_000 + b'"]}',
        b'{"captions": ["\\ud800"]}',
    ]
    return _inserted(data, rng, "json", texts[int(rng.integers(len(texts)))])


def hurt_array(data: bytearray, rng: Rng) -> bytearray:
    """A stored array that claims to be objects, of a gigantic shape, or is cut."""
    header = "{'descr': %s, 'fortran_order': False, 'shape': %s, }"
    kinds = [
        ("'|O'", "(3,)"),
        ("'<f4'", "(1000000000, 1000000)"),
        ("'<f4'", "(-1, 4)"),
        ("'<f4'", "(2, 3)"),
        ("'x'", "()"),
    ]
    described = (header % kinds[int(rng.integers(len(kinds)))]).encode().ljust(117) + b"\n"
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(described)) + described + b"cbuiltins\nexec\n."
    return _inserted(data, rng, "text_embedding.npy", body)


def bomb(data: bytearray, rng: Rng) -> bytearray:
    """An image of a few bytes whose header claims gigapixels, or one that unpacks to them."""
    width, height = [(60_000, 60_000), (2**31 - 1, 1), (1, 65_535), (30_000, 30_000), (0, 0)][int(rng.integers(5))]
    if rng.random() < 0.5:
        rows = zlib.compress(bytes(1 << 20)) * 3
        parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")
        chunks = (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in parts
        )
        return _inserted(data, rng, "png", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    _, jpeg = pil_image("progressive" if rng.random() < 0.5 else "JPEG", rng)
    frame = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    sizes = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
    return _inserted(data, rng, "jpg", jpeg[: frame + 5] + sizes + jpeg[frame + 9 :])


MUTATIONS: dict[str, Callable[[bytearray, Rng], bytearray]] = {
    mutation.__name__: mutation
    for mutation in (
        cut,
        flip,
        lose_a_piece,
        wrong_size,
        absurd_header,
        evil_name,
        pax_rubbish,
        hurt_image,
        hurt_text,
        hurt_array,
        bomb,
    )
}


def mutated_tar(rng: Rng) -> tuple[str, bytes]:
    """What was done, and the tar it was done to; mostly one mutation, sometimes several."""
    data = bytearray(whole_tar(rng))
    names = [list(MUTATIONS)[int(n)] for n in rng.integers(0, len(MUTATIONS), 1 if rng.random() < 0.7 else 3)]
    for name in names:
        if len(data) > 2 * BLOCK:
            data = MUTATIONS[name](data, rng)
    return "+".join(names), bytes(data)


def _header(data: bytearray, rng: Rng, kinds: tuple[bytes, ...] = (b"",)) -> int:
    """The offset of some member's header."""
    offsets = [
        at
        for at in range(0, len(data) - BLOCK, BLOCK)
        if data[at + 257 : at + 262] == b"ustar" and bytes(data[at : at + 100]).rstrip(b"\0").endswith(kinds)
    ]
    return offsets[int(rng.integers(len(offsets)))] if offsets else 0


def _with_checksum(data: bytearray, at: int, rng: Rng) -> bytearray:
    """Mostly with a right header checksum, for a wrong one would end the tar there."""
    if rng.random() < 0.9 and len(data) >= at + BLOCK:
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
    return data


def _inserted(data: bytearray, rng: Rng, extension: str, body: bytes) -> bytearray:
    """A further sample before some other, whose part of this kind is `body` and whose others are sound."""
    kind, image = pil_image("JPEG", rng)
    parts = {kind: image, "json": b'{"captions": ["a caption"]}', extension: body}
    at, members = _header(data, rng, kinds=(b".jpg", b".png", b".webp", b".gif", b".avif")), b""
    for name, content in parts.items():
        entry = tarfile.TarInfo(f"inserted.{name}")
        entry.size = len(content)
        members += entry.tobuf() + content + bytes(-len(content) % BLOCK)
    return data[:at] + members + data[at:]
