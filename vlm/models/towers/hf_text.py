"""Text towers on transformers: any encoder or causal language model, trained with the rest."""

from typing import Any

from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.config import TextTowerConfig
from vlm.models.towers.hf_config import dropout_of, is_causal, open_config
from vlm.models.towers.hf_image import fresh_builder, load_weights, set_checkpointing
from vlm.models.towers.text import TextTower, pool_states, projection, real_tokens
from vlm.tensors import Float, Int64, Tensor


class HuggingFaceTextTower(TextTower):
    """States of a language model over the tokens, pooled and projected; of encoder-decoders the encoder alone.

    Positions are counted from the start of the row, so rows are padded at their end.
    """

    def __init__(self, trunk: Any, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.pad_id, self.pooling = config.pad_id, config.pooling
        self.head = projection(int(trunk.config.hidden_size), config.hidden, embed_dim)

    def forward(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""
        mask = real_tokens(tokens, self.pad_id)
        states = self.trunk(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return self.head(pool_states(states, mask, self.pooling))

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """The language model's; the projection is trained all the same."""
        return dict(self.trunk.named_parameters())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the language model does it."""
        set_checkpointing(self.trunk, enable)


def build_hf_text(config: TextTowerConfig, name: str, embed_dim: int) -> TextTower:
    """`hf:FOLDER` or `hf:TYPE`; the weights are those of `initial_weights` if that is given, else fresh.

    A vocabulary larger than the model's (a padding token was added) gets new entries at its end.

    Raises:
        UsageError: the model cannot be built, or reads fewer tokens than a caption may have.
    """
    changes: dict[str, Any] = dropout_of(config.dropout) | {"use_cache": False}
    hf_config = open_config(config.hf_config, **changes)
    check_length(config.tower, hf_config, config.context_length)
    if config.initial_weights:
        trunk: Any = load_weights(hf_config, config.initial_weights)
    else:
        trunk = fresh_builder(hf_config, config.tower)()
    if getattr(hf_config, "is_encoder_decoder", False):
        trunk = trunk.get_encoder()
    if config.vocab_size > trunk.get_input_embeddings().weight.shape[0]:
        trunk.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    return HuggingFaceTextTower(trunk, config, embed_dim)


def check_length(tower: str, hf_config: Any, length: int) -> None:
    """Refuse captions longer than the model has positions for.

    Raises:
        UsageError: they are.
    """
    longest = getattr(hf_config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UsageError(f"{tower} reads {longest} tokens and not {length}; give --context-length {longest} or less.")


def default_pooling(values: dict[str, Any]) -> str:
    """The last state of a causal model, which alone has seen the whole text; the mean of the others."""
    return "last" if is_causal(values) else "mean"
