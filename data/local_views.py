"""Small crops of a picture beside its view, for objectives that hold parts against the whole."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.data.decode import EncodedPicture, reduction
from vlm.data.samples import Chance
from vlm.data.views import Crop, RandomView
from vlm.errors import UsageError
from vlm.tensors import Array, UInt8

LOCAL_SCALE = (0.05, 0.4)
"""Range of a crop's share of the area, as in the multi-crop of DINO (Caron et al. 2021)."""


@dataclass(frozen=True, kw_only=True)
class LocalViews:
    """So many crops of a picture, each drawn as `view` says."""

    number: int
    view: RandomView

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UsageError(f"{self.number} local crops: give 1 or more, or none at all.")

    @classmethod
    def beside(
        cls, view: RandomView, *, number: int, size: int = 0, scale: tuple[float, float] = LOCAL_SCALE
    ) -> "LocalViews":
        """Crops that go with a view, mirrored as often and resized alike. size: of their side; 0 is half the view's."""
        return cls(number=number, view=replace(view, size=size or max(view.size // 2, 1), scale=scale))

    def draw(self, width: int, height: int, rng: Chance) -> list[Crop]:
        """The crops of an upright picture of this size."""
        return [self.view.draw(width, height, rng) for _ in range(self.number)]

    def show(
        self,
        picture: EncodedPicture,
        crops: Sequence[Crop],
        decoded: UInt8[Array, "H W 3"],
        *,
        out: UInt8[Array, "V h w 3"],
    ) -> None:
        """Write the resized crops to `out`.

        decoded: the picture as its view needed it, which serves unless the crops need it finer; then it is decoded a
        second time.

        Raises:
            BadSample: it cannot be decoded.
        """
        resolution = max(self.view.resolution(crop) for crop in crops)
        if picture.step_of(decoded) > reduction(resolution):
            decoded = picture.pixels(resolution=resolution)
        for row, crop in zip(out, crops, strict=True):
            self.view.cut(picture, decoded, crop, out=row)
