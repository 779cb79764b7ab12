"""What is minimised."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A sum of weighted terms, and what they are told."""

    objective: str = "clip"
    """Terms of the table in the docs, joined by +, each with a weight if not 1: `clip`, `siglip + 2*caption`."""

    same_pairs: Literal["negative", "ignore", "positive"] = "negative"
    """What pairs of a batch with the same key, caption or picture are to each other in contrastive terms."""

    margin: float = 0.2
    """Margin of the ranking term: cosines of negatives must stay this far below that of the pair."""

    negatives: Literal["both", "images", "texts", "hardest"] = "both"
    """Negatives of the ranking term: wrong images, wrong texts, both, or the hardest of each."""

    teacher: str = ""
    """MODEL that distillation learns from while training; empty reads teacher embeddings stored in the shards."""

    teacher_scale: float = 100.0
    """Inverse temperature of the teacher's similarities."""

    sub_captions: int = 0
    """Sentences drawn from a sample's captions that are shown as several positives; 0 shows one caption."""

    local_views: int = 0
    """Small crops of each picture for local-to-global self-distillation."""

    parallel_share: float = 0.75
    """Share of captions that the parallel captioner predicts all at once (CapPa); the others token by token."""

    text_embedding_size: int = 0
    """Numbers in a stored text embedding that pictures are aligned with (`text_align`)."""

    similarity_block: int = 1024
    """Rows of the similarity matrix that are held at once; changes memory only."""
