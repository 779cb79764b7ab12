"""The loss of an ordinary image classifier, beside which GPT4Image aligns images with descriptions."""

from pathlib import Path

from torch import nn
from torch.nn import functional as F

from vlm.data.class_labels import read_class_names
from vlm.errors import UsageError
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Tensor
from vlm.train.objectives.loss_term import Heads, Inputs, LossOptions, LossTerm, Outputs, at_least_float32

CLASS_HEAD = "classify"
"""Head from an image's embedding to the logits of the classes."""


def classify(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Cross-entropy of the true classes y_i, summed over images: -Σ_i log softmax(W f_i + b)_{y_i}.

    In GPT4Image (Ding et al. 2023) a classifier is trained with this loss plus the alignment of the same features f
    with the embedding of a description (`text_align`); here f is the image's joint embedding before it is normalised,
    so that what is learnt is of use to retrieval too.
    """
    return F.cross_entropy(at_least_float32(outputs["class_logits"]), inputs["class_label"], reduction="sum")


def class_head(model: VisionLanguageModel, options: LossOptions) -> Heads:
    """The linear classifier.

    Raises:
        UsageError: the file of class names or the field of the class is not configured, or the file cannot be read.
    """
    config = options.config
    if not config.class_names or not config.class_field:
        raise UsageError(
            f"class_names = {config.class_names!r}, class_field = {config.class_field!r}: classify needs a file of "
            "class names and the metadata field of the class; give --class-names FILE --class-field NAME."
        )
    return {CLASS_HEAD: nn.Linear(model.embedding_size, len(read_class_names(Path(config.class_names))))}


CLASSIFY = LossTerm(
    summary="cross-entropy of a linear classifier on the image's embedding",
    paper="Ding et al. 2023, GPT4Image",
    outputs=("class_logits",),
    inputs=("class_label",),
    sample_level=classify,
    heads=class_head,
)
