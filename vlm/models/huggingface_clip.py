"""Dual encoders of transformers as networks of ours: CLIP, MetaCLIP 2, SigLIP and SigLIP 2 from a Hugging Face folder.

The configuration of transformers is kept in our own, under `huggingface`, so that a model that is trained on or
exported here is a model folder like any other.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from vlm.data.tokenizers import TransformersTokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.models.model import VisionLanguageModel
from vlm.models.towers.huggingface import set_checkpointing
from vlm.models.towers.tower import text_mask
from vlm.tensor_types import Bool, Float, Int64, Tensor

FAMILIES = ("clip", "metaclip_2", "siglip", "siglip2")
"""The `model_type` of the configurations that can be loaded."""

CONFIG_KEY = "huggingface"
_CONFIG_FILE = "config.json"
# by Pillow's numbers, which image processors store
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class HuggingFaceDualEncoder(nn.Module):
    """CLIP, MetaCLIP 2, SigLIP or SigLIP 2 of transformers, called as open_clip's models are.

    SigLIP 2 with `model_type` siglip2 (NaFlex) is given all images as squares of its number of patches.
    """

    def __init__(self, values: dict[str, Any], trunk: Any | None = None) -> None:
        """values: our configuration. trunk: the model of transformers; None builds one with random weights."""
        super().__init__()
        self.trunk: Any = _build(values[CONFIG_KEY]) if trunk is None else trunk
        # found under these names by everything that works with open_clip's models
        self.logit_scale = nn.Parameter(self.trunk.logit_scale.detach().clone().squeeze())
        bias = getattr(self.trunk, "logit_bias", None)
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(bias.detach().clone().squeeze()))
        del self.trunk.logit_scale
        if bias is not None:
            del self.trunk.logit_bias
        text = values["text_cfg"]
        self._pad_id = int(text["pad_id"])
        self._pads_with_end_token = text["pad_id"] == text["eos_id"]
        self._has_text_mask = bool(text["has_mask"])
        family = values[CONFIG_KEY]["model_type"]
        self._patch_size = int(values[CONFIG_KEY]["vision_config"]["patch_size"]) if family == "siglip2" else 0
        # a causal tower read at its end token; SigLIP reads the last position of the whole row
        self.can_trim_padding = family in ("clip", "metaclip_2")

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self.trunk.vision_model

    def encode_image(self, image: Float[Tensor, "B 3 H W"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Embeddings of images."""
        inputs = _patches(image, self._patch_size) if self._patch_size else {"pixel_values": image}
        return _embeddings(self.trunk.get_image_features(**inputs), normalize)

    def pool_image(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Features of images before the projection; SigLIP has no projection, so they are the embeddings."""
        if not hasattr(self.trunk, "visual_projection"):
            return self.encode_image(image)
        return self.visual(pixel_values=image).pooler_output

    def encode_text(self, text: Int64[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Embeddings of rows of tokens."""
        mask = self._mask(text) if self._has_text_mask and not self.can_trim_padding else None
        return _embeddings(self.trunk.get_text_features(input_ids=text, attention_mask=mask), normalize)

    def forward(self, image: Float[Tensor, "B 3 H W"], text: Int64[Tensor, "B L"]) -> dict[str, Tensor]:
        """`image_features` and `text_features` [B, D] of unit length, `logit_scale`, and `logit_bias` if any."""
        outputs = {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        bias = self.logit_bias
        return outputs | {"logit_bias": bias} if isinstance(bias, Tensor) else outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        set_checkpointing(self.trunk, enable)

    def _mask(self, tokens: Int64[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        mask = text_mask(tokens, self._pad_id)
        if not self._pads_with_end_token:
            return mask
        # the first padding is the end token of the text
        before = F.pad(mask, (1, 0))[:, :-1]
        is_empty = ~mask.any(dim=1, keepdim=True)
        return mask | before | (is_empty & (torch.arange(mask.shape[1], device=mask.device) == 0))


def _build(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(**values), dtype=torch.float32)


def _embeddings(outputs: Any, normalize: bool) -> Float[Tensor, "B D"]:
    # transformers 4 gives the embeddings, transformers 5 an object that holds them
    embeddings = outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output
    return F.normalize(embeddings, dim=-1) if normalize else embeddings


def _patches(image: Float[Tensor, "B 3 H W"], size: int) -> dict[str, Tensor]:
    """The inputs of a NaFlex tower: rows of patches, each with its channels last, and the grid they come from."""
    batch, channels, height, width = image.shape
    grid = image.view(batch, channels, height // size, size, width // size, size)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)
    shapes = torch.tensor([[height // size, width // size]] * batch, device=image.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=image.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def is_huggingface_folder(folder: Path) -> bool:
    """Whether transformers has saved a model of one of `FAMILIES`, or another one, there."""
    return (folder / _CONFIG_FILE).is_file()


def is_dual_encoder(folder: Path) -> bool:
    """Whether it is a folder of one of `FAMILIES`."""
    return is_huggingface_folder(folder) and _model_type(folder) in FAMILIES


def load_huggingface(folder: Path, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    """A dual encoder as transformers saves it, with its tokenizer and its image preprocessing.

    Raises:
        UsageError: it is another kind of model, has no tokenizer, or preprocesses images in a way that we cannot.
        VlmError: its weights cannot be read.
    """
    family = _model_type(folder)
    if family not in FAMILIES:
        raise UsageError(
            f"{folder} holds a model of type {family!r}, which is not a dual encoder known here "
            f"({', '.join(FAMILIES)}); as a tower of a new model it is hf:{folder} (docs/towers.md)."
        )
    try:
        trunk, info = _read_weights(folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise VlmError(f"The weights of {folder} cannot be read: {error}") from error
    # transformers only warns, and leaves random values in their place
    if info["missing_keys"]:
        raise VlmError(
            f"The weights of {folder} lack {len(info['missing_keys'])} tensors of its configuration, such as "
            f"{min(info['missing_keys'])}."
        )
    values = json.loads(trunk.config.to_json_string(use_diff=False))
    tokenizer = TransformersTokenizer(str(folder), int(values["text_config"]["max_position_embeddings"]))
    view = _read_view(folder, values)
    config: dict[str, Any] = {
        "vision_cfg": {"image_size": view.size},
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": int(values["text_config"]["vocab_size"]),
            "pad_id": tokenizer.pad_token,
            "eos_id": tokenizer.end_token,
            "has_mask": tokenizer.gives_mask,
        },
        CONFIG_KEY: values,
    }
    network: Any = HuggingFaceDualEncoder(config, trunk).eval().to(device)
    config["embed_dim"] = _embedding_size(network, tokenizer, device)
    return VisionLanguageModel(
        name=str(folder),
        network=network,
        config=config,
        view=view,
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        trims_padding=network.can_trim_padding,
    )


def _read_weights(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModel

    with no_loading_bar():
        return AutoModel.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
        )


@contextlib.contextmanager
def no_loading_bar() -> Iterator[None]:
    """Without the bar that transformers 5 draws while it reads weights, also where nobody looks."""
    from transformers.utils import logging

    is_drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_drawn:
            logging.enable_progress_bar()


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8")).get("model_type", ""))


@torch.inference_mode()
def _embedding_size(network: HuggingFaceDualEncoder, tokenizer: TransformersTokenizer, device: torch.device) -> int:
    # each family has another key for it, and SigLIP one for each tower
    return network.encode_text(torch.from_numpy(tokenizer.encode([""])).to(device)).shape[1]


def _read_view(folder: Path, values: dict[str, Any]) -> EvalTransform:
    """The image preprocessing as one of our views; SigLIP 2's variable grids of patches become squares.

    Raises:
        UsageError: it resizes or crops in another way, or the folder does not say how.
    """
    from transformers import AutoImageProcessor

    try:
        # rather than the file itself, which leaves out what is the default of its class
        processor: Any = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} does not say how images are prepared (preprocessor_config.json); add this file of the model."
        ) from error
    interpolation = _INTERPOLATIONS.get(int(processor.resample), "")
    mode, size = _resizing(processor, values)
    if not interpolation or not size:
        raise UsageError(
            f"The preprocessing of {folder} is not supported (size {processor.size}, crop "
            f"{getattr(processor, 'crop_size', None)}, resample {processor.resample}): bicubic or bilinear to a "
            "square, or of the shorter side with a crop of the same size."
        )
    mean = tuple(processor.image_mean)
    return EvalTransform(
        size=size, mean=mean, std=tuple(processor.image_std), interpolation=interpolation, resize_mode=mode
    )


def _resizing(processor: Any, values: dict[str, Any]) -> tuple[str, int]:
    """How images are resized, and the side of the square; 0 if that cannot be said in our terms."""
    if values["model_type"] == "siglip2":
        vision = values["vision_config"]
        return "squash", int(vision["patch_size"]) * int(vision["num_patches"] ** 0.5)
    if not processor.do_resize or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        return "", 0
    resized = dict(processor.size)
    crop = _side(processor.crop_size) if getattr(processor, "do_center_crop", False) else 0
    shortest = resized.get("shortest_edge") or 0
    if shortest:
        return "shortest_floor", crop if crop == shortest else 0
    square = _side(resized)
    return "squash", square if crop in (0, square) else 0


def _side(size: Any) -> int:
    """The side of a square; 0 for anything else."""
    sides = dict(size)
    height = sides.get("height") or 0
    return int(height) if height == sides.get("width") else 0
