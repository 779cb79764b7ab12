"""The head of an upgrade: a change of basis of the new space, fitted so that its first block meets old rows."""

from dataclasses import dataclass

import numpy as np
import torch

from vlm.evaluation.retrieval import Retrieval
from vlm.index.compat.measure import ask_mixed, ask_old
from vlm.index.compat.pairs import Pairs
from vlm.models.compatible import Head
from vlm.tensors import Array, Float

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_CHOOSE_BY = 0.15


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and what it reached on pictures that were kept out for choosing.

    penalty: of the ridge regression. recall: mean over both directions and over recall@1, 5, 10, on old rows and on
    rows of which half are new.
    """

    penalty: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A head, and how it was chosen."""

    head: Head
    choice: Choice


def fit_head(pairs: Pairs, *, seed: int = 0) -> Fitted:
    """The change of basis nearest to a ridge regression of old on new embeddings, with the penalty that recalls best.

    On real pairs it meets old rows better than the regression itself, and better than the Procrustes turn, to which it
    comes as the penalty grows (scripts/bench_upgrade.py).

    Raises:
        UsageError: there are too few pictures.
    """
    fitting, choosing = pairs.split(_CHOOSE_BY, seed=seed)
    tried = []
    for penalty in PENALTIES:
        head = make_head(pairs, basis_change(predict_old(fitting, penalty)))
        recall = _mean_recall(ask_old(choosing, head), ask_mixed(choosing, head, seed=seed))
        tried.append(Choice(penalty=penalty, recall=recall))
    best = max(tried, key=lambda one: one.recall)
    return Fitted(head=make_head(pairs, basis_change(predict_old(pairs, best.penalty))), choice=best)


def predict_old(pairs: Pairs, penalty: float) -> Float[Array, "d D"]:
    """The matrix W with the least mean |W new - old|² + penalty |W|², pictures and captions weighing alike."""
    new, old = (
        np.concatenate([images / len(images) ** 0.5, texts / len(texts) ** 0.5]).astype(np.float64)
        for images, texts in ((pairs.new_images, pairs.new_texts), (pairs.old_images, pairs.old_texts))
    )
    return np.linalg.solve(new.T @ new + penalty * np.eye(new.shape[1]), new.T @ old).T


def basis_change(prediction: Float[Array, "d D"]) -> Float[Array, "S D"]:
    """The matrix with orthonormal columns whose first d rows are the polar factor of the prediction.

    Where D > d the other D - d rows span what the first ones leave out; S is the larger of d and D.
    """
    left, _, right = np.linalg.svd(prediction, full_matrices=True)
    common = min(prediction.shape)
    return np.concatenate([left[:, :common] @ right[:common], right[common:]])


def make_head(pairs: Pairs, matrix: Float[Array, "S D"]) -> Head:
    """A head of the models of the pairs."""
    return Head(
        matrix=torch.from_numpy(matrix.astype(np.float32)),
        old_dimension=pairs.old.dimension,
        old=pairs.old.fingerprint,
        new=pairs.new.fingerprint,
        model=pairs.new.model,
    )


def _mean_recall(*found: Retrieval) -> float:
    directions = [direction for one in found for direction in (one.text_to_image, one.image_to_text)]
    return float(np.mean([value for direction in directions for value in direction.recall.values()]))
