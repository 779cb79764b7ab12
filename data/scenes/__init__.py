"""Pictures drawn by rule, with captions in several languages: data that needs no download.

A `Scene` is six facts. `sample_scenes` gives scenes by seed, `draw_scene` paints one,
`describe` says what is on it, and `check_caption` tells whether somebody else's caption
is true. The (shape, colour) combinations in `HELD_OUT` never occur in the split "train"
and are all there is in "val": whoever names them has understood shape and colour apart.
"""

from vlm.data.scenes.check import CaptionCheck, check_caption
from vlm.data.scenes.describe import LANGUAGES, describe
from vlm.data.scenes.draw import draw_scene
from vlm.data.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Split,
    every_scene,
    sample_scene,
    sample_scenes,
    shape_colour_class,
    shape_colour_classes,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "COUNTS",
    "HELD_OUT",
    "LANGUAGES",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "CaptionCheck",
    "Scene",
    "Split",
    "check_caption",
    "describe",
    "draw_scene",
    "every_scene",
    "sample_scene",
    "sample_scenes",
    "shape_colour_class",
    "shape_colour_classes",
]
