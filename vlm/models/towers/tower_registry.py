"""All towers by prefix, model configurations completed from tower names, and `TowerNetwork`, which joins two towers.

A tower is named PREFIX:NAME. What open_clip's format can express is written in it (`portable_config`), so that a model
folder opens there too; other towers keep a `tower` key, which open_clip rejects.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm.config import suggest
from vlm.data.transforms import ASPECT
from vlm.errors import UsageError
from vlm.models.towers.bag_of_words import build_bag, build_ngram
from vlm.models.towers.captioner import (
    COCA,
    CPTR,
    add_residual_dropout,
    build_cptr,
    build_decoder,
    complete_coca,
    complete_cptr,
    decoder_config,
    decoder_forward,
    is_caption_tower,
)
from vlm.models.towers.huggingface import (
    build_hf_image,
    build_hf_text,
    default_pooling,
    hf_image_size,
    hf_preprocess,
    read_hf_config,
)
from vlm.models.towers.language_model import (
    LIMBER,
    SoftPromptDecoder,
    build_limber,
    build_lm,
    complete_limber,
    complete_lm,
)
from vlm.models.towers.pooling import authors_gamma
from vlm.models.towers.timm import build_timm, build_vit, parse_vit_size, timm_grid, timm_image_size, timm_preprocess
from vlm.models.towers.tower import ImageTower
from vlm.models.towers.tower_config import (
    INITIAL_WEIGHTS_KEY,
    TOWER_KEY,
    ImageTowerConfig,
    TextTowerConfig,
    config_to_values,
    parse_tower_options,
    read_image_config,
    read_text_config,
    split_tower,
    suggest_names,
)
from vlm.tensor_types import Float, Int64, Tensor

_VISION: dict[str, tuple[str, ...]] = {
    "timm": ("dropout", "drop_path", "patch_dropout"),
    "vit": ("dropout", "drop_path", "patch_dropout"),
    "hf": ("dropout", "drop_path"),
}
_TEXT: dict[str, tuple[str, ...]] = {
    "hf": ("dropout",),
    "lm": ("dropout",),
    "bag": ("dropout",),
    "ngram": ("dropout",),
    CPTR: (),
    LIMBER: (),
}
_OPEN_CLIP_TIMM = {"dropout": "timm_drop", "drop_path": "timm_drop_path", "patch_dropout": "patch_dropout"}


def set_dropout(
    config: dict[str, Any], *, dropout: float = 0.0, drop_path: float = 0.0, patch_dropout: float = 0.0
) -> dict[str, Any]:
    """The same model_cfg with dropout in every tower that has the kind; 0 leaves what is configured.

    dropout: on pooled vectors (timm's head, open_clip's timm_drop), in the hidden layers of hf:, before the
    projection of bag, ngram and lm:, and in the layers of coca: and cptr:. drop_path: residual branches of timm and hf
    trunks. patch_dropout: patches of ViTs (FLIP, Li et al. 2023).

    Raises:
        UsageError: no tower has the kind.
    """
    changed = deepcopy(config)
    for kind, value in (("dropout", dropout), ("drop_path", drop_path), ("patch_dropout", patch_dropout)):
        if not value:
            continue
        keys = {"vision_cfg": _vision_key(config["vision_cfg"], kind), "text_cfg": _text_key(config["text_cfg"], kind)}
        # open_clip's own captioners have no dropout in their decoder
        if kind == "dropout" and DECODER_KEY in config and uses_towers(config):
            keys[DECODER_KEY] = kind
        if not any(keys.values()):
            raise UsageError(
                f"{kind} = {value}: neither tower of this model has it (image: {_tower_label(config['vision_cfg'])}; "
                f"text: {_tower_label(config['text_cfg'])}); leave it at 0."
            )
        for part, key in keys.items():
            if key:
                changed[part][key] = value
    return changed


def _vision_key(values: dict[str, Any], kind: str) -> str | None:
    if TOWER_KEY in values:
        return kind if kind in _VISION[split_tower(values[TOWER_KEY])[0]] else None
    if values.get("timm_model_name"):
        return _OPEN_CLIP_TIMM[kind]
    # open_clip's ResNets have no patches to drop
    is_resnet = isinstance(values.get("layers"), list | tuple)
    return kind if kind == "patch_dropout" and not is_resnet else None


def _text_key(values: dict[str, Any], kind: str) -> str | None:
    if TOWER_KEY not in values:
        return None
    return kind if kind in _TEXT[split_tower(values[TOWER_KEY])[0]] else None


def _tower_label(values: dict[str, Any]) -> str:
    return str(
        values.get(TOWER_KEY) or values.get("timm_model_name") or values.get("hf_model_name") or "open_clip's own"
    )


def portable_config(config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model_cfg to write next to weights: in open_clip's format if that builds a network of the same weights.

    open_clip's format can express its own towers, and `timm:` towers with native pooling at timm's size for them. It
    cannot express other poolings, other sizes of trunks with fixed positions, and hf:, lm:, bag and ngram.
    """
    saved = deepcopy(config)
    if "logit_bias" in weights and saved.get("init_logit_bias") is None:
        saved["init_logit_bias"] = float(weights["logit_bias"])
    # saved weights replace the initial ones, whose folder may be gone
    for part in ("vision_cfg", "text_cfg"):
        saved[part].pop(INITIAL_WEIGHTS_KEY, None)
    if TOWER_KEY in saved["text_cfg"] or TOWER_KEY not in saved["vision_cfg"]:
        return saved
    vision = _to_open_clip_config(read_image_config(saved["vision_cfg"]))
    if vision is None:
        return saved
    exported = saved | {"vision_cfg": vision, "custom_text": True}
    # some timm trunks get other layers through open_clip's adapter, which only the shapes show
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return exported if _open_clip_shapes(exported) == shapes else saved


def _to_open_clip_config(config: ImageTowerConfig) -> dict[str, Any] | None:
    prefix, name = split_tower(config.tower)
    is_plain = prefix == "timm" and config.pooling == "native"
    is_plain = is_plain and not (
        config.registers or config.overrides or config.residual or config.decoder_width or config.tokens
    )
    if not is_plain or config.image_size != timm_image_size(name):
        return None
    return {
        "timm_model_name": name,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop": config.dropout,
        **({"timm_drop_path": config.drop_path} if config.drop_path else {}),
        "patch_dropout": config.patch_dropout,
        "image_size": config.image_size,
    }


def _open_clip_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    from open_clip import CustomTextCLIP

    values = _without(config, "custom_text")
    try:
        # on meta a network has shapes only, and costs neither memory nor time
        with torch.device("meta"):
            meta_network = CustomTextCLIP(**values, output_dict=True)
    except (TypeError, RuntimeError, AssertionError):
        return None
    return {name: tuple(value.shape) for name, value in meta_network.state_dict().items()}


Values = dict[str, Any]
_VIT_SIZE = 224
_EMBED_DIM = 256
# 64 as in the ViT paper and CLIP; 32 for narrow towers whose width 64 does not divide
_HEAD_WIDTHS = (64, 32)


def _without(values: Values, key: str) -> Values:
    return {name: value for name, value in values.items() if name != key}


@dataclass(frozen=True, kw_only=True)
class TowerType:
    """A kind of tower. complete: fills in what the name stands for, given (values, name).

    build: builds the tower of completed values, given (config, name, embed_dim); without it, completing gives values
    in open_clip's own format.
    """

    complete: Callable[[Values, str], Values]
    build: Callable[[Any, str, int], nn.Module] | None = None


def _complete_timm(values: Values, name: str) -> Values:
    grid = timm_grid(values, name)
    # values last, here and below: options and saved values win over what the name stands for
    return {"image_size": grid.side if grid else timm_image_size(name), **values}


def _complete_vit(values: Values, name: str) -> Values:
    width, _, _ = parse_vit_size(name)
    head_width = next((head_width for head_width in _HEAD_WIDTHS if width % head_width == 0), width)
    return {"image_size": _VIT_SIZE, "head_width": head_width, **values}


def _complete_hf_image(values: Values, name: str) -> Values:
    if "hf_config" in values:
        return {"image_size": hf_image_size(values["hf_config"]), **values}
    hf_config, weights = read_hf_config(name)
    return {"image_size": hf_image_size(hf_config), "hf_config": hf_config, "initial_weights": weights, **values}


def _complete_hf_text(values: Values, name: str) -> Values:
    if "hf_config" in values:
        return values
    hf_config, weights = read_hf_config(name)
    return {"pooling": default_pooling(hf_config), "hf_config": hf_config, "initial_weights": weights, **values}


def _complete_lm(values: Values, name: str) -> Values:
    return values if values.get("lm_fingerprint") else complete_lm(values, name)


def _complete_bag(values: Values, name: str) -> Values:
    return values


def _complete_transformer(values: Values, name: str) -> Values:
    """`transformer:WIDTHxDEPTH` in open_clip's keys; other keys are open_clip's already."""
    width, separator, layers = name.partition("x")
    if not (separator and width.isdigit() and layers.isdigit()) or int(width) % _HEAD_WIDTHS[-1]:
        raise UsageError(
            f"transformer:{name} is not a size; write transformer:WIDTHxDEPTH, e.g. transformer:256x4, with a width "
            f"that is a multiple of {_HEAD_WIDTHS[-1]}."
        )
    head_width = next(head_width for head_width in _HEAD_WIDTHS if int(width) % head_width == 0)
    sizes = {"width": int(width), "heads": int(width) // head_width, "layers": int(layers)}
    return sizes | _without(values, TOWER_KEY)


def _complete_open_clip(part: str) -> Callable[[Values, str], Values]:
    def complete(values: Values, name: str) -> Values:
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise UsageError(f"open_clip has no {name!r}; {suggest_names(name, open_clip.list_models())}")
        return config[part] | _without(values, TOWER_KEY)

    return complete


IMAGE_TOWERS: dict[str, TowerType] = {
    "timm": TowerType(complete=_complete_timm, build=build_timm),
    "vit": TowerType(complete=_complete_vit, build=build_vit),
    "hf": TowerType(complete=_complete_hf_image, build=build_hf_image),
    "open_clip": TowerType(complete=_complete_open_clip("vision_cfg")),
}
"""Adding an image tower is a builder and a line here."""

TEXT_TOWERS: dict[str, TowerType] = {
    "transformer": TowerType(complete=_complete_transformer),
    "open_clip": TowerType(complete=_complete_open_clip("text_cfg")),
    "hf": TowerType(complete=_complete_hf_text, build=build_hf_text),
    "lm": TowerType(complete=_complete_lm, build=build_lm),
    "bag": TowerType(complete=_complete_bag, build=build_bag),
    "ngram": TowerType(complete=_complete_bag, build=build_ngram),
    COCA: TowerType(complete=complete_coca),
    CPTR: TowerType(complete=complete_cptr, build=build_cptr),
    LIMBER: TowerType(complete=complete_limber, build=build_limber),
}
"""Adding a text tower is a builder and a line here."""


def parse_towers(name: str) -> Values:
    """The model_cfg of `IMAGE_TOWER+TEXT_TOWER[@EMBED_DIM]`.

    Options follow a tower after commas: `timm:vit_tiny_patch16_224,pooling=simpool+ngram,hidden=512@256`.

    Raises:
        UsageError: a tower is unknown (the nearest is named), or an option does not fit.
    """
    towers, at, size = name.rpartition("@")
    if not (at and size.isdigit()):
        towers = name
        size = str(_EMBED_DIM)
    image, text = _split(towers)
    image_tower, image_options = parse_tower_options(image)
    text_tower, text_options = parse_tower_options(text)
    named: Values = {
        "embed_dim": int(size),
        "vision_cfg": {TOWER_KEY: image_tower, **image_options},
        "text_cfg": {TOWER_KEY: text_tower, **text_options},
    }
    if is_caption_tower(text_tower):
        named = _with_decoder(named, decoder_config(text_tower))
    if _prefix_of(text_tower) == LIMBER:
        named["text_cfg"] = complete_limber(named["text_cfg"], split_tower(text_tower)[1])
        # one linear map to the language model's space, and nothing else
        named = _with_decoder(named, {TOWER_KEY: LIMBER, "width": named["text_cfg"]["lm_width"]})
        named["vision_cfg"]["decoder_norm"] = False
    # completed before γ is chosen, which depends on the trunk that the name stands for
    config = resolve_tower_configs(named)
    if image_options.get("pooling") == "simpool" and "gamma" not in image_options:
        config["vision_cfg"]["gamma"] = _authors_gamma(config)
    return config


def _with_decoder(config: Values, decoder: Values) -> Values:
    image_tower = config["vision_cfg"][TOWER_KEY]
    if _prefix_of(image_tower) == "open_clip":
        raise UsageError(
            f"{image_tower} gives a decoder no tokens; name a timm:, vit: or hf: tower, or one of open_clip's own "
            "captioners, e.g. coca_ViT-B-32."
        )
    vision = config["vision_cfg"] | {"decoder_width": decoder["width"]}
    return config | {"vision_cfg": vision, DECODER_KEY: decoder}


def _authors_gamma(config: Values) -> float:
    """SimPool's γ for this kind of trunk; a saved configuration without γ is older than this, and means 1."""
    with torch.device("meta"):
        tower = build_image_tower(_without(config["vision_cfg"], INITIAL_WEIGHTS_KEY), config["embed_dim"])
    assert isinstance(tower, ImageTower)
    return authors_gamma(tower.trunk_info.layouts)


def _split(towers: str) -> tuple[str, str]:
    # folders may have a + in their names, so the first + with a known prefix on both sides counts
    parts = towers.split("+")
    for number in range(1, len(parts)):
        image = "+".join(parts[:number])
        text = "+".join(parts[number:])
        if _prefix_of(image) in IMAGE_TOWERS and _prefix_of(text) in TEXT_TOWERS:
            return image, text

    image, _, text = towers.partition("+")
    is_image_known = _prefix_of(image) in IMAGE_TOWERS
    unknown = text if is_image_known else image
    known = list(TEXT_TOWERS if is_image_known else IMAGE_TOWERS)
    raise UsageError(f"Unknown tower {unknown!r} in {towers!r}; {suggest(_prefix_of(unknown), known)}")


def _prefix_of(words: str) -> str:
    return split_tower(words.split(",")[0])[0]


def resolve_tower_configs(config: Values) -> Values:
    """A model_cfg with what the names of its towers stand for, and every key checked.

    Towers that open_clip's format can express are written in it; what is complete does not change.

    Raises:
        UsageError: a tower or a key is unknown, or a folder is missing.
    """
    completed = deepcopy(config)
    for part, table, read in (
        ("vision_cfg", IMAGE_TOWERS, read_image_config),
        ("text_cfg", TEXT_TOWERS, read_text_config),
    ):
        values = completed[part]
        if TOWER_KEY not in values:
            continue
        kind, name = _choose(table, values[TOWER_KEY])
        values = kind.complete(values, name)
        # read and written back, so that an unknown key is named here and not when the network is built
        completed[part] = config_to_values(read(values)) if kind.build else values
    # both towers are open_clip's now; CustomTextCLIP keeps the names of TowerNetwork's parts
    if not uses_towers(completed):
        completed["custom_text"] = True
    return completed


def uses_towers(config: Values) -> bool:
    """Whether a model_cfg names a tower that open_clip's format cannot express."""
    return TOWER_KEY in config["vision_cfg"] or TOWER_KEY in config["text_cfg"]


def initial_preprocess(values: Values) -> dict[str, Any]:
    """What an image tower is to see, as keys of a `preprocess_cfg`: its grids, if images keep their shape, and what its
    initial weights were trained to see, where they are not random and say it. Empty for towers of open_clip's own.
    """
    if TOWER_KEY not in values:
        return {}
    prefix, name = split_tower(values[TOWER_KEY])
    grid = timm_grid(values, name) if prefix == "timm" else None
    view: Values = {"resize_mode": ASPECT, "patch": grid.patch, "tokens": grid.tokens} if grid else {}
    if not values.get(INITIAL_WEIGHTS_KEY):
        return view
    if prefix == "timm":
        return view | timm_preprocess(name)
    return hf_preprocess(values[INITIAL_WEIGHTS_KEY]) if prefix == "hf" else {}


def build_image_tower(values: Values, embed_dim: int) -> nn.Module:
    """The image tower of a completed vision_cfg, ours or open_clip's, with fresh weights."""
    if TOWER_KEY not in values:
        from open_clip import CLIPVisionCfg

        from vlm.data import open_clip_private

        return open_clip_private.build_vision_tower(embed_dim, CLIPVisionCfg(**values))
    config: ImageTowerConfig = read_image_config(values)
    kind, name = _choose(IMAGE_TOWERS, config.tower)
    assert kind.build is not None
    return kind.build(config, name, embed_dim)


def build_text_tower(values: Values, embed_dim: int) -> nn.Module:
    """The text tower of a completed text_cfg, ours or open_clip's, with fresh weights."""
    if TOWER_KEY not in values:
        from open_clip import CLIPTextCfg

        from vlm.data import open_clip_private

        return open_clip_private.build_text_tower(embed_dim, CLIPTextCfg(**values))
    config: TextTowerConfig = read_text_config(values)
    kind, name = _choose(TEXT_TOWERS, config.tower)
    assert kind.build is not None
    return kind.build(config, name, embed_dim)


def _choose(table: dict[str, TowerType], tower: str) -> tuple[TowerType, str]:
    prefix, name = split_tower(tower)
    if prefix not in table:
        raise UsageError(f"Unknown tower {tower!r}; {suggest(prefix, list(table))}")
    return table[prefix], name


DECODER_KEY = "multimodal_cfg"
_KEYS = ("embed_dim", "vision_cfg", "text_cfg", DECODER_KEY, "init_logit_scale", "init_logit_bias", "custom_text")
INITIAL_SCALE = math.log(1 / 0.07)  # CLIP §2.5


class TowerNetwork(nn.Module):
    """An image tower and a text tower with a learned temperature; its parts have the names of CustomTextCLIP's.

    It has a logit_bias if init_logit_bias is a number (SigLIP, Zhai et al. 2023).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for key in config:
            if key not in _KEYS:
                raise UsageError(f"model_cfg: unknown key {key!r} for towers; {suggest(key, list(_KEYS))}")
        # again, although complete as a rule: a model_cfg written by hand may hold names alone
        values = resolve_tower_configs(config)
        self.visual = build_image_tower(values["vision_cfg"], values["embed_dim"])
        self.text = build_text_tower(values["text_cfg"], values["embed_dim"])
        self.logit_scale = nn.Parameter(torch.tensor(float(values.get("init_logit_scale", INITIAL_SCALE))))
        bias = values.get("init_logit_bias")
        # registered even when absent, so that the attribute exists for CLIP and SigLIP alike
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor(float(bias))))

    def encode_image(self, image: Float[Tensor, "B 3 H W"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Embeddings of images."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Int64[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Embeddings of texts."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Float[Tensor, "B 3 H W"], text: Int64[Tensor, "B L"]) -> dict[str, Tensor]:
        """`image_features` and `text_features` [B, D] of unit length, `logit_scale`, and `logit_bias` if any."""
        outputs = {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        bias = self.logit_bias
        return outputs | {"logit_bias": bias} if isinstance(bias, torch.Tensor) else outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Raises:
            UsageError: the trunk of a tower cannot.
        """
        towers: tuple[Any, Any] = (self.visual, self.text)
        for tower in towers:
            tower.set_grad_checkpointing(enable)


class CaptionerNetwork(TowerNetwork):
    """A `TowerNetwork` with a caption decoder (`vlm.models.towers.captioner`), of the parts of open_clip's CoCa."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        values = config[DECODER_KEY]
        text: Any = self.text
        if values.get(TOWER_KEY) == LIMBER:
            self.text_decoder: nn.Module = SoftPromptDecoder(text.language_model, values["vocab_size"])
            self.can_trim_padding = True
            return
        self.text_decoder = build_decoder(values)
        add_residual_dropout(list(text.transformer.resblocks), values.get("dropout", 0.0))
        # without a class token at the end of the row nothing depends on how long it is
        self.can_trim_padding = text.cls_emb is None

    def _encode_image(
        self, images: Float[Tensor, "B 3 H W"], normalize: bool = True
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B M C"]]:
        features, memory = self.visual(images)
        return (F.normalize(features, dim=-1) if normalize else features), memory

    def _encode_text(
        self, text: Int64[Tensor, "B L"], normalize: bool = True
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L C"]]:
        features, states = self.text(text)
        return (F.normalize(features, dim=-1) if normalize else features), states

    def encode_image(self, image: Float[Tensor, "B 3 H W"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Embeddings of images."""
        return self._encode_image(image, normalize)[0]

    def encode_text(self, text: Int64[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Embeddings of texts."""
        return self._encode_text(text, normalize)[0]

    def forward(self, image: Float[Tensor, "B 3 H W"], text: Int64[Tensor, "B L"]) -> dict[str, Tensor]:
        """As `TowerNetwork`, and `logits` [B, L-1, V] with `labels` [B, L-1]."""
        features, memory = self._encode_image(image)
        outputs = {"image_features": features, "logit_scale": self.logit_scale.exp()}
        outputs |= decoder_forward(self.text, self.text_decoder, memory, text)
        bias = self.logit_bias
        return outputs | {"logit_bias": bias} if isinstance(bias, torch.Tensor) else outputs

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `TowerNetwork`, in the decoder, too."""
        super().set_grad_checkpointing(enable)
        decoder: Any = self.text_decoder
        # a frozen language model has none of ours
        if hasattr(decoder, "set_grad_checkpointing"):
            decoder.set_grad_checkpointing(enable)
