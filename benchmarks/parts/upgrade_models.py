"""The models of the upgrade benchmark, trained if missing, and their embeddings; everything is kept."""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from parts.quality_data import DataSet

from vlm.cli.main import main
from vlm.errors import VlmError
from vlm.index.backward_compat import EmbeddingPairs, read_pairs

ROLES = ("old", "new", "newer")
_OLD = ["--architecture", "small", "--epochs", "4", "--warmup-steps", "30", "--ema-decay", "0.95", "--seed", "0"]
_LARGER = ["--architecture", "timm:test_convnext3+bag@256"]
RECIPES: dict[str, list[str]] = {
    "old": _OLD,
    "new": [*_LARGER, "--epochs", "14", "--seed", "1"],
    "newer": [*_LARGER, "--epochs", "20", "--seed", "2"],
}
"""Options added to `vlm train PRESET`: a short run of a small network of 192 dimensions, then longer ones of 256."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """data: with its training and held-out shards. specs: MODEL of each role. folder: for the outputs.

    embedded: folders that were embedded, or were complete, in this process.
    """

    data: DataSet
    specs: dict[str, str]
    folder: Path
    embedded: set[Path] = field(default_factory=set)

    def pairs(self, old: str, new: str, split: str) -> EmbeddingPairs:
        """Embeddings of the images and captions of a split (train or val) by the models of two roles."""
        images = [self._embedded(role, split, "image") for role in (old, new)]
        texts = [self._embedded(role, split, "text") for role in (old, new)]
        return read_pairs(images[0], images[1], texts[0], texts[1], max_images=sys.maxsize, seed=0)

    def images(self, role: str, split: str) -> Path:
        """The embeddings folder of the images of a split."""
        return self._embedded(role, split, "image")

    def _embedded(self, role: str, split: str, modality: str) -> Path:
        shards = self.data.train if split == "train" else self.data.val
        out = self.folder / f"{self.data.name}-{role}-{split}-{modality}"
        if out not in self.embedded:
            # does nothing if it is complete, and refuses to resume with another model
            run_vlm("embed", self.specs[role], shards, str(out), "--modality", modality)
            self.embedded.add(out)
        return out


def open_models(data: DataSet, given: dict[str, str], folder: Path) -> Models:
    """Train the missing models; unfinished runs are resumed."""
    specs = {}
    for role in ROLES:
        specs[role] = given[role] or str(folder / f"{data.name}-{role}")
        if not given[role] and not (Path(specs[role]) / "model" / "manifest.json").is_file():
            words = ["--data", data.train, "--val", data.val, "--tokenizer", str(data.tokenizer), "--resume"]
            run_vlm("train", data.name, *words, "--run", specs[role], *RECIPES[role])
    return Models(data=data, specs=specs, folder=folder)


def run_vlm(*words: str) -> None:
    """Run a command of vlm in this process, with its log on stderr.

    Raises:
        VlmError: it fails.
    """
    with contextlib.redirect_stdout(sys.stderr):
        code = main(words)
    if code:
        raise VlmError(f"vlm {words[0]} … failed; see its output above.")
