"""Why a score is no better than guessing: the usual errors of wiring, each tested on the embeddings where it can be."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.evaluation.class_metrics import every_other_of_class
from vlm.tensor_types import Array, Float32, Int

# embeddings whose elements all differ by less are the same for a search
_SAME = 1e-5
_UNIT_TOLERANCE = 1e-2
# of the predictions, from which on a single class is worth a word
_DOMINANT_SHARE = 0.9
_MIN_IMAGES = 20
USUAL_ERRORS = (
    "class names in another order than the labels, images normalised with another mean and deviation, another "
    "tokenizer, swapped columns"
)

# identifiers rather than words: WordNet numbers of ImageNet, numbers, hexadecimal digests, UUIDs, file names
_KEY_LIKE = re.compile(
    r"n\d{8}|[\W\d_]+|[0-9a-f]{12,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\S+\.(jpe?g|png|webp|gif|bmp|tiff?|txt)",
    re.IGNORECASE,
)


def is_at_chance(low: float | None, chance: float | None) -> bool:
    """Whether the interval of a score reaches down to its chance level."""
    # a constant model is at chance up to rounding
    return low is not None and chance is not None and low <= chance + 1e-9


def key_like(texts: Sequence[str]) -> list[str]:
    """Those texts that look like keys, numbers or file names instead of words."""
    return [text for text in texts if _KEY_LIKE.fullmatch(text.strip())]


def check_texts(texts: Sequence[str], what: str) -> list[str]:
    """What is suspicious about texts that should be words. what: `class names` or `captions`."""
    keys = key_like(texts)
    # some numbers are words, as of digits or of street numbers
    if len(keys) * 2 > len(texts):
        shown = ", ".join(repr(text) for text in keys[:3])
        return [
            f"{len(keys):,} of {len(texts):,} {what} look like keys ({shown}): another column or file holds the words"
        ]
    return []


def check_embeddings(rows: Float32[Array, "N D"], what: str) -> list[str]:
    """What is suspicious about embeddings. what: `images` or `texts`, each row another one."""
    problems: list[str] = []
    if len(rows) > 1 and np.abs(rows - rows[:1]).max() < _SAME:
        cause = "the preprocessing or the weights of the image tower" if what == "images" else "another tokenizer"
        problems.append(f"all {len(rows):,} {what} have the same embedding: look at {cause}")
    norms = np.linalg.norm(rows, axis=1)
    if np.abs(norms - 1).max(initial=0) > _UNIT_TOLERANCE:
        problems.append(
            f"embeddings of {what} are not of unit length ({norms.min():.3g} to {norms.max():.3g}): normalise them"
        )
    return problems


@dataclass(frozen=True, kw_only=True)
class ClassWiring:
    """What a zero-shot measurement saw, for `check_classes`.

    images, classifier: their embeddings. truth, prediction, lowest: for each image the number of its class, of the
    class that scores highest, and of the one that scores lowest. names: by number.
    """

    images: Float32[Array, "N D"]
    classifier: Float32[Array, "K D"]
    truth: Int[Array, " N"]
    prediction: Int[Array, " N"]
    lowest: Int[Array, " N"]
    names: Sequence[str]


def check_classes(wiring: ClassWiring) -> list[str]:
    """What may be wrong with a zero-shot measurement at chance, most telling first; empty where nothing shows."""
    problems = check_texts(wiring.names, "class names")
    problems += check_embeddings(wiring.images, "images") + check_embeddings(wiring.classifier, "texts")
    # whatever else shows follows from that
    if any("same embedding" in problem for problem in problems):
        return problems
    problems += _equal_classes(wiring.classifier, wiring.names)
    if len(wiring.truth) >= _MIN_IMAGES:
        problems += _check_order(wiring)
        problems += _check_rows(wiring)
    shares = np.bincount(wiring.prediction, minlength=len(wiring.names)) / max(len(wiring.prediction), 1)
    most = int(shares.argmax())
    if shares[most] >= _DOMINANT_SHARE and len(wiring.names) > 1:
        problems.append(
            f"{shares[most]:.0%} of the images are taken for {wiring.names[most]!r}: look at the mean and standard "
            "deviation of the image preprocessing"
        )
    return problems


def _equal_classes(classifier: np.ndarray, names: Sequence[str]) -> list[str]:
    _, first, inverse = np.unique(np.round(classifier / _SAME), axis=0, return_index=True, return_inverse=True)
    same = np.flatnonzero(first[inverse.reshape(-1)] != np.arange(len(names)))
    if not len(same):
        return []
    number = int(same[0])
    other = int(first[inverse.reshape(-1)[number]])
    return [
        f"{len(same):,} classes have the embedding of another one, as {names[number]!r} that of {names[other]!r}: "
        "look at the tokenizer (unknown words, texts cut short)"
    ]


def _check_order(wiring: ClassWiring) -> list[str]:
    """Classes mixed up consistently: the order of the names is another than that of the labels."""
    # a mapping made from noise fits the images it was made from
    fit = every_other_of_class(wiring.truth)
    as_predicted = consistent_mapping(wiring.truth[fit], wiring.prediction[fit], len(wiring.names))
    # measured on the images that the mapping was not made from
    agreement = _balanced(as_predicted[wiring.truth[~fit]] == wiring.prediction[~fit], wiring.truth[~fit])
    moved = np.flatnonzero((as_predicted >= 0) & (as_predicted != np.arange(len(wiring.names))))
    if len(moved) < 2 or not _is_far_above_chance(agreement, len(wiring.names), int((~fit).sum())):
        return []
    shift = {(int(number) - int(as_predicted[number])) % len(wiring.names) for number in moved}
    if len(shift) == 1:
        step = shift.pop()
        step = step if step <= len(wiring.names) // 2 else step - len(wiring.names)
        return [
            f"the labels are shifted by {step:+d} against the class names ({agreement:.0%} are right with that "
            "shift): do they count from 1, or does a line of the names lack?"
        ]
    number = int(moved[0])
    pair = f"images of {wiring.names[number]!r} are taken for {wiring.names[int(as_predicted[number])]!r}"
    order = np.argsort(np.asarray(wiring.names), kind="stable")
    by_name = as_predicted[moved] == order[moved]
    # either side may be the sorted one, and the two permutations are inverses of each other
    by_rank = as_predicted[moved] == np.argsort(order)[moved]
    hint = " as if one of them were sorted by name" if max(by_name.mean(), by_rank.mean()) > 0.5 else ""
    return [
        f"the order of the classes differs between labels and names{hint}: {pair}, and {agreement:.0%} are right once "
        "classes are exchanged so"
    ]


def _check_rows(wiring: ClassWiring) -> list[str]:
    """A sign turned round, or labels of the neighbouring image."""
    problems: list[str] = []
    num_classes = len(wiring.names)
    lowest = _balanced(wiring.lowest == wiring.truth, wiring.truth)
    if num_classes > 2 and _is_far_above_chance(lowest, num_classes, len(wiring.truth)):
        problems.append(
            f"the class with the lowest similarity is the right one for {lowest:.0%}: a sign is turned round"
        )
    for step in (-1, 1):
        neighbour = _balanced(np.roll(wiring.truth, step) == wiring.prediction, wiring.truth)
        if _is_far_above_chance(neighbour, num_classes, len(wiring.truth)):
            side = "next" if step == -1 else "previous"
            problems.append(
                f"{neighbour:.0%} are right by the label of the {side} image: images and labels are a row apart"
            )
    return problems


def consistent_mapping(truth: Int[Array, " N"], prediction: Int[Array, " N"], num_classes: int) -> Int[Array, " K"]:
    """For each class the one its images are taken for most, no two classes for the same; -1 where none is left.

    The most frequent pairs are matched first: a model that always answers the same maps one class only.
    """
    pairs, counts = np.unique(truth * num_classes + prediction, return_counts=True)
    mapping = np.full(num_classes, -1)
    is_taken = np.zeros(num_classes, bool)
    for pair in pairs[np.argsort(-counts, kind="stable")].tolist():
        true, predicted = divmod(pair, num_classes)
        if mapping[true] < 0 and not is_taken[predicted]:
            mapping[true] = predicted
            is_taken[predicted] = True
    return mapping


def _balanced(correct: np.ndarray, truth: np.ndarray) -> float:
    """Mean per class, where a model that always answers the same is at chance whatever the shares of the classes."""
    if not len(truth):
        return 0.0
    totals = np.bincount(truth)
    sums = np.bincount(truth, weights=correct)
    return float((sums[totals > 0] / totals[totals > 0]).mean())


def _is_far_above_chance(accuracy: float, num_classes: int, num_images: int) -> bool:
    """A third of the way from chance to perfect, and beyond what noise on so few images gives."""
    chance = 1 / num_classes
    noise = 3 * math.sqrt(chance * (1 - chance) / max(num_images, 1))
    return accuracy > chance + max((1 - chance) / 3, noise)
