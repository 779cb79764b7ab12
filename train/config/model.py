"""Which network is trained, and what of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, how it reads text, and how it is regularised."""

    architecture: str = "tiny"
    """One of ours (tiny, tiny-coca, small), any open_clip name (ViT-B-32, coca_ViT-L-14), or IMAGE_TOWER+TEXT_TOWER."""

    start_from: str = ""
    """MODEL whose weights, view and tokenizer the run starts from; empty starts from fresh weights."""

    tokenizer: str = "clip"
    """clip, a SentencePiece .model file, or a Hugging Face folder."""

    context_length: int = 0
    """Tokens a caption; 0 takes the architecture's."""

    image_size: int = 0
    """Pixels of the square the network sees; 0 takes the architecture's."""

    lock: Literal["", "image", "text"] = ""
    """Tower whose weights stay as they are: `image` is locked-image tuning (LiT)."""

    unlocked_groups: int = 0
    """Last groups of layers of the locked tower that are trained all the same."""

    patch_dropout: float = 0.0
    """Share of patches a ViT leaves out while training."""

    dropout: float = 0.0
    """Probability of the dropout layers the towers have."""

    drop_path: float = 0.0
    """Probability of skipping a residual branch of a timm tower, rising with depth to this."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    channels_last: bool = False
    """Lay out a convolutional tower's maps with channels last."""

    compile: bool = False
    """Compile the network (torch.compile); its first steps take minutes."""
