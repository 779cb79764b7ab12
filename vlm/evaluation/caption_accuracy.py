"""Caption accuracy on synthetic shapes: each generated caption is checked fact by fact against its scene."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from vlm.console import progress
from vlm.data.synthetic.shape_captions import CaptionCheck, check_caption
from vlm.data.synthetic.shapes import Scene
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Measurement, Value
from vlm.tensor_types import Tensor, UInt8

# of whatever comes, then as many mistakes, which are what a reader looks for
_NUM_EXAMPLES = 8


@runtime_checkable
class Captioner(Protocol):
    """What the check needs of a model."""

    @property
    def view(self) -> EvalTransform:
        """The transform of its images."""
        ...

    def caption_images(self, images: UInt8[Tensor, "B 3 H W"], prompt: str = "") -> list[str]:
        """A caption for each image."""
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionTruth:
    """true: fraction of captions whose every fact is correct. wrong: how often each kind of fact was wrong."""

    true: float
    num_captions: int
    wrong: dict[str, int]
    examples: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class CaptionAccuracy:
    """The share of captions of drawn scenes that are true in every fact.

    prompt: text that each caption begins with. limit: so many scenes, the first ones. seed: of the resampling.
    """

    name: str = "scene-captions"
    prompt: str = ""
    limit: int = 1000
    seed: int = 0

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: the model has no caption decoder, or an image is of no drawn scene.
        """
        data = data.select(range(min(self.limit, len(data))))
        for key, metadata in zip(data.keys, data.metadata, strict=True):
            if "scene" not in metadata:
                raise UsageError(
                    f"Sample {key!r} has no scene; only synthetic shapes (vlm pack scenes) can be checked."
                )
        captioner = model.encoder
        if not isinstance(captioner, Captioner) or not getattr(captioner, "can_caption", True):
            raise UsageError(f"{model.name} has no caption decoder; train one, e.g. vlm train tiny-coca.")
        keys: list[str] = []
        captions: list[str] = []
        checks: list[CaptionCheck] = []
        with progress(total=len(data), what=f"captioning {data.name}", unit="image") as bar:
            for batch in data.iter_images(captioner.view):
                images: Any = batch.images
                for row, caption in zip(batch.rows, captioner.caption_images(images, self.prompt), strict=True):
                    keys.append(data.keys[row])
                    captions.append(caption)
                    checks.append(check_caption(caption, Scene(**data.metadata[row]["scene"])))
                bar.update(len(batch.rows))
        if not keys:
            raise UsageError(f"No image to caption in {data.name}: none can be decoded.")
        is_true = np.array([check.is_true for check in checks])
        accuracy = mean_interval(is_true, rng=np.random.default_rng(self.seed))
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(keys),
            values={"accuracy": Value(value=accuracy.value, low=accuracy.low, high=accuracy.high)},
            samples=pa.table(
                {
                    "key": keys,
                    "accuracy": is_true.astype(np.float64),
                    "caption": captions,
                    "reason": [check.reason for check in checks],
                }
            ),
            details=_truth(keys, captions, checks),
        )


def _truth(keys: Sequence[str], captions: Sequence[str], checks: Sequence[CaptionCheck]) -> CaptionTruth:
    wrong: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for key, caption, check in zip(keys, captions, checks, strict=True):
        # a caption that is not of the grammar states no fact that could be wrong, but is not true either
        wrong.update(check.wrong or ([] if check.is_true else ["unreadable"]))
        if len(examples) < _NUM_EXAMPLES or (not check.is_true and len(examples) < 2 * _NUM_EXAMPLES):
            examples.append({"key": key, "caption": caption, "true": check.is_true, "reason": check.reason})
    num_true = sum(check.is_true for check in checks)
    return CaptionTruth(
        true=num_true / len(checks), num_captions=len(checks), wrong=dict(wrong), examples=tuple(examples)
    )
