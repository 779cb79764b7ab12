"""Rows for the index type benchmark: embeddings of images, of augmented copies, of synthetic shapes, of captions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vlm.data.decode import EncodedImage
from vlm.data.samples import SampleIndex, SampleRng
from vlm.data.shards import ShardSet, count_samples
from vlm.data.transforms import RandomResizedCrop
from vlm.index.embeddings_folder import (
    Embeddings,
    EmbeddingSpace,
    EmbeddingsWriter,
    Origin,
    normalize_rows,
    open_vectors,
    read_origins,
)
from vlm.index.encoder import Encoder
from vlm.manifest import is_complete
from vlm.model_spec import absolute_spec
from vlm.tensor_types import Array, Float32, UInt8

_IMAGES_AT_ONCE = 16
_SCALE, _BRIGHTNESS = (0.35, 1.0), (0.6, 1.4)


def embed_copies(
    model: Encoder, shards: Sequence[str], scenes: Sequence[str], out: Path, *, spec: str, copies: int, moved: int
) -> Path:
    """Embed each image of the shards and `copies` augmented views of it, each synthetic image, and `moved` more rows.

    An augmented view is a random crop of 35 to 100% of the area, randomly mirrored, of 0.6 to 1.4 times the brightness.
    A moved row is an image's embedding plus the difference that augmentation made to another image's. An interrupted
    call resumes after the last complete shard.
    """
    if is_complete(out):
        return out
    space = EmbeddingSpace(
        model=absolute_spec(spec), fingerprint=model.fingerprint, dimension=model.embedding_size, modality="image"
    )
    identity = {"model": model.fingerprint, "shards": [*shards, *scenes], "copies": copies, "moved": moved}
    writer = EmbeddingsWriter(out, space=space, identity=identity)
    addresses = [*shards, *scenes]
    for number in range(len(writer.parts), len(addresses)):
        views = copies if number < len(shards) else 0
        vectors, origins = _embed_shard(model, addresses[number], views)
        writer.add(addresses[number], vectors, origins)
    if moved and len(writer.parts) == len(addresses):
        writer.add("moved", *_moved(writer, len(shards), copies, moved))
    writer.finish(inputs={"model": model.fingerprint}, details={"shards": [*addresses, "moved"]})
    return out


def split_texts(texts: Path, folders: Sequence[Path], *, most: int, seed: int) -> None:
    """Split the texts of a folder into several that share no sample, with up to `most` in each."""
    source = Embeddings.open(texts)
    vectors, origins = np.concatenate(list(source.blocks())), list(source.origins())
    places: dict[tuple[str, int], int] = {}
    samples = np.array([places.setdefault((origin.shard, origin.number), len(places)) for origin in origins])
    generator = np.random.default_rng(seed)
    share_of = generator.permutation(len(places)) % len(folders)
    for share, folder in enumerate(folders):
        if not is_complete(folder):
            chosen = np.sort(generator.permutation(np.flatnonzero(share_of[samples] == share))[:most])
            writer = EmbeddingsWriter(folder, space=source.space, identity={"share": share, "seed": seed})
            writer.add("texts", vectors[chosen], [origins[row] for row in chosen])
            writer.finish(inputs={}, details={"shards": ["texts"]})


def _embed_shard(model: Encoder, shard: str, copies: int) -> tuple[Float32[Array, "N D"], list[Origin]]:
    """The rows of a shard: for each image its plain view, then the augmented ones."""
    vectors, origins, views = [], [], []
    for origin, image in _images(shard):
        views.append(model.view(image)[None])
        if copies:
            views.append(_jittered(image, origin.key, model.view.size, copies))
        origins += [replace(origin, uid=f"{origin.uid}~{copy}") for copy in range(copies + 1)]
        if len(views) >= _IMAGES_AT_ONCE:
            vectors.append(model.embed_images(torch.from_numpy(np.concatenate(views))).numpy())
            views = []
    if views:
        vectors.append(model.embed_images(torch.from_numpy(np.concatenate(views))).numpy())
    return np.concatenate(vectors), origins


def _images(shard: str) -> Iterator[tuple[Origin, bytes]]:
    opened, (count,) = ShardSet([shard]), count_samples([shard])
    for number in range(count):
        sample = opened.read(SampleIndex(0, 0, number))
        origin = Origin(
            uid=f"{Path(shard).stem}/{sample.key}",
            key=sample.key,
            shard=shard,
            number=number,
            image_offset=0,
            image_size=len(sample.image),
            caption_number=None,
            captions=sample.captions,
            metadata={},
        )
        yield origin, sample.image


def _jittered(image: bytes, key: str, size: int, copies: int) -> UInt8[Array, "C 3 S S"]:
    pil_image, view = EncodedImage(image), RandomResizedCrop(size=size, scale=_SCALE, flip=0.5)
    pixels, low, high = pil_image.pixels(resolution=1.0), *_BRIGHTNESS
    shown = np.empty((copies, size, size, 3), np.uint8)
    for copy in range(copies):
        chance = SampleRng(0, copy, key, purpose="jitter")
        view.cut(pil_image, pixels, view.draw(pil_image.width, pil_image.height, chance), out=shown[copy])
        bright = shown[copy] * np.float32(low + (high - low) * chance.random())
        shown[copy] = np.minimum(bright, 255).astype(np.uint8)
    return np.ascontiguousarray(shown.transpose(0, 3, 1, 2))


def _moved(
    writer: EmbeddingsWriter, shards: int, copies: int, count: int
) -> tuple[Float32[Array, "N D"], list[Origin]]:
    generator = np.random.default_rng(0)
    parts = writer.parts[:shards]
    rows = np.concatenate([np.asarray(open_vectors(writer.folder, part), np.float32) for part in parts])
    views = rows.reshape(-1, copies + 1, rows.shape[1])
    at, other = generator.integers(0, len(views), (2, count))
    copy = generator.integers(1, copies + 1, count)
    vectors = normalize_rows(views[at, 0] + views[other, copy] - views[other, 0])
    origins = [origin for part in parts for origin in read_origins(writer.folder, part)][:: copies + 1]
    return vectors, [replace(origins[place], uid=f"moved/{number}") for number, place in enumerate(at)]
