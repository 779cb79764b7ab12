"""Texts to the embeddings of a frozen language model, as the text tower `lm:FOLDER` computes them (FLAME)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.errors import UsageError
from vlm.files import compute_fingerprint
from vlm.models.huggingface_clip import is_dual_encoder
from vlm.models.load import choose_device, load_model
from vlm.models.model import VisionLanguageModel
from vlm.models.model_spec import CHECKPOINTS, CONFIG, RUN_MODEL
from vlm.models.towers.language_model import FrozenLanguageTower, build_lm, complete_lm
from vlm.models.towers.tower_config import read_text_config
from vlm.tensor_types import Float32, Tensor

_TEXT_BATCH_SIZE = 64

Pooling = Literal["", "mean", "last"]


class LanguageModelEmbedder:
    """What a tower that reads precomputed embeddings is given: `tower.embed` of the tokens, in float32."""

    precision = torch.float32

    def __init__(self, tower: FrozenLanguageTower, tokenizer: Tokenizer, device: torch.device) -> None:
        self._tower = tower
        self._tokenizer = tokenizer
        self._device = device

    @property
    def fingerprint(self) -> str:
        """Identity of the vectors: weights, pooling, prompts and tokenizer."""
        digest = bytes(self._tower.get_buffer("language_model_digest").tolist())
        return compute_fingerprint(digest, self._tokenizer.fingerprint())

    def describe(self) -> dict[str, Any]:
        """What the vectors depend on, by name, as a manifest records it."""
        return {
            "language_model": self._tower.language_model.fingerprint,
            "pooling": self._tower.pooling,
            "facets": self._tower.facets,
            "prompts": [list(prompt) for prompt in self._tower.prompts],
            "context_length": self._tokenizer.context_length,
        }

    @property
    def embedding_size(self) -> int:
        """E, the length of a vector."""
        return self._tower.embedding_size

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T E"]:
        """A row for each text, not normalised, on the CPU."""
        # starts empty, so that no texts give a matrix of no rows
        rows = [torch.zeros(0, self.embedding_size)]
        for first in range(0, len(texts), _TEXT_BATCH_SIZE):
            tokens = torch.from_numpy(self._tokenizer.encode(list(texts[first : first + _TEXT_BATCH_SIZE])))
            rows.append(self._tower.embed(tokens.to(self._device)).float().cpu())
        return torch.cat(rows)


def load_text_model(
    spec: str,
    *,
    context_length: int = 0,
    pooling: Pooling = "",
    prompts: Sequence[str] = (),
    device: str = "auto",
    precision: str = "fp32",
) -> VisionLanguageModel | LanguageModelEmbedder:
    """The text tower of a MODEL, or a language model in a Hugging Face folder.

    For a MODEL that reads precomputed embeddings, these are meant, not what it makes of them.

    Args:
        context_length: tokens of a text; 0 is 77. pooling: which states are used; empty is the last one. prompts:
            facet prompts (FLAME). All three are for a folder: a MODEL has its own.

    Raises:
        UsageError: there is no such model, or an option is given that it has itself.
    """
    path = Path(spec)
    # a MODEL comes first, whatever other files its folder holds
    is_model = is_dual_encoder(path) or any((path / name).exists() for name in (CONFIG, RUN_MODEL, CHECKPOINTS))
    if (path / "config.json").is_file() and not is_model:
        tokenizer = open_tokenizer(spec, context_length or None)
        return LanguageModelEmbedder(_tower(spec, tokenizer, pooling, prompts), tokenizer, choose_device(device))
    if context_length or pooling or prompts:
        raise UsageError(
            f"{spec} is not a folder of a language model; leave out --context-length, --pooling and --prompt."
        )
    model = load_model(spec, device=device, precision=precision)
    tower: Any = getattr(model.network, "text", None)
    if isinstance(tower, FrozenLanguageTower):
        return LanguageModelEmbedder(tower, model.tokenizer, model.device)
    return model


def _tower(folder: str, tokenizer: Tokenizer, pooling: Pooling, prompts: Sequence[str]) -> FrozenLanguageTower:
    values = {
        "tower": f"lm:{folder}",
        "context_length": tokenizer.context_length,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_token,
        "eos_id": tokenizer.end_token,
        "pooling": pooling,
        "prompts": tuple(prompts),
    }
    tower = build_lm(read_text_config(complete_lm(values, folder)), folder, embed_dim=1)
    assert isinstance(tower, FrozenLanguageTower)
    return tower.eval()
