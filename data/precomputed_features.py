"""Features read in place of what would be computed: those stored next to a sample, and a cache of frozen towers'.

`PrecomputedFeatures` are a teacher's embeddings of views and captions, or text embeddings, stored next to a sample.

A sample may hold `key.NAME.npy` members. Those of NAME `view_seeds` (uint64 [A]) are seeds of A views a teacher saw;
`teacher_image` (float [A, D]) is what it made of them: the student is shown the same view (dataset reinforcement,
Faghri et al. 2023, section 3; in image-text form Vasu et al. 2023, MobileCLIP, section 4). `teacher_text` and
`text_embedding` (float [T, D]) have a row for each caption, languages in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vlm.data.caption_sampler import SampledCaption
from vlm.data.samples import RandomSource, Sample, SampleIndex, random_below
from vlm.errors import BadSample, UsageError, VlmError
from vlm.tensor_types import Array, Float, Tensor

VIEW_SEEDS = "view_seeds"
ARRAY_ROWS: dict[str, Literal["view", "caption"]] = {
    "teacher_image": "view",
    "teacher_text": "caption",
    "text_embedding": "caption",
}
"""The arrays training may request, and what each row belongs to."""


@dataclass(frozen=True, kw_only=True)
class PrecomputedFeatures:
    """Which stored arrays a batch carries. names: keys of `ARRAY_ROWS`."""

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in ARRAY_ROWS:
                raise UsageError(f"There is no stored array {name!r}; it must be one of {', '.join(ARRAY_ROWS)}.")

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The arrays to read of each sample."""
        return (VIEW_SEEDS, *self.names) if self.has_views else self.names

    @cached_property
    def has_views(self) -> bool:
        """Whether views are those a teacher saw."""
        return any(ARRAY_ROWS[name] == "view" for name in self.names)

    @cached_property
    def has_captions(self) -> bool:
        """Whether there are rows for captions, which belong to the one that is drawn."""
        return any(ARRAY_ROWS[name] == "caption" for name in self.names)

    def sample_view(self, sample: Sample, rng: RandomSource) -> tuple[int, np.random.Generator]:
        """The number of a stored view, drawn at random, and the generator that draws the view again.

        Raises:
            BadSample: the seeds are not a list of whole numbers.
        """
        seeds = sample.arrays[VIEW_SEEDS]
        # a shard comes from anywhere: a float or negative seed would fail deep inside numpy, without a key
        if seeds.ndim != 1 or not len(seeds) or seeds.dtype.kind not in "ui" or seeds.min() < 0:
            raise BadSample(
                "bad array", f"{VIEW_SEEDS} has shape {seeds.shape} of {seeds.dtype}; uint64 [A] is expected"
            )
        number = random_below(rng, len(seeds))
        return number, view_rng(int(seeds[number]))

    def rows(self, sample: Sample, *, view: int, caption: SampledCaption) -> tuple[Float[Array, " D"], ...]:
        """The row of each array that belongs to the drawn view and caption.

        Raises:
            BadSample: an array has no such row.
        """
        selected: list[np.ndarray] = []
        for name in self.names:
            array = sample.arrays[name]
            row = view if ARRAY_ROWS[name] == "view" else caption.number
            if array.ndim != 2 or array.dtype.kind != "f" or not 0 <= row < len(array):
                raise BadSample(
                    "bad array",
                    f"{name} has shape {array.shape} of {array.dtype}; row {row} of a float matrix is expected",
                )
            # a float64 beyond float32 becomes infinite here, and is refused below with its name and row
            with np.errstate(over="ignore"):
                values = array[row].astype(np.float32)
            if not np.isfinite(values).all():
                raise BadSample("bad array", f"{name} has values in row {row} that are not finite in float32")
            selected.append(values)
        return tuple(selected)

    def stack(
        self, rows: Sequence[tuple[Float[Array, " D"], ...]], keys: Sequence[str]
    ) -> dict[str, Float[Tensor, "B D"]]:
        """The rows of a batch as float32 matrices, by name.

        Raises:
            VlmError: they differ in length.
        """
        stacked: dict[str, torch.Tensor] = {}
        for position, name in enumerate(self.names):
            # one key for each length, to name an example of each in the message
            sizes: dict[int, str] = {}
            vectors: list[np.ndarray] = []
            for row, key in zip(rows, keys, strict=True):
                sizes[row[position].size] = key
                vectors.append(row[position])
            if len(sizes) > 1:
                raise VlmError(
                    f"{name} has rows of different lengths ({sizes}, one key each); store them with one length."
                )
            stacked[name] = torch.from_numpy(np.stack(vectors))
        return stacked


def view_rng(seed: int) -> np.random.Generator:
    """The generator that draws the view of a stored seed."""
    # the bit generator is part of the format: another one would not draw the crops the teacher saw
    return np.random.Generator(np.random.SFC64(seed))


IMAGE_FEATURE = "image_feature"
TEXT_FEATURE = "text_feature"
"""Names of the features in a batch, which its task reads in place of pixels and tokens."""

# random() has 53 bits; one number of it seeds the generator that draws the weights of a blend
_SEEDS = 1 << 53


@dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """Features of frozen towers, computed once and read in training instead of images and captions.

    A part holds the features of one shard, in the order of its samples: of images [N, V, F] for V views, of captions
    [N, C, F] for the longest list of captions, numbered over all languages as the shard has them. What could not be
    computed (a damaged image) or is not there (a shorter list) is NaN. Parts are float16 .npy files, memory-mapped.

    image_parts, text_parts: of all shards of a corpus, in their order; none where that tower is not frozen.

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
        # numbered over all languages: only the captions in the drawn one's language say the same
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
            # mapped: all workers share the pages, and read no more than the rows they draw
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
