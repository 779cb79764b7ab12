"""Sentence encoders of sentence-transformers as models that embed texts only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from vlm.data.tokenizers import TransformersTokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint
from vlm.models.huggingface_clip import is_dual_encoder, load_huggingface, no_loading_bar
from vlm.models.model import TEXT_BATCH_SIZE, VisionLanguageModel, space_fingerprint
from vlm.tensor_types import Float32, Tensor, UInt8

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
