"""A model as mteb evaluates it: `mteb.evaluate(MtebEncoder(vlm.load(MODEL)), tasks)`, with images and texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.api.inference import Model, load
from vlm.errors import UsageError
from vlm.tensor_types import Array, Float32

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class MtebEncoder:
    """What mteb 2 asks of an encoder (`mteb.models.EncoderProtocol`).

    Inputs of both an image and a text get the sum of their embeddings, as mteb's own encoders for CLIP do it.

    model_name: a model of `vlm.load`, or what names one, as mteb's command line gives it.
    """

    def __init__(
        self, model_name: str | Path | Model, revision: str | None = None, *, device: str | None = None, **_: Any
    ) -> None:
        self._model = model_name if isinstance(model_name, Model) else load(model_name, device=device or "auto")
        self._revision = revision

    def encode(
        self,
        inputs: "DataLoader[Any]",
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **_: Any,
    ) -> Float32[Array, "N D"]:
        """Embeddings of the batches of a data loader, whose keys are `image`, `text`, or both.

        The rest is what mteb says of its task, which our models have no use for.

        Raises:
            UsageError: a batch has neither, or the model knows no images.
        """
        # the first row is empty, so that no batches give a matrix of no rows
        rows = [np.zeros((0, self._model.embedding_size), np.float32)]
        rows += map(self._encode_batch, inputs)
        return np.concatenate(rows)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float32[Array, "N M"]:
        """Cosines of each row with each."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float32[Array, " N"]:
        """Cosines of the rows with each other, one by one."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(axis=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes down of the model.

        Raises:
            UsageError: mteb is not installed.
        """
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError("mteb is not installed: pip install mteb.") from error
        encoder = self._model.encoder
        parameters = sum(parameter.numel() for parameter in encoder.network.parameters())
        # mteb names results by organisation and model
        name = "/".join(("vlm", *Path(self._model.name).parts[-1:]))
        return ModelMeta(
            loader=MtebEncoder,
            name=name,
            revision=self._revision or self._model.fingerprint,
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=parameters * 4 / 2**20,
            max_tokens=self._model.tokenizer.context_length,
            embed_dim=self._model.embedding_size,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"] if encoder.embeds_images else ["text"],
        )

    def _encode_batch(self, batch: dict[str, Any]) -> Float32[Array, "B D"]:
        parts: list[np.ndarray] = []
        if "text" in batch:
            parts.append(self._model.embed_texts(batch["text"]))
        if "image" in batch:
            parts.append(self._model.embed_images(batch["image"], batch_size=max(len(batch["image"]), 1)))
        if not parts:
            raise UsageError(f"A batch of mteb has {', '.join(sorted(batch))}; images or texts are needed.")
        return np.sum(parts, axis=0)


def _unit(embeddings: Any) -> np.ndarray:
    rows = np.atleast_2d(np.asarray(embeddings, dtype=np.float32))
    # a row of zeros has no direction: its cosines are 0, not NaN
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
