"""Fixture: synthetic embeddings of images and texts."""

from pathlib import Path

import numpy as np

from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Modality, Origin, normalize_rows

CAPTIONS = 5


def write(folder: Path, vectors: np.ndarray, *, modality: Modality, fingerprint: str = "drawn") -> Path:
    """An embeddings folder; five texts belong to one sample, an image is a sample of its own."""
    space = EmbeddingSpace(model="drawn", fingerprint=fingerprint, dimension=vectors.shape[1], modality=modality)
    writer, a_sample = EmbeddingsWriter(folder, space=space, identity={}), CAPTIONS if modality == "text" else 1
    for first in range(0, len(vectors), 1000):
        numbers = range(first, min(first + 1000, len(vectors)))
        origins = [
            Origin(
                uid=f"{modality}{row}", key=f"{row // a_sample}", shard="/drawn/0.tar", number=row // a_sample,
                image_offset=0, image_size=0, caption_number=None, captions={}, metadata={},
            )
            for row in numbers
        ]  # fmt: skip
        writer.add("/drawn/0.tar", vectors[first : first + 1000], origins)
    writer.finish(inputs={}, details={"shards": ["/drawn/0.tar"]})
    return folder


def write_images_and_texts(folder: Path) -> tuple[Path, Path]:
    """3,000 images in clusters, and 400 texts about them on the other side of a gap."""
    generator = np.random.default_rng(1)
    centres, gap = generator.standard_normal((60, 16)), generator.standard_normal(16)
    images = centres[generator.integers(0, 60, 3000)] + 0.5 * generator.standard_normal((3000, 16))
    texts = images[generator.integers(0, 3000, 400)] + 0.8 * generator.standard_normal((400, 16))
    rows, asked = ((normalize_rows(each.astype(np.float32))) for each in (images + 0.5 * gap, texts - 0.5 * gap))
    return write(folder / "images", rows, modality="image"), write(folder / "texts", asked, modality="text")
