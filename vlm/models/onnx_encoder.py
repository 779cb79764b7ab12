"""An exported model as an encoder on the CPU: images and texts to unit vectors by ONNX Runtime, without torch.

    image.onnx, text.onnx (each with its weights in NAME.onnx.data), the tokenizer, manifest.json

Nothing here needs torch: a search reads this folder instead of loading the model.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from vlm.data.tokenizers import Tokenizer, open_tokenizer, trim_tokens
from vlm.errors import UsageError, VlmError
from vlm.files import sha256_file, write_text
from vlm.manifest import MANIFEST, Manifest, damage_as_error, read_manifest
from vlm.model_spec import (
    MIRROR,
    ONNX,
    ONNX_TEXT_TOWER,
    VARIANT_SEPARATOR,
    mirrored_fingerprint,
    truncated_fingerprint,
)
from vlm.tensor_types import Array, Float32, UInt8

if TYPE_CHECKING:
    import onnxruntime

    import vlm.data.transforms


IMAGE_TOWER = "image.onnx"
PIXELS = "pixels"
TOKENS = "tokens"
EMBEDDINGS = "embeddings"

OnnxPrecision = Literal["float32", "int8"]

Rows = TypeVar("Rows", Array, list[str])


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of the model that was exported, as it was then."""

    bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class OnnxDetails:
    """What an export's manifest says besides the fingerprint, which is that of the model.

    model: MODEL as it was named. source, source_files: its folder and the files there; empty for a name of open_clip.
    view: the fields of `EvalTransform`. text_length: "any" if rows of tokens may be cut to the longest text.
    logit_scale: turns cosines into logits. largest_difference: of an entry of a unit vector from torch's.
    quality: what int8 costs, measured; empty for float32.
    """

    model: str
    source: str
    source_files: dict[str, SourceFile]
    view: dict[str, Any]
    embedding_size: int
    context_length: int
    text_length: Literal["any", "context"]
    logit_scale: float
    precision: OnnxPrecision
    largest_difference: float
    quality: dict[str, Any]
    made_with: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class OnnxFolder:
    """A complete export."""

    path: Path
    fingerprint: str
    details: OnnxDetails


def read_onnx_folder(folder: Path, *, verify: bool = False) -> OnnxFolder:
    """An export's manifest; its files must have the recorded sizes, and with `verify` the recorded checksums.

    Raises:
        UsageError: it is not an export. VlmError: it is damaged.
    """
    manifest = read_manifest(folder, ONNX)
    for name, record in manifest.files.items():
        path = folder / name
        is_whole = path.is_file() and path.stat().st_size == record.bytes
        if not is_whole or (verify and sha256_file(path) != record.sha256):
            raise VlmError(f"{path} is missing or damaged; export the model again (vlm export MODEL --to onnx).")
    return OnnxFolder(path=folder, fingerprint=manifest.fingerprint, details=_details(manifest, folder))


def _details(manifest: Manifest, folder: Path) -> OnnxDetails:
    with damage_as_error(folder / MANIFEST):
        values = dict(manifest.details)
        values["source_files"] = {name: SourceFile(**file) for name, file in values["source_files"].items()}
        return OnnxDetails(**values)


def record_sources(folder: Path) -> dict[str, SourceFile]:
    """The files of a model folder by their paths below it, without its exports and its manifest, which has the date."""
    sources: dict[str, SourceFile] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and name.parts[0] not in (ONNX, MANIFEST):
            stat = path.stat()
            sources[str(name)] = SourceFile(bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256_file(path))
    return sources


def stale_reason(export: OnnxFolder) -> str:
    """Why an export is no longer that of the model beside it; empty if it is.

    Sizes and times are compared; a file with another time is read, and where it is the same after all (a copied
    folder), the new time is recorded. An export whose model is gone is good: it needs nothing else.
    """
    # beside its model it belongs to that one, also after both were moved
    beside = export.path.parent if export.path.name == ONNX else None
    folder = beside if beside is not None and export.details.source else Path(export.details.source)
    touched: dict[str, SourceFile] = {}
    for name, recorded in export.details.source_files.items():
        try:
            stat = os.stat(folder / name)
        except OSError:
            if folder == beside:
                return f"{folder / name} is gone"
            continue
        if stat.st_size != recorded.bytes:
            return f"{folder / name} has changed"
        if stat.st_mtime_ns != recorded.mtime_ns:
            if sha256_file(folder / name) != recorded.sha256:
                return f"{folder / name} has changed"
            touched[name] = replace(recorded, mtime_ns=stat.st_mtime_ns)
    if touched:
        _record_times(export, touched)
    return ""


def _record_times(export: OnnxFolder, touched: dict[str, SourceFile]) -> None:
    path = export.path / MANIFEST
    values = json.loads(path.read_text(encoding="utf-8"))
    values["details"]["source_files"] |= {name: asdict(file) for name, file in touched.items()}
    try:
        write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    except OSError:
        return  # a folder that only others may write to: the files are read again next time


_IMAGES_AT_ONCE = 32
_TEXTS_AT_ONCE = 256
# of one thread: the quickest of 1 to 250 for a ViT and a text transformer of width 192, for more leave its cache
_ROWS_OF_A_THREAD = 16
_ERRORS_ONLY = 3


@dataclass(frozen=True, kw_only=True)
class OnnxEncoder:
    """An export, whose embeddings count as those of the model it was made from.

    name: MODEL as it was asked for. dimensions: how many numbers of an embedding are kept; None: all. is_mirrored: an
    image is embedded with its mirror image, before that.
    is_bulk: for many rows, each small batch of which has a thread to itself: quicker than threads that share each batch
        and wait for each other, and a vector's last bits do not depend on the number of threads.
    """

    name: str
    export: OnnxFolder
    dimensions: int | None = None
    is_mirrored: bool = False
    is_bulk: bool = False
    _sessions: dict[str, "onnxruntime.InferenceSession"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        size = self.export.details.embedding_size
        if self.dimensions is not None and not 1 <= self.dimensions <= size:
            raise UsageError(
                f"{self.name}{VARIANT_SEPARATOR}{self.dimensions}: the embeddings of {self.name} have {size} "
                f"dimensions; keep from 1 to {size} of them."
            )

    @property
    def spec(self) -> str:
        """MODEL with its variant."""
        mirror = f"{VARIANT_SEPARATOR}{MIRROR}" if self.is_mirrored else ""
        return f"{self.name}{mirror}" + ("" if self.dimensions is None else f"{VARIANT_SEPARATOR}{self.dimensions}")

    @property
    def fingerprint(self) -> str:
        """That of the exported model, or of its variant."""
        whole = self.export.fingerprint
        if self.is_mirrored:
            whole = mirrored_fingerprint(whole)
        is_whole = self.dimensions in (None, self.export.details.embedding_size)
        return whole if is_whole or self.dimensions is None else truncated_fingerprint(whole, self.dimensions)

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.dimensions or self.export.details.embedding_size

    @property
    def embeds_images(self) -> bool:
        """Every export has an image tower."""
        return True

    @property
    def can_caption(self) -> bool:
        """No decoder is exported."""
        return False

    @property
    def device(self) -> str:
        """ONNX Runtime runs on the CPU."""
        return "cpu, by onnxruntime"

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature that turns cosines into logits."""
        return self.export.details.logit_scale

    @cached_property
    def view(self) -> "vlm.data.transforms.EvalTransform":
        """From an encoded image to the pixels the model sees, the same as for torch."""
        from vlm.data.transforms import EvalTransform

        return EvalTransform.from_preprocess(self.export.details.view)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's; of its ids there is no doubt, they were compared at the export."""
        return open_tokenizer(str(self.export.path))

    def open_towers(self, *, texts: bool, images: bool) -> None:
        """Read what embeds texts or images now, rather than with the first of them.

        Raises: as of `open_session`.
        """
        if texts:
            # a cached property: to name it is to open it
            _ = self.tokenizer
            self._session(ONNX_TEXT_TOWER)
        if images:
            self._session(IMAGE_TOWER)

    def embed_images(self, images: UInt8[Array, "B 3 H W"]) -> Float32[Array, "B D"]:
        """Unit vectors of images as `view` gives them."""
        batches = self._batches(images, _IMAGES_AT_ONCE)
        vectors = self._embed(IMAGE_TOWER, PIXELS, batches)
        if self.is_mirrored:
            both = vectors + self._embed(IMAGE_TOWER, PIXELS, [batch[:, :, :, ::-1] for batch in batches])
            vectors = both / np.linalg.norm(both, axis=1, keepdims=True)
        return self._truncated(vectors)

    def embed_texts(self, texts: Sequence[str]) -> Float32[Array, "T D"]:
        """Unit vectors of texts; neighbours of like length are embedded in less time."""
        batches: list[Array] = []
        for some in self._batches(list(texts), _TEXTS_AT_ONCE):
            tokens = self.tokenizer.encode(some)
            if self.export.details.text_length == "any":
                tokens = trim_tokens(tokens, self.tokenizer)
            batches.append(tokens)
        return self._truncated(self._embed(ONNX_TEXT_TOWER, TOKENS, batches))

    def _batches(self, rows: Rows, size: int) -> list[Rows]:
        """Consecutive rows in as few batches as can be, of nearly one size, so that none is left with a single row."""
        number = -(-len(rows) // (_ROWS_OF_A_THREAD if self.is_bulk else size))
        ends = [len(rows) * batch // number for batch in range(number + 1)] if number else []
        return [rows[first:end] for first, end in pairwise(ends)]

    def _embed(self, tower: str, input_name: str, batches: Sequence[Array]) -> Float32[Array, "N D"]:
        session = self._session(tower)

        def run(batch: Array) -> Float32[Array, "B D"]:
            outputs: Any = session.run([EMBEDDINGS], {input_name: np.ascontiguousarray(batch)})
            return outputs[0]

        run_all = self._threads.map if self.is_bulk else map
        no_rows = np.zeros((0, self.export.details.embedding_size), np.float32)
        return np.concatenate([no_rows, *run_all(run, batches)])

    def _truncated(self, vectors: Float32[Array, "N D"]) -> Float32[Array, "N K"]:
        if self.dimensions is None:
            return vectors
        part = vectors[:, : self.dimensions]
        # normalised again, since a part of a unit vector is shorter
        return part / np.linalg.norm(part, axis=1, keepdims=True)

    def _session(self, tower: str) -> "onnxruntime.InferenceSession":
        # each tower when it is first used: a text query never reads the image tower's weights
        if tower not in self._sessions:
            self._sessions[tower] = open_session(
                self.export, tower, threads=1 if self.is_bulk else _num_threads(default=0)
            )
        return self._sessions[tower]

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_num_threads(default=len(os.sched_getaffinity(0))), "onnx")


def _num_threads(*, default: int) -> int:
    """As many as OMP_NUM_THREADS says."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() and int(threads) else default


def open_session(export: OnnxFolder, tower: str, *, threads: int = 0) -> "onnxruntime.InferenceSession":
    """A tower ready to run on the CPU, with so many threads; 0 is one a core.

    Raises:
        UsageError: onnxruntime is not installed. VlmError: it cannot read the tower.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "An ONNX export needs onnxruntime: pip install 'vlm-pipeline[onnx]', or use --backend torch."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    # waiting threads sleep: the few queries of a process do not pay for spinning
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if export.details.precision == "float32":
        # Packed copies of the weights double the memory and take five times as long to open as a mapped file, to save
        # a tenth of each batch: measured with ViT-B-32's text tower.
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(export.path / tower), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        reason = str(error).partition("\n")[0]
        raise VlmError(f"{export.path / tower} cannot be read by onnxruntime ({reason}); export it again.") from error
