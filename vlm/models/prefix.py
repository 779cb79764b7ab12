"""`MODEL#64`: the first 64 numbers of a model's embeddings, of unit length again.

It is meant for models whose leading numbers say most (Matryoshka representations, Kusupati et al. 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from vlm.errors import UsageError
from vlm.files import fingerprint_of
from vlm.models.encoder import VisionLanguageModel
from vlm.tensors import Float32, Tensor, UInt8

SIGN = "#"


@dataclass(kw_only=True)
class PrefixModel(VisionLanguageModel):
    """A model that keeps the first `dimensions` numbers of each embedding; all else is that of the whole model."""

    whole: VisionLanguageModel
    dimensions: int

    @classmethod
    def of(cls, whole: VisionLanguageModel, dimensions: int) -> VisionLanguageModel:
        """The first numbers of `whole`; all of them are `whole` itself.

        Raises:
            UsageError: it has not so many.
        """
        size = whole.embedding_size
        if not 1 <= dimensions <= size:
            raise UsageError(
                f"{whole.name}{SIGN}{dimensions}: the embeddings of {whole.name} have {size} dimensions; keep from 1 "
                f"to {size} of them."
            )
        if dimensions == size:
            return whole
        shared = {one.name: getattr(whole, one.name) for one in fields(VisionLanguageModel) if one.init}
        name = f"{whole.name}{SIGN}{dimensions}"
        return cls(**shared | {"name": name, "whole": whole, "dimensions": dimensions})

    @property
    def fingerprint(self) -> str:
        """Identity of the shorter space."""
        return fingerprint_of(self.whole.fingerprint, "prefix", str(self.dimensions))

    @property
    def made_of(self) -> str:
        """The whole model."""
        return self.whole.name

    @property
    def embedding_size(self) -> int:
        """As many as are kept."""
        return self.dimensions

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B K"]:
        """Unit vectors of pictures as `view` gives them, on the CPU."""
        return nn.functional.normalize(self.whole.embed_images(images)[:, : self.dimensions], dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T K"]:
        """Unit vectors of texts, on the CPU."""
        return nn.functional.normalize(self.whole.embed_texts(texts)[:, : self.dimensions], dim=-1)


def split_spec(spec: str) -> tuple[str, int | None]:
    """The model, and how many numbers of its embeddings are kept; None where nothing is said, or a path is named so.

    >>> split_spec("runs/mine#64"), split_spec("ViT-B-32:openai")
    (('runs/mine', 64), ('ViT-B-32:openai', None))

    Raises:
        UsageError: what follows the sign is no number.
    """
    model, sign, kept = spec.rpartition(SIGN)
    if not sign or Path(spec).exists():
        return spec, None
    if not (kept.isascii() and kept.isdecimal()):
        raise UsageError(f"{spec!r}: {kept!r} is no number of dimensions; write MODEL{SIGN}64 to keep the first 64.")
    return model, int(kept)
