"""The shards, vocabulary and network of the quality benchmark, created once and cached."""

import io
import json
import subprocess
import sys
import tarfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.messages import say
from parts.open_clip_environment import DATASETS

from vlm.data.shards import count_samples, expand_shards
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write, write_text
from vlm.models.model import ARCHITECTURES

NETWORK = "clip-small"
"""Name of the network in open_clip's trainer."""

CLIP_VOCABULARY = 49408
_VOCABULARY: dict[str, list[str]] = {
    "fashion": ["--vocabulary", "2048"],
    "flickr8k": ["--vocabulary", "4096", "--languages", "en"],
}
_SEVERAL_CAPTIONS = ("flickr8k",)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set as both sides read it. tokenizer: SentencePiece model.

    first_captions: training shards with only the first caption; the training shards themselves if there is only one.
    """

    name: str
    train: str
    val: str
    num_train: int
    tokenizer: Path
    first_captions: str


def prepare(name: str, folder: Path, *, shards: int) -> DataSet:
    """Pack and prepare whatever is missing. shards: number of training shards used, the first ones; 0 uses all.

    Raises:
        VlmError: a step fails.
    """
    packed = _packed_fashion(folder / "shards-fashion") if name == "fashion" else DATASETS / name
    train = expand_shards(str(packed / "train-*.tar"))
    if shards > len(train):
        raise UsageError(f"--shards {shards}: {name} has {len(train)} training shards.")
    train = train[: shards or None]
    tokenizer = folder / f"words-{name}-{len(train)}.model"
    if not tokenizer.exists():
        say(f"Training the vocabulary of {name} …")
        _vlm("tokenizer", "train", "::".join(train), str(tokenizer), *_VOCABULARY[name])
    return DataSet(
        name=name,
        train="::".join(train),
        val=str(packed / "val-*.tar"),
        num_train=sum(count_samples(train)),
        tokenizer=tokenizer,
        first_captions="::".join(
            _with_first_caption(Path(shard), folder / f"first-{name}") if name in _SEVERAL_CAPTIONS else shard
            for shard in train
        ),
    )


def write_network(folder: Path) -> None:
    """Write our `small` with CLIP's vocabulary, for `open_clip.add_model_config(folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{NETWORK}.json", json.dumps(their_network(), indent=2))


def their_network() -> dict[str, Any]:
    """The network that open_clip trains, in its format."""
    values = deepcopy(ARCHITECTURES["small"])
    values["text_cfg"]["vocab_size"] = CLIP_VOCABULARY
    return values


def _packed_fashion(folder: Path) -> Path:
    if not (folder / "manifest.json").is_file():
        say(f"Packing {DATASETS / 'fashion'} into {folder} …")
        _vlm("pack", str(DATASETS / "fashion"), str(folder), "--hold-out", "1000")
    return folder


def _with_first_caption(shard: Path, folder: Path) -> str:
    """The same tar with only the first caption of each image, in text and metadata."""
    made = folder / shard.name
    if made.exists():
        return str(made)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard) as source, atomic_write(made) as file, tarfile.open(fileobj=file, mode="w") as target:
        for member in source:
            content = source.extractfile(member)
            if content is None:
                continue
            data = content.read()
            if member.name.endswith(".json"):
                data = _first_of(json.loads(data))
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    return str(made)


def _first_of(metadata: dict[str, Any]) -> bytes:
    kept = {name: value for name, value in metadata.items() if not name.startswith("captions_")}
    return json.dumps(kept | {"captions": metadata["captions"][:1]}, ensure_ascii=False).encode()


def _vlm(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "vlm", *words], capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"vlm {' '.join(words[:2])} … failed: {(done.stderr or done.stdout)[-2000:]}")
