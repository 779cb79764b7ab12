"""A run that is trained, or read where it is finished, and the score it ended with.

A score is a recall that the run logged, or its held-out contrastive loss (`loss`), which is measured here: recalls of
small models on few candidates are coarse, and lie at their floor where the loss still tells models apart.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlm.config import from_toml, lookup
from vlm.console import without_progress
from vlm.data.samples import select_languages
from vlm.errors import BadSample, UsageError, VlmError
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.files import write_text
from vlm.manifest import MANIFEST
from vlm.models.load import load_model
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Array, Float, Float32, Int64
from vlm.train.averaging import parse_metric, recall_metrics
from vlm.train.feature_cache import evaluated_paths, keep_evaluated_features
from vlm.train.history import CONFIG, RunRecord, format_metric, read_run
from vlm.train.run import train
from vlm.train.run_config import FREE_OF_SCORES, TrainConfig, changed_settings, disallowed_changes

logger = logging.getLogger(__name__)

LOSS = "loss"
"""The metric that is the held-out contrastive loss; all others are recalls, of which more is better."""
_LOSS_FILE = "held_out_loss.json"
# of float32: 64 MB
_SIMILARITIES_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A finished run. samples_seen: drawn in all its steps. flops_per_sample: forward and backward, locked trunks
    included; None where they were not counted."""

    run: str
    steps: int
    samples_seen: int
    flops_per_sample: float | None
    score: float


def check_metric(metric: str) -> None:
    """Whether there is such a score.

    Raises:
        UsageError: there is none; the nearest is named.
    """
    lookup({LOSS: (LOSS,)} | recall_metrics(), metric, "metric")


def error_of(metric: str, score: float) -> float:
    """What is to become small: the loss itself, or one minus a recall. Applied twice it gives the score again.

    >>> error_of("recall@10", 0.75), error_of("loss", 2.5)
    (0.25, 2.5)
    """
    return score if metric == LOSS else 1 - score


def format_score(metric: str, score: float) -> str:
    """A score for people."""
    return format_metric(metric, score)


def check_score(metric: str, score: float, run: str) -> None:
    """Refuse a score that no fit can use. run: its name in the message.

    Raises:
        VlmError: it is no finite number.
    """
    if not np.isfinite(score):
        raise VlmError(
            f"{run} ends with {metric} {score}, which no fit can use: its training diverged. Give a lower "
            "--learning-rate, and another --run."
        )


def measure_run(config: TrainConfig, metric: str) -> MeasuredRun:
    """Train a run, or go on with it, or read it where it is finished.

    Raises:
        UsageError: the folder holds a run with other settings. VlmError: the run had to end, or its score is no number.
    """
    folder = Path(config.run)
    # the manifest is written last; a run that was cut off while it computed features has its configuration alone
    if not (folder / MANIFEST).is_file():
        # resuming refuses another configuration
        train(config, resume=(folder / CONFIG).is_file())
    differences = changed_settings(asdict(from_toml(TrainConfig, folder / CONFIG)), asdict(config))
    changed = disallowed_changes(differences, (), free=FREE_OF_SCORES)
    if changed:
        raise UsageError(
            f"{folder} is a run with other settings ({'; '.join(changed)}), whose score would not belong to this fit; "
            "name another --run for these, or remove it."
        )
    record = read_run(folder)
    score = _kept_loss(config) if metric == LOSS else _logged_recall(record, metric)
    # now, rather than after all other runs of the fit
    check_score(metric, score, str(folder))
    counted = [record.telemetry.get(f"{way}_flops_per_sample") for way in ("forward", "backward")]
    return MeasuredRun(
        run=str(folder),
        steps=record.planned_steps,
        samples_seen=record.planned_steps * config.batch_size,
        flops_per_sample=sum(filter(None, counted)) if all(counted) else None,
        score=score,
    )


def _logged_recall(record: RunRecord, metric: str) -> float:
    recalls = parse_metric(metric)
    for line in reversed(record.lines):
        if all(name in line for name in recalls):
            return float(np.mean([line[name] for name in recalls]))
    raise UsageError(f"{record.folder} has not measured {metric}; remove it, and it is trained again.")


def _kept_loss(config: TrainConfig) -> float:
    """The held-out loss of a finished run, measured once and kept in its folder."""
    path = Path(config.run) / _LOSS_FILE
    if not path.is_file():
        model = load_model(config.run)
        if config.loader.cache_features and config.model.lock:
            # the files that the run's own evaluations have written
            files = evaluated_paths(Path(config.loader.feature_folder or Path(config.run) / "features"), model)
            for name, tower in (("visual", "image"), ("text", "text")):
                if config.model.lock not in (tower, "both"):
                    files.pop(name, None)
            keep_evaluated_features(model.network, files)
        data = open_evaluation_set(config.val, limit=config.val_limit)
        loss = held_out_loss(model, data, languages=config.loader.languages)
        write_text(path, json.dumps({LOSS: loss}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))[LOSS]


def held_out_loss(model: VisionLanguageModel, data: EvaluationSet, *, languages: Sequence[str] = ()) -> float:
    """The contrastive loss (nats) of the whole set as one batch, at the model's own temperature: the mean of both
    directions.

    Of each image its first caption is taken; equal captions are right for each other's images, whose probabilities add
    up. It grows with the logarithm of the number of images, so that only losses on the same set compare.

    Raises:
        UsageError: no image with a caption can be used. VlmError: the model has diverged.
    """
    with without_progress():
        evaluated = EvaluatedModel(model)
        data, images = evaluated.image_features(data)
        rows: list[int] = []
        texts: list[str] = []
        for row, captions in enumerate(data.captions):
            try:
                first, *_ = select_languages(captions, tuple(languages)).values()
            except BadSample:
                continue
            rows.append(row)
            texts.append(first[0])
        if not texts:
            raise UsageError(f"No image of {data.name} has a caption in {', '.join(languages) or 'any language'}.")
        text_vectors = evaluated.text_features(texts)
    _, labels = np.unique(np.array(texts, dtype=object), return_inverse=True)
    scale = np.float32(model.logit_scale)
    by_text = _direction_loss(text_vectors * scale, images[rows], labels)
    return (by_text + _direction_loss(images[rows] * scale, text_vectors, labels)) / 2


def _direction_loss(
    queries: Float32[Array, "N D"], candidates: Float32[Array, "N D"], labels: Int64[Array, " N"]
) -> float:
    """labels: candidates with the label of a query are right for it."""
    losses: list[Float[Array, " B"]] = []
    rows_at_once = max(_SIMILARITIES_AT_ONCE // len(candidates), 1)
    for first in range(0, len(queries), rows_at_once):
        logits = (queries[first : first + rows_at_once] @ candidates.T).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        is_right = labels[first : first + rows_at_once, None] == labels[None]
        # the best right one apart, so that none that is far below the best wrong one becomes the logarithm of 0
        right = np.where(is_right, logits, -np.inf)
        best = right.max(axis=1)
        log_right = best + np.log(np.exp(right - best[:, None]).sum(axis=1))
        losses.append(np.log(np.exp(logits).sum(axis=1)) - log_right)
    return float(np.concatenate(losses).mean())
