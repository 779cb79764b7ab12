"""`vlm.caption_metrics`: captions against references, and with images also by the embeddings of a model."""

from collections.abc import Sequence
from pathlib import Path

from vlm.api.image_batches import Images
from vlm.api.inference import Model, load
from vlm.errors import UsageError, os_errors_explained
from vlm.evaluation import caption_metrics as metrics


@os_errors_explained()
def caption_metrics(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    images: Images | None = None,
    model: str | Path | Model | None = None,
    meteor: bool = False,
    seed: int = 0,
) -> metrics.CaptionScores:
    """BLEU, ROUGE-L, CIDEr and CIDEr-D of captions, and where asked for METEOR, CLIP score and RefCLIPScore.

    On the words of COCO's tokenizer, whose rules need no Java here. With images and a model, CLIP score is that
    model's; published figures are those of OpenAI's ViT-B/32.

    Args:
        candidates: a caption for each image.
        references: for each image its references, or one.
        images: the images, in the same order. model: MODEL as for `vlm.load`, or a model.
        meteor: compute METEOR, by the Java program that comes with pycocoevalcap.
        seed: of the bootstrap that gives the intervals.

    Raises:
        UsageError: there are no captions, not as many references or images, or METEOR cannot run.

    >>> scores = caption_metrics(["a dog runs", "two cats"], [["a dog runs"], ["a cat", "two cats sleep"]])
    >>> scores.cider_d.value > scores.bleu[3].value
    True
    """
    if (images is None) != (model is None):
        raise UsageError("CLIP score needs images and a model: give both, or neither.")
    scores = metrics.caption_metrics(candidates, references, meteor=meteor, seed=seed)
    if images is None or model is None:
        return scores
    judge = model if isinstance(model, Model) else load(model)
    rows = judge.embed_images(images)
    if len(rows) != len(candidates):
        raise UsageError(f"{len(candidates):,} captions for {len(rows):,} images: give a caption for each.")
    return metrics.add_clip_scores(
        scores, candidates, references, images=rows, embed_texts=judge.embed_texts, seed=seed
    )
