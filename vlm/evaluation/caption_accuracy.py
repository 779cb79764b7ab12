"""Caption accuracy on synthetic shapes: each generated caption is checked fact by fact against its scene."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vlm.data.synthetic.shape_captions import check_caption
from vlm.data.synthetic.shapes import Scene
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.retrieval import iter_sample_batches
from vlm.tensor_types import Tensor, UInt8


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


def measure_caption_truth(
    model: Captioner, shards: Sequence[str], *, prompt: str = "", limit: int = 1000, workers: int = 0
) -> CaptionTruth:
    """Caption the first `limit` scenes of the shards and check each caption.

    Raises:
        UsageError: the shards hold no synthetic shapes.
    """
    num_true = 0
    total = 0
    wrong: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for batch in iter_sample_batches(shards, model.view, workers=workers):
        # whole batches are captioned, so up to one batch more than the limit
        if total >= limit or not batch.decoded:
            break
        for item, caption in zip(batch.decoded, model.caption_images(batch.images, prompt), strict=True):
            if "scene" not in item.metadata:
                raise UsageError(
                    f"Sample {item.key!r} has no scene; only synthetic shapes (vlm pack scenes) can be checked."
                )
            check = check_caption(caption, Scene(**item.metadata["scene"]))
            total += 1
            num_true += check.is_true
            # a caption that is not of the grammar states no fact that could be wrong, but is not true either
            wrong.update(check.wrong or ([] if check.is_true else ["unreadable"]))
            # eight of whatever comes, then room for eight mistakes, which are what a reader looks for
            if len(examples) < 8 or (not check.is_true and len(examples) < 16):
                examples.append({"key": item.key, "caption": caption, "true": check.is_true, "reason": check.reason})
    if not total:
        raise UsageError(f"No image to caption in {shards[0]} …")
    return CaptionTruth(true=num_true / total, num_captions=total, wrong=dict(wrong), examples=tuple(examples))
