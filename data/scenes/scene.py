"""What a drawn picture shows, and which combinations training never sees."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

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
        for fact, allowed in VOCABULARIES.items():
            value = getattr(self, fact)
            if value not in allowed:
                raise ValueError(f"{fact} {value!r} is not one of {', '.join(map(str, allowed))}")
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
def every_scene(split: Split) -> tuple[Scene, ...]:
    """All scenes of a split, in a fixed order; the two splits share no (shape, colour)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    is_held_out = split == "val"
    return tuple(
        Scene(
            shape=shape,
            colour=colour,
            size=size,
            count=count,
            position=position,
            background=background,
        )
        for shape, colour, size, count, position, background in itertools.product(
            SHAPES, COLOURS, SIZES, COUNTS, POSITIONS, BACKGROUNDS
        )
        if ((shape, colour) in HELD_OUT) == is_held_out and colour != background
    )


def sample_scene(split: Split, rng: np.random.Generator) -> Scene:
    """One scene of the split, all equally likely."""
    scenes = every_scene(split)
    return scenes[int(rng.integers(len(scenes)))]


def sample_scenes(split: Split, number: int, *, seed: int, is_distinct: bool = False) -> Iterator[tuple[str, Scene]]:
    """Keys and scenes; the i-th depends on (seed, split, i, is_distinct) and not on `number`.

    With `is_distinct` no scene, and so no full caption, comes twice; asking for more
    than exist raises ValueError at once, before the first scene.

    >>> [key for key, scene in sample_scenes("val", 2, seed=0)]
    ['val-000000', 'val-000001']
    """
    scenes = every_scene(split)
    if number < 0:
        raise ValueError(f"number of scenes is {number}: it cannot be negative")
    if is_distinct and number > len(scenes):
        raise ValueError(
            f"{number} distinct scenes asked, but split {split!r} has only {len(scenes)}: "
            "ask for fewer, or allow repeats"
        )
    return _generate(split, number, seed=seed, is_distinct=is_distinct)


def _generate(split: Split, number: int, *, seed: int, is_distinct: bool) -> Iterator[tuple[str, Scene]]:
    scenes = every_scene(split)
    stream = SPLITS.index(split)
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
