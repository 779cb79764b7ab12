"""`vlm explain`: heat maps of why an image matches a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.cli.options import DeviceOption, JsonOption, ModelArgument
from vlm.console import show_json, show_table
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Show which parts of an image make a model match it with a text: vlm explain MODEL cat.jpg "a cat" --out why.png.

    Writes the image and, beside it in grey, the heat map of the text and of each word: dark where nothing is for it.
    """

    model: ModelArgument

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What the image is compared with."""

    out: Path = Path("explanation.png")
    """File to write: .png for the figure, .npy for the map of the text as numbers."""

    method: Literal["auto", "attention", "grad-cam", "hires-cam", "similarity", "eigen-cam", "occlusion"] = "auto"
    """How maps are computed; auto: attention where the image tower has any, else grad-cam. Occlusion works with any
    tower, slowly; eigen-cam knows no text."""

    against: tuple[str, ...] = ()
    """Other texts: show what speaks for the text rather than for them."""

    words: bool = False
    """Also a map for each word by itself."""

    shifts: int = 0
    """Shifts of the image along each axis that maps are averaged over; 0: as many as make 14 places a side."""

    device: DeviceOption = "auto"

    json: JsonOption = False

    def run(self) -> None:
        """Explain, write, show."""
        if self.out.suffix.lower() not in (".png", ".npy"):
            raise UsageError(f"--out {self.out}: name a file that ends in .png (a figure) or .npy (the numbers).")
        if not self.image.is_file():
            raise UsageError(f"There is no image {str(self.image)!r}.")
        # after the checks, which should not wait for torch
        from vlm.api.explanation import explain

        explanation = explain(
            self.model,
            self.image,
            self.text,
            method=self.method,
            against=self.against,
            words=self.words,
            shifts=self.shifts,
            device=self.device,
        )
        explanation.save(self.out)
        if self.json:
            show_json(explanation.to_json() | {"out": str(self.out)})
            return
        rows: list[list[object]] = []
        for heat_map in (explanation.whole, *explanation.words):
            right, down = heat_map.peak
            rows.append([heat_map.text, f"{heat_map.similarity:.3f}", f"{right:.0%} right, {down:.0%} down"])
        show_table(["text", "similarity", "hottest place"], rows, title=f"{explanation.method} → {self.out}")
