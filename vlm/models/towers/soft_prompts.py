"""LiMBeR (Merullo et al. 2022, §3): a frozen causal language model writes captions from an image's soft prompt.

One linear map, the only thing trained, takes the image tower's patches to the space of the language model's word
embeddings; what it makes of an image stands before the caption as words would. The language model is no part of the
network's weights: a model folder names its folder and its fingerprint.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.files import compute_fingerprint
from vlm.models.caption_state import CaptionState
from vlm.models.towers.language_model import LazyLanguageModel, complete_lm
from vlm.models.towers.tower import TextTower, pool_states, text_mask
from vlm.models.towers.tower_config import TextTowerConfig
from vlm.tensor_types import Float, Int64, Tensor

LIMBER = "limber"


class LazyWriter(LazyLanguageModel):
    """A causal language model with its output layer, which gradients pass through and do not change."""

    def embed(self, tokens: Int64[Tensor, "*B L"]) -> Float[Tensor, "*B L C"]:
        """Embeddings of words; an id beyond the model's own, the padding, counts as its last."""
        table = self._on(tokens.device).get_input_embeddings()
        return table(tokens.clamp(max=table.num_embeddings - 1))

    def run(self, embeddings: Float[Tensor, "R L C"], past: Any = None) -> Any:
        """The model's output for embeddings of words, after those of a cache if there is one."""
        model = self._on(embeddings.device)
        # trained weights are float32, whatever the map to them is
        return model(inputs_embeds=embeddings.to(model.dtype), past_key_values=past, use_cache=past is not None)

    def _load(self, values: dict[str, Any], weights: str) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{weights} holds no causal language model: {error}") from error


class PromptedTower(TextTower):
    """Words as a frozen language model reads them.

    The text's vector, which LiMBeR has none of, is the projected mean of its words' embeddings.
    """

    cls_emb = None

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.language_model = LazyWriter(config.folder, config.lm_fingerprint)
        self.pad_id = config.pad_id
        self.context_length = config.context_length
        self.head = nn.Linear(config.lm_width, embed_dim, bias=False)
        digest = compute_fingerprint(config.lm_fingerprint, LIMBER)
        # a buffer, so that it is part of state_dict and of the fingerprint
        self.register_buffer("language_model_digest", torch.tensor(list(digest.encode()), dtype=torch.uint8))

    def forward(self, tokens: Int64[Tensor, "B L"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L C"]]:
        """Vectors of the joint space, not normalised, and the words' embeddings."""
        states = self.language_model.embed(tokens)
        pooled = pool_states(states, text_mask(tokens, self.pad_id), "mean")
        return self.head(pooled.to(self.head.weight.dtype)), states


class SoftPromptDecoder(nn.Module):
    """The language model after a soft prompt."""

    def __init__(self, language_model: LazyWriter, vocab_size: int) -> None:
        super().__init__()
        self._language_model = language_model
        self._vocab_size = vocab_size

    def forward(self, memory: Float[Tensor, "B M C"], states: Float[Tensor, "B L C"]) -> Float[Tensor, "B L V"]:
        """Logits of the next token at each word."""
        words = torch.cat([memory.to(states.dtype), states], dim=1)
        logits = self._language_model.run(words).logits[:, memory.shape[1] :]
        return self.widened(logits)

    def widened(self, logits: Float[Tensor, "*B U"]) -> Float[Tensor, "*B V"]:
        """With ids that the tokenizer has beyond the model's, which are never written."""
        missing = self._vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min) if missing > 0 else logits

    def begin_captions(self, memory: Float[Tensor, "B M C"], text: PromptedTower) -> CaptionState:
        """One empty caption of each image, with the model's own cache."""
        return cast(CaptionState, _PromptedState(self, self._language_model, memory, text))


class _PromptedState:
    """Captions being written by a language model: rows of its cache, those of an image one after the other."""

    attention = None

    def __init__(self, decoder: SoftPromptDecoder, writer: LazyWriter, memory: Tensor, text: PromptedTower) -> None:
        from transformers import DynamicCache

        self._decoder, self._writer, self._text = decoder, writer, text
        self._num_rows = 1
        self._past = DynamicCache()
        writer.run(memory, self._past)

    def advance(self, tokens: Int64[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        words = self._writer.embed(tokens.flatten()[:, None])
        logits = self._writer.run(words, self._past).logits[:, -1]
        return self._decoder.widened(logits.float()).unflatten(0, tokens.shape)

    def select(self, images: Int64[Tensor, " C"], rows: Int64[Tensor, "C J"]) -> None:
        self._past.batch_select_indices((images[:, None] * self._num_rows + rows).flatten())
        self._num_rows = rows.shape[1]


def complete_limber(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The text_cfg of `limber:FOLDER` with what must be known of the language model.

    Raises:
        UsageError: the folder holds no causal language model with weights.
    """
    return values if values.get("lm_fingerprint") else complete_lm(values, name)


def build_limber(config: TextTowerConfig, name: str, embed_dim: int) -> PromptedTower:
    """`limber:FOLDER` without its decoder."""
    return PromptedTower(config, embed_dim)
