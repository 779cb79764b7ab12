"""Rows of tokens shorter than the context: what a batch of short captions saves in the text tower."""

from typing import Any

from torch import nn

from vlm.models.network import is_captioner

_POOLS_BY_TOKEN = frozenset({"argmax", "eos", "first"})


def accept_short_texts(network: nn.Module) -> bool:
    """Let `encode_text` take rows cut to the batch's longest caption, if its vectors are those of the whole rows.

    open_clip's transformer adds its mask of the whole context; here it is cut to the row. In a causal tower nothing
    after the end token has any influence before it, so nothing else changes.

    False, and nothing is changed, for captioners, whose class token stands at the end of the row; for open_clip's CLIP
    without `custom_text`, which adds the positions of the whole context; for towers that pool a token counted from the
    row's end; and where texts pass through dropout, since what it drops depends on the length of the row.
    """
    text = getattr(network, "text", None)
    if is_captioner(network) or text is None or _drops(text):
        return False
    if not hasattr(text, "attn_mask"):
        return True
    if getattr(text, "pool_type", "") not in _POOLS_BY_TOKEN:
        return False
    text.get_submodule("transformer").register_forward_pre_hook(_cut_mask, with_kwargs=True)
    return True


def _drops(text: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in text.modules())


def _cut_mask(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask, length = named.get("attn_mask"), arguments[0].shape[1]
    if mask is not None and mask.shape[-1] > length:
        named = named | {"attn_mask": mask[..., :length, :length]}
    return arguments, named
