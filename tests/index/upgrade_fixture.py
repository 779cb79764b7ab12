"""Fake: an old and a new model with known truth, for they embed hidden traits that an image and its captions share."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.index.origin_fixture import make_origin
from vlm.index.backward_compat import EmbeddingPairs, read_pairs
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Modality, Origin, normalize_rows

TRAITS = 12
CAPTIONS_EACH = 2


def turn(size: int, seed: int) -> np.ndarray:
    """A random rotation."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


class World:
    """Pictures of so many traits; a caption says them inexactly."""

    def __init__(self, count: int, seed: int = 0) -> None:
        chance = np.random.default_rng(seed)
        self.uids = [f"k{number}" for number in range(count)]
        self.images = chance.standard_normal((count, TRAITS))
        noise = chance.standard_normal((count, CAPTIONS_EACH, TRAITS))
        self.texts = (self.images[:, None] + 0.5 * noise).reshape(-1, TRAITS)

    def seen_by(self, eyes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of pictures and captions of a model whose dimensions are these mixtures of traits."""
        return normalize_rows((self.images @ eyes.T).astype(np.float32)), normalize_rows(
            (self.texts @ eyes.T).astype(np.float32)
        )

    def pairs(self, old: np.ndarray, new: np.ndarray) -> EmbeddingPairs:
        """As `read_pairs` gives them."""
        (old_images, old_texts), (new_images, new_texts) = self.seen_by(old), self.seen_by(new)
        return EmbeddingPairs(
            old=space("old", len(old)),
            new=space("new", len(new)),
            old_images=old_images,
            new_images=new_images,
            old_texts=old_texts,
            new_texts=new_texts,
            image_of=np.repeat(np.arange(len(self.uids)), CAPTIONS_EACH),
            captions=tuple(origin.captions[""][0] for origin in self.text_origins()),
        )

    def image_origins(self) -> list[Origin]:
        """Named k0, k1, …"""
        return [
            make_origin(uid, {"number": number}, {"": tuple(f"{uid} {n}" for n in range(CAPTIONS_EACH))}, number=number)
            for number, uid in enumerate(self.uids)
        ]

    def text_origins(self) -> Iterator[Origin]:
        """Named k0#0, k0#1, k1#0, …"""
        for origin in self.image_origins():
            for number, caption in enumerate(origin.captions[""]):
                yield replace(origin, uid=f"{origin.uid}#{number}", caption_number=number, captions={"": (caption,)})


def space(name: str, dimension: int, modality: Modality = "image") -> EmbeddingSpace:
    """Of a model that is nowhere."""
    return EmbeddingSpace(model=name, fingerprint=name, dimension=dimension, modality=modality)


def write(folder: Path, vectors: np.ndarray, origins: list[Origin], described: EmbeddingSpace) -> Path:
    """An embeddings folder."""
    writer = EmbeddingsWriter(folder, space=described, identity={})
    writer.add("/nowhere/0.tar", vectors, origins)
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    return folder


def write_world(folder: Path, world: World, eyes: np.ndarray, name: str) -> tuple[Path, Path]:
    """Folders of its pictures and captions by a model of this name."""
    images, texts = world.seen_by(eyes)
    return (
        write(folder / f"{name}-images", images, world.image_origins(), space(name, len(eyes))),
        write(folder / f"{name}-texts", texts, list(world.text_origins()), space(name, len(eyes), "text")),
    )


def join(old: tuple[Path, Path], new: tuple[Path, Path], max_images: int = 10**6) -> EmbeddingPairs:
    """The pairs of the folders of two models."""
    return read_pairs(old[0], new[0], old[1], new[1], max_images=max_images, seed=0)
