"""`vlm.explain`: why an image matches a text, as heat maps over the image."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.api.image_batches import ImageLike, name_images, read_batches
from vlm.api.inference import Model, load
from vlm.config import text_list
from vlm.errors import UsageError, os_errors_explained
from vlm.files import write_bytes
from vlm.tensor_types import Array, Float32, UInt8

if TYPE_CHECKING:
    from vlm.models.heat_maps import Method

logger = logging.getLogger(__name__)

_PANEL_PIXELS = 336
# of maps that stand beside a small image
_SMALL_PIXELS = 240
_LABEL_PIXELS = 26
_PANELS_A_ROW = 4
# matplotlib's, even in lightness, so that nothing looks like an edge that is none
_COLOUR_MAP = "inferno"
_HEAT_SHARE = 0.65


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Where an image matches a text.

    heat: from 0 to 1 for each pixel of the image as the model sees it. similarity: cosine of the image with the text.
    """

    text: str
    similarity: float
    heat: Float32[Array, "H W"]

    @property
    def peak(self) -> tuple[float, float]:
        """The hottest place, in widths and heights of the view, from the left and from the top."""
        row, column = np.unravel_index(int(self.heat.argmax()), self.heat.shape)
        height, width = self.heat.shape
        return (float(column) + 0.5) / width, (float(row) + 0.5) / height

    def to_json(self) -> dict[str, Any]:
        """All but the map."""
        return {"text": self.text, "similarity": self.similarity, "peak": list(self.peak)}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Heat maps of an image for a text, and for each of its words where asked for.

    view: the image as the model sees it, cropped. method: what computed them; never "auto".
    """

    image: str
    method: str
    view: UInt8[Array, "H W 3"]
    whole: HeatMap
    words: tuple[HeatMap, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the maps and the image."""
        words = [word.to_json() for word in self.words]
        return {"image": self.image, "method": self.method, **self.whole.to_json(), "words": words}

    def overlay(self, heat_map: HeatMap | None = None) -> Image.Image:
        """The view in grey with the heat over it, dark where there is none; the whole text's unless a map is given."""
        import matplotlib

        heat = self.whole.heat if heat_map is None else heat_map.heat
        # enlarged as numbers, not as colours
        enlarged = np.asarray(Image.fromarray(heat).resize((_PANEL_PIXELS, _PANEL_PIXELS), Image.Resampling.BILINEAR))
        colours = matplotlib.colormaps[_COLOUR_MAP](np.clip(enlarged, 0, 1))[..., :3] * 255
        grey = np.asarray(self._enlarged_view().convert("L").convert("RGB"), np.float32)
        mixed = _HEAT_SHARE * colours + (1 - _HEAT_SHARE) * grey
        return Image.fromarray(np.clip(mixed + 0.5, 0, 255).astype(np.uint8))

    def figure(self) -> Image.Image:
        """The view, and beside it the overlay of the text and of each word, with their names."""
        panels = [(self.method, self._enlarged_view()), (self.whole.text, self.overlay())]
        panels += [(word.text, self.overlay(word)) for word in self.words]
        columns = min(len(panels), _PANELS_A_ROW)
        height = _PANEL_PIXELS + _LABEL_PIXELS
        figure = Image.new("RGB", (columns * _PANEL_PIXELS, -(-len(panels) // columns) * height), "white")
        brush = ImageDraw.Draw(figure)
        font = ImageFont.load_default(size=15)
        for number, (label, panel) in enumerate(panels):
            corner = (number % columns * _PANEL_PIXELS, number // columns * height)
            brush.text((corner[0] + 6, corner[1] + 4), _shortened(label, font), fill="black", font=font)
            figure.paste(panel, (corner[0], corner[1] + _LABEL_PIXELS))
        return figure

    @os_errors_explained()
    def save(self, path: str | Path) -> None:
        """Write the figure as PNG, or the map of the text as .npy, float32 [H, W].

        Raises:
            UsageError: the name ends in neither.
        """
        path = Path(path)
        content = io.BytesIO()
        if check_out(path) == ".npy":
            np.save(content, self.whole.heat)
        else:
            self.figure().save(content, "PNG")
        write_bytes(path, content.getvalue())

    def _enlarged_view(self) -> Image.Image:
        return Image.fromarray(self.view).resize((_PANEL_PIXELS, _PANEL_PIXELS), Image.Resampling.BICUBIC)


def explainer(load_model: Callable[[], Model]) -> Callable[[Image.Image, str, str], bytes | None]:
    """What makes heat maps of a model, loaded with the first: of a text, rather than of another unless that is empty.

    Each as a JPEG over the view. Where its image tower gives none, that is said once, and there are none.
    """

    model = cache(load_model)
    # a tower without maps has none for any image: said once, not at each mistake
    problems: set[str] = set()

    def explain_mistake(image: Image.Image, text: str, other: str) -> bytes | None:
        if problems:
            return None
        try:
            overlay = explain(model(), image, text, against=(other,) if other else ()).overlay()
        except UsageError as error:
            problems.add(str(error))
            logger.warning(f"The report has no heat maps: {error}")
            return None
        overlay.thumbnail((_SMALL_PIXELS, _SMALL_PIXELS))
        content = io.BytesIO()
        overlay.save(content, "JPEG", quality=80)
        return content.getvalue()

    return explain_mistake


def check_out(path: Path) -> str:
    """The ending of a file that an explanation can be written to.

    Raises:
        UsageError: it is another one.
    """
    if path.suffix.lower() not in (".png", ".npy"):
        raise UsageError(f"{path}: an explanation is written as .png (a figure) or .npy (the numbers); name one.")
    return path.suffix.lower()


@os_errors_explained()
def explain(
    model: str | Path | Model,
    image: ImageLike,
    text: str,
    *,
    method: "Method" = "auto",
    against: Sequence[str] = (),
    words: bool = False,
    shifts: int = 0,
    device: str = "auto",
) -> Explanation:
    """Heat maps that say which parts of an image make a model match it with a text.

    Args:
        model: MODEL as for `vlm.load`, or a model.
        image: one image in any form that `Model.embed_images` takes.
        text: what the image is compared with.
        method: "auto" (attention where the tower has any, else grad-cam), "attention", "grad-cam", "hires-cam",
            "similarity", "eigen-cam" (which knows no text), or "occlusion" (slow, for any tower): docs/evaluation.md.
        against: other texts: the map then says what speaks for `text` rather than for them.
        words: give a map for each word of the text by itself, too.
        shifts: shifts of the image along each axis that maps are averaged over; 0 decides by how coarse they are.

    Raises:
        UsageError: the text is empty, the image cannot be used, or the tower has not what the method needs.
    """
    import torch
    from torch.nn.functional import normalize

    from vlm.models.heat_maps import default_method, heat_maps
    from vlm.models.model import normalise

    if not text.strip():
        raise UsageError("The text is empty: there is nothing to explain.")
    named = name_images(image)
    if len(named) != 1:
        raise UsageError(f"{len(named)} images were given: explain one at a time.")
    encoder = (model if isinstance(model, Model) else load(model, device=device)).encoder
    # encoders of other origin that embed for an index need not be networks
    if not hasattr(encoder, "network") or not encoder.embeds_images:
        raise UsageError(f"{encoder.name} has no image tower to look into: heat maps need one that torch runs.")
    # the crop that the model sees: a map over the whole file would point beside the thing
    view = next(read_batches(named, encoder.view, batch_size=1, on_error="raise")).pixels
    texts = [text, *(text.split() if words else [])]
    rows = encoder.embed_texts(texts)
    # cosines that are shown stay those of the texts, whatever the maps are against
    directions = rows.clone()
    if against:
        directions = directions - encoder.embed_texts(text_list(against, "against")).mean(dim=0)

    pixels = normalise(torch.from_numpy(view).to(encoder.device), encoder.view)
    if method == "auto":
        method = default_method(encoder.network, pixels)
    maps = heat_maps(encoder.network, pixels, directions, method, shifts=shifts).cpu()
    cosines = normalize(encoder.embed_images(torch.from_numpy(view)), dim=-1) @ rows.T
    explained: list[HeatMap] = []
    for label, cosine, heat in zip(texts, cosines[0].tolist(), maps, strict=True):
        explained.append(HeatMap(text=label, similarity=cosine, heat=_from_0_to_1(heat.numpy())))
    return Explanation(
        image=named[0].name,
        method=method,
        view=np.ascontiguousarray(view[0].transpose(1, 2, 0)),
        whole=explained[0],
        words=tuple(explained[1:]),
    )


def _from_0_to_1(heat: Float32[Array, "H W"]) -> Float32[Array, "H W"]:
    """From its least to its greatest value; a map of one value is 0."""
    heat = heat.astype(np.float32)
    spread = float(heat.max() - heat.min())
    return (heat - heat.min()) / np.float32(spread) if spread > 0 else np.zeros_like(heat)


def _shortened(label: str, font: Any) -> str:
    # measured, since letters of other scripts are twice as wide
    while len(label) > 1 and font.getlength(label) > _PANEL_PIXELS - 12:
        label = label.removesuffix("…")[:-1] + "…"
    return label
