"""Models derived from a loaded one: shorter (Matryoshka) embeddings, of images with their mirror images,
backward-compatible ones, another image size.

`MODEL#64` keeps the first 64 numbers of an embedding, normalised again; meant for models whose leading numbers say most
(Matryoshka representations, Kusupati et al. 2022).

`MODEL#mirror` embeds an image as the mean of its own vector and of its mirror image's, normalised again, at twice the
time an image (the flips of ten-crop testing, Krizhevsky et al. 2012, §4.1, with vectors in place of probabilities).
What is written in an image is seen mirrored too.

A backward-compatible model is a new one whose embeddings can be compared with those of an old one. After BT² (Zhou et
al., ICCV 2023) its embedding is [what is compared with old ones | the rest], by a matrix with orthonormal columns, so
that no cosine between two new embeddings changes; old ones are padded with zeros. BT² also learns a rotation of the
space; for a model that is trained already it can be part of the matrix.

For images of another size the weights stay and position embeddings are interpolated to the new grid; so Dosovitskiy et
al. 2021 (§3.2) fine-tune ViT at a higher resolution.
"""

import dataclasses
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, compute_fingerprint
from vlm.manifest import Manifest, read_manifest, record_file, write_manifest
from vlm.model_spec import (
    MIRROR,
    PROJECTION_WEIGHTS,
    VARIANT_SEPARATOR,
    mirrored_fingerprint,
    truncated_fingerprint,
)
from vlm.models.model import VisionLanguageModel, build_network
from vlm.tensor_types import Float, Float32, Tensor, UInt8

# tokens before the patches: none, a class token, or that with registers
_PREFIX_TOKENS = (0, 1, 2, 4, 5)


def with_image_size(model: VisionLanguageModel, size: int) -> VisionLanguageModel:
    """The model for images of size × size pixels.

    Raises:
        UsageError: one of its weights depends on the size of the image and is not a grid of position embeddings.
    """
    if size == model.view.size:
        return model
    config = deepcopy(model.config)
    # networks of other libraries keep their size elsewhere
    if not isinstance(config.get("vision_cfg", {}).get("image_size"), int):
        raise UsageError(f"{model.name} takes images of {model.view.size} px only; leave out --image-size.")
    config["vision_cfg"]["image_size"] = size
    network = build_network(config).to(model.device)
    weights = network.state_dict()
    # sine positions are computed for their grid, not learned
    is_fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    for name, tensor in model.network.state_dict().items():
        if name not in weights or name in is_fixed:
            continue
        if weights[name].shape != tensor.shape:
            tensor = _interpolated(tensor, weights[name].shape, f"{model.name} takes {model.view.size} px: {name}")
        weights[name] = tensor
    network.load_state_dict(weights)
    view = dataclasses.replace(model.view, size=size)
    return dataclasses.replace(model, network=network.eval(), config=config, view=view)


def _interpolated(positions: Float[Tensor, "*B N C"], shape: torch.Size, name: str) -> Float[Tensor, "*B M C"]:
    from timm.layers.pos_embed import resample_abs_pos_embed

    is_grid = positions.ndim in (2, 3) and len(shape) == positions.ndim and shape[-1] == positions.shape[-1]
    old_length = positions.shape[-2:][0]
    new_length = shape[-2:][0]
    for num_prefix in _PREFIX_TOKENS if is_grid else ():
        old_side, new_side = (isqrt(max(length - num_prefix, 0)) for length in (old_length, new_length))
        if (old_side**2 + num_prefix, new_side**2 + num_prefix) == (old_length, new_length):
            rows = positions.reshape(1, old_length, -1)
            resampled = resample_abs_pos_embed(
                rows, [new_side, new_side], [old_side, old_side], num_prefix_tokens=num_prefix
            )
            return resampled.reshape(shape)
    raise UsageError(f"{name} depends on the image size in a way that cannot be interpolated; leave out --image-size.")


def _fields_of(model: VisionLanguageModel) -> dict[str, Any]:
    """What a derived model takes over from the model it wraps."""
    return {field.name: getattr(model, field.name) for field in fields(VisionLanguageModel) if field.init}


@dataclass(kw_only=True)
class TruncatedModel(VisionLanguageModel):
    """A model that keeps the first `dimensions` numbers of each embedding; all else is the whole model's."""

    whole: VisionLanguageModel
    dimensions: int

    @classmethod
    def of(cls, whole: VisionLanguageModel, dimensions: int) -> VisionLanguageModel:
        """`whole` truncated to so many dimensions; `whole` itself if these are all.

        Raises:
            UsageError: it has fewer.
        """
        size = whole.embedding_size
        if not 1 <= dimensions <= size:
            raise UsageError(
                f"{whole.name}{VARIANT_SEPARATOR}{dimensions}: the embeddings of {whole.name} have {size} "
                f"dimensions; keep from 1 to {size} of them."
            )
        if dimensions == size:
            return whole
        shared = _fields_of(whole)
        name = f"{whole.name}{VARIANT_SEPARATOR}{dimensions}"
        return cls(**shared | {"name": name, "whole": whole, "dimensions": dimensions})

    @property
    def fingerprint(self) -> str:
        """Identity of the shorter space."""
        return truncated_fingerprint(self.whole.fingerprint, self.dimensions)

    @property
    def derived_from(self) -> str:
        """The whole model."""
        return self.whole.name

    @property
    def embedding_size(self) -> int:
        """The number of dimensions kept."""
        return self.dimensions

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B K"]:
        """Unit vectors of images as `view` gives them, on the CPU."""
        # normalised again, since a part of a unit vector is shorter
        return nn.functional.normalize(self.whole.embed_images(images)[:, : self.dimensions], dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T K"]:
        """Unit vectors of texts, on the CPU."""
        return nn.functional.normalize(self.whole.embed_texts(texts)[:, : self.dimensions], dim=-1)


@dataclass(kw_only=True)
class MirroredModel(VisionLanguageModel):
    """A model whose image vectors are those of an image and of its mirror image together; texts are the whole model's.

    Features before the projection (`pool_images`), captions and heat maps are those of the image alone.
    """

    whole: VisionLanguageModel

    @classmethod
    def of(cls, whole: VisionLanguageModel) -> "MirroredModel":
        """`whole` with both views.

        Raises:
            UsageError: it embeds no images, or images in their own shape, which lie at the left of their canvas.
        """
        name = f"{whole.name}{VARIANT_SEPARATOR}{MIRROR}"
        if not whole.embeds_images or whole.view.grid:
            reason = "images keep their shape there" if whole.embeds_images else "it embeds texts only"
            raise UsageError(f"{name}: {reason}; leave {VARIANT_SEPARATOR}{MIRROR} out.")
        return cls(**_fields_of(whole) | {"name": name, "whole": whole})

    @property
    def fingerprint(self) -> str:
        """Identity of the space with both views."""
        return mirrored_fingerprint(self.whole.fingerprint)

    @property
    def derived_from(self) -> str:
        """The model of one view."""
        return self.whole.name

    @property
    def embedding_size(self) -> int:
        """D of the whole model."""
        return self.whole.embedding_size

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of images as `view` gives them, on the CPU."""
        both = self.whole.embed_images(images) + self.whole.embed_images(images.flip(3))
        return nn.functional.normalize(both, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts, on the CPU."""
        return self.whole.embed_texts(texts)


MANIFEST_KIND = "upgrade"


@dataclass(frozen=True, kw_only=True, eq=False)
class CompatibilityProjection:
    """From the new model's space of D dimensions to the one of S that it shares with old embeddings.

    matrix: its columns are orthonormal; its first `old_dimension` rows give the block compared with old embeddings.
    old, new: fingerprints of the old space and of the new model. model: the new model, as for `load_model`.
    """

    matrix: Float32[Tensor, "S D"]
    old_dimension: int
    old: str
    new: str
    model: str

    @property
    def dimension(self) -> int:
        """S."""
        return self.matrix.shape[0]

    @property
    def fingerprint(self) -> str:
        """Identity of the space it gives: of both models and of the matrix."""
        return compute_fingerprint(
            MANIFEST_KIND, self.old, self.new, repr(tuple(self.matrix.shape)), self.matrix.numpy().tobytes()
        )

    def __call__(self, vectors: Float32[Tensor, "B D"]) -> Float32[Tensor, "B S"]:
        """Unit vectors of the new model to unit vectors of the shared space."""
        return nn.functional.normalize(vectors @ self.matrix.T, dim=-1)


@dataclass(kw_only=True)
class BackwardCompatibleModel(VisionLanguageModel):
    """The new model with the projection on top; captions are those of the new model."""

    base: VisionLanguageModel
    head: CompatibilityProjection

    @classmethod
    def of(cls, base: VisionLanguageModel, head: CompatibilityProjection, name: str) -> "BackwardCompatibleModel":
        """`base` with a projection that was fitted for it."""
        shared = _fields_of(base)
        return cls(**shared | {"base": base, "head": head, "name": name})

    @property
    def fingerprint(self) -> str:
        """Of the space that old and new embeddings share."""
        return self.head.fingerprint

    @property
    def derived_from(self) -> str:
        """The model without its projection."""
        return self.base.name

    @property
    def embedding_size(self) -> int:
        """S."""
        return self.head.dimension

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B S"]:
        """Unit vectors of images as `view` gives them, on the CPU."""
        return self.head(self.base.embed_images(images))

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T S"]:
        """Unit vectors of texts, on the CPU."""
        return self.head(self.base.embed_texts(texts))


def save_projection(
    folder: Path, head: CompatibilityProjection, *, configuration: dict[str, Any], details: dict[str, Any]
) -> None:
    """Write an upgrade folder, whole or not at all.

    Raises:
        UsageError: it exists.
    """
    # an index that migrates must never see half a projection
    with atomic_folder(folder) as partial:
        save_file({"matrix": head.matrix.contiguous()}, partial / PROJECTION_WEIGHTS)
        manifest = Manifest(
            kind=MANIFEST_KIND,
            fingerprint=head.fingerprint,
            counts={"old_dimension": head.old_dimension, "dimension": head.dimension},
            configuration=configuration,
            inputs={"old": head.old, "new": head.new},
            files={PROJECTION_WEIGHTS: record_file(partial / PROJECTION_WEIGHTS)},
            details=details | {"model": head.model},
        )
        write_manifest(partial, manifest)


def read_projection(folder: Path) -> CompatibilityProjection:
    """The projection of an upgrade folder.

    Raises:
        UsageError: it is not one. VlmError: its weights are damaged.
    """
    manifest = read_manifest(folder, MANIFEST_KIND)
    try:
        matrix = load_file(folder / PROJECTION_WEIGHTS)["matrix"]
    except (SafetensorError, OSError, KeyError) as error:
        raise VlmError(f"The weights of {folder} cannot be read ({error}); fit the head again.") from error
    head = CompatibilityProjection(
        matrix=matrix,
        old_dimension=manifest.counts["old_dimension"],
        model=manifest.details["model"],
        **manifest.inputs,
    )
    # the fingerprint covers the matrix, so it is the checksum as well
    if head.fingerprint != manifest.fingerprint:
        raise VlmError(f"{folder} is not what its manifest says: its weights were changed. Fit the head again.")
    return head
