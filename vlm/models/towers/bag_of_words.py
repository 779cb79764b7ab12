"""Bag-of-words text encoders, of tokens and of n-grams: no order, no attention, as fast as a table lookup."""

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.tower import TextTower, projection, text_mask
from vlm.models.towers.tower_config import TextTowerConfig
from vlm.tensor_types import Bool, Float, Int64, Tensor

_MULTIPLIER = 0x9E3779B1  # 2³² over the golden ratio (Knuth, TAOCP 3, §6.4)
_LOW_31 = 0x7FFFFFFF


class BagOfWordsTower(TextTower):
    """Entries of a table, one for each token, put together and projected: the bag-of-words model of "Deep Learning
    Applied to Image and Text Matching", on tokens.
    """

    def __init__(self, config: TextTowerConfig, embed_dim: int, *, entries: int) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        self.is_mean = config.reduce == "mean"
        self.table = nn.EmbeddingBag(entries, config.width, mode="sum")
        # an n-gram that no caption of training has keeps this entry: at the length of trained ones it drowns the others
        nn.init.normal_(self.table.weight, std=config.entry_length * config.width**-0.5)
        self.head = projection(config.width, config.hidden, embed_dim, config.dropout)

    def forward(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""
        entries, mask = self.entries(tokens)
        weights = mask.to(self.table.weight.dtype)
        if self.is_mean:
            # weights instead of mode="mean", which would count padding
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return self.head(self.table(entries, per_sample_weights=weights))

    def entries(self, tokens: Int64[Tensor, "B L"]) -> tuple[Int64[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Entries of the table, and which of them count."""
        return tokens, text_mask(tokens, self.pad_id)


class NgramTower(BagOfWordsTower):
    """The same on n-grams of tokens, hashed into a table (its bigram and trigram models; Weinberger et al. 2009)."""

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__(config, embed_dim, entries=config.table_size)
        self.orders = tuple(config.orders)

    def entries(self, tokens: Int64[Tensor, "B L"]) -> tuple[Int64[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """The hashes of all n-grams, those of each order after the other."""
        mask = text_mask(tokens, self.pad_id)
        hashed: list[Tensor] = []
        counted: list[Tensor] = []
        for order in self.orders:
            # rows cut to the longest caption of a batch may be shorter than an n-gram
            if order <= tokens.shape[1]:
                hashed.append(hash_ngrams(tokens, order, self.table.num_embeddings))
                counted.append(mask.unfold(1, order, 1).all(dim=2))
        return torch.cat(hashed, dim=1), torch.cat(counted, dim=1)


def hash_ngrams(tokens: Int64[Tensor, "B L"], order: int, table_size: int) -> Int64[Tensor, "B N"]:
    """The place of each n-gram in the table: h ← (h · 2³²/φ + token + 1) mod 2³¹, begun with the order.

    The high bits are folded into the low ones at the end, since multiplication carries upwards only.
    """
    grams = tokens.unfold(1, order, 1)
    hashed = torch.full_like(grams[:, :, 0], order)
    for place in range(order):
        hashed = (hashed * _MULTIPLIER + grams[:, :, place] + 1) & _LOW_31
    hashed = ((hashed ^ (hashed >> 15)) * _MULTIPLIER) & _LOW_31
    return (hashed ^ (hashed >> 13)) % table_size


def build_bag(config: TextTowerConfig, name: str, embed_dim: int) -> TextTower:
    """`bag`."""
    _check(config, name)
    return BagOfWordsTower(config, embed_dim, entries=config.vocab_size)


def build_ngram(config: TextTowerConfig, name: str, embed_dim: int) -> TextTower:
    """`ngram`."""
    _check(config, name)
    return NgramTower(config, embed_dim)


def _check(config: TextTowerConfig, name: str) -> None:
    if name:
        raise UsageError(f"{config.tower}: {config.tower.split(':')[0]} takes no name; its width is an option: width=.")
    # 0 would give every text the same vector, which has no direction
    if not config.entry_length > 0:
        raise UsageError(
            f"entry_length = {config.entry_length} leaves texts no direction; give more than 0, e.g. 0.02."
        )
    if not config.orders or min(config.orders) < 1:
        raise UsageError(f"orders = {config.orders} are not lengths of n-grams; give some from 1.")
    if max(config.orders) > config.context_length:
        raise UsageError(
            f"orders = {config.orders}: captions have {config.context_length} tokens; give a longer --context-length."
        )
