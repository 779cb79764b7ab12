"""A space of two dimensions whose texts are angles, so that every answer can be worked out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.index.origin_fixture import make_origin
from vlm.data.transforms import EvalTransform
from vlm.index.embeddings_folder import EmbeddingSpace, Origin
from vlm.service.search import SearchService
from vlm.tensor_types import Float32, Tensor, UInt8

OpenService = Callable[..., SearchService]
SPACE = EmbeddingSpace(model="circle", fingerprint="circle", dimension=2, modality="image")


@dataclass
class CircleModel:
    """A text is an angle in degrees."""

    fingerprint: str = "circle"
    embedding_size: int = 2
    calls: int = 0

    @property
    def view(self) -> EvalTransform:
        return EvalTransform(size=8)

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        raise AssertionError("No picture is asked for.")

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        self.calls += 1
        return torch.from_numpy(points([float(text) for text in texts]))


def points(degrees: Sequence[float]) -> np.ndarray:
    angles = np.radians(np.asarray(degrees, np.float64))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def origin(uid: str, caption: str = "", **metadata: Any) -> Origin:
    return make_origin(uid, metadata, {"en": (caption,)} if caption else {})
