"""A picture as a model sees it: the random view of training and the fixed view of everything else."""

from dataclasses import asdict, dataclass, fields
from math import exp, log, sqrt
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.decode import open_picture, to_rgb, upright_size
from vlm.errors import UsageError

# OpenAI CLIP's channel statistics, which open_clip keeps as its default
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class FixedView:
    """Resize and crop without chance, pixel for pixel as open_clip's evaluation transform does.

    size: pixels of the square. mean, std: of the channels in [0, 1], applied on the device.
    resize_mode: shortest (then centre crop), squash, or longest (then pad with fill_color).
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def from_preprocess(cls, values: dict[str, Any]) -> "FixedView":
        """From the `preprocess_cfg` of an open_clip model folder."""
        known = {field.name for field in fields(cls)}
        kept: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known
        }
        if isinstance(kept.get("size"), tuple):
            height, width = kept["size"]
            if height != width:
                raise UsageError(f"The model wants {height}×{width} pictures; only square ones are supported.")
            kept["size"] = height
        return cls(**kept)

    def to_preprocess(self) -> dict[str, Any]:
        """As the `preprocess_cfg` of an open_clip model folder."""
        return asdict(self) | {"mode": "RGB", "mean": list(self.mean), "std": list(self.std)}

    def __call__(self, image: bytes) -> np.ndarray:
        """Encoded picture to uint8 [3, size, size].

        Raises:
            BadSample: it cannot be decoded.
        """
        picture = to_rgb(open_picture(image))
        return _channels_first(self._fit(picture))

    def _fit(self, picture: Image.Image) -> Image.Image:
        size, resample = self.size, _FILTERS[self.interpolation]
        if self.resize_mode == "squash":
            return picture.resize((size, size), resample)
        width, height = picture.size
        if self.resize_mode == "longest":
            ratio = max(width, height) / size
            small = picture.resize((max(round(width / ratio), 1), max(round(height / ratio), 1)), resample)
            square = Image.new("RGB", (size, size), (self.fill_color,) * 3)
            square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
            return square
        if width <= height:
            new_width, new_height = size, int(size * height / width)
        else:
            new_width, new_height = int(size * width / height), size
        if (new_width, new_height) != picture.size:
            picture = picture.resize((new_width, new_height), resample)
        left, top = round((new_width - size) / 2), round((new_height - size) / 2)
        return picture.crop((left, top, left + size, top + size))


@dataclass(frozen=True, kw_only=True)
class RandomView:
    """A random crop, resized (Inception's RandomResizedCrop), decoded no larger than it needs.

    scale: range of the crop's share of the area. ratio: range of its width / height.
    flip: probability of mirroring.
    """

    size: int = 224
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: str = "bicubic"

    def __call__(self, image: bytes, rng: np.random.Generator) -> np.ndarray:
        """Encoded picture to uint8 [3, size, size].

        Raises:
            BadSample: it cannot be decoded.
        """
        picture = open_picture(image)
        width, height = upright_size(picture)
        left, top, crop_width, crop_height = self._crop(width, height, rng)
        is_mirrored = rng.random() < self.flip
        rgb = to_rgb(picture, resolution=min(1.0, self.size / min(crop_width, crop_height)))
        # 1, 2, 4 or 8; the last row and column of a reduced JPEG reach over the edge, so the sizes do not divide
        scale = round(max(width, height) / max(rgb.size))
        box = (left / scale, top / scale, (left + crop_width) / scale, (top + crop_height) / scale)
        view = rgb.resize((self.size, self.size), _FILTERS[self.interpolation], box=box)
        if is_mirrored:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _channels_first(view)

    def _crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, width, height) in pixels; the centre, as large as the ratio allows, after ten misses."""
        if self.scale[0] == 1.0 and self.ratio[0] <= width / height <= self.ratio[1]:
            return 0, 0, width, height
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = exp(rng.uniform(log(self.ratio[0]), log(self.ratio[1])))
            crop_width, crop_height = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(rng.integers(width - crop_width + 1))
                top = int(rng.integers(height - crop_height + 1))
                return left, top, crop_width, crop_height
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _channels_first(picture: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
