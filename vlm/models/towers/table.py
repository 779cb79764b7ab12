"""All towers by prefix, and configurations completed with what their names stand for."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm.config import nearest
from vlm.errors import UsageError
from vlm.models.towers.config import (
    TOWER,
    ImageTowerConfig,
    TextTowerConfig,
    plain,
    read_image_config,
    read_text_config,
)
from vlm.models.towers.hf_config import read_hf
from vlm.models.towers.hf_image import build_hf_image, hf_size
from vlm.models.towers.hf_text import build_hf_text, default_pooling
from vlm.models.towers.language_model import build_lm, complete_lm
from vlm.models.towers.naming import nearest_of_many, read_options, split_tower
from vlm.models.towers.timm_tower import build_timm, build_vit, read_vit, timm_size
from vlm.models.towers.words import build_bag, build_ngram

Values = dict[str, Any]
_VIT_SIZE = 224
_EMBED_DIM = 256
_HEAD_WIDTHS = (64, 32)


@dataclass(frozen=True, kw_only=True)
class TowerKind:
    """A prefix of towers. complete: fills in what the name stands for, given (values, name).

    build: makes the tower of completed values, given (config, name, embed_dim); without it, completing gives values
    in open_clip's own format.
    """

    complete: Callable[[Values, str], Values]
    build: Callable[[Any, str, int], nn.Module] | None = None


def _complete_timm(values: Values, name: str) -> Values:
    return {"image_size": timm_size(name), **values}


def _complete_vit(values: Values, name: str) -> Values:
    width, _, _ = read_vit(name)
    head_width = next((each for each in _HEAD_WIDTHS if width % each == 0), width)
    return {"image_size": _VIT_SIZE, "head_width": head_width, **values}


def _complete_hf_image(values: Values, name: str) -> Values:
    if "hf_config" in values:
        return {"image_size": hf_size(values["hf_config"]), **values}
    found, weights = read_hf(name)
    return {"image_size": hf_size(found), "hf_config": found, "initial_weights": weights, **values}


def _complete_hf_text(values: Values, name: str) -> Values:
    if "hf_config" in values:
        return values
    found, weights = read_hf(name)
    return {"pooling": default_pooling(found), "hf_config": found, "initial_weights": weights, **values}


def _complete_lm(values: Values, name: str) -> Values:
    return values if values.get("lm_fingerprint") else complete_lm(values, name)


def _complete_words(values: Values, name: str) -> Values:
    return values


def _complete_transformer(values: Values, name: str) -> Values:
    """`transformer:WIDTHxDEPTH` in open_clip's keys; other keys are open_clip's and stay."""
    width, by, layers = name.partition("x")
    if not (by and width.isdigit() and layers.isdigit()) or int(width) % _HEAD_WIDTHS[-1]:
        raise UsageError(
            f"transformer:{name} is no size; write transformer:WIDTHxDEPTH, e.g. transformer:256x4, with a width that "
            f"is a multiple of {_HEAD_WIDTHS[-1]}."
        )
    head_width = next(each for each in _HEAD_WIDTHS if int(width) % each == 0)
    own = {"width": int(width), "heads": int(width) // head_width, "layers": int(layers)}
    return own | {key: value for key, value in values.items() if key != TOWER}


def _complete_open_clip(part: str) -> Callable[[Values, str], Values]:
    def complete(values: Values, name: str) -> Values:
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise UsageError(f"open_clip has no {name!r}; {nearest_of_many(name, open_clip.list_models())}")
        return config[part] | {key: value for key, value in values.items() if key != TOWER}

    return complete


IMAGE_TOWERS: dict[str, TowerKind] = {
    "timm": TowerKind(complete=_complete_timm, build=build_timm),
    "vit": TowerKind(complete=_complete_vit, build=build_vit),
    "hf": TowerKind(complete=_complete_hf_image, build=build_hf_image),
    "open_clip": TowerKind(complete=_complete_open_clip("vision_cfg")),
}
"""Adding an image tower is a builder and a line here."""

TEXT_TOWERS: dict[str, TowerKind] = {
    "transformer": TowerKind(complete=_complete_transformer),
    "open_clip": TowerKind(complete=_complete_open_clip("text_cfg")),
    "hf": TowerKind(complete=_complete_hf_text, build=build_hf_text),
    "lm": TowerKind(complete=_complete_lm, build=build_lm),
    "bag": TowerKind(complete=_complete_words, build=build_bag),
    "ngram": TowerKind(complete=_complete_words, build=build_ngram),
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
        towers, size = name, str(_EMBED_DIM)
    image, text = _split(towers)
    vision_cfg, text_cfg = ({TOWER: tower, **options} for tower, options in (read_options(image), read_options(text)))
    return complete_towers({"embed_dim": int(size), "vision_cfg": vision_cfg, "text_cfg": text_cfg})


def _split(towers: str) -> tuple[str, str]:
    places = [place for place, letter in enumerate(towers) if letter == "+"]
    for place in places:  # folders may have a + in their names
        image, text = towers[:place], towers[place + 1 :]
        if _kind_of(image) in IMAGE_TOWERS and _kind_of(text) in TEXT_TOWERS:
            return image, text
    image, text = towers[: places[0]], towers[places[0] + 1 :]
    table, tower = (TEXT_TOWERS, text) if _kind_of(image) in IMAGE_TOWERS else (IMAGE_TOWERS, image)
    raise UsageError(f"Unknown tower {tower!r} in {towers!r}; {nearest(_kind_of(tower), list(table))}")


def _kind_of(words: str) -> str:
    return split_tower(words.split(",")[0])[0]


def complete_towers(config: Values) -> Values:
    """A model_cfg with what the names of its towers stand for, and every key checked.

    Towers that open_clip's format can say are said in it; what is complete stays as it is.

    Raises:
        UsageError: a tower or a key is unknown, or a folder is not there.
    """
    completed = deepcopy(config)
    for part, table, read in (
        ("vision_cfg", IMAGE_TOWERS, read_image_config),
        ("text_cfg", TEXT_TOWERS, read_text_config),
    ):
        values = completed[part]
        if TOWER not in values:
            continue
        kind, name = _choose(table, values[TOWER])
        values = kind.complete(values, name)
        completed[part] = plain(read(values)) if kind.build else values
    if not names_towers(completed):
        completed["custom_text"] = True
    return completed


def names_towers(config: Values) -> bool:
    """Whether a model_cfg names a tower that open_clip's format cannot say."""
    return TOWER in config["vision_cfg"] or TOWER in config["text_cfg"]


def build_image_tower(values: Values, embed_dim: int) -> nn.Module:
    """The image tower of a completed vision_cfg, ours or open_clip's, with fresh weights."""
    if TOWER not in values:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        return _build_vision_tower(embed_dim, CLIPVisionCfg(**values))
    config: ImageTowerConfig = read_image_config(values)
    kind, name = _choose(IMAGE_TOWERS, config.tower)
    assert kind.build is not None
    return kind.build(config, name, embed_dim)


def build_text_tower(values: Values, embed_dim: int) -> nn.Module:
    """The text tower of a completed text_cfg, ours or open_clip's, with fresh weights."""
    if TOWER not in values:
        from open_clip.model import CLIPTextCfg, _build_text_tower

        return _build_text_tower(embed_dim, CLIPTextCfg(**values))
    config: TextTowerConfig = read_text_config(values)
    kind, name = _choose(TEXT_TOWERS, config.tower)
    assert kind.build is not None
    return kind.build(config, name, embed_dim)


def _choose(table: dict[str, TowerKind], tower: str) -> tuple[TowerKind, str]:
    prefix, name = split_tower(tower)
    if prefix not in table:
        raise UsageError(f"Unknown tower {tower!r}; {nearest(prefix, list(table))}")
    return table[prefix], name
