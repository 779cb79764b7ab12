"""The names of open_clip that its package does not offer as public ones, in one place.

A release that moves one of them breaks here alone (`tests/models/test_open_clip_names.py` lists them). Imported inside
functions, since open_clip takes seconds.
"""

from open_clip.coca_model import _build_text_decoder_tower as build_text_decoder
from open_clip.model import _build_text_tower as build_text_tower
from open_clip.model import _build_vision_tower as build_vision_tower
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer

__all__ = [
    "HFTokenizer",
    "ResidualAttentionBlock",
    "TextTransformer",
    "TimmModel",
    "VisionTransformer",
    "build_text_decoder",
    "build_text_tower",
    "build_vision_tower",
]
