"""Tiny shards, a model that knows colours, and vectors without a model."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.index.embed_fixture import embed_shards
from tests.index.index_fixture import SPACE, MakeIndex, origins, vectors
from vlm.data.transforms import EvalTransform
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Modality, Origin
from vlm.tensor_types import Float32, Tensor, UInt8

COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "cyan": (0, 255, 255),
    "red": (255, 0, 0),
    "magenta": (255, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
}


@dataclass
class ColourModel:
    """A picture's vector says how much of it has which colour, a text's which colours it names."""

    fingerprint: str = "colours"
    view: EvalTransform = field(default_factory=lambda: EvalTransform(size=8))
    embedding_size: int = len(COLOURS)
    fail_on_batch: int | None = None
    batches: int = 0

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """The share of pixels nearest to each colour."""
        if self.batches == self.fail_on_batch:
            raise InterruptedError("killed")
        self.batches += 1
        palette = torch.tensor(list(COLOURS.values())).float()
        pixels = images.float().flatten(2).transpose(1, 2)
        nearest = torch.cdist(pixels, palette.expand(len(images), -1, -1)).argmin(-1)
        return _unit(torch.nn.functional.one_hot(nearest, len(COLOURS)).float().mean(1))

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Ones where a colour is named; a text without colours points somewhere of its own."""
        rows = [[float(name in text.split()) for name in COLOURS] for text in texts]
        for row, text in zip(rows, texts, strict=True):
            if not any(row):
                row[:] = np.random.default_rng(zlib.crc32(text.encode())).random(len(COLOURS)).tolist()
        return _unit(torch.tensor(rows, dtype=torch.float32).reshape(-1, len(COLOURS)))


def _unit(rows: Float32[Tensor, "B D"]) -> Float32[Tensor, "B D"]:
    return torch.nn.functional.normalize(rows, dim=-1)


def _paint(*colours: str) -> bytes:
    image = Image.new("RGB", (16, 16))
    width = 16 // len(colours)
    for number, colour in enumerate(colours):
        image.paste(COLOURS[colour], (number * width, 0, 16, 16))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _write_shard(path: Path, samples: Sequence[tuple[str, bytes, Sequence[str]]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, captions in samples:
            described = json.dumps({"captions": list(captions), "width": 16}).encode()
            for name, data in ((f"{key}.png", image), (f"{key}.json", described)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return str(path)


@pytest.fixture
def paint() -> Callable[..., bytes]:
    """Gives a PNG with one stripe of each colour named."""
    return _paint


@pytest.fixture
def write_shard() -> Callable[..., str]:
    """Writes a tar of (key, encoded picture, captions) and gives its address."""
    return _write_shard


@pytest.fixture
def make_model() -> Callable[..., ColourModel]:
    """Makes a model with a fingerprint, or one that fails on a batch, of its own."""
    return ColourModel


@pytest.fixture
def model() -> ColourModel:
    """A model whose right answers are known."""
    return ColourModel()


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three shards of four pictures: two stripes each, captions naming both colours; one picture is no picture."""
    names, addresses = list(COLOURS), []
    for shard in range(3):
        samples = []
        for number in range(4):
            first, second = names[(shard * 4 + number) % 8], names[(shard + number + 1) % 8]
            image = b"no image" if (shard, number) == (1, 2) else _paint(first, second)
            samples.append((f"{shard}{number}", image, [f"{first} and {second}", f"stripes of {second}"]))
        addresses.append(_write_shard(tmp_path / "shards" / f"{shard:05d}.tar", samples))
    return addresses


@pytest.fixture
def embeddings(tmp_path: Path, shards: list[str], model: ColourModel) -> Path:
    """The pictures of the shards, embedded."""
    embed_shards(model, shards, tmp_path / "embeddings", model_spec="colours", batch_size=3)
    return tmp_path / "embeddings"


@pytest.fixture
def index(tmp_path: Path, embeddings: Path) -> Path:
    """A flat index of them."""
    build_index(embeddings, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def embed_vectors(tmp_path: Path) -> Callable[..., Path]:
    """Writes given vectors as an embeddings folder, in parts of 1,000 rows."""

    def write(vectors: np.ndarray, *, modality: Modality = "image") -> Path:
        folder = tmp_path / "vectors"
        space = EmbeddingSpace(model="given", fingerprint="given", dimension=vectors.shape[1], modality=modality)
        writer = EmbeddingsWriter(folder, space=space, identity={})
        for first in range(0, len(vectors), 1000):
            block = vectors[first : first + 1000]
            origins = [
                Origin(
                    uid=f"k{row}", key=f"k{row}", shard="/nowhere/0.tar", number=row, image_offset=0, image_size=0,
                    caption_number=None, captions={"": (f"row {row}",)}, metadata={},
                )
                for row in range(first, first + len(block))
            ]  # fmt: skip
            writer.add("/nowhere/0.tar", block, origins)
        writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
        return folder

    return write


@pytest.fixture
def make_index(tmp_path: Path) -> MakeIndex:
    """Builds an index of random rows named k0, k1, …"""

    def build(count: int = 300, *, kind: str = "flat", tuning: TuningParams | None = None) -> Path:
        writer = EmbeddingsWriter(tmp_path / "embeddings", space=SPACE, identity={})
        writer.add("/nowhere/0.tar", vectors(count, 0), origins([f"k{n}" for n in range(count)], split="first"))
        writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
        build_index(tmp_path / "embeddings", tmp_path / "index", kind=kind, tuning=tuning)
        return tmp_path / "index"

    return build
