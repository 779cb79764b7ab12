"""Fixture: shards embedded into one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.index.embed import EmbedOptions, EmbedSummary, embed_into
from vlm.index.embeddings_folder import Modality
from vlm.index.encoder import Encoder


def embed_shards(
    model: Encoder, shards: Sequence[str], out: Path, *, modality: Modality = "image", **options: Any
) -> EmbedSummary:
    """Embed the image, or each caption, of every sample."""
    return embed_into(model, shards, {modality: out}, EmbedOptions(**options))[modality]
