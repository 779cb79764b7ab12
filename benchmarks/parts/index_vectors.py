"""Vectors for the index benchmark: real embeddings, or synthetic ones of the same structure."""

from pathlib import Path

import numpy as np

from vlm.errors import UsageError
from vlm.index.embeddings_folder import Embeddings, EmbeddingSpace, EmbeddingsWriter, Modality, Origin, normalize_rows
from vlm.tensor_types import Array, Bool, Float32

# spread of images around their cluster, of texts around their image, and the modality gap
_IMAGE_SPREAD, _TEXT_SPREAD, _GAP = 0.7, 1.5, 0.8
_ROWS_A_CLUSTER = 100
_ROWS_A_PART = 100_000


class Mixture:
    """The distribution of synthetic images, and of texts about some of them.

    Images are a mixture of Gaussians, one cluster per 100 rows; a text is its image with noise; the two modalities lie
    on either side of a gap, as those of contrastive models do (Liang et al. 2022, "Mind the gap"). Spreads are
    lengths, not standard deviations, so that more dimensions do not blur them.

    decay: the variance of the i-th strongest dimension is proportional to i^-decay; with 0 all are equal, which is
        harder than embeddings of models.
    """

    def __init__(self, rows: int, dimension: int, *, seed: int, decay: float = 0.0) -> None:
        generator = np.random.default_rng(seed)
        spectrum = np.random.default_rng((seed, 2)).permutation(np.arange(1.0, dimension + 1) ** -decay)
        self._deviations = np.sqrt(spectrum / spectrum.sum()).astype(np.float32)
        self._centres = self._noise(generator, max(1, rows // _ROWS_A_CLUSTER), 1.0)
        self._gap = self._noise(generator, 1, _GAP / 2)

    def draw(
        self, rows: int, questions: int, generator: np.random.Generator
    ) -> tuple[Float32[Array, "N D"], Float32[Array, "Q D"]]:
        """Unit vectors of images and of texts about some of these."""
        chosen = generator.integers(0, len(self._centres), rows)
        images = self._centres[chosen] + self._noise(generator, rows, _IMAGE_SPREAD)
        about = generator.integers(0, rows, questions)
        texts = images[about] + self._noise(generator, questions, _TEXT_SPREAD)
        return normalize_rows(images + self._gap), normalize_rows(texts - self._gap)

    def _noise(self, generator: np.random.Generator, count: int, length: float) -> Float32[Array, "N D"]:
        drawn = generator.standard_normal((count, len(self._deviations)), dtype=np.float32)
        return drawn * (np.float32(length) * self._deviations)


def draw_vectors(
    rows: int, questions: int, dimension: int, *, seed: int, decay: float = 0.0
) -> tuple[Float32[Array, "N D"], Float32[Array, "Q D"]]:
    """Unit vectors of images and of texts about some of them, from one mixture."""
    return Mixture(rows, dimension, seed=seed, decay=decay).draw(rows, questions, np.random.default_rng((seed, 1)))


def write_vectors(folder: Path, vectors: Float32[Array, "N D"], *, modality: Modality) -> Path:
    """Write vectors as an embeddings folder, one sample per row."""
    space = EmbeddingSpace(model="drawn", fingerprint="drawn", dimension=vectors.shape[1], modality=modality)
    writer = EmbeddingsWriter(folder, space=space, identity={"rows": len(vectors)})
    for first in range(0, len(vectors), _ROWS_A_PART):
        block = vectors[first : first + _ROWS_A_PART]
        shard = f"/drawn/{modality}-{first // _ROWS_A_PART:05d}.tar"
        origins = [
            Origin(
                uid=f"{modality}{row}",
                key=f"{row}",
                shard=shard,
                number=row - first,
                image_offset=0,
                image_size=0,
                caption_number=0 if modality == "text" else None,
                captions={},
                metadata={},
            )
            for row in range(first, first + len(block))
        ]
        writer.add(shard, block, origins)
    writer.finish(inputs={}, details={"shards": sorted({part.shard for part in writer.parts})})
    return folder


def read_vectors(folder: Path) -> Float32[Array, "N D"]:
    """Read all rows of an embeddings folder.

    Raises:
        UsageError: it is unfinished.
    """
    embeddings = Embeddings.open(folder)
    if not len(embeddings):
        raise UsageError(f"{folder} has no rows.")
    return np.concatenate(list(embeddings.blocks()))


def halves(
    folder: Path, count: int, *, seed: int, language: str | None = None
) -> tuple[Float32[Array, "Q D"], Float32[Array, "P D"]]:
    """`count` random rows of an embeddings folder, in two halves that share no sample.

    language: of the captions; None: all.
    """
    embeddings = Embeddings.open(folder)
    places: dict[tuple[str, int], int] = {}
    samples = np.array(
        [places.setdefault((origin.shard, origin.number), len(places)) for origin in embeddings.origins()]
    )
    generator = np.random.default_rng(seed)
    is_second = (generator.permutation(len(places)) % 2 == 1)[samples]
    is_spoken = _is_spoken(embeddings, language)
    first, second = (
        np.sort(generator.permutation(np.flatnonzero(chosen & is_spoken))[: count // 2])
        for chosen in (~is_second, is_second)
    )
    return embeddings.take(first), embeddings.take(second)


def read_texts(folder: Path, language: str | None) -> Float32[Array, "N D"]:
    """The rows of captions in a language; None: all."""
    return read_vectors(folder)[_is_spoken(Embeddings.open(folder), language)]


def _is_spoken(embeddings: Embeddings, language: str | None) -> Bool[Array, " N"]:
    return np.array([language is None or language in origin.captions for origin in embeddings.origins()])
