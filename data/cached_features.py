"""Features of frozen towers, computed once and read in training instead of images and captions.

A part holds the features of one shard, in the order of its samples: of images [N, V, F] for V views, of captions
[N, C, F] for the longest list of captions, numbered over all languages as the shard has them. What could not be
computed (a damaged image) or is not there (a shorter list) is NaN. Parts are float16 .npy files, mapped into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm.data.caption_sampler import SampledCaption
from vlm.data.precomputed_features import view_rng
from vlm.data.sampler import SampleIndex
from vlm.data.samples import RandomSource, Sample, random_below
from vlm.errors import BadSample, VlmError
from vlm.tensor_types import Array, Float

IMAGE_FEATURE = "image_feature"
TEXT_FEATURE = "text_feature"
"""Names of the features in a batch, which its task reads in place of pixels and tokens."""

# random() has 53 bits; one number of it seeds the generator that draws the weights of a blend
_SEEDS = 1 << 53


@dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """The parts of all shards of a corpus, in their order; none where that tower is not frozen.

    blend: concentration of the Dirichlet weights by which the captions of a sample, those in the language of the drawn
        one, are averaged; 0 takes the drawn caption alone. A large number gives nearly their mean, 1 all weights alike.
    """

    image_parts: tuple[Path, ...] = ()
    text_parts: tuple[Path, ...] = ()
    blend: float = 0.0

    @property
    def has_images(self) -> bool:
        """Whether images need not be decoded."""
        return bool(self.image_parts)

    def rows(
        self, sample_index: SampleIndex, sample: Sample, caption: SampledCaption, rng: RandomSource
    ) -> dict[str, Float[Array, " F"]]:
        """The features of one visit of a sample: of one of its views, and of its drawn caption or a blend of them.

        Raises:
            BadSample: the sample has none.
        """
        features: dict[str, np.ndarray] = {}
        if self.image_parts:
            views = self._images[sample_index.shard][sample_index.number]
            features[IMAGE_FEATURE] = _finite(views[random_below(rng, len(views))], "its image could not be decoded")
        if self.text_parts:
            rows = self._texts[sample_index.shard][sample_index.number]
            if not 0 <= caption.number < len(rows):
                raise BadSample("no features", f"caption {caption.number} is not among the {len(rows)} cached ones")
            row = self._blend(rows, sample, caption, rng) if self.blend else rows[caption.number]
            features[TEXT_FEATURE] = _finite(row, "its caption was not there when they were computed")
        return features

    def _blend(
        self, rows: Float[Array, "C F"], sample: Sample, caption: SampledCaption, rng: RandomSource
    ) -> Float[Array, " F"]:
        first = 0
        for texts in sample.captions.values():
            if first <= caption.number < first + len(texts):
                own = rows[first : first + len(texts)].astype(np.float32)
                seed = int(rng.random() * _SEEDS)
                return view_rng(seed).dirichlet(np.full(len(own), self.blend)).astype(np.float32) @ own
            first += len(texts)
        raise BadSample("no features", f"caption {caption.number} is not one of the sample's")

    @cached_property
    def _images(self) -> list[np.ndarray]:
        return _map_parts(self.image_parts)

    @cached_property
    def _texts(self) -> list[np.ndarray]:
        return _map_parts(self.text_parts)


def _map_parts(parts: Sequence[Path]) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for part in parts:
        try:
            arrays.append(np.load(part, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise VlmError(
                f"{part} cannot be read ({error}); remove it, and the features are computed again."
            ) from error
    return arrays


def _finite(row: np.ndarray, otherwise: str) -> Float[Array, " F"]:
    values = row.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadSample("no features", otherwise)
    return values
