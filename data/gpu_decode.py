"""JPEG decoding on the GPU: workers read headers and draw crops, the GPU decodes, crops and resizes.

For machines whose CPU cores cannot keep the GPU fed. The crops are the same as those of the CPU path; the pixels differ
a little, since the GPU decodes whole images and has a decoder of its own.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

from vlm.data.decode import EncodedImage
from vlm.data.transforms import Crop, RandomResizedCrop
from vlm.errors import BadSample, UsageError
from vlm.tensor_types import Array, Float, Tensor, UInt8

Decoder = Callable[[list[bytes], torch.device], list[Tensor]]
"""Decodes JPEGs to stored pixels, uint8 [3, H, W]; a RuntimeError means that one of them cannot be decoded."""

# JPEG markers
_SCAN = 0xDA
_APP1 = 0xE1
_APP15 = 0xEF
_END = b"\xff\xd9"
# how far from the end of the file the end mark may lie: cameras pad
_END_SEARCH_BYTES = 4096

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

    Exactly one of encoded and shown is given. orientation: EXIF's, of the stored pixels; `encoded` does not say it.
    """

    crop: Crop
    orientation: int = 1
    encoded: bytes | None = None
    shown: UInt8[Array, "3 S S"] | None = None


@dataclass(frozen=True, kw_only=True)
class DecodedViews:
    """Views on the device. damaged: rows whose image turned out to be damaged, and why; they are black."""

    images: UInt8[Tensor, "B 3 S S"]
    damaged: dict[int, BadSample]


def prepare_view(image: EncodedImage, crop: Crop, view: RandomResizedCrop) -> PreparedView:
    """A drawn view for the device; what is not a whole, plain JPEG is decoded right here. For the workers.

    Raises:
        BadSample: what was decoded is damaged.
    """
    jpeg = image.data
    # GPU decoders fill the rest of a cut file with grey without a word
    if image.is_jpeg and _has_end(jpeg):
        # some decoders turn the image themselves
        encoded = jpeg if image.orientation == 1 else _without_exif(jpeg)
        return PreparedView(crop=crop, orientation=image.orientation, encoded=encoded)
    return PreparedView(crop=crop, shown=view.show(image, crop))


def decode_views_on_device(
    prepared: Sequence[PreparedView], view: RandomResizedCrop, device: torch.device, decoder: Decoder | None = None
) -> DecodedViews:
    """Decode, crop and resize a batch of prepared views on the device.

    view: the one they were prepared with. decoder: the best that is installed if not given. The pixels of a row do not
    depend on the others. With a CPU device it works too, slowly.
    """
    images = torch.zeros((len(prepared), 3, view.size, view.size), dtype=torch.uint8, device=device)
    damaged: dict[int, BadSample] = {}
    encoded: dict[int, bytes] = {}
    for row, item in enumerate(prepared):
        if item.encoded is not None:
            encoded[row] = item.encoded
    decoded = _decode_batch(list(encoded.values()), device, decoder or installed_decoder())
    pixels = dict(zip(encoded, decoded, strict=True))
    for row, item in enumerate(prepared):
        try:
            if item.shown is not None:
                images[row] = torch.from_numpy(item.shown)
            elif item.encoded is not None:
                images[row] = _resized(_upright(item, pixels[row], device), item.crop, view)
        except BadSample as error:
            damaged[row] = error
    return DecodedViews(images=images, damaged=damaged)


def check_decoder(device: torch.device, decoder: Decoder | None = None) -> None:
    """Decode a JPEG on the device, so that a run without a decoder ends before it begins, not slowly on the CPU.

    Raises:
        UsageError: the device has no decoder.
    """
    black = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    try:
        (decoder or installed_decoder())([black], device)
    except (RuntimeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"JPEGs cannot be decoded on {device} here: {reason}. Install a torchvision or "
            "torchcodec built for CUDA, or leave out --decode-on-device."
        ) from error


def _header(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Offset and marker of each segment of a JPEG up to its first scan, that included."""
    offset = 2
    while jpeg[offset : offset + 1] == b"\xff":
        while jpeg[offset + 1 : offset + 2] == b"\xff":  # any number of 0xFF may fill up before a marker
            offset += 1
        marker = int.from_bytes(jpeg[offset + 1 : offset + 2])
        yield offset, marker
        if marker == _SCAN:
            return
        offset += 2 + int.from_bytes(jpeg[offset + 2 : offset + 4])


def _has_end(jpeg: bytes) -> bool:
    """Whether a JPEG ends in the end mark; that of a thumbnail embedded in its header does not count."""
    scan = len(jpeg)
    for offset, marker in _header(jpeg):
        # the header ends with it
        if marker == _SCAN:
            scan = offset
    return jpeg.rfind(_END, max(scan, len(jpeg) - _END_SEARCH_BYTES)) >= 0


def _without_exif(jpeg: bytes) -> bytes:
    """The JPEG with its APP1 segments, which hold EXIF, renamed, so that no decoder reads them."""
    changed = bytearray(jpeg)
    for offset, marker in _header(jpeg):
        if marker == _APP1:
            changed[offset + 1] = _APP15
    return bytes(changed)


def _upright(item: PreparedView, stored: Tensor | None, device: torch.device) -> UInt8[Tensor, "3 H W"]:
    """Upright pixels; decoded on the CPU, one by one, where the device could not."""
    if stored is None:
        assert item.encoded is not None
        pixels = np.ascontiguousarray(EncodedImage(item.encoded).pixels())
        stored = torch.from_numpy(pixels).permute(2, 0, 1).to(device)
    return _TURNS[item.orientation](stored) if item.orientation in _TURNS else stored


def _resized(pixels: UInt8[Tensor, "3 H W"], crop: Crop, view: RandomResizedCrop) -> Float[Tensor, "3 S S"]:
    piece = pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # on CUDA the antialiased filter wants floats
    batch = F.interpolate(piece.unsqueeze(0).float(), (view.size, view.size), mode=view.interpolation, antialias=True)
    shown = batch[0].round().clamp(0, 255)
    return shown.flip(2) if crop.is_flipped else shown


def _decode_batch(jpegs: list[bytes], device: torch.device, decoder: Decoder) -> list[Tensor | None]:
    """Stored pixels of each JPEG; None for one that the device cannot decode."""
    if not jpegs:
        return []
    if device.type == "cuda":
        # the decoder writes on a stream of its own, maybe into memory that this one is still reading
        torch.cuda.current_stream(device).synchronize()
    try:
        return list(decoder(jpegs, device))
    except RuntimeError:
        # One damaged JPEG fails the whole batch and is not named: bisect until it is alone.
        if len(jpegs) == 1:
            return [None]
        half = len(jpegs) // 2
        return _decode_batch(jpegs[:half], device, decoder) + _decode_batch(jpegs[half:], device, decoder)


def installed_decoder() -> Decoder:
    """TorchCodec's decoder where it is installed, else torchvision's, which is being phased out."""
    try:
        from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError):
        return _decode_by_torchvision
    return lambda jpegs, device: decode_jpeg(jpegs, mode="RGB", device=device)


def _decode_by_torchvision(jpegs: list[bytes], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded: Any = decode_jpeg(tensors, ImageReadMode.RGB, device=device)
    return decoded
