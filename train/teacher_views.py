"""The views a teacher saw and the student is trained on: their seeds, their geometry, a check that both agree.

A view is the crop that `RandomResizedCrop` draws from a stored seed. The same seed gives the student the same crop only
if its own `crop_scale` and `flip` are those of the teacher; so they are written into the manifest of reinforced shards.
The size of the image a model sees has no influence on what is drawn, and moves the edges of the crop by less than one
of its pixels, since these lie on whole pixels of the reduced JPEG.

`CollateViews` is what workers make of samples for teachers: every view of each image, and all captions.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.data.decode import EncodedImage
from vlm.data.precomputed_features import PrecomputedFeatures, view_rng
from vlm.data.samples import Sample, SampleIndex
from vlm.data.shards import SampleFailure, ShardSet, sample_failure
from vlm.data.transforms import EvalTransform, RandomResizedCrop
from vlm.errors import BadSample, UsageError
from vlm.manifest import MANIFEST
from vlm.models.model import VisionLanguageModel
from vlm.models.sentence_encoder import LanguageModelEmbedder
from vlm.models.towers.language_model import FrozenLanguageTower
from vlm.storage import is_remote, local_path, read_small, sibling_url
from vlm.tensor_types import Array, Tensor, UInt8
from vlm.train.run_config import LoaderConfig

logger = logging.getLogger(__name__)

REINFORCEMENT = "reinforcement"
"""Key in the details of a manifest of shards: what `vlm reinforce` stored in them."""

# a manifest of many shards lists the checksum of each file
_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ViewGeometry:
    """What a view drawn from a seed depends on in addition to the image.

    crop_scale: range of the crop's fraction of the area. flip: probability of a horizontal flip. ratio: range of its
    width / height.
    """

    crop_scale: tuple[float, float] = LoaderConfig.crop_scale
    flip: float = LoaderConfig.flip
    ratio: tuple[float, float] = RandomResizedCrop.ratio

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"crop_scale = {low:g} {high:g}: give two shares of the area, 0 < smallest ≤ largest ≤ 1.")
        if not 0 <= self.flip <= 1:
            raise UsageError(f"flip = {self.flip:g} is not a probability; give a number from 0 to 1.")

    def view_for(self, model_view: EvalTransform) -> RandomResizedCrop:
        """The random view at the size a model sees."""
        return RandomResizedCrop(
            size=model_view.size,
            scale=self.crop_scale,
            ratio=self.ratio,
            flip=self.flip,
            interpolation=model_view.interpolation,
        )


def view_seeds(seed: int, key: str, number: int) -> np.ndarray:
    """Seeds of the views of a sample, uint64 [number]; the first ones stay the same for a larger number.

    >>> view_seeds(0, "a", 3)[:2].tolist() == view_seeds(0, "a", 2).tolist()
    True
    """
    # hashed from the key, so that a sample has the same views in whatever shard and order it is read
    digests: list[bytes] = []
    for view in range(number):
        text = f"{seed}/{view}/{key}".encode(errors="surrogatepass")
        digests.append(blake2b(text, digest_size=8, person=b"view").digest())
    # read in one byte order, so that every machine draws the same crops
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def check_views(shards: Sequence[str], loader: LoaderConfig) -> None:
    """Check that the student sees the crops the teacher saw. Does nothing unless features with views are read.

    shards: URLs as `expand_shards` gives them. Shards whose folder does not say are logged.

    Raises:
        UsageError: `crop_scale`, `flip` or the ratio is not that of the teacher's views.
    """
    if not PrecomputedFeatures(names=loader.arrays).has_views:
        return
    ours = ViewGeometry(crop_scale=loader.crop_scale, flip=loader.flip)
    for manifest, stored in _reinforcement_by_manifest(shards).items():
        if "views" not in stored:
            logger.warning(
                f"{manifest} does not say how the stored views were cropped; --crop-scale and --flip must be the same."
            )
            continue
        theirs = geometry_from_values(stored)
        # the ratio is not configurable, so there is no option to name
        if theirs.ratio != ours.ratio:
            raise UsageError(f"The views of {manifest} have the ratio {theirs.ratio}, this vlm draws {ours.ratio}.")
        if theirs != ours:
            raise UsageError(
                f"The teacher saw {_describe_geometry(theirs)} ({manifest}), but the run would show the student "
                f"{_describe_geometry(ours)}: give --crop-scale {theirs.crop_scale[0]:g} {theirs.crop_scale[1]:g} "
                f"--flip {theirs.flip:g}, or reinforce the shards again."
            )


def check_text_embeddings(shards: Sequence[str], arrays: Sequence[str], model: VisionLanguageModel) -> None:
    """Check that stored text embeddings are what the model's frozen language model makes of the same texts.

    Does nothing unless they are read, and the text tower is `lm:` (FLAME). Shards whose folder does not say are logged.

    Raises:
        UsageError: they are another language model's, or were made with other settings.
    """
    tower = getattr(model.network, "text", None)
    if "text_embedding" not in arrays or not isinstance(tower, FrozenLanguageTower):
        return
    ours = LanguageModelEmbedder(tower, model.tokenizer, model.device)
    for manifest, stored in _reinforcement_by_manifest(shards).items():
        theirs = stored.get("text_embedding", {})
        if "fingerprint" not in theirs:
            logger.warning(
                f"{manifest} does not say what the stored text embeddings were made by; the run needs those of "
                f"{ours.describe()}."
            )
        elif theirs["fingerprint"] != ours.fingerprint:
            differences: list[str] = []
            for name, value in ours.describe().items():
                if name in theirs and theirs[name] != value:
                    differences.append(f"{name} {theirs[name]!r} there, {value!r} here")
            raise UsageError(
                f"The stored text embeddings ({manifest}) are not what this text tower makes: "
                f"{'; '.join(differences) or 'another tokenizer or language model'}. Give the tower the same settings, "
                "or add its own by vlm reinforce --text-model."
            )


def geometry_from_values(stored: dict[str, Any]) -> ViewGeometry:
    """The geometry from `views` of a reinforcement."""
    views = stored["views"]
    low, high = views["crop_scale"]
    narrow, wide = views["ratio"]
    return ViewGeometry(crop_scale=(low, high), flip=views["flip"], ratio=(narrow, wide))


def read_reinforcement(shards: Sequence[str]) -> dict[str, Any]:
    """What was stored in the shards before, according to their folders; empty unless all say the same."""
    stored = list(_reinforcement_by_manifest(shards).values())
    return stored[0] if all(other == stored[0] for other in stored) else {}


def views_to_values(geometry: ViewGeometry, *, number: int, seed: int) -> dict[str, Any]:
    """`views` of a reinforcement."""
    return asdict(geometry) | {"number": number, "seed": seed}


def _reinforcement_by_manifest(shards: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the manifest next to each shard says of stored features, by its URL; empty if there is none."""
    by_address: dict[str, dict[str, Any]] = {}
    for shard in shards:
        address = sibling_url(shard, MANIFEST) if is_remote(shard) else str(Path(local_path(shard)).parent / MANIFEST)
        # thousands of shards share one folder, whose manifest is read once
        if address not in by_address:
            by_address[address] = _read_manifest_reinforcement(address)
    return by_address


def _read_manifest_reinforcement(address: str) -> dict[str, Any]:
    try:
        if is_remote(address):
            data = read_small(address, max_bytes=_MAX_MANIFEST_BYTES) or b"{}"
        else:
            data = Path(address).read_bytes()
        stored = json.loads(data).get("details", {}).get(REINFORCEMENT, {})
    except (OSError, ValueError, AttributeError):  # foreign folders may hold any manifest.json
        return {}
    return stored if isinstance(stored, dict) else {}


def _describe_geometry(geometry: ViewGeometry) -> str:
    low, high = geometry.crop_scale
    return f"crops of {low:g} to {high:g} of the area, mirrored with probability {geometry.flip:g}"


@dataclass(frozen=True, kw_only=True)
class ViewedSample:
    """A usable sample: the seeds of its views, uint64 [A], and its captions, languages in their order."""

    key: str
    seeds: np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ViewedBatch:
    """Samples of one shard in file order.

    rows: of each index, its sample, or None for a bad one, which `incidents` names. images: of the usable samples, one
    after the other, the views [A, S, S, 3] at each size S of `sizes`, as rows of plain bytes [B, bytes]; empty on the
    way from a worker.
    """

    images: UInt8[Tensor, "..."]
    rows: tuple[ViewedSample | None, ...]
    num_views: int
    sizes: tuple[int, ...]
    incidents: tuple[SampleFailure, ...] = field(default_factory=tuple)

    @property
    def usable(self) -> list[ViewedSample]:
        """The samples that have rows in `images`."""
        return [row for row in self.rows if row is not None]

    def with_images(self, images: UInt8[Tensor, "..."]) -> "ViewedBatch":
        """The same batch with other images."""
        return replace(self, images=images)

    def views(self, size_index: int) -> UInt8[Tensor, "views 3 S S"]:
        """All views at size number `size_index`, sample by sample."""
        # in a sample's row the views of one size stand behind those of the sizes before it
        first = sum(self._bytes(size) for size in self.sizes[:size_index])
        size = self.sizes[size_index]
        images = self.images[:, first : first + self._bytes(size)]
        return images.reshape(len(images) * self.num_views, size, size, 3).permute(0, 3, 1, 2)

    def _bytes(self, size: int) -> int:
        return 3 * size**2 * self.num_views


@dataclass(frozen=True, kw_only=True)
class CollateViews:
    """Draws `num_views` crops of each image and renders each of them by every view; without views nothing is decoded.

    views: the same in all but size and interpolation, so that a seed gives all of them the same crop.
    """

    views: tuple[RandomResizedCrop, ...]
    num_views: int
    seed: int

    @property
    def image_bytes(self) -> int:
        """Bytes of all views of an image."""
        return sum(3 * view.size**2 for view in self.views) * self.num_views

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> ViewedBatch:
        """Read these samples."""
        images = shards.allocate_images((len(sample_indices), self.image_bytes))
        rows: list[ViewedSample | None] = []
        incidents: list[SampleFailure] = []
        for sample_index in sample_indices:
            # bad samples leave no gap in the images
            usable = len(rows) - len(incidents)
            try:
                rows.append(self._row(shards.read(sample_index), images[usable]))
            except BadSample as error:
                rows.append(None)
                incidents.append(sample_failure(sample_index, error, shards))
        return ViewedBatch(
            images=torch.from_numpy(images[: len(rows) - len(incidents)]),
            rows=tuple(rows),
            num_views=self.num_views,
            sizes=tuple(view.size for view in self.views),
            incidents=tuple(incidents),
        )

    def _row(self, sample: Sample, buffer: UInt8[Array, " bytes"]) -> ViewedSample:
        captions = tuple(chain.from_iterable(sample.captions.values()))
        if not captions:
            raise BadSample("no caption", f"key {sample.key!r}")

        seeds = view_seeds(self.seed, sample.key, self.num_views)
        if self.views:
            self._render_views(EncodedImage(sample.image), seeds, buffer)
        return ViewedSample(key=sample.key, seeds=seeds, captions=captions)

    def _render_views(self, image: EncodedImage, seeds: np.ndarray, buffer: UInt8[Array, " bytes"]) -> None:
        first = 0
        for view in self.views:
            size = 3 * view.size**2
            for seed in seeds.tolist():
                crop = view.draw(image.width, image.height, view_rng(seed))
                buffer[first : first + size] = view.show(image, crop).transpose(1, 2, 0).ravel()
                first += size
