"""Our own small architectures, in open_clip's configuration format; its names are known besides."""

from typing import Any

# sine positions, because learned ones start too weak to be used in a short run; 16 patches see a drawn scene well
# enough; batch normalisation is avoided throughout, since a split batch must equal the whole one
_TINY_VISION: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 192,
    "head_width": 32,
    "layers": 2,
    "pos_embed_type": "sin_cos_2d",
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": _TINY_VISION,
        "text_cfg": {"context_length": 16, "vocab_size": 258, "width": 96, "heads": 3, "layers": 1},
        "custom_text": True,
    },
    "tiny-coca": {
        "embed_dim": 128,
        "vision_cfg": _TINY_VISION
        | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 16, "output_tokens": True},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 258,
            "width": 128,
            "heads": 4,
            "layers": 1,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {"context_length": 16, "vocab_size": 258, "width": 128, "heads": 4, "layers": 1},
        "custom_text": True,
    },
    "small": {
        "embed_dim": 192,
        "vision_cfg": {
            "timm_model_name": "test_convnext3",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 2050, "width": 192, "heads": 3, "layers": 1},
        "custom_text": True,
    },
}
"""Sizes of towers; vocabulary and context length follow the tokenizer of the run."""
