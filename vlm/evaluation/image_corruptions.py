"""Images made harder: ImageNet-C's corruptions, replaced patches, and the name of a wrong class written on them.

Each edit is a frozen dataclass that is called with an image as the model sees it and its key, and gives an image of
the same size. What it draws depends on its seed, its kind and the key alone: severities of a kind differ in strength
and not in luck, and patches of a larger share contain those of a smaller one.

Sources: Hendrycks and Dietterich 2019, Benchmarking neural network robustness to common corruptions and perturbations;
Naseer et al. 2021, Intriguing properties of vision transformers (patches); Goh et al. 2021, Multimodal neurons in
artificial neural networks (typographic attacks).

Drawn scenes are drawn again with another background or size, all else the same (as ImageNet-E edits photographs):
places, turns, tints, light and texture come from the key of an image alone, so that the two drawings of a scene differ
in nothing but the edited fact and what follows from it.

Source: Li et al. 2023, ImageNet-E: Benchmarking neural network robustness via attribute editing.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.config import suggest
from vlm.data.samples import SampleRng
from vlm.data.synthetic.shapes import VOCABULARIES, Scene, render_scene
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.tensor_types import Array, UInt8

EditedFact = Literal["background", "size"]
EDITED_FACTS: tuple[EditedFact, ...] = ("background", "size")


@dataclass(frozen=True, kw_only=True)
class SceneEdit:
    """Draws the scene of a key in the image's size, with a random other value of a fact; None draws it as it is."""

    scenes: Mapping[str, Scene] = field(repr=False)
    fact: EditedFact | None
    seed: int = 0

    def __call__(self, image: Image.Image, key: str) -> Image.Image:
        """The drawing in place of the image."""
        # one stream for the drawing, which all edits share, and one for the other value
        drawing = SampleRng(self.seed, 0, key, purpose="scene")
        rng = np.random.default_rng(int(drawing.random() * 2**53))
        return render_scene(self.edited(key), pixels=image.width, rng=rng)

    def edited(self, key: str) -> Scene:
        """The scene that is drawn."""
        scene = self.scenes[key]
        if self.fact is None:
            return scene
        others: list[str] = []
        for value in VOCABULARIES[self.fact]:
            if value not in (getattr(scene, self.fact), scene.colour):
                others.append(str(value))
        position = SampleRng(self.seed, 0, key, purpose=self.fact).random()
        return replace(scene, **{self.fact: others[int(position * len(others))]})


def scenes_of(data: EvaluationSet) -> dict[str, Scene]:
    """The scene of each image, by key.

    Raises:
        UsageError: an image has none in its metadata.
    """
    scenes: dict[str, Scene] = {}
    for key, metadata in zip(data.keys, data.metadata, strict=True):
        facts = metadata.get("scene")
        try:
            scenes[key] = Scene(**facts)  # pyright: ignore[reportCallIssue]
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{key} of {data.name} has no drawn scene in its metadata ({error}): backgrounds and sizes can be "
                "edited only where vlm can draw the images itself (vlm pack scenes)."
            ) from error
    return scenes


def check_labels_survive(data: EvaluationSet, fact: EditedFact) -> None:
    """Before labels that an edit makes wrong are taken for right.

    Raises:
        UsageError: the labels are values of the edited fact.
    """
    values = set(map(str, VOCABULARIES[fact]))
    labels = set[str]().union(*data.true_labels)
    if labels and labels <= values:
        raise UsageError(
            f"The labels of {data.name} are those of the edited {fact}: evaluate other labels, such as scene.shape."
        )


# the fifteen of the benchmark, in the order of its table; its four for tuning are not among them
CORRUPTION_KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
# the library refuses smaller images
MIN_PIXELS = 32
# patches of 16 pixels in an image of 224, as a ViT cuts them
PATCH_GRID = 14
PATCH_SHARES = (0.1, 0.25, 0.5, 0.75)

PatchFill = Literal["noise", "black"]
Pixels = UInt8[Array, "H W 3"]

# draws from this library come out of numpy's one global generator
_GLOBAL_GENERATOR = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One of ImageNet-C's fifteen kinds at a severity from 1 to 5, as the package imagecorruptions-imaug makes it.

    Its constants were set for 224 pixels: at fewer a severity is stronger than in the benchmark.

    Raises:
        UsageError: there is no such kind or severity, or the package is not installed.
    """

    kind: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTION_KINDS:
            raise UsageError(f"There is no corruption {self.kind!r}; {suggest(self.kind, list(CORRUPTION_KINDS))}")
        if self.severity not in SEVERITIES:
            raise UsageError(f"A corruption of severity {self.severity} does not exist: severities are 1 to 5.")
        _corruption_functions()

    def __call__(self, pixels: Pixels, key: str) -> Pixels:
        """The image corrupted.

        Raises:
            UsageError: it has less than 32 pixels a side.
        """
        if min(pixels.shape[:2]) < MIN_PIXELS:
            raise UsageError(
                f"Corruptions need images of {MIN_PIXELS} pixels or more, and these have {min(pixels.shape[:2])}: "
                f"corrupt them before the model's view (pixels = {MIN_PIXELS})."
            )
        corrupt = _corruption_functions()[self.kind]
        number = _draw_seed(self.seed, self.kind, key)
        # two kinds draw from generators of their own
        own_seed = {"seed": number} if self.kind in ("impulse_noise", "glass_blur") else {}
        with _seeded_global_generator(number):
            corrupted = corrupt(Image.fromarray(pixels), self.severity, **own_seed)
        # truncated, not rounded, as in the files of ImageNet-C
        return np.asarray(corrupted).astype(np.uint8)


def _corruption_functions() -> Mapping[str, Any]:
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        raise UsageError(
            f"Corruptions need imagecorruptions-imaug ({error}): pip install 'vlm-pipeline[evaluation]'; where libGL "
            "is missing, opencv-python-headless in place of opencv-python."
        ) from error
    return corruption_dict


def _draw_seed(seed: int, purpose: str, key: str) -> int:
    """32 bits, as numpy's global generator takes."""
    visit = f"{seed}/{purpose}/{key}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(visit, digest_size=4).digest())


@contextmanager
def _seeded_global_generator(number: int) -> Iterator[None]:
    """numpy's global generator begins from the number, and afterwards is where it was before."""
    with _GLOBAL_GENERATOR:
        state = np.random.get_state()
        np.random.seed(number)
        try:
            yield
        finally:
            np.random.set_state(state)


@dataclass(frozen=True, kw_only=True)
class PatchCorruption:
    """A share of an image's square patches replaced by noise (uniform, a value for each pixel) or by black.

    grid: patches along each side. The patches do not depend on `fill`.

    Raises:
        UsageError: the share is not between 0 and 1, or the grid below 1.
    """

    share: float
    fill: PatchFill = "noise"
    grid: int = PATCH_GRID
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"A share of {self.share:g} of the patches cannot be replaced: give one from 0 to 1.")
        if self.grid < 1:
            raise UsageError(f"A grid of {self.grid} patches is empty: {PATCH_GRID} are usual.")

    def __call__(self, pixels: Pixels, key: str) -> Pixels:
        """The image with its patches replaced."""
        rng = np.random.default_rng(_draw_seed(self.seed, "patches", key))
        order = rng.permutation(self.grid**2)
        is_replaced = np.zeros(self.grid**2, np.bool_)
        is_replaced[order[: round(self.share * len(order))]] = True
        height, width = pixels.shape[:2]
        rows = np.arange(height) * self.grid // height
        columns = np.arange(width) * self.grid // width
        mask = is_replaced.reshape(self.grid, self.grid)[rows][:, columns]
        filling = np.zeros_like(pixels)
        if self.fill == "noise":
            filling = rng.integers(256, size=pixels.shape, dtype=np.uint8)
        return np.where(mask[..., None], filling, pixels)


@dataclass(frozen=True, kw_only=True)
class TypographicAttack:
    """A text written on each image in black on a white label, somewhere in it.

    texts: by key. height: of the letters, as a share of the image's height; smaller where the text is too long.

    Raises:
        UsageError: a text has letters that the font lacks.
    """

    texts: Mapping[str, str] = field(repr=False)
    height: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for text in sorted(set(self.texts.values())):
            missing = sorted(set(filter(_is_missing, text)))
            if missing:
                raise UsageError(
                    f"The font of typographic attacks has no {missing[0]!r}, which is in {text!r}: give the classes "
                    "names in Latin, Greek or Cyrillic letters."
                )

    def __call__(self, pixels: Pixels, key: str) -> Pixels:
        """The image with its text."""
        rng = np.random.default_rng(_draw_seed(self.seed, "typographic", key))
        image = Image.fromarray(pixels)
        brush = ImageDraw.Draw(image)
        font = self._font(brush, self.texts[key], image)
        left, top, right, bottom = brush.textbbox((0, 0), self.texts[key], font=font)
        margin = max(1, round((bottom - top) / 5))
        label_width = right - left + 2 * margin
        label_height = bottom - top + 2 * margin
        x = round(rng.random() * max(0, image.width - label_width))
        y = round(rng.random() * max(0, image.height - label_height))
        brush.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill="white")
        brush.text((x + margin - left, y + margin - top), self.texts[key], fill="black", font=font)
        return np.array(image)

    def _font(self, brush: ImageDraw.ImageDraw, text: str, image: Image.Image) -> ImageFont.FreeTypeFont:
        size = max(_MIN_LETTERS, round(self.height * image.height / _LETTER_SHARE))
        while size > _MIN_LETTERS and brush.textlength(text, font=_font(size)) > 0.9 * image.width:
            size -= 1
        return _font(size)


# a capital letter's part of the height that a font of a size takes
_LETTER_SHARE = 0.7
_MIN_LETTERS = 6


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has no letter beyond ASCII; matplotlib comes with one for Latin, Greek, Cyrillic and Arabic
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


@cache
def _is_missing(letter: str) -> bool:
    """Whether the font draws the box of an unknown letter."""
    return not letter.isascii() and _drawn(letter) == _drawn("\U0010ffff")


def _drawn(letter: str) -> bytes:
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).text((4, 4), letter, fill=255, font=_font(16))
    return image.tobytes()


def wrong_class_names(
    labels: Mapping[str, tuple[str, ...]], class_names: tuple[str, ...], *, seed: int = 0
) -> dict[str, str]:
    """For each key the name of a random class that is not one of its labels.

    Raises:
        UsageError: an image is of all classes.
    """
    wrong: dict[str, str] = {}
    for key, true_names in labels.items():
        others = [name for name in class_names if name not in true_names]
        if not others:
            raise UsageError(f"{key} is of all classes: there is no wrong name to write on it.")
        rng = np.random.default_rng(_draw_seed(seed, "wrong class", key))
        wrong[key] = others[int(rng.integers(len(others)))]
    return wrong
