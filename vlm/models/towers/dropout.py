"""Dropout of a whole model, told to the towers that have it."""

from copy import deepcopy
from typing import Any

from vlm.errors import UsageError
from vlm.models.towers.config import TOWER
from vlm.models.towers.naming import split_tower

_VISION: dict[str, tuple[str, ...]] = {
    "timm": ("dropout", "drop_path", "patch_dropout"),
    "vit": ("dropout", "drop_path", "patch_dropout"),
    "hf": ("dropout", "drop_path"),
}
_TEXT: dict[str, tuple[str, ...]] = {"hf": ("dropout",), "lm": ("dropout",), "bag": ("dropout",), "ngram": ("dropout",)}
_OPEN_CLIP_TIMM = {"dropout": "timm_drop", "drop_path": "timm_drop_path", "patch_dropout": "patch_dropout"}


def set_dropout(
    config: dict[str, Any], *, dropout: float = 0.0, drop_path: float = 0.0, patch_dropout: float = 0.0
) -> dict[str, Any]:
    """The same model_cfg with dropout in every tower that has that kind of it; 0 leaves what the towers say.

    dropout: on pooled vectors (timm's head, open_clip's timm_drop), in the hidden layers of hf:, and before the
    projection of bag, ngram and lm:. drop_path: residual branches of timm and hf trunks. patch_dropout: patches of ViTs
    (FLIP, Li et al. 2023).

    Raises:
        UsageError: no tower has the kind asked for.
    """
    changed = deepcopy(config)
    for kind, value in (("dropout", dropout), ("drop_path", drop_path), ("patch_dropout", patch_dropout)):
        if not value:
            continue
        keys = {"vision_cfg": _vision_key(config["vision_cfg"], kind), "text_cfg": _text_key(config["text_cfg"], kind)}
        if not any(keys.values()):
            raise UsageError(
                f"{kind} = {value}: neither tower of this model has it (image: {_said(config['vision_cfg'])}; "
                f"text: {_said(config['text_cfg'])}); leave it at 0."
            )
        for part, key in keys.items():
            if key:
                changed[part][key] = value
    return changed


def _vision_key(values: dict[str, Any], kind: str) -> str | None:
    if TOWER in values:
        return kind if kind in _VISION[split_tower(values[TOWER])[0]] else None
    if values.get("timm_model_name"):
        return _OPEN_CLIP_TIMM[kind]
    is_resnet = isinstance(values.get("layers"), list | tuple)
    return kind if kind == "patch_dropout" and not is_resnet else None


def _text_key(values: dict[str, Any], kind: str) -> str | None:
    if TOWER not in values:
        return None
    return kind if kind in _TEXT[split_tower(values[TOWER])[0]] else None


def _said(values: dict[str, Any]) -> str:
    return str(values.get(TOWER) or values.get("timm_model_name") or values.get("hf_model_name") or "open_clip's own")
