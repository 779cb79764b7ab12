"""Our own small architectures, in open_clip's configuration format; its names are known besides."""

from typing import Any

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
        "text_cfg": {"context_length": 32, "vocab_size": 512, "width": 128, "heads": 4, "layers": 2},
    },
}
