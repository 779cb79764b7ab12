"""Models that embed texts only: sentence encoders of sentence-transformers, and frozen language models (FLAME)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import override

from vlm.data.tokenizers import Tokenizer, TransformersTokenizer, open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.model_spec import CHECKPOINTS, CONFIG, RUN_MODEL
from vlm.models.huggingface_clip import is_dual_encoder, load_huggingface, no_loading_bar
from vlm.models.load import choose_device, load_model
from vlm.models.model import TEXT_BATCH_SIZE, VisionLanguageModel, space_fingerprint
from vlm.models.towers.language_model import FrozenLanguageTower, build_lm, complete_lm
from vlm.models.towers.tower_config import read_text_config
from vlm.tensor_types import Float32, Tensor, UInt8

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


_MODULES_FILE = "modules.json"


@dataclass(kw_only=True)
class SentenceModel(VisionLanguageModel):
    """Embeds texts as `SentenceTransformer.encode` does, pooling and default prompt included; knows no images."""

    sentence_transformer: Any

    @property
    @override
    def fingerprint(self) -> str:
        """Identity of the embedding space: weights, tokenizer, and the prompt before each text."""
        prompt = self.sentence_transformer.prompts.get(self.sentence_transformer.default_prompt_name, "")
        self._fingerprint = self._fingerprint or compute_fingerprint(
            space_fingerprint(self.network, self.view, self.tokenizer), "sentence-transformers", prompt
        )
        return self._fingerprint

    @property
    @override
    def embeds_images(self) -> bool:
        """No."""
        return False

    @property
    @override
    def logit_scale(self) -> float:
        """None is learned without images.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.name} embeds texts only, so that it has no temperature for images and texts.")

    @override
    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Not of this model.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.name} is a sentence-transformers model, which embeds texts only; images need another.")

    @override
    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts, on the CPU."""
        if not texts:
            return torch.zeros(0, self.embedding_size)
        rows = self.sentence_transformer.encode(
            list(texts), batch_size=TEXT_BATCH_SIZE, show_progress_bar=False, convert_to_tensor=True
        )
        return nn.functional.normalize(rows.float(), dim=-1).cpu()


def is_sentence_transformer(folder: Path) -> bool:
    """Whether sentence-transformers saved it."""
    return (folder / _MODULES_FILE).is_file()


def load_sentence_transformer(folder: Path, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    """The folder's model; one around CLIP is loaded as CLIP, with its image tower.

    Raises:
        UsageError: sentence-transformers is not installed. VlmError: it cannot read the folder.
    """
    modules = json.loads((folder / _MODULES_FILE).read_text(encoding="utf-8"))
    trunk = folder / modules[0]["path"]
    if len(modules) == 1 and is_dual_encoder(trunk):
        return load_huggingface(trunk, device, precision)
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{folder} is a sentence-transformers model: pip install sentence-transformers to use it."
        ) from error
    try:
        with no_loading_bar():
            loaded = SentenceTransformer(
                str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": precision}
            ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise VlmError(f"{folder} cannot be read by sentence-transformers: {error}") from error
    with torch.inference_mode():
        size = loaded.encode(["a"], convert_to_tensor=True, show_progress_bar=False).shape[1]
    return SentenceModel(
        name=str(folder),
        network=loaded,
        config={"embed_dim": size},
        view=EvalTransform(),
        tokenizer=TransformersTokenizer(str(trunk), loaded.max_seq_length),
        device=device,
        precision=precision,
        sentence_transformer=loaded,
    )
