"""Scenes of coloured shapes: what an image shows, which combinations training never sees, and how it is drawn.

Two images of one scene show the same facts, never the same pixels.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "val"]

SPLITS: tuple[Split, ...] = ("train", "val")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "orange", "black", "green", "blue", "purple", "pink", "brown")
SIZES = ("small", "large")
COUNTS = (1, 2, 3)
POSITIONS = ("left", "right", "top", "bottom", "centre")
BACKGROUNDS = ("white", "grey", "beige", "yellow", "turquoise", "lavender")

# Strides 3 and 1 modulo 6 spread the set: every shape and every colour loses one or
# two of its combinations, so training still shows each of them with most others.
HELD_OUT = frozenset(
    (shape, colour)
    for (row, shape), (column, colour) in itertools.product(enumerate(SHAPES), enumerate(COLOURS))
    if (3 * row + column + row // 2) % 6 == 0
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A group of `count` equal shapes at one place of a plain background.

    Raises ValueError for a value outside its vocabulary.
    """

    shape: str
    colour: str
    size: str
    count: int
    position: str
    background: str

    def __post_init__(self) -> None:
        """Refuse what no vocabulary has."""
        for attribute, allowed in VOCABULARIES.items():
            value = getattr(self, attribute)
            if value not in allowed:
                raise ValueError(f"{attribute} {value!r} is not one of {', '.join(map(str, allowed))}")
        if self.colour == self.background:
            raise ValueError(f"colour and background are both {self.colour!r}: nothing to see")


VOCABULARIES: dict[str, tuple[str, ...] | tuple[int, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "count": COUNTS,
    "position": POSITIONS,
    "background": BACKGROUNDS,
}


@cache
def all_scenes(split: Split) -> tuple[Scene, ...]:
    """All scenes of a split, in a fixed order; the two splits share no (shape, colour)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    is_held_out = split == "val"
    scenes: list[Scene] = []
    # the order of the vocabularies must not change: a drawn number is a place in it
    for values in itertools.product(*VOCABULARIES.values()):
        attributes: dict[str, Any] = dict(zip(VOCABULARIES, values, strict=True))
        is_pair_held_out = (attributes["shape"], attributes["colour"]) in HELD_OUT
        if is_pair_held_out == is_held_out and attributes["colour"] != attributes["background"]:
            scenes.append(Scene(**attributes))
    return tuple(scenes)


def sample_scene(split: Split, rng: np.random.Generator) -> Scene:
    """One scene of the split, all equally likely."""
    scenes = all_scenes(split)
    return scenes[int(rng.integers(len(scenes)))]


def sample_scenes(split: Split, number: int, *, seed: int, is_distinct: bool = False) -> Iterator[tuple[str, Scene]]:
    """Keys and scenes; the i-th depends on (seed, split, i, is_distinct) and not on `number`.

    With `is_distinct` no scene, and so no full caption, comes twice; asking for more
    than exist raises ValueError at once, before the first scene.

    >>> [key for key, scene in sample_scenes("val", 2, seed=0)]
    ['val-000000', 'val-000001']
    """
    scenes = all_scenes(split)
    if number < 0:
        raise ValueError(f"number of scenes is {number}: it cannot be negative")
    if is_distinct and number > len(scenes):
        raise ValueError(
            f"{number} distinct scenes asked, but split {split!r} has only {len(scenes)}: "
            "ask for fewer, or allow repeats"
        )
    return _generate(split, number, seed=seed, is_distinct=is_distinct)


def _generate(split: Split, number: int, *, seed: int, is_distinct: bool) -> Iterator[tuple[str, Scene]]:
    scenes = all_scenes(split)
    stream = SPLITS.index(split)
    # without replacement one permutation is needed; else each scene has a generator of its own
    order = np.random.default_rng([seed, stream]).permutation(len(scenes)) if is_distinct else None
    for index in range(number):
        if order is not None:
            scene = scenes[order[index]]
        else:
            scene = sample_scene(split, np.random.default_rng([seed, stream, index]))
        yield f"{split}-{index:06d}", scene


def shape_colour_class(scene: Scene) -> str:
    """The class of a scene for zero-shot classification, whatever its count: "red circle"."""
    return f"{scene.colour} {scene.shape}"


def shape_colour_classes() -> tuple[str, ...]:
    """The names of all shape x colour classes, seen in training or not."""
    return tuple(f"{colour} {shape}" for shape, colour in itertools.product(SHAPES, COLOURS))


# Every background is lighter than every colour. Where contrast went both ways, a small ViT
# trained on labels knew 52% of the shapes after 32,000 images; with a palette like this, 94%.
COLOUR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 40),
    "orange": (250, 130, 10),
    "black": (24, 24, 28),
    "green": (36, 158, 62),
    "blue": (44, 98, 238),
    "purple": (142, 52, 198),
    "pink": (234, 66, 156),
    "brown": (132, 80, 42),
}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (249, 249, 251),
    "grey": (196, 199, 204),
    "beige": (236, 218, 184),
    "yellow": (252, 238, 130),
    "turquoise": (142, 228, 222),
    "lavender": (220, 204, 248),
}

# Lengths in widths of the image. Larger ones would leave three large shapes no place but the middle.
RADIUS = {"small": 0.14, "large": 0.172}
GAP = 0.032
CENTRES = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "centre": (0.5, 0.5),
}
PLACE_JITTER = 0.025
TURN_DEGREES = 8.0
MARGIN = 0.012
SUPERSAMPLING = 4

Points = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def render_scene(scene: Scene, *, pixels: int, rng: np.random.Generator) -> Image.Image:
    """A square RGB image of `pixels` x `pixels`; `rng` decides what the scene leaves open.

    Open are exact places and turns, tints, light and texture. Shapes of a group never touch.
    """
    return draw_scenes([scene], pixels=pixels, rng=rng).image


@dataclass(frozen=True)
class DrawnScenes:
    """An image with, for each scene on it, how much of a pixel its shapes cover, from 0 to 1."""

    image: Image.Image
    coverages: tuple[np.ndarray, ...]


def draw_scenes(scenes: Sequence[Scene], *, pixels: int, rng: np.random.Generator) -> DrawnScenes:
    """Scenes at different places on one image, with the background of the first, and where the shapes of each are.

    >>> left = Scene(shape="star", colour="red", size="small", count=1, position="left", background="white")
    >>> drawn = draw_scenes([left], pixels=32, rng=np.random.default_rng(0))
    >>> bool(drawn.coverages[0][:, :16].any()), bool(drawn.coverages[0][:, 16:].any())
    (True, False)
    """
    coverages = [_cover(scene, pixels=pixels, rng=rng) for scene in scenes]
    image = _paint(BACKGROUND_RGB[scenes[0].background], pixels=pixels, rng=rng)
    for scene, coverage in zip(scenes, coverages, strict=True):
        ink = _paint(COLOUR_RGB[scene.colour], pixels=pixels, rng=rng)
        image = image + coverage[..., None] * (ink - image)
    return DrawnScenes(Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8)), tuple(coverages))


def _cover(scene: Scene, *, pixels: int, rng: np.random.Generator) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """How much of each pixel the shapes of a scene cover."""
    radius = RADIUS[scene.size] * rng.uniform(0.94, 1.06)
    # Pillow draws polygons without antialiasing, so they are drawn larger and averaged
    canvas = Image.new("L", (pixels * SUPERSAMPLING, pixels * SUPERSAMPLING))
    brush = ImageDraw.Draw(canvas)
    for centre in _shape_centres(scene, radius=radius, rng=rng):
        turn = math.radians(rng.uniform(-TURN_DEGREES, TURN_DEGREES))
        corners = (_rotate(_outline(scene.shape), turn) * radius + centre) * canvas.width
        brush.polygon(corners.ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _shape_centres(scene: Scene, *, radius: float, rng: np.random.Generator) -> Points:
    """Centres of the shapes, in widths of the image, all shapes inside the image."""
    spacing = 2 * radius + GAP
    if scene.count == 1:
        offsets = np.zeros((1, 2))
    else:
        # a regular polygon whose sides are `spacing`
        angles = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(scene.count) / scene.count
        reach = spacing / (2 * math.sin(math.pi / scene.count))
        offsets = reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    offsets = offsets + rng.uniform(-GAP / 6, GAP / 6, size=offsets.shape)
    centre = np.array(CENTRES[scene.position]) + rng.uniform(-PLACE_JITTER, PLACE_JITTER, size=2)
    # the group is moved as a whole, so that a shape at the edge keeps its distance from the others
    lowest = MARGIN + radius - offsets.min(axis=0)
    highest = 1 - MARGIN - radius - offsets.max(axis=0)
    return np.clip(centre, lowest, highest) + offsets


def _paint(
    rgb: tuple[int, int, int], *, pixels: int, rng: np.random.Generator
) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    """A surface of about this colour: own tint, light from one side, soft blotches."""
    tint = np.array(rgb, dtype=np.float32) + rng.uniform(-7, 7, size=3).astype(np.float32)
    blotches = Image.fromarray(rng.normal(0, 3.5, size=(7, 7)).astype(np.float32))
    surface = np.array(blotches.resize((pixels, pixels), Image.Resampling.BICUBIC))
    ramp = np.linspace(-1, 1, pixels, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-7, 7, size=2)
    surface += np.float32(slope_x) * ramp[None, :] + np.float32(slope_y) * ramp[:, None]
    return tint + surface[..., None]


def _rotate(points: Points, radians: float) -> Points:
    cosine, sine = math.cos(radians), math.sin(radians)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


def _arc(*, start: float, stop: float, number: int = 40) -> Points:
    """Points on the unit circle, from angle to angle in degrees; 0 is right, 90 is down."""
    angles = np.radians(np.linspace(start, stop, number))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> Points:
    corners = _arc(start=-90, stop=234, number=10)
    # inner corners of a regular five-pointed star are at 0.38; a little more keeps small ones legible
    corners[1::2] *= 0.42
    return corners * 1.1 + (0, 0.06)


def _heart() -> Points:
    # the heart curve of MathWorld, upside down since y points down in images
    t = np.linspace(0, 2 * math.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16


def _cross() -> Points:
    arm, half = 0.98, 0.31
    quarter = np.array([(half, -arm), (half, -half), (arm, -half)])
    return np.concatenate([_rotate(quarter, math.pi / 2 * turn) for turn in range(4)])


@cache
def _outline(shape: str) -> Points:
    """The polygon of a shape of radius about 1 around 0."""
    match shape:
        case "circle":
            return _arc(start=0, stop=360) * 0.96
        case "square":
            return _arc(start=45, stop=315, number=4)
        case "triangle":
            return _arc(start=-90, stop=150, number=3) * 1.1 + (0, 0.2)
        case "star":
            return _star()
        case "heart":
            return _heart()
        case "cross":
            return _cross()
        case _:
            raise ValueError(f"no outline for shape {shape!r}")
