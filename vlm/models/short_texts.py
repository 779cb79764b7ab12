"""Rows of tokens shorter than the context: what a batch of short captions saves in the text tower."""

from typing import Any

from torch import nn

from vlm.errors import UsageError
from vlm.models.network import is_captioner

_POOLS_BY_TOKEN = frozenset({"argmax", "eos", "first"})


def accept_short_texts(network: nn.Module) -> None:
    """Let `encode_text` take rows cut to the batch's longest caption; its vectors are those of the whole rows.

    open_clip's transformer adds its mask of the whole context; here it is cut to the row. In a causal tower nothing
    after the end token has any influence before it, so nothing else changes.

    Raises:
        UsageError: the place of a token from the row's end matters to this network.
    """
    if is_captioner(network):
        raise UsageError("--trim-text does not fit captioners: their class token stands at the end of the row.")
    text = getattr(network, "text", None)
    if text is None:
        raise UsageError("--trim-text does not fit this network, whose text tower adds all positions; leave it out.")
    if not hasattr(text, "attn_mask"):
        return
    pool = getattr(text, "pool_type", "")
    if pool not in _POOLS_BY_TOKEN:
        raise UsageError(f"--trim-text does not fit a text tower that takes the {pool} token of a row; leave it out.")
    transformer = text.get_submodule("transformer")
    transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)


def _cut_mask(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask, length = named.get("attn_mask"), arguments[0].shape[1]
    if mask is not None and mask.shape[-1] > length:
        named = named | {"attn_mask": mask[..., :length, :length]}
    return arguments, named
