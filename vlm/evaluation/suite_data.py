"""The data of a suite: where each set lies below the folder of the user's data, how it is read, how it is fetched."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.config import suggest
from vlm.data.pack import PackConfig, held_out_split
from vlm.data.shards import expand_shards
from vlm.data.sources.caption_files import SCENES
from vlm.data.sources.source import SceneOptions, SourceKind, SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.errors import UsageError
from vlm.evaluation.class_vectors import CLASS_NAMES_FILE
from vlm.evaluation.evaluation_set import CLS_LABEL, NPY_LABEL, EvaluationSet, open_evaluation_set
from vlm.files import compute_fingerprint, write_text
from vlm.storage import is_remote

logger = logging.getLogger(__name__)

DATASET_TYPE_FILE = "dataset_type.txt"
_LABELS_OF_TYPES = {"classification": CLS_LABEL, "multilabel": NPY_LABEL, "retrieval": ""}


@dataclass(frozen=True, kw_only=True)
class SuiteData:
    """The table `[data.NAME]` of a suite.

    path: below the folder of the user's data: shards, or anything `vlm pack` reads; `scenes` is drawn on the spot.
    layout: `clip-benchmark` is a folder with `classnames.txt`, `dataset_type.txt` and a folder of tars for each split.
    kind, folder, image_column, caption_column, captions: as of `vlm pack`. label, class_names, caption_lines, limit:
        as of `open_evaluation_set`.
    hold_out: only the pairs that `vlm pack --hold-out` of this number would hold out.
    hub: a data set of the Hugging Face Hub that is this set in this layout. fetch: else how to get it.
    not_evaluated: of a set that is named only to say so: why no evaluator takes it.
    """

    path: str
    layout: Literal["", "clip-benchmark"] = ""
    split: str = "test"
    kind: SourceKind | None = None
    folder: str = ""
    image_column: str | None = None
    caption_column: str | None = None
    captions: Literal["", "none", "optional"] = ""
    caption_lines: bool = False
    label: str = ""
    class_names: tuple[str, ...] = ()
    hold_out: int = 0
    limit: int = 0
    scenes: SceneOptions = field(default_factory=lambda: SceneOptions(split="val"))
    hub: str = ""
    fetch: str = ""
    not_evaluated: str = ""

    def address(self, root: Path) -> str:
        """Where it lies."""
        is_elsewhere = self.path == SCENES or is_remote(self.path)
        path = self.path if is_elsewhere else str(root.expanduser() / self.path)
        return f"{path}/{self.split}" if self.layout else path

    def how_to_fetch(self, root: Path) -> str:
        """What the user does to have it."""
        target = root / self.path
        if self.hub:
            return f"hf download {self.hub} --repo-type dataset --local-dir {target}"
        return self.fetch or f"put it at {target}"


@dataclass(frozen=True, kw_only=True)
class AbsentData:
    """A set that is left out. reason: why. fetch: how to get what is not there; empty where that would not help."""

    name: str
    reason: str
    fetch: str = ""


def find_absent(name: str, data: SuiteData, root: Path) -> AbsentData | None:
    """The set as one that is left out, None if it is there."""
    if data.not_evaluated:
        return AbsentData(name=name, reason=data.not_evaluated)
    address = data.address(root)
    if address == SCENES or is_remote(address):
        return None
    path = Path(address)
    is_there = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if not is_there and not path.exists():
        try:
            is_there = bool(expand_shards(address))
        except UsageError:
            is_there = False
    return None if is_there else AbsentData(name=name, reason=f"not at {address}", fetch=data.how_to_fetch(root))


def open_suite_data(name: str, data: SuiteData, root: Path, *, cache: Path | None = None) -> EvaluationSet:
    """A set of a suite that is there.

    cache: folder in which is kept which pairs are held out, for which all images have to be decoded.

    Raises:
        UsageError: it cannot be read so, or lacks the label.
    """
    address = data.address(root)
    options = SourceOptions(
        kind=data.kind,
        folder=data.folder,
        image_column=data.image_column,
        caption_column=data.caption_column,
        captions=data.captions,
        scenes=data.scenes,
    )
    label, caption_lines = data.label, data.caption_lines
    if data.layout:
        label, caption_lines = _clip_benchmark_labels(Path(address), data)
    is_plain = data.path != SCENES and options == SourceOptions(scenes=data.scenes)
    opened = open_evaluation_set(
        address,
        name=name,
        label=label,
        class_names=data.class_names,
        options=None if is_plain else options,
        caption_lines=caption_lines,
    )
    if data.hold_out:
        opened = _held_out(opened, data.hold_out, address, options, cache)
    return opened.select(range(data.limit)) if 0 < data.limit < len(opened) else opened


def _clip_benchmark_labels(split: Path, data: SuiteData) -> tuple[str, bool]:
    """The label of a set in CLIP_benchmark's layout, and whether each line of a text is a caption.

    Raises:
        UsageError: its type is not known.
    """
    type_file = split.parent / DATASET_TYPE_FILE
    # the file may be missing, and then it is classification
    kind = type_file.read_text(encoding="utf-8").strip().lower() if type_file.is_file() else "classification"
    if kind not in _LABELS_OF_TYPES:
        raise UsageError(f"{type_file} says {kind!r}; {suggest(kind, list(_LABELS_OF_TYPES))}")
    label = data.label or _LABELS_OF_TYPES[kind]
    if label == CLS_LABEL and not data.class_names and not (split.parent / CLASS_NAMES_FILE).is_file():
        logger.warning(f"{split.parent} has no {CLASS_NAMES_FILE}, so that its classes have numbers for names.")
    return label, kind == "retrieval" or data.caption_lines


def _held_out(
    opened: EvaluationSet, number: int, address: str, options: SourceOptions, cache: Path | None
) -> EvaluationSet:
    key = compute_fingerprint(opened.digest, str(number))
    kept = cache / f"held-out-{key}.json" if cache else None
    if kept is not None and kept.is_file():
        numbers = json.loads(kept.read_text(encoding="utf-8"))
    else:
        split = held_out_split(open_source(address, options), PackConfig(hold_out=number))
        numbers = sorted(split.numbers)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(numbers))
    return opened.select(np.flatnonzero(np.isin(opened.images.numbers, numbers)))
