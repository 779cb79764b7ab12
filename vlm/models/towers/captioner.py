"""Captioners over any image tower: CoCa's two halves, and CPTR's decoder without a text tower of its own.

The decoder is open_clip's: each layer attends to the words before, then to the image's tokens, with a feed-forward part
after each. So all that reads open_clip's CoCa (cached decoding, parallel captions, likelihoods) reads these as well.
"""

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.towers.tower import TextTower, pool_states, text_mask
from vlm.models.towers.tower_config import TOWER_KEY, TextTowerConfig, split_tower
from vlm.tensor_types import Float, Int64, Tensor

COCA = "coca"
CPTR = "cptr"
_HEAD_WIDTHS = (64, 32)
_PERIOD = 10_000.0
_SIZES = {COCA: (re.compile(r"(\d+)x(\d+)x(\d+)"), "WIDTHxTEXT_LAYERSxDECODER_LAYERS, e.g. coca:256x1x3")}
_SIZES[CPTR] = (re.compile(r"(\d+)x(\d+)"), "WIDTHxLAYERS, e.g. cptr:256x4")


def is_caption_tower(tower: str) -> bool:
    """Whether the name of a text tower stands for a decoder of ours, too."""
    return split_tower(tower)[0] in _SIZES


def complete_coca(values: dict[str, Any], name: str) -> dict[str, Any]:
    """`coca:WIDTHxTEXT_LAYERSxDECODER_LAYERS`: the lower half of CoCa (Yu et al. 2022, §3.2) in open_clip's keys.

    Raises:
        UsageError: the name is not such a size.
    """
    width, layers, _ = _sizes(COCA, name)
    own = {key: value for key, value in values.items() if key != TOWER_KEY}
    # the class token at the end, which sees the whole caption, is the text's vector
    return {"width": width, "heads": _heads(width), "layers": layers, "embed_cls": True, "output_tokens": True} | own


def complete_cptr(values: dict[str, Any], name: str) -> dict[str, Any]:
    """`cptr:WIDTHxLAYERS`: words alone (Liu et al. 2021, §2.3); all layers are the decoder's.

    Raises:
        UsageError: the name is not such a size.
    """
    width, _ = _sizes(CPTR, name)
    return values | {"width": width}


def decoder_config(tower: str) -> dict[str, Any]:
    """The `multimodal_cfg` that the name of a text tower stands for.

    Raises:
        UsageError: the name is not a size.
    """
    prefix, name = split_tower(tower)
    width, *_, layers = _sizes(prefix, name)
    # a tokenizer's sizes take the place of these
    text = TextTowerConfig(tower=tower)
    lengths = {"context_length": text.context_length, "vocab_size": text.vocab_size}
    return {"width": width, "heads": _heads(width), "layers": layers} | lengths


def _sizes(prefix: str, name: str) -> tuple[int, ...]:
    pattern, form = _SIZES[prefix]
    match = pattern.fullmatch(name)
    sizes = tuple(map(int, match.groups())) if match else ()
    if not sizes or not all(sizes) or sizes[0] % _HEAD_WIDTHS[-1]:
        raise UsageError(
            f"{prefix}:{name} is not a size; write {prefix}:{form}, with a width that is a multiple of "
            f"{_HEAD_WIDTHS[-1]} and a layer at least."
        )
    return sizes


def _heads(width: int) -> int:
    return width // next(head_width for head_width in _HEAD_WIDTHS if width % head_width == 0)


class WordTower(TextTower):
    """Embeddings of words with sine positions, which CPTR's decoder begins with (Liu et al. 2021, §2.3).

    The text's vector, which CPTR has none of, is the projected mean of its words. The parts have the names of
    open_clip's text tower, with no layers, so that decoding reads both alike.
    """

    cls_emb = None

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        self.context_length = config.context_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.token_embedding.weight, std=config.width**-0.5)
        self.positional_embedding = nn.Parameter(
            _sine_positions(config.context_length, config.width), requires_grad=False
        )
        self.transformer = _NoLayers(self.token_embedding)
        self.ln_final = nn.Identity()
        self.head = nn.Linear(config.width, embed_dim, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Int64[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L W"]]:
        """Vectors of the joint space, not normalised, and the states a decoder continues from."""
        states = self.token_embedding(tokens)
        pooled = pool_states(states, text_mask(tokens, self.pad_id), "mean")
        return self.head(pooled), states + self.positional_embedding[: tokens.shape[1]].to(states.dtype)


class _NoLayers(nn.Module):
    """Stands for the transformer of a text tower that has none."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList()
        # not registered as a part: its weight belongs to the tower
        self._embedding = (embedding,)

    def get_cast_dtype(self) -> torch.dtype:
        """As open_clip's transformer: the type of its weights."""
        return self._embedding[0].weight.dtype


def _sine_positions(length: int, width: int) -> Float[Tensor, "L W"]:
    """Vaswani et al. 2017, §3.5; scaled to the size of a word's embedding."""
    places = torch.arange(length)[:, None]
    angles = places / _PERIOD ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1) * width**-0.5


def build_cptr(config: TextTowerConfig, name: str, embed_dim: int) -> WordTower:
    """`cptr:WIDTHxLAYERS` without its decoder."""
    return WordTower(config, embed_dim)


def build_decoder(values: dict[str, Any]) -> nn.Module:
    """open_clip's decoder of a completed multimodal_cfg, with fresh weights.

    dropout: of the values, on what each part adds to a token (Vaswani et al. 2017, §5.4).
    """
    from vlm.data.open_clip_private import build_text_decoder

    sizes = {key: value for key, value in values.items() if key != "dropout"}
    decoder = build_text_decoder(values["vocab_size"], multimodal_cfg=sizes)
    add_residual_dropout([*decoder.resblocks, *decoder.cross_attn], values.get("dropout", 0.0))
    return decoder


def add_residual_dropout(blocks: list[Any], probability: float) -> None:
    """Drop values of what attention and feed-forward parts of open_clip's blocks add, while training."""
    for block in blocks if probability else ():
        # identities in ours, where open_clip may scale what a part adds
        block.ls_1 = nn.Dropout(probability)
        block.ls_2 = nn.Dropout(probability)


def decoder_forward(
    text: nn.Module, decoder: nn.Module, memory: Float[Tensor, "B M W"], tokens: Int64[Tensor, "B L"]
) -> dict[str, Tensor]:
    """`text_features` of unit length, `logits` [B, L-1, V] of the next tokens, and their `labels` [B, L-1]."""
    pooled, states = text(tokens)
    logits = decoder(memory, states[:, :-1])
    return {"text_features": F.normalize(pooled, dim=-1), "logits": logits, "labels": tokens[:, 1:]}
