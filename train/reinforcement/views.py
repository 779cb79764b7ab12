"""The views a teacher saw and the student is shown again: their seeds, their geometry, and that both agree.

A view is the crop that `RandomView` draws from a stored seed. The same seed gives the student the same crop only if its
own `crop_scale` and `flip` are those of the teacher; so they are written into the manifest of reinforced shards. The
size of the picture a model sees has no influence on what is drawn, and moves the edges of the crop by less than one
of its pixels (`RandomView` puts them on whole pixels of the reduced JPEG).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vlm.console import say
from vlm.data.arrays import StoredArrays
from vlm.data.storage.addresses import is_remote, local_path, neighbour
from vlm.data.storage.remote import read_small
from vlm.data.views import FixedView, RandomView
from vlm.errors import UsageError
from vlm.manifest import MANIFEST
from vlm.train.config import LoaderConfig

REINFORCEMENT = "reinforcement"
"""Where a manifest of shards tells, among its details, what `vlm reinforce` put into them."""

_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ViewGeometry:
    """What a view drawn from a seed depends on besides the picture.

    crop_scale: range of the crop's share of the area. flip: probability of mirroring. ratio: range of the crop's
    width / height.
    """

    crop_scale: tuple[float, float] = LoaderConfig.crop_scale
    flip: float = LoaderConfig.flip
    ratio: tuple[float, float] = RandomView.ratio

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"crop_scale = {low:g} {high:g}: give two shares of the area, 0 < smallest ≤ largest ≤ 1.")
        if not 0 <= self.flip <= 1:
            raise UsageError(f"flip = {self.flip:g} is no probability; give a number from 0 to 1.")

    def view_for(self, model_view: FixedView) -> RandomView:
        """The random view at the size a model sees."""
        return RandomView(
            size=model_view.size,
            scale=self.crop_scale,
            ratio=self.ratio,
            flip=self.flip,
            interpolation=model_view.interpolation,
        )


def view_seeds(seed: int, key: str, number: int) -> np.ndarray:
    """Seeds of the views of a sample, uint64 [number]; the first ones stay when more are asked for.

    >>> view_seeds(0, "a", 3)[:2].tolist() == view_seeds(0, "a", 2).tolist()
    True
    """
    drawn = (f"{seed}/{place}/{key}".encode(errors="surrogatepass") for place in range(number))
    digests = [blake2b(text, digest_size=8, person=b"view").digest() for text in drawn]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def check_views(shards: Sequence[str], loader: LoaderConfig) -> None:
    """Refuse to show the student other crops than the teacher saw. Does nothing unless arrays with views are asked for.

    shards: addresses as `expand_shards` gives them. Of shards whose folder does not say, a line of talk is made.

    Raises:
        UsageError: `crop_scale`, `flip` or the ratio is not that of the teacher's views.
    """
    if not StoredArrays(names=loader.arrays).has_views:
        return
    ours = ViewGeometry(crop_scale=loader.crop_scale, flip=loader.flip)
    for manifest, told in _told_by_folders(shards).items():
        if "views" not in told:
            say(f"{manifest} does not say how the stored views were cropped; --crop-scale and --flip must be the same.")
            continue
        theirs = geometry_of(told)
        if theirs.ratio != ours.ratio:
            raise UsageError(f"The views of {manifest} have the ratio {theirs.ratio}, this vlm draws {ours.ratio}.")
        if theirs != ours:
            raise UsageError(
                f"The teacher saw {_in_words(theirs)} ({manifest}), but the run would show the student "
                f"{_in_words(ours)}: give --crop-scale {theirs.crop_scale[0]:g} {theirs.crop_scale[1]:g} "
                f"--flip {theirs.flip:g}, or reinforce the shards anew."
            )


def geometry_of(told: dict[str, Any]) -> ViewGeometry:
    """The geometry that `views` of a reinforcement tells."""
    views = told["views"]
    low, high = views["crop_scale"]
    narrow, wide = views["ratio"]
    return ViewGeometry(crop_scale=(low, high), flip=views["flip"], ratio=(narrow, wide))


def reinforcement_of(shards: Sequence[str]) -> dict[str, Any]:
    """What the folders of shards say was put into them before; empty unless all say the same."""
    told = list(_told_by_folders(shards).values())
    return told[0] if all(other == told[0] for other in told) else {}


def described(geometry: ViewGeometry, *, number: int, seed: int) -> dict[str, Any]:
    """`views` of a reinforcement."""
    return asdict(geometry) | {"number": number, "seed": seed}


def _told_by_folders(shards: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the manifest beside each shard says of stored arrays, by its address; empty where there is none."""
    addresses = [
        neighbour(shard, MANIFEST) if is_remote(shard) else str(Path(local_path(shard)).parent / MANIFEST)
        for shard in shards
    ]
    return {address: _told(address) for address in dict.fromkeys(addresses)}


def _told(address: str) -> dict[str, Any]:
    try:
        if is_remote(address):
            data = read_small(address, max_bytes=_MAX_MANIFEST_BYTES) or b"{}"
        else:
            data = Path(address).read_bytes()
        told = json.loads(data).get("details", {}).get(REINFORCEMENT, {})
    except (OSError, ValueError, AttributeError):  # foreign folders may hold any manifest.json
        return {}
    return told if isinstance(told, dict) else {}


def _in_words(geometry: ViewGeometry) -> str:
    low, high = geometry.crop_scale
    return f"crops of {low:g} to {high:g} of the area, mirrored with probability {geometry.flip:g}"
