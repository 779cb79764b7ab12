"""An exported model as an encoder on the CPU: images and texts to unit vectors by ONNX Runtime, without torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.data.tokenizers import Tokenizer, open_tokenizer, trim_tokens
from vlm.errors import UsageError, VlmError
from vlm.models.model_spec import DIMENSIONS_SEPARATOR, truncated_fingerprint
from vlm.models.onnx_folder import EMBEDDINGS, IMAGE_TOWER, PIXELS, TEXT_TOWER, TOKENS, OnnxFolder
from vlm.tensor_types import Array, Float32, UInt8

if TYPE_CHECKING:
    import onnxruntime

    import vlm.data.transforms

_IMAGES_AT_ONCE = 32
_TEXTS_AT_ONCE = 256
_ERRORS_ONLY = 3


@dataclass(frozen=True, kw_only=True)
class OnnxEncoder:
    """An export, whose embeddings count as those of the model it was made from.

    name: MODEL as it was asked for. dimensions: how many numbers of an embedding are kept; None: all.
    """

    name: str
    export: OnnxFolder
    dimensions: int | None = None
    _sessions: dict[str, "onnxruntime.InferenceSession"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        size = self.export.details.embedding_size
        if self.dimensions is not None and not 1 <= self.dimensions <= size:
            raise UsageError(
                f"{self.name}{DIMENSIONS_SEPARATOR}{self.dimensions}: the embeddings of {self.name} have {size} "
                f"dimensions; keep from 1 to {size} of them."
            )

    @property
    def fingerprint(self) -> str:
        """That of the exported model, or of its first dimensions."""
        whole = self.export.fingerprint
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
            self._session(TEXT_TOWER)
        if images:
            self._session(IMAGE_TOWER)

    def embed_images(self, images: UInt8[Array, "B 3 H W"]) -> Float32[Array, "B D"]:
        """Unit vectors of images as `view` gives them."""
        batches = [images[first : first + _IMAGES_AT_ONCE] for first in range(0, len(images), _IMAGES_AT_ONCE)]
        return self._embed(IMAGE_TOWER, PIXELS, batches)

    def embed_texts(self, texts: Sequence[str]) -> Float32[Array, "T D"]:
        """Unit vectors of texts."""
        batches: list[Array] = []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = self.tokenizer.encode(list(texts[first : first + _TEXTS_AT_ONCE]))
            if self.export.details.text_length == "any":
                tokens = trim_tokens(tokens, self.tokenizer)
            batches.append(tokens)
        return self._embed(TEXT_TOWER, TOKENS, batches)

    def _embed(self, tower: str, input_name: str, batches: Sequence[Array]) -> Float32[Array, "N D"]:
        rows = [np.zeros((0, self.export.details.embedding_size), np.float32)]
        for batch in batches:
            outputs: Any = self._session(tower).run([EMBEDDINGS], {input_name: np.ascontiguousarray(batch)})
            rows.append(outputs[0])
        vectors = np.concatenate(rows)
        if self.dimensions is None:
            return vectors
        part = vectors[:, : self.dimensions]
        # normalised again, since a part of a unit vector is shorter
        return part / np.linalg.norm(part, axis=1, keepdims=True)

    def _session(self, tower: str) -> "onnxruntime.InferenceSession":
        # each tower when it is first used: a text query never reads the image tower's weights
        if tower not in self._sessions:
            self._sessions[tower] = open_session(self.export, tower)
        return self._sessions[tower]


def open_session(export: OnnxFolder, tower: str) -> "onnxruntime.InferenceSession":
    """A tower ready to run on the CPU, with as many threads as OMP_NUM_THREADS says, by default one a core.

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
    threads = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
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
