"""Transforms: an image as a model sees it.

`RandomResizedCrop` is the random view of training, `LocalCrops` the small crops next to it, `EvalTransform` the fixed
view of everything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, lru_cache
from math import ceil, exp, floor, isqrt, log, sqrt
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import EncodedImage, check_size, open_image, reduction, to_rgb
from vlm.data.samples import RandomSource
from vlm.errors import UsageError
from vlm.tensor_types import Array, Int, Tensor, UInt8

# OpenAI CLIP's channel statistics, which open_clip keeps as its default
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# how far the filters of antialiased resizing reach, in pixels of the smaller of both images
_SUPPORTS = {"bicubic": 2.0, "bilinear": 1.0}
# a filter that reaches further has over 16 taps, the most that the compiled module takes (MAX_PAIRS); in views of
# three pixels it may have fewer
_MAX_SUPPORT = 9.0
# of torch's whole-number weights, in bits behind the point
_MAX_PRECISION = 22
# height and width of an image, and the size of its view, for which the compiled filter is compared with torch's:
# enlarged, left, and shrunk by all numbers of taps
_PROBES = ((140, 61, 224), (64, 64, 64), (97, 130, 96), (150, 170, 96), (90, 75, 33), (33, 88, 30))


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Grids of at most `tokens` patches in the shape of an image (NaViT, Dehghani et al. 2023; NaFlex, SigLIP 2).

    patch: pixels of a patch's side. An image fills its grid, from the top left corner of a square canvas on; the rest
    is black. The canvas holds shapes to 2:1, √2 times as long as a square of as many patches; longer ones are squeezed.

    >>> TokenGrid(patch=12, tokens=64).cells(400, 300)
    (7, 9)
    """

    patch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.patch < 1 or self.tokens < 1:
            raise UsageError(f"{self.tokens} patches of {self.patch} pixels show nothing; give 1 or more of each.")

    @property
    def side(self) -> int:
        """Pixels of the canvas's side."""
        return self.patch * isqrt(2 * self.tokens)

    def cells(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns for an image of this size.

        Of the grids that take no further row or no further column, so that few tokens are missing, they are those of
        the one nearest in shape.
        """
        longest = isqrt(2 * self.tokens)
        grids: list[tuple[float, int, int]] = []
        for side in range(max(1, self.tokens // longest), longest + 1):
            other = min(longest, self.tokens // side)
            for rows, columns in ((other, side), (side, other)):
                grids.append((abs(log(columns * height / (rows * width))), rows, columns))
        _, rows, columns = min(grids)
        return rows, columns

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels at which an image of this size is shown."""
        rows, columns = self.cells(width, height)
        return rows * self.patch, columns * self.patch


ASPECT = "aspect"
"""The resize mode that keeps the shape of an image, on a `TokenGrid`."""

# fields of the fixed view that this mode alone has; identities of other views were computed without them
_GRID_FIELDS = ("patch", "tokens")


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Resize and crop deterministically, pixel for pixel as open_clip's evaluation transform does.

    size: pixels of the square. mean, std: of the channels in [0, 1], applied on the device.
    resize_mode: shortest (then centre crop), squash, or longest (then pad with fill_color); shortest_floor is shortest
        with the crop of transformers, which rounds half of an odd remainder down, torchvision to the even number;
        aspect is ours, without a crop: a `TokenGrid` of `tokens` patches of `patch` pixels, on a canvas of `size`.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    patch: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.grid and self.grid.side != self.size:
            raise UsageError(
                f"Images of at most {self.tokens} patches of {self.patch} px lie on a canvas of {self.grid.side} px, "
                f"not {self.size}; their size is the image tower's tokens=, not --image-size."
            )

    @cached_property
    def grid(self) -> TokenGrid | None:
        """The grids that images keep their shape on; None where all are squares."""
        return TokenGrid(patch=self.patch, tokens=self.tokens) if self.resize_mode == ASPECT else None

    def identity(self) -> str:
        """What the fingerprint of an embedding space holds of it.

        The name in it is the class's first one: fingerprints of models and indexes outlive a renaming.
        """
        values = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"FixedView({values})"

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for field in fields(self):
            if self.resize_mode == ASPECT or field.name not in _GRID_FIELDS:
                values[field.name] = getattr(self, field.name)
        return values

    @classmethod
    def from_preprocess(cls, values: dict[str, Any]) -> "EvalTransform":
        """From the `preprocess_cfg` of an open_clip model folder."""
        arguments: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in values:
                # JSON has no tuples, and a frozen dataclass is hashed
                value = values[field.name]
                arguments[field.name] = tuple(value) if isinstance(value, list) else value
        if isinstance(arguments.get("size"), tuple):
            height, width = arguments["size"]
            if height != width:
                raise UsageError(f"The model takes {height}×{width} images; only square ones are supported.")
            arguments["size"] = height
        return cls(**arguments)

    def to_preprocess(self) -> dict[str, Any]:
        """As the `preprocess_cfg` of an open_clip model folder."""
        return self._values() | {"mode": "RGB", "mean": list(self.mean), "std": list(self.std)}

    def __call__(self, data: bytes) -> np.ndarray:
        """Encoded image to uint8 [3, size, size].

        Raises:
            BadSample: it cannot be decoded.
        """
        return self.of_image(open_image(data))

    def of_image(self, image: Image.Image) -> np.ndarray:
        """An opened or drawn image to uint8 [3, size, size], as its file would be.

        Raises:
            BadSample: its data is damaged, or it is too large.
        """
        check_size(*image.size)
        return _channels_first(self._fit(to_rgb(image)))

    def _fit(self, image: Image.Image) -> Image.Image:
        size = self.size
        resample = _FILTERS[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((size, size), resample)
        width, height = image.size
        if self.grid:
            canvas = Image.new("RGB", (size, size))
            canvas.paste(image.resize(self.grid.shape(width, height)[::-1], resample), (0, 0))
            return canvas
        if self.resize_mode == "longest":
            ratio = max(width, height) / size
            # a banner of extreme proportions would round to no pixel at all
            small = image.resize((max(round(width / ratio), 1), max(round(height / ratio), 1)), resample)
            square = Image.new("RGB", (size, size), (self.fill_color,) * 3)
            square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
            return square
        # int() and round() as in torchvision's Resize and CenterCrop: another rounding shifts the image by a pixel
        new_width = size if width <= height else int(size * width / height)
        new_height = int(size * height / width) if width <= height else size
        if (new_width, new_height) != image.size:
            image = image.resize((new_width, new_height), resample)
        half = floor if self.resize_mode == "shortest_floor" else round
        left = half((new_width - size) / 2)
        top = half((new_height - size) / 2)
        return image.crop((left, top, left + size, top + size))


class Crop(NamedTuple):
    """A rectangle of an upright image, in its pixels, and whether it is mirrored.

    shown: height and width in pixels of the part of the view that it fills; None is all of it.
    """

    left: int
    top: int
    width: int
    height: int
    is_flipped: bool = False
    shown: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random crop, resized (Inception's RandomResizedCrop), decoded no larger than needed.

    scale: range of the crop's share of the area. ratio: range of its width / height.
    flip: probability of mirroring. interpolation: bicubic or bilinear, both antialiased.
    grid: images keep their shape: a crop fills the grid of its whole image, and `ratio` is of its shape to that grid's.

    Raises:
        UsageError: size is below 1.
    """

    size: int = 224
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: str = "bicubic"
    grid: TokenGrid | None = None

    @classmethod
    def of_view(cls, view: EvalTransform, *, scale: tuple[float, float], flip: float) -> "RandomResizedCrop":
        """Crops for a model whose fixed view this is."""
        return cls(size=view.size, scale=scale, flip=flip, interpolation=view.interpolation, grid=view.grid)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size = {self.size} pixels show nothing; give 1 or more.")

    def __call__(self, data: bytes, rng: RandomSource) -> UInt8[Array, "3 S S"]:
        """Encoded image to its view; the channels of a pixel are adjacent in memory (as of `show`).

        Raises:
            BadSample: it cannot be decoded.
        """
        image = EncodedImage(data)
        return self.show(image, self.draw(image.width, image.height, rng))

    def draw(self, width: int, height: int, rng: RandomSource) -> Crop:
        """The crop of an upright image of this size; the centre, as large as the ratio allows, after ten misses.

        What is drawn from the generator depends on the size alone, not on how the image is decoded.
        """
        is_flipped = rng.random() < self.flip
        shown = self.grid.shape(width, height) if self.grid else None
        # a square view has stretch 1.0 exactly, so that a seed's crops stay what they are
        stretch = shown[1] / shown[0] if shown else 1.0
        # a crop of the whole area can only be the whole image: the tries would all miss and end there too
        if self.scale[0] == 1.0 and self.ratio[0] <= width / height / stretch <= self.ratio[1]:
            return self._on_grid(Crop(0, 0, width, height, is_flipped, shown))
        random = rng.random
        low, span = self._log_ratio
        min_scale, max_scale = self.scale
        scale_span = max_scale - min_scale
        # what is as wide or as high does not fit, whichever way it is rounded
        widest = (width + 0.75) ** 2
        highest = (height + 0.75) ** 2
        # ten tries, then the centre, as torchvision's RandomResizedCrop does
        for _ in range(10):
            # four numbers for every try, in this order: with another one a seed would give other views
            share = random()
            shape = random()
            across = random()
            down = random()
            area = width * height * (min_scale + share * scale_span)
            aspect = exp(low + shape * span) * stretch  # uniform in the logarithm: wide is as likely as tall
            if area * aspect > widest or area / aspect > highest:
                continue
            crop_width = round(sqrt(area * aspect))
            crop_height = round(sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(across * (width - crop_width + 1))
                top = int(down * (height - crop_height + 1))
                return self._on_grid(Crop(left, top, crop_width, crop_height, is_flipped, shown))

        aspect = min(max(width / height, self.ratio[0] * stretch), self.ratio[1] * stretch)
        crop_width = min(width, round(height * aspect))
        crop_height = min(height, round(width / aspect))
        left = (width - crop_width) // 2
        top = (height - crop_height) // 2
        return self._on_grid(Crop(left, top, crop_width, crop_height, is_flipped, shown))

    @cached_property
    def _log_ratio(self) -> tuple[float, float]:
        return log(self.ratio[0]), log(self.ratio[1]) - log(self.ratio[0])

    def _on_grid(self, crop: Crop) -> Crop:
        """The crop with its edges on whole pixels of the reduced JPEG, for images of every format.

        Otherwise a reduced image would be shifted by part of a pixel against the same one decoded whole.
        """
        step = reduction(self._magnification(crop))
        if step == 1:
            return crop
        left, top, width, height = (edge - edge % step for edge in crop[:4])
        return Crop(left, top, width, height, crop.is_flipped, crop.shown)

    def _magnification(self, crop: Crop) -> float:
        height, width = crop.shown or (self.size, self.size)
        return max(width / crop.width, height / crop.height)

    def show(self, image: EncodedImage, crop: Crop) -> UInt8[Array, "3 S S"]:
        """Decode an image and resize its crop; the channels of a pixel are adjacent in memory.

        Raises:
            BadSample: it cannot be decoded.
        """
        shown = np.empty((self.size, self.size, 3), np.uint8)
        self.cut(image, image.pixels(resolution=self.resolution(crop)), crop, out=shown)
        return shown.transpose(2, 0, 1)

    def resolution(self, crop: Crop) -> float:
        """Share of the image's width and height at which its crop still fills the view."""
        return min(1.0, self._magnification(crop))

    def cut(
        self, image: EncodedImage, pixels: UInt8[Array, "H W 3"], crop: Crop, *, out: UInt8[Array, "h w 3"]
    ) -> None:
        """Write the resized crop of the image's pixels, whole or reduced, to `out`."""
        if crop.shown:
            height, width = crop.shown
            # in a piece of its own: torch's filter writes whole arrays
            part = np.empty((height, width, 3), np.uint8)
            self.cut(image, pixels, crop._replace(shown=None), out=part)
            out[:] = 0
            out[:height, :width] = part
            return
        step = image.reduction_of(pixels)
        if image.orientation != 1 and any(overhang := image.overhang(step)):
            self._crop_between_pixels(pixels, crop, step, overhang, out=out)
            if crop.is_flipped:
                _mirror(out)
        else:
            rows = slice(crop.top // step, max((crop.top + crop.height) // step, 1))
            columns = slice(crop.left // step, max((crop.left + crop.width) // step, 1))
            resize_antialiased(
                pixels[rows, columns], out, interpolation=self.interpolation, is_mirrored=crop.is_flipped
            )

    def _crop_between_pixels(
        self,
        pixels: UInt8[Array, "H W 3"],
        crop: Crop,
        step: int,
        overhang: tuple[int, int],
        *,
        out: UInt8[Array, "h w 3"],
    ) -> None:
        """As `cut` where the reduced pixels do not begin at the image's corner; torch cuts at whole ones only."""
        left, right = _reduced_edges(crop.left, crop.width, overhang[0], step, pixels.shape[1])
        top, bottom = _reduced_edges(crop.top, crop.height, overhang[1], step, pixels.shape[0])
        first_row = int(top)
        first_column = int(left)
        piece = Image.fromarray(np.ascontiguousarray(pixels[first_row : ceil(bottom), first_column : ceil(right)]))
        box = (left - first_column, top - first_row, right - first_column, bottom - first_row)
        out[:] = piece.resize((out.shape[1], out.shape[0]), _FILTERS[self.interpolation], box=box)


def _reduced_edges(first: int, length: int, overhang: int, step: int, num_pixels: int) -> tuple[float, float]:
    """Where a stretch of an image begins and ends among its reduced pixels."""
    return (first + overhang) / step, min((first + length + overhang) / step, num_pixels)


def resize_antialiased(
    pixels: UInt8[Array, "H W 3"],
    out: UInt8[Array, "height width 3"],
    *,
    interpolation: str,
    is_mirrored: bool = False,
) -> None:
    """Resize to the size of `out` by torch's antialiased filter: Pillow's results within two levels, in a fifth of its
    time, or a twentieth where the compiled module can do it.

    is_mirrored: then exchange left and right.
    """
    bits = compiled_filter()
    if bits and _resize_by_kernel(bits, pixels, out, interpolation, is_mirrored=is_mirrored):
        return
    if min(pixels.strides) < 0:  # an image turned upright; torch has no negative strides, not even of a single row
        pixels = pixels.copy()
    _resize_by_torch(pixels, out, interpolation)
    if is_mirrored:
        _mirror(out)


def _mirror(pixels: UInt8[Array, "H W 3"]) -> None:
    """Exchange left and right."""
    import torch

    tensor = torch.from_numpy(pixels)
    # numpy copies the bytes of such a view one by one, which takes longer than decoding a small photo
    tensor.copy_(tensor.flip(1))


def _resize_by_torch(pixels: UInt8[Array, "H W 3"], out: UInt8[Array, "h w 3"], interpolation: str) -> None:
    # what F.interpolate calls, but it has no `out`, and a view that is copied later has left the processor's cache
    _resize_functions()[interpolation](_batch_of_one(pixels), out.shape[:2], False, out=_batch_of_one(out))


@cache
def _resize_functions() -> dict[str, Callable[..., Any]]:
    # here, since the fixed view resizes without torch, which takes seconds to load
    from torch.ops import aten

    return {"bicubic": aten._upsample_bicubic2d_aa.out, "bilinear": aten._upsample_bilinear2d_aa.out}


def _batch_of_one(pixels: UInt8[Array, "H W 3"]) -> UInt8[Tensor, "1 3 H W"]:
    import torch

    # torch sees channels last, for which it has its fastest filter; numpy turns axes in half of torch's time
    return torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))


@cache
def compiled_filter() -> int:
    """Bits of the vectors with which the compiled module (`antialias.c`) resizes as torch does: 512 or 256.

    0 where it is not built, the processor has neither, or its pixels are not those of the torch that is installed.
    """
    try:
        from vlm.data import antialias

        widest = antialias.vector_bits()
        return next((bits for bits in (512, 256) if bits <= widest and _is_torchs_filter(bits)), 0)
    # of a checkout that was updated since it was installed, the module may have other functions, or other arguments
    except (ImportError, AttributeError, TypeError):
        return 0


def _is_torchs_filter(bits: int) -> bool:
    rng = np.random.default_rng(0)
    for height, width, size in _PROBES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for interpolation in _SUPPORTS:
            found, expected = np.zeros((2, size, size, 3), np.uint8)
            _resize_by_torch(pixels, expected, interpolation)
            _resize_by_kernel(bits, pixels, found, interpolation)
            if not np.array_equal(found, expected):
                return False
    return True


def _resize_by_kernel(
    bits: int,
    pixels: UInt8[Array, "H W 3"],
    out: UInt8[Array, "h w 3"],
    interpolation: str,
    *,
    is_mirrored: bool = False,
) -> bool:
    """Whether it could: not where an image is shrunk to less than a third, or was turned upright."""
    from vlm.data import antialias

    across = _filter_axis(pixels.shape[1], out.shape[1], interpolation, bits, is_mirrored)
    down = _filter_axis(pixels.shape[0], out.shape[0], interpolation, bits)
    return across is not None and down is not None and antialias.resize(pixels, out, across, down)


# of crops of photos of all sizes, which decoding brings to one to two times the view, there are a few hundred
@lru_cache(maxsize=512)
def _filter_axis(size: int, size_out: int, interpolation: str, bits: int, is_mirrored: bool = False) -> Any:
    """What the compiled module needs to resize from `size` pixels to `size_out`; None where that is too far.

    is_mirrored: the result from its end to its beginning, for which a mirrored view needs no pass of its own.
    """
    # first, since of a banner shrunk to an icon the weights alone would take gigabytes to read off
    if _SUPPORTS[interpolation] * size / size_out > _MAX_SUPPORT:
        return None
    from vlm.data import antialias

    starts, taps, precision = _filter_taps(size, size_out, interpolation)
    if is_mirrored:
        starts, taps = np.flip(starts).copy(), np.flip(taps, axis=0).copy()
    return antialias.axis(starts, taps, size, precision, bits)


def _filter_taps(size: int, size_out: int, interpolation: str) -> tuple[Int[Array, " h"], Int[Array, "h K"], int]:
    """Where the taps of each pixel of the result begin, their weights times 2^precision, and the precision.

    torch's own numbers, read off its filter in 64-bit floats, since the same formula rounds otherwise elsewhere: each
    row of `impulses` is 1 at every `period`-th pixel, so that a pixel of the result is the weight of the one it sees.
    """
    import torch

    support = _SUPPORTS[interpolation] * max(size / size_out, 1.0)
    period = 2 * ceil(support) + 3
    impulses = (np.arange(size) % period == np.arange(period)[:, None]).astype(np.float64)
    answers = np.empty((period, size_out))
    batch, answer_batch = (torch.from_numpy(array[None, None]) for array in (impulses, answers))
    _resize_functions()[interpolation](batch, (period, size_out), False, out=answer_batch)

    # one pixel before the first that has weight, should rounding put it there
    centres = (np.arange(size_out) + 0.5) * (size / size_out)
    first = np.maximum((centres - support + 0.5).astype(np.int64) - 1, 0)
    places = first[:, None] + np.arange(period)
    weights = np.where(places < size, answers[places % period, np.arange(size_out)[:, None]], 0.0)

    # as torch rounds them: with as many bits as leave the largest in 16
    precision = 0
    while precision < _MAX_PRECISION and int(weights.max() * 2.0 ** (precision + 1) + 0.5) < 1 << 15:
        precision += 1
    scaled = weights * 2.0**precision
    taps = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int16)

    is_used = taps != 0
    skipped = is_used.argmax(axis=1)
    num_taps = int((period - is_used[:, ::-1].argmax(axis=1) - skipped).max())
    padded = np.pad(taps, ((0, 0), (0, num_taps)))
    used_taps = np.take_along_axis(padded, skipped[:, None] + np.arange(num_taps), axis=1)
    return (first + skipped).astype(np.int32), used_taps, precision


def _channels_first(image: Image.Image) -> np.ndarray:
    # Pillow takes its pixels apart in half the time that numpy needs to turn them over
    planes = bytearray().join(image.tobytes("raw", channel) for channel in "RGB")
    return np.frombuffer(planes, np.uint8).reshape(3, image.height, image.width)


LOCAL_SCALE = (0.05, 0.4)
"""Range of a crop's share of the area, as in the multi-crop of DINO (Caron et al. 2021)."""


@dataclass(frozen=True, kw_only=True)
class LocalCrops:
    """`number` crops of an image, each drawn as `view` says."""

    number: int
    view: RandomResizedCrop

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UsageError(f"{self.number} local crops: give 1 or more, or none at all.")

    @classmethod
    def for_global_crop(
        cls, view: RandomResizedCrop, *, number: int, size: int = 0, scale: tuple[float, float] = LOCAL_SCALE
    ) -> "LocalCrops":
        """Crops next to a view, flipped as often and resized alike. size: of their side; 0 is half the view's."""
        return cls(number=number, view=replace(view, size=size or max(view.size // 2, 1), scale=scale))

    def draw(self, width: int, height: int, rng: RandomSource) -> list[Crop]:
        """The crops of an upright image of this size."""
        return [self.view.draw(width, height, rng) for _ in range(self.number)]

    def show(
        self,
        image: EncodedImage,
        crops: Sequence[Crop],
        decoded: UInt8[Array, "H W 3"],
        *,
        out: UInt8[Array, "V h w 3"],
    ) -> None:
        """Write the resized crops to `out`.

        decoded: the image as its view needed it, which serves unless the crops need it finer; then it is decoded a
        second time.

        Raises:
            BadSample: it cannot be decoded.
        """
        resolution = max(self.view.resolution(crop) for crop in crops)
        if image.reduction_of(decoded) > reduction(resolution):
            decoded = image.pixels(resolution=resolution)
        for row, crop in zip(out, crops, strict=True):
            self.view.cut(image, decoded, crop, out=row)
