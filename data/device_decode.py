"""Decoding on the device: workers read headers and draw crops, the GPU's JPEG decoder does the rest.

For machines whose CPU cores cannot keep the GPU fed. What is drawn is the same as with `RandomView`; the pixels differ
a little, since the GPU decodes whole pictures and has a decoder of its own.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlm.data.decode import EncodedPicture
from vlm.data.views import Crop, RandomView
from vlm.errors import BadSample
from vlm.tensors import Array, Float, Tensor, UInt8

_END = b"\xff\xd9"
# how far from the end of the file the end mark may lie: cameras pad
_END_WITHIN = 4096

# EXIF orientation → the stored pixels [3, H, W] upright
_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda stored: stored.flip(2),
    3: lambda stored: stored.flip(1, 2),
    4: lambda stored: stored.flip(1),
    5: lambda stored: stored.transpose(1, 2),
    6: lambda stored: stored.transpose(1, 2).flip(2),
    7: lambda stored: stored.flip(1, 2).transpose(1, 2),
    8: lambda stored: stored.transpose(1, 2).flip(1),
}


@dataclass(frozen=True, kw_only=True)
class PreparedView:
    """A view on its way to the device: an encoded JPEG with the crop to show, or the view itself.

    Exactly one of encoded and shown is given. orientation: EXIF's, of the stored pixels.
    """

    crop: Crop
    orientation: int = 1
    encoded: bytes | None = None
    shown: UInt8[Array, "3 S S"] | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceViews:
    """Views on the device. damaged: rows whose picture turned out to be damaged, and why; they are black."""

    images: UInt8[Tensor, "B 3 S S"]
    damaged: dict[int, BadSample]


def prepare_view(image: bytes, view: RandomView, rng: np.random.Generator) -> PreparedView:
    """Read the header and draw the crop; what is no whole, plain JPEG is decoded right here. For the workers.

    Raises:
        BadSample: the header cannot be read, or what was decoded is damaged.
    """
    picture = EncodedPicture(image)
    crop = view.draw(picture.width, picture.height, rng)
    # GPU decoders fill the rest of a cut file with grey without a word
    if picture.is_jpeg and image.rfind(_END, -_END_WITHIN) >= 0:
        return PreparedView(crop=crop, orientation=picture.orientation, encoded=image)
    return PreparedView(crop=crop, shown=view.show(picture, crop))


def show_on_device(prepared: Sequence[PreparedView], view: RandomView, device: torch.device) -> DeviceViews:
    """Decode, crop and resize a batch of prepared views on the device.

    view: that which they were prepared with. With a CPU device it works too, slowly.
    """
    rows = torch.zeros((len(prepared), 3, view.size, view.size), dtype=torch.uint8, device=device)
    damaged: dict[int, BadSample] = {}
    encoded = {row: one.encoded for row, one in enumerate(prepared) if one.encoded is not None}
    decoded = _decode_batch(list(encoded.values()), device)
    pixels = dict(zip(encoded, decoded or [None] * len(encoded), strict=True))
    for row, one in enumerate(prepared):
        try:
            if one.shown is not None:
                rows[row] = torch.from_numpy(one.shown)
            elif one.encoded is not None:
                rows[row] = _resized(_upright(one, pixels[row], device), one.crop, view)
        except BadSample as error:
            damaged[row] = error
    return DeviceViews(images=rows, damaged=damaged)


def _upright(one: PreparedView, stored: Tensor | None, device: torch.device) -> UInt8[Tensor, "3 H W"]:
    """Upright pixels; decoded on the CPU, one by one, where the batch could not be."""
    if stored is None:
        assert one.encoded is not None
        pixels = np.ascontiguousarray(EncodedPicture(one.encoded).pixels())
        return torch.from_numpy(pixels).permute(2, 0, 1).to(device)
    return _TURNS[one.orientation](stored) if one.orientation in _TURNS else stored


def _resized(pixels: UInt8[Tensor, "3 H W"], crop: Crop, view: RandomView) -> Float[Tensor, "3 S S"]:
    piece = pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # on CUDA the antialiased filter wants floats
    batch = F.interpolate(piece.unsqueeze(0).float(), (view.size, view.size), mode=view.interpolation, antialias=True)
    shown = batch[0].round().clamp(0, 255)
    return shown.flip(2) if crop.is_mirrored else shown


def _decode_batch(images: list[bytes], device: torch.device) -> list[Tensor] | None:
    """Stored pixels of each JPEG; None if one of them cannot be decoded, which fails the whole batch."""
    if not images:
        return []
    try:
        return _decoder()(images, device)
    except RuntimeError:
        return None


def _decoder() -> Callable[[list[bytes], torch.device], list[Tensor]]:
    """TorchCodec's decoder where it is installed, else torchvision's, which is on its way out."""
    try:
        from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError):
        return _decode_by_torchvision
    return lambda images, device: decode_jpeg(images, mode="RGB", device=device)


def _decode_by_torchvision(images: list[bytes], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded: Any = decode_jpeg(tensors, ImageReadMode.RGB, device=device)
    return decoded
