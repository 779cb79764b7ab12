"""Inputs of both sides of the embedding benchmark: shards of images with one caption each, and a small model."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm.data.tar import ShardReader
from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import VlmError
from vlm.models.load import WEIGHTS, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer

ARCHITECTURE = "vlm-bench"
_PIXELS = 224
_PATCH = 32
_CONTEXT = 77
_HEAD = 64
_JPEG = b"\xff\xd8"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A ViT and a text transformer of the same width and depth, with random weights."""

    width: int
    layers: int

    def config(self) -> dict:
        """The configuration in open_clip's format."""
        text = {"context_length": _CONTEXT, "vocab_size": 49408, "heads": self.width // _HEAD}
        vision = {"image_size": _PIXELS, "patch_size": _PATCH, "head_width": _HEAD}
        same = {"width": self.width, "layers": self.layers}
        return {"embed_dim": self.width, "vision_cfg": vision | same, "text_cfg": text | same, "custom_text": True}


def write_model(network: Network, folder: Path) -> tuple[Path, Path, Path]:
    """Write our model folder; returns it, its weights file, and open_clip's configuration of the same network."""
    tokenizer = open_tokenizer("clip", _CONTEXT)
    config = fit_to_tokenizer(network.config(), tokenizer)
    torch.manual_seed(0)
    model = VisionLanguageModel(
        name=ARCHITECTURE,
        network=build_network(config).eval(),
        config=config,
        view=EvalTransform(size=_PIXELS),
        tokenizer=tokenizer,
    )
    save_model_folder(folder / "model", model, inputs={})
    described = folder / f"{ARCHITECTURE}.json"
    described.write_text(json.dumps(network.config()), encoding="utf-8")
    return folder / "model", folder / "model" / WEIGHTS, described


def write_shards(sources: list[str], folder: Path, *, pairs: int, shards: int) -> list[str]:
    """Tars of KEY.jpg and KEY.txt, the same number of pairs in each but the last, from the first caption of each
    sample of the sources, which are repeated as often as necessary; returns the first captions of that many samples.

    Raises:
        VlmError: the sources hold no JPEG with a caption.
    """
    folder.mkdir(parents=True)
    each, captions = -(-pairs // shards), []
    found = itertools.islice(_pairs(sources), pairs)
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place, (image, caption) in enumerate(itertools.islice(found, each)):
                key = f"{number:05d}{place:05d}"
                for name, data in ((f"{key}.jpg", image), (f"{key}.txt", caption.encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                captions.append(caption)
    return captions


def _pairs(sources: list[str]) -> Iterator[tuple[bytes, str]]:
    while True:
        none_yet = True
        for source in sources:
            reader = ShardReader(source)
            for number in range(len(reader.index)):
                sample = reader.read(number)
                captions = [text for texts in sample.captions.values() for text in texts]
                if sample.image.startswith(_JPEG) and captions:
                    none_yet = False
                    yield sample.image, captions[0]
            reader.close()
        if none_yet:
            raise VlmError(f"{sources[0]} … hold no JPEG with a caption; choose other --shards.")
