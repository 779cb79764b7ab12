"""Tars of tiny samples, made fast, some of them damaged on purpose."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DAMAGES = ("", "no image", "unreadable image", "unreadable json", "no caption")


def tiny_image(number: int) -> bytes:
    file = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", (12, 10), colour).save(file, format="JPEG")
    return file.getvalue()


def members(key: str, number: int, damage: str = "", metadata: dict[str, Any] | None = None) -> list[tuple[str, bytes]]:
    captions = [] if damage == "no caption" else [f"{key} one", f"{key} two", f"{key} three"]
    described = {"captions": captions} | (metadata or {})
    parts = [
        (f"{key}.jpg", b"\xff\xd8 not much more" if damage == "unreadable image" else tiny_image(number)),
        (f"{key}.json", b"{" if damage == "unreadable json" else json.dumps(described).encode()),
    ]
    return parts[1:] if damage == "no image" else parts


def write_tar(path: Path, damages: Sequence[str], *, prefix: str = "", metadata: dict[str, Any] | None = None) -> str:
    """A tar with a sample for each entry, whole where it is empty, else damaged as it says."""
    with tarfile.open(path, "w") as tar:
        for number, damage in enumerate(damages):
            for name, data in members(f"{prefix}{path.stem}-{number}", number, damage, metadata):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return str(path)


def damages_for(size: int, share: float, rng: np.random.Generator) -> list[str]:
    """A damage for about `share` of `size` samples."""
    return [DAMAGES[int(rng.integers(1, len(DAMAGES)))] if rng.random() < share else "" for _ in range(size)]


def without_tables(jpeg: bytes) -> bytes:
    """The JPEG less its quantization tables: its header can be read, its pixels cannot."""
    place, kept = 2, jpeg[:2]
    while jpeg[place + 1] != 0xDA:
        after = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        kept += b"" if jpeg[place + 1] == 0xDB else jpeg[place:after]
        place = after
    return kept + jpeg[place:]
