"""Which names of open_clip the library uses beyond its public ones, and that they stand in one file."""

import ast
from pathlib import Path

import open_clip
import pytest

from vlm.data import open_clip_private

ROOT = Path(__file__).resolve().parents[2]
PRIVATE_FILE = ROOT / "data" / "open_clip_private.py"
SOURCES = [
    path
    for folder in ("vlm", "data", "train", "index")
    for path in (ROOT / folder).rglob("*.py")
    if path != PRIVATE_FILE and not any(parent.is_symlink() for parent in path.parents)
]
# classes whose attributes are read, a wrapper of tokenizers, and what builds a tower without a network
PRIVATE = {
    "HFTokenizer",
    "ResidualAttentionBlock",
    "TextTransformer",
    "TimmModel",
    "VisionTransformer",
    "build_text_decoder",
    "build_text_tower",
    "build_vision_tower",
}


def test_private_names_are_these_and_there():
    assert set(open_clip_private.__all__) == PRIVATE
    assert all(callable(getattr(open_clip_private, name)) for name in PRIVATE)


def test_no_other_file_reaches_into_open_clips_modules():
    reaching = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("open_clip."):
                reaching.append(f"{path.name}: {node.module}")
            if isinstance(node, ast.Import) and any(alias.name.startswith("open_clip.") for alias in node.names):
                reaching.append(path.name)
    assert not reaching


@pytest.mark.parametrize("name", ["_encode_image", "_encode_text"])
def test_the_captioner_has_the_methods_that_captioning_calls(name):
    """Private, but the public ones do not give the tokens that the decoder reads (vlm/models/coca.py)."""
    assert callable(getattr(open_clip.CoCa, name))
