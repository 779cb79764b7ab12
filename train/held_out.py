"""What the held-out figures of a run say of its course: when to stop, and whether it learns its pairs by heart.

Both are read from the lines of `metrics.jsonl`, so that a resumed run judges as one that was never interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlm.train.history import format_metric

Lines = Sequence[Mapping[str, Any]]

DEFAULT_METRIC = "text_to_image_recall@10"
"""What is judged where no metric is named."""
# a fall by chance is smaller on a thousand images, measured on the same ones each time
_LEAST_FALL = 0.01
# two evaluations, since one may be low by chance
_LEAST_EVALUATIONS = 2
_LEAST_LOSS_FALL = 0.02


def evaluations_without_gain(lines: Lines, metric: str) -> int:
    """How many evaluations in a row, up to the last, have not beaten the best before them.

    >>> evaluations_without_gain([{"top1": 0.3}, {"loss": 1.0}, {"top1": 0.5}, {"top1": 0.5}, {"top1": 0.4}], "top1")
    2
    """
    without_gain = 0
    best = -1.0
    for line in lines:
        if metric not in line:
            continue
        # an equal value is no gain, as for the best checkpoint
        without_gain = 0 if line[metric] > best else without_gain + 1
        best = max(best, line[metric])
    return without_gain


def overfitting(lines: Lines, metric: str) -> str:
    """In words, that a held-out share falls while the loss falls; empty where it does not, or not by more than chance.

    The share must be a point below its best at the last two evaluations, and the loss 2% below what it was at the best.
    It is said once for each best: at later evaluations of the same fall this is empty.
    """
    values: list[tuple[int, float, float]] = []
    loss: float | None = None
    for line in lines:
        loss = line.get("loss", loss)
        if metric in line and loss is not None:
            values.append((line["step"], line[metric], loss))
    if not values:
        return ""
    best = max(range(len(values)), key=lambda index: values[index][1])
    best_step, best_value, best_loss = values[best]
    falls: list[bool] = []
    for _, value, loss_then in values[best + 1 :]:
        falls.append(best_value - value >= _LEAST_FALL and loss_then < best_loss * (1 - _LEAST_LOSS_FALL))
    is_new = len(falls) < _LEAST_EVALUATIONS + 1 or not all(falls[-_LEAST_EVALUATIONS - 1 : -1])
    if len(falls) < _LEAST_EVALUATIONS or not all(falls[-_LEAST_EVALUATIONS:]) or not is_new:
        return ""
    _, value, last_loss = values[-1]
    return (
        f"Overfitting: since step {best_step:,} the loss on what is trained on has fallen from {best_loss:.3g} to "
        f"{last_loss:.3g}, and {metric} on what is held out from {format_metric(metric, best_value)} to "
        f"{format_metric(metric, value)}: the model learns its pairs by heart. Keep the best "
        f"(--keep-best {metric} --early-stop 3), train shorter or at a smaller --learning-rate, lock a tower (--lock), "
        "or bring more pairs."
    )
