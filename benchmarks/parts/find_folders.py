"""Folders for the benchmark of `vlm find`: real images out of tars, changes of them, and very many tiny ones."""

import io
import os
import random
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".png")
_LONG_AGO = 1_600_000_000


def unpack(tars: Sequence[Path], folder: Path) -> None:
    """All files of the tars, each in a folder of its name."""
    for tar in tars:
        with tarfile.open(tar) as opened:
            opened.extractall(folder / tar.stem, filter="data")


def image_files(folder: Path) -> list[Path]:
    """The images, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def add(folder: Path, number: int, rng: random.Random) -> None:
    """New images, which are none of the others."""
    (folder / "added").mkdir()
    for name in range(number):
        _write_noise(folder / "added" / f"{name}.png", rng, pixels=64)


def move(folder: Path, number: int, rng: random.Random) -> None:
    """Images to another folder, under other names."""
    (folder / "moved").mkdir()
    for name, path in enumerate(rng.sample(_originals(folder), number)):
        path.rename(folder / "moved" / f"{name}{path.suffix}")


def delete(folder: Path, number: int, rng: random.Random) -> None:
    """Images away."""
    for path in rng.sample(_originals(folder), number):
        path.unlink()


def edit(folder: Path, number: int, rng: random.Random) -> None:
    """Other bytes in place of images, as an editor writes them."""
    for path in rng.sample(_originals(folder), number):
        image = Image.open(path).convert("RGB").rotate(180)
        # none of the images is a product of another one: the seal makes sure
        image.putpixel((0, 0), tuple(rng.randbytes(3)))
        image.save(path)


def copy(folder: Path, number: int, rng: random.Random) -> None:
    """Copies of images, in a folder of their own."""
    (folder / "copied").mkdir()
    for name, path in enumerate(rng.sample(_originals(folder), number)):
        (folder / "copied" / f"{name}{path.suffix}").write_bytes(path.read_bytes())


def write_many(folder: Path, number: int) -> None:
    """Tiny images of noise, a thousand in each folder, as old as photos are."""
    rng = random.Random(0)
    for name in range(number):
        path = folder / f"{name // 1000:03d}" / f"{name:06d}.png"
        if name % 1000 == 0:
            path.parent.mkdir(parents=True)
        _write_noise(path, rng, pixels=8)
        os.utime(path, (_LONG_AGO, _LONG_AGO))


def settle() -> None:
    """Wait until the files written last are older than the coarsest clock of a file system."""
    time.sleep(2.5)


def _originals(folder: Path) -> list[Path]:
    return [path for path in image_files(folder) if path.parent.name not in ("added", "moved", "copied")]


def _write_noise(path: Path, rng: random.Random, *, pixels: int) -> None:
    noise = np.frombuffer(rng.randbytes(3 * pixels * pixels), np.uint8).reshape(pixels, pixels, 3)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    path.write_bytes(file.getvalue())
