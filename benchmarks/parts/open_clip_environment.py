"""The separate environment in which open_clip's pipeline runs, and the shards that both sides read."""

import sys
from pathlib import Path

import torch
import torchvision
from parts.isolated_environment import own_python, run_quietly
from parts.messages import say

from vlm.data.shards import expand_shards
from vlm.errors import VlmError

PINNED = ("open_clip_torch==3.3.0", "webdataset==0.2.86")
DATASETS = Path(__file__).parents[3] / "shared" / "datasets"


def open_clip_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, which is created if missing.

    Raises:
        VlmError: it cannot be created.
    """
    same = (f"torch=={torch.__version__.split('+')[0]}", f"torchvision=={torchvision.__version__.split('+')[0]}")
    return own_python(folder, (*PINNED, *same, "psutil", "pandas"))


def packed_clothing(folder: Path) -> str:
    """The full-size photos in six shards, packed unchanged by `vlm pack` if missing."""
    say(f"Packing {DATASETS / 'clothing'} into {folder} …")
    source = str(DATASETS / "clothing" / "clothing.tar")
    run_quietly([sys.executable, "-m", "vlm", "pack", source, str(folder), "--samples-per-shard", "64"])
    return str(folder)


def shards_of(names: tuple[str, ...], folder: Path, workers: int) -> dict[str, list[str]]:
    """The tars of each data set: `clothing`, `flickr8k`, or any shards.

    Raises:
        VlmError: there are fewer shards than workers, which open_clip's pipeline rejects.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if name == "clothing":
            packed = folder / "shards-clothing"
            url = str(packed) if packed.is_dir() else packed_clothing(packed)
        else:
            url = str(DATASETS / "flickr8k" / "train-*.tar") if name == "flickr8k" else name
        found[name] = expand_shards(url)
        if len(found[name]) < workers:
            raise VlmError(f"{name} has {len(found[name])} shards; open_clip needs at least as many as workers.")
    return found
