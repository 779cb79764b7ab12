"""Drawn scenes drawn again with another background or size, all else the same (as ImageNet-E edits photographs).

Places, turns, tints, light and texture come from the key of an image alone, so that the two drawings of a scene differ
in nothing but the edited fact and what follows from it.

Source: Li et al. 2023, ImageNet-E: Benchmarking neural network robustness via attribute editing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from PIL import Image

from vlm.data.samples import SampleRng
from vlm.data.synthetic.shapes import VOCABULARIES, Scene, render_scene
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import EvaluationSet

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
