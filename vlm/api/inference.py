"""`vlm.load` and `vlm.Model`: a model that embeds, compares, classifies and captions images and texts in any number."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import numpy as np

from vlm.api.image_batches import Images, NamedImage, OnError, name_images, read_batches
from vlm.config import text_list
from vlm.console import progress
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, os_errors_explained
from vlm.evaluation.class_vectors import (
    class_probabilities,
    class_texts,
    class_vectors,
    read_class_names,
)
from vlm.evaluation.rejection import RejectRule, read_reject_rule
from vlm.files import json_text
from vlm.models.decoding_options import DecodingOptions
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.service.query import (
    Backend,
    embed_pixels,
    embed_query_texts,
    export_or_torch,
    load_encoder,
    load_query_encoder,
)
from vlm.tensor_types import Array, Float32

# imported where it is used: an ONNX export needs no torch
if TYPE_CHECKING:
    from vlm.models.model import DecodedCaption, VisionLanguageModel

logger = logging.getLogger(__name__)

IMAGE_BATCH_SIZE = 64
_TEXT_BATCH_SIZE = 1024

Classes = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]
"""Candidate classes: their names, names with the prompts of each, `a,b,c`, or a file with a name on each line."""


NONE_OF_THESE = "none of these"


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """A class with its probability among the candidates."""

    name: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class ImageClasses:
    """The most probable classes of an image, first the most probable.

    image: its path, or `images[3]` for the fourth of the call. error: why it cannot be used, where such are skipped;
    then there are no classes.
    reject_score: what was held against a reject threshold; None where none was given. is_rejected: it is below.
    """

    image: str
    classes: tuple[ClassProbability, ...]
    error: str = ""
    reject_score: float | None = None
    is_rejected: bool = False

    @property
    def best(self) -> str:
        """The most probable class, or `none of these` if the image is rejected; empty where it cannot be used."""
        if self.is_rejected:
            return NONE_OF_THESE
        return self.classes[0].name if self.classes else ""

    def to_json(self) -> dict[str, Any]:
        """The fields; `error` only where there is one, those of a reject threshold only where one was given."""
        classes = [{"name": entry.name, "probability": entry.probability} for entry in self.classes]
        values: dict[str, Any] = {"image": self.image, "classes": classes}
        if self.reject_score is not None:
            values |= {"best": self.best, "is_rejected": self.is_rejected, "reject_score": self.reject_score}
        return values | {"error": self.error} if self.error else values


@dataclass(frozen=True, kw_only=True)
class WordAttention:
    """A word of a caption, and how much each token of the image counted when it was written, mean over layers."""

    word: str
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredCaption:
    """One of an image's captions.

    log_likelihood: mean of its tokens, in nats, as the model scores them; the prompt does not count.
    words: with the image tokens each attends to, where that was asked for.
    """

    caption: str
    log_likelihood: float
    words: tuple[WordAttention, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields; `words` only where there are some."""
        values: dict[str, Any] = {"caption": self.caption, "log_likelihood": self.log_likelihood}
        return values | ({"words": [asdict(word) for word in self.words]} if self.words else {})


@dataclass(frozen=True, kw_only=True)
class ImageCaption:
    """Captions for an image, the best first. error: why it cannot be used, where such are skipped; then there are none.

    embedding: the image's unit vector from the same pass, where it was asked for.
    """

    image: str
    captions: tuple[ScoredCaption, ...] = ()
    embedding: tuple[float, ...] = ()
    error: str = ""

    @property
    def caption(self) -> str:
        """The best caption; empty where the image cannot be used."""
        return self.captions[0].caption if self.captions else ""

    def to_json(self) -> dict[str, Any]:
        """The best caption and all of them; `embedding` and `error` only where there is one."""
        captions = [caption.to_json() for caption in self.captions]
        values: dict[str, Any] = {"image": self.image, "caption": self.caption, "captions": captions}
        values |= {"embedding": list(self.embedding)} if self.embedding else {}
        return values | ({"error": self.error} if self.error else {})


Item = TypeVar("Item", ImageClasses, ImageCaption)


@dataclass(frozen=True)
class ImageResults(Sequence[Item], Generic[Item]):
    """A result for each image, in the order of the images."""

    images: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...

    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self.images[index]

    @property
    def skipped(self) -> tuple[Item, ...]:
        """Those of images that cannot be used."""
        return tuple(result for result in self.images if result.error)

    def to_json(self) -> list[dict[str, Any]]:
        """What the verb prints with --json."""
        return json.loads(json_text([result.to_json() for result in self.images]))


@os_errors_explained()
def load(
    model: str | Path,
    *,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    backend: Backend | Literal[""] = "torch",
) -> "Model":
    """Load a model of this project, of open_clip, of Hugging Face or of sentence-transformers.

    Args:
        model: a run folder, a model folder, an upgrade folder, a Hugging Face folder of CLIP, MetaCLIP 2, SigLIP or
            SigLIP 2, a sentence-transformers folder (which embeds texts only), `ORGANISATION/NAME` on the Hugging Face
            Hub, or `NAME:WEIGHTS` of open_clip; with `#64` behind it the first 64 dimensions of its embeddings, with
            `#mirror` each image's together with its mirror image's.
        device: `auto` is a GPU where there is one. precision: of the forward pass; embeddings are float32 in any case.
        backend: `onnx` is the model's ONNX export (`vlm.export`), which needs no torch and runs on the CPU; `auto`
            takes it where there is no GPU and it is up to date; empty is what VLM_BACKEND says, else `auto`.

    Raises:
        UsageError: there is no such model or device. VlmError: its weights cannot be loaded.
    """
    from_torch = partial(load_encoder, device=device, precision=precision)
    choice = export_or_torch(backend, device=device, precision=precision)
    encoder = load_query_encoder(str(model), backend=choice, load=from_torch)
    return Model(encoder)  # pyright: ignore[reportArgumentType]


class Model:
    """Images and texts to unit vectors of one space, to classes and to captions, one or many at once.

    Images are paths (a folder stands for all images below it), bytes of files, PIL images, NumPy arrays [H, W, 3] or
    tensors [3, H, W]; they are decoded in threads while the model works. With `on_error="skip"` an image that cannot be
    used is logged and its row left empty instead of ending the call.
    """

    def __init__(self, encoder: "VisionLanguageModel | OnnxEncoder") -> None:
        self._encoder = encoder

    def __repr__(self) -> str:
        return f"<vlm.Model {self.name}: {self.embedding_size} dimensions on {self._encoder.device}>"

    @property
    def encoder(self) -> "VisionLanguageModel":
        """The model as the stages of this project use it, which take this one too.

        Raises:
            UsageError: it is an ONNX export.
        """
        # an export has unit vectors and nothing of the network behind them
        if isinstance(self._encoder, OnnxEncoder):
            raise UsageError(f"{self.name} was loaded from its ONNX export; load it with backend='torch' for this.")
        return self._encoder

    @property
    def query_encoder(self) -> "VisionLanguageModel | OnnxEncoder":
        """What embeds, of either backend; `vlm.open_index` takes it for queries."""
        return self._encoder

    @property
    def name(self) -> str:
        """What it was loaded from."""
        return self._encoder.name

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space: weights, image preprocessing and tokenizer."""
        return self._encoder.fingerprint

    @property
    def embedding_size(self) -> int:
        """D, the length of an embedding."""
        return self._encoder.embedding_size

    @property
    def can_caption(self) -> bool:
        """Whether it has a caption decoder."""
        return self._encoder.can_caption

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature that turns cosines into logits.

        Raises:
            UsageError: the model embeds texts only.
        """
        return self._encoder.logit_scale

    @property
    def view(self) -> EvalTransform:
        """How it sees images."""
        return self._encoder.view

    @property
    def tokenizer(self) -> Tokenizer:
        """How it reads texts."""
        return self._encoder.tokenizer

    @os_errors_explained()
    def embed_images(
        self, images: Images, *, batch_size: int = IMAGE_BATCH_SIZE, on_error: OnError = "raise"
    ) -> Float32[Array, "N D"]:
        """A unit vector for each image; a row of NaN for one that is skipped.

        Raises:
            UsageError: an image cannot be used, or the model embeds texts only.
        """
        self._check_images()
        named = name_images(images)
        # NaN marks what was skipped: zeros would pass for a vector in a product
        rows = np.full((len(named), self.embedding_size), np.nan, np.float32)
        for usable, vectors, _ in self._embedded(named, batch_size, on_error):
            rows[usable] = vectors
        return rows

    @os_errors_explained()
    def embed_texts(self, texts: str | Iterable[str]) -> Float32[Array, "N D"]:
        """A unit vector for each text.

        Raises:
            UsageError: one of them is not a text.
        """
        listed = text_list(texts, "texts")
        rows = np.zeros((len(listed), self.embedding_size), np.float32)
        with _progress(len(listed), _TEXT_BATCH_SIZE, "embedding texts", "text") as bar:
            for first in range(0, len(listed), _TEXT_BATCH_SIZE):
                some = listed[first : first + _TEXT_BATCH_SIZE]
                rows[first : first + len(some)] = embed_query_texts(self._encoder, some)
                bar.update(len(some))
        return rows

    def similarity(
        self,
        images: Images,
        texts: str | Iterable[str],
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        on_error: OnError = "raise",
    ) -> Float32[Array, "N T"]:
        """The cosine of each image with each text; a row of NaN for an image that is skipped.

        Raises:
            UsageError: an image cannot be used, or one of the texts is not a text.
        """
        # the texts first: what is wrong with them shows before the longer work
        text_rows = self.embed_texts(texts)
        return self.embed_images(images, batch_size=batch_size, on_error=on_error) @ text_rows.T

    @os_errors_explained()
    def classify(
        self,
        images: Images,
        classes: Classes,
        *,
        templates: str | Sequence[str] = (),
        class_descriptions: str | Path | Mapping[str, Sequence[str]] = "",
        top: int = 5,
        reject: str | float | RejectRule | None = None,
        batch_size: int = IMAGE_BATCH_SIZE,
        on_error: OnError = "raise",
    ) -> ImageResults[ImageClasses]:
        """The most probable classes of each image by zero-shot classification (CLIP §3.1.2), as `vlm classify` does.

        Args:
            classes: names, as `["cat", "dog"]`; prompts of each, as `{"cat": ["a photo of a cat", "a kitten"]}`; the
                text `cat,dog`; or a file with a name on each line.
            templates: sentences with {} for the name of a class, or files of them with one on each line; three common
                ones if not given. Not used where `classes` holds prompts.
            class_descriptions: sentences by class name, or a JSON file of them, as prompts beside the templates given,
                or alone; as of `vlm.evaluate`.
            top: classes of each image.
            reject: images below this threshold are of none of the classes: a cosine with the nearest class, or the
                file `reject.safetensors` that `vlm eval --out-of-distribution` writes.

        Raises:
            UsageError: there are fewer than two classes, a template has no {}, a class has no description, an
                image cannot be used, or the threshold is of another model.
        """
        self._check_images()
        prompts = read_prompts(classes, templates, class_descriptions)
        # a threshold of another model is refused before images are read
        rule = self._reject_rule(reject, list(prompts))
        if top < 1:
            raise UsageError(f"top = {top} is out of range: give 1 or more.")
        named = name_images(images)
        names = list(prompts)
        classifier = self._classifier(prompts)
        results = [ImageClasses(image=image.name, classes=()) for image in named]
        for usable, vectors, errors in self._embedded(named, batch_size, on_error):
            for number, message in errors.items():
                results[number] = ImageClasses(image=named[number].name, classes=(), error=message)
            rows = class_probabilities(vectors, classifier, self.logit_scale).tolist()
            scores = rule.scores(vectors, (vectors @ classifier.T).max(axis=1)).tolist() if rule else [None] * len(rows)
            for number, row, score in zip(usable, rows, scores, strict=True):
                results[number] = ImageClasses(
                    image=named[number].name,
                    classes=_most_probable(names, row, top),
                    reject_score=score,
                    is_rejected=rule is not None and score is not None and score < rule.threshold,
                )
        return ImageResults(tuple(results))

    @os_errors_explained()
    def caption(
        self,
        images: Images,
        *,
        prompt: str = "",
        decoding: DecodingOptions | None = None,
        embeddings: bool = False,
        attention: bool = False,
        batch_size: int = IMAGE_BATCH_SIZE,
        on_error: OnError = "raise",
    ) -> ImageResults[ImageCaption]:
        """Captions for each image, as `vlm caption` writes them.

        Args:
            prompt: words that each caption begins with.
            decoding: how captions are written, `vlm.DecodingOptions`: beams, sampling, several captions, lengths; by
                default the likeliest token is taken each time.
            embeddings: give each image's embedding, too, which costs nothing more.
            attention: give, for each word, how much each token of the image counted.

        Raises:
            UsageError: the model has no caption decoder, or an image cannot be used.
        """
        # only for captions: an export classifies and embeds without torch
        import torch

        encoder = self.encoder
        encoder.check_can_caption()
        options = decoding or DecodingOptions()
        options = replace(options, prompt=prompt or options.prompt)
        named = name_images(images)
        results: list[ImageCaption] = []
        with _progress(len(named), batch_size, "captioning", "image") as bar:
            for batch in read_batches(named, self.view, batch_size=batch_size, on_error=on_error):
                _warn(batch.errors)
                written = encoder.decode_captions(torch.from_numpy(batch.pixels), options, has_attention=attention)
                rows = written.embeddings.tolist() if embeddings else [()] * len(batch.usable)
                # by number, since the batch holds only the usable images of its range
                captioned: dict[int, ImageCaption] = {}
                for number, captions, row in zip(batch.usable, written.captions, rows, strict=True):
                    scored = tuple(_scored(caption, self.tokenizer) for caption in captions)
                    captioned[number] = ImageCaption(image=named[number].name, captions=scored, embedding=tuple(row))
                for number in range(batch.first, batch.first + batch.size):
                    failed = ImageCaption(image=named[number].name, error=batch.errors.get(number, ""))
                    results.append(captioned.get(number, failed))
                bar.update(batch.size)
        return ImageResults(tuple(results))

    def _check_images(self) -> None:
        if not self._encoder.embeds_images:
            raise UsageError(f"{self.name} embeds texts only; images need a model with an image tower.")

    def _embedded(
        self, images: Sequence[NamedImage], batch_size: int, on_error: OnError
    ) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
        """For each batch the numbers of its usable images, their vectors, and why others cannot be used."""
        with _progress(len(images), batch_size, "embedding images", "image") as bar:
            for batch in read_batches(images, self.view, batch_size=batch_size, on_error=on_error):
                _warn(batch.errors)
                if batch.usable:
                    vectors = embed_pixels(self._encoder, batch.pixels)
                else:
                    vectors = np.zeros((0, self.embedding_size), np.float32)
                yield batch.usable, vectors, batch.errors
                bar.update(batch.size)

    def _reject_rule(self, reject: str | float | RejectRule | None, names: Sequence[str]) -> RejectRule | None:
        rule = reject if reject is None or isinstance(reject, RejectRule) else read_reject_rule(reject)
        if rule is not None:
            rule.check_model(self.fingerprint)
            # the threshold is of the largest cosine with any class, which grows with the number of classes
            if rule.classes and set(rule.classes) != set(names):
                logger.warning(
                    f"The reject threshold was measured with {len(rule.classes)} other classes "
                    f"({', '.join(rule.classes[:3])} …); with these it may reject too much or too little."
                )
        return rule

    def _classifier(self, prompts: Mapping[str, Sequence[str]]) -> Float32[Array, "K D"]:
        """A unit vector for each class, [K, D]: the mean of those of its prompts, of unit length again."""
        # all prompts at once, so that a class of one prompt costs no batch of its own
        rows = self.embed_texts(chain.from_iterable(prompts.values()))
        return class_vectors(rows, list(map(len, prompts.values())))


def encoder_of(
    model: "str | Path | Model | VisionLanguageModel", *, device: str = "auto", precision: str = "fp32"
) -> "VisionLanguageModel":
    """The model as the stages of this project use it, loaded where it is named."""
    if isinstance(model, Model):
        return model.encoder
    if not isinstance(model, str | Path):
        return model
    from vlm.models.load import load_model

    return load_model(str(model), device=device, precision=precision)


def precision_name(model: "VisionLanguageModel") -> Literal["fp32", "bf16"]:
    """That of a model that is loaded already, whatever a call asked for."""
    import torch

    return "fp32" if model.precision == torch.float32 else "bf16"


def read_prompts(
    classes: Classes,
    templates: str | Sequence[str] = (),
    class_descriptions: str | Path | Mapping[str, Sequence[str]] = "",
) -> dict[str, list[str]]:
    """The prompts of each candidate class.

    Raises:
        UsageError: there are fewer than two classes, one has no prompt or no description, a template has no {} for the
            name, or the classes hold their prompts and are described besides.
    """
    if isinstance(classes, Mapping):
        if class_descriptions:
            raise UsageError("The classes hold their prompts: give their names, or no descriptions beside them.")
        prompts = {name: text_list(given, f"the prompts of {name!r}") for name, given in classes.items()}
    else:
        text = isinstance(classes, str | Path)
        names = read_class_names(str(classes)) if text else list(dict.fromkeys(text_list(classes, "classes")))
        described = str(class_descriptions) if isinstance(class_descriptions, Path) else class_descriptions
        sentences = tuple(text_list(templates, "templates"))
        of_names = class_texts(names, sentences, described)[0].prompts if names else ()
        prompts = {name: list(of_name) for name, of_name in zip(names, of_names, strict=True)}
    if len(prompts) < 2:
        raise UsageError(
            f"classes = {classes!r} names {len(prompts)} class, which every image would be; give two or more, as "
            "a,b,c or a file with one a line."
        )
    for name, of_class in prompts.items():
        if not of_class:
            raise UsageError(f"The class {name!r} has no prompt; give one or more.")
    return prompts


def _most_probable(names: Sequence[str], probabilities: Sequence[float], top: int) -> tuple[ClassProbability, ...]:
    # stable: classes of equal probability stay in the order given
    ranked = sorted(zip(names, probabilities, strict=True), key=lambda entry: -entry[1])[:top]
    return tuple(ClassProbability(name=name, probability=probability) for name, probability in ranked)


def _scored(caption: "DecodedCaption", tokenizer: Tokenizer) -> ScoredCaption:
    words: list[WordAttention] = []
    if caption.attention is not None:
        for word, weights in caption.attention_by_word(tokenizer):
            words.append(WordAttention(word=word, weights=tuple(weights.tolist())))
    return ScoredCaption(caption=caption.text, log_likelihood=caption.log_likelihood, words=tuple(words))


def _progress(total: int, batch_size: int, what: str, unit: str) -> Any:
    # no bar for what is done in a moment
    return progress(total=total, what=what, unit=unit, is_shown=total > batch_size)


def _warn(errors: Mapping[int, str]) -> None:
    for message in errors.values():
        logger.warning(f"Skipped: {message}")
