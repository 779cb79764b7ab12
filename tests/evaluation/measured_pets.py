"""Two models measured by every kind of evaluator on twelve drawn pets, for tests of the page."""

import numpy as np
import pyarrow as pa
from PIL import Image

from vlm.evaluation.comparison import ModelMeasurements
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.measurement import Measurement, Value

CLASSES = ["cat", "dog & wolf", "a class with a name of many words that is rather long"]


def pets_at(folder) -> EvaluationSet:
    """Twelve images of three classes."""
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for image in range(4):
            Image.new("RGB", (40, 30), (60 * image, 80 * number, 90)).save(folder / name / f"{image}.png")
    return open_evaluation_set(str(folder), name="pets")


def zero_shot(pets, predictions, **fields):
    """Zero-shot classification with these predictions, by number of the class."""
    truths = [labels[0] for labels in pets.true_labels]
    # four predictions for each class in turn
    left = {name: list(predictions[4 * number : 4 * number + 4]) for number, name in enumerate(CLASSES)}
    predicted = [CLASSES[left[truth].pop(0)] for truth in truths]
    right = [float(truth == prediction) for truth, prediction in zip(truths, predicted, strict=True)]
    samples = pa.table(
        {
            "key": list(pets.keys),
            "top1": right,
            "truth": truths,
            "prediction": predicted,
            "rank": [1.0 if entry else 3.0 for entry in right],
            "probability": np.linspace(0.35, 0.99, 12),
        }
    )
    values = {"top1": Value(value=float(np.mean(right)), chance=1 / 3), "calibration_error": Value(value=0.125)}
    values["top1/de"] = Value(value=0.25)
    return measurement_of(pets, "zero-shot", values, samples, **fields)


def retrieval(pets, ranks):
    """Retrieval of images for texts, and of the same texts in German."""
    keys = list(pets.keys)
    of_scope = {
        "key": keys,
        "direction": ["text_to_image"] * 12,
        "caption": [f"text <{key}>" for key in keys],
        "wrong_key": [keys[(number + 1) % 12] for number in range(12)],
    }
    rank_columns = {
        "text_to_image_recall@1": [float(rank <= 1) for rank in ranks],
        "text_to_image_rank": [float(rank) for rank in ranks],
    }
    german = {f"de/{name}": [float(number == 0)] * 12 for number, name in enumerate(rank_columns)}
    samples = pa.concat_tables(
        [
            pa.table(of_scope | {"captions": ["all"] * 12} | rank_columns),
            pa.table(of_scope | {"captions": ["de"] * 12} | german),
        ],
        promote_options="default",
    )
    recall = float(np.mean(rank_columns["text_to_image_recall@1"]))
    values = {
        "text_to_image_recall@1": Value(value=recall, chance=1 / 12),
        "text_to_image_median_rank": Value(value=float(np.median(ranks))),
        "de/text_to_image_recall@1": Value(value=1.0),
    }
    return measurement_of(pets, "retrieval", values, samples)


def few_shot(pets):
    """Accuracies by the number of images."""
    values = {f"{shots}-shot": Value(value=0.2 + shots / 40, low=0.1, high=0.7) for shots in (1, 4)}
    return measurement_of(pets, "few-shot", values, pa.table({"key": list(pets.keys)}))


def robustness(pets, clean):
    """Accuracy in fog of two levels."""
    columns = {"clean": [clean] * 12, "fog": [0.3] * 12, "fog/1": [0.4] * 12, "fog/3": [0.2] * 12}
    values = {"clean": Value(value=clean), "fog": Value(value=0.3), "drop": Value(value=clean - 0.3)}
    return measurement_of(pets, "robustness", values, pa.table({"key": list(pets.keys), **columns}))


def measurement_of(pets, evaluator, values, samples, **fields):
    return Measurement(
        evaluator=evaluator,
        data="pets",
        data_digest=pets.digest,
        num_images=12,
        values=values,
        samples=samples,
        **fields,
    )


RIGHT = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
WRONG = [0, 0, 0, 1, 0, 0, 0, 0, 2, 2, 0, 0]


def models_of(pets):
    first = ModelMeasurements(
        model="/runs/first/model",
        fingerprint="abc123",
        measurements=(
            zero_shot(pets, WRONG, warnings=("Accuracy is at chance: swapped <columns>?",)),
            retrieval(pets, [1, 2, 3, 1, 12, 1, 1, 1, 7, 1, 1, 1]),
            few_shot(pets),
            robustness(pets, 0.6),
        ),
    )
    second = ModelMeasurements(
        model="/runs/second/model",
        fingerprint="def456",
        measurements=(zero_shot(pets, RIGHT), retrieval(pets, [1] * 12), few_shot(pets), robustness(pets, 0.8)),
    )
    return first, second
