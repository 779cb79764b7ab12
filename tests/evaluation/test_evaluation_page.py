"""The page of an evaluation: what stands on it, and that nothing of it runs off a narrow screen."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vlm.evaluation.comparison import ModelMeasurements, compare
from vlm.evaluation.evaluation_page import evaluation_page, write_evaluation_page
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.mistakes import Thumbnails, worst_mistakes
from vlm.evaluation.report_charts import Point, class_rows, condition_rows, confusion_rows, line_charts
from vlm.pages import Provenance

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLASSES = ["cat", "dog & wolf", "a class with a name of many words that is rather long"]
PROVENANCE = Provenance(command="vlm eval 'a b' --out <c>", date="2026-01-02 03:04 UTC", version="9.8")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Twelve images of three classes."""
    folder = tmp_path_factory.mktemp("pets")
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for image in range(4):
            Image.new("RGB", (40, 30), (60 * image, 80 * number, 90)).save(folder / name / f"{image}.png")
    return open_evaluation_set(str(folder), name="pets")


def classified(pets, predictions, *, shots=(), **fields):
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
    values |= {f"top1@{shot}-shot": Value(value=0.2 + shot / 40, low=0.1, high=0.7) for shot in shots}
    values |= {f"top1@fog/{level}": Value(value=0.5 - level / 10) for level in (1, 3)}
    return Measurement(
        evaluator="zero-shot",
        data="pets",
        data_digest=pets.digest,
        num_images=12,
        values=values,
        samples=samples,
        **fields,
    )


def ranked(pets, ranks):
    """Retrieval of images for texts."""
    keys = list(pets.keys)
    samples = pa.table(
        {
            "key": keys,
            "recall@1": [float(rank <= 1) for rank in ranks],
            "query": [f"text <{key}>" for key in keys],
            "prediction_key": [keys[(number + (rank > 1)) % 12] for number, rank in enumerate(ranks)],
            "rank": [float(rank) for rank in ranks],
        }
    )
    values = {
        "recall@1": Value(value=float(np.mean(samples["recall@1"].to_numpy())), chance=1 / 12),
        "median_rank": Value(value=float(np.median(ranks))),
    }
    return Measurement(
        evaluator="text to image", data="pets", data_digest=pets.digest, num_images=12, values=values, samples=samples
    )


RIGHT = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
WRONG = [0, 0, 0, 1, 0, 0, 0, 0, 2, 2, 0, 0]


def models_of(pets):
    first = ModelMeasurements(
        model="/runs/first/model",
        fingerprint="abc123",
        measurements=(
            classified(pets, WRONG, shots=(1, 4), warnings=("Accuracy is at chance: swapped <columns>?",)),
            ranked(pets, [1, 2, 3, 1, 12, 1, 1, 1, 7, 1, 1, 1]),
        ),
    )
    second = ModelMeasurements(
        model="/runs/second/model",
        fingerprint="def456",
        measurements=(classified(pets, RIGHT, shots=(1, 4)), ranked(pets, [1] * 12)),
    )
    return first, second


def page_of(pets, *models, sets=True):
    comparison = compare(models, rng=np.random.default_rng(0))
    return evaluation_page(comparison, sets={"pets": pets} if sets else None, provenance=PROVENANCE)


def text_of(page):
    """What a reader sees, on one line."""
    body = re.sub(r"<(style|title)>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def test_a_page_names_model_data_date_and_command(pets):
    text = text_of(page_of(pets, models_of(pets)[0]))
    assert "Evaluation of first" in text
    for word in ("/runs/first/model", "abc123", "pets", pets.digest, "12 images", "2026-01-02 03:04 UTC", "vlm 9.8"):
        assert word in text
    assert "vlm eval &#39;a b&#39; --out &lt;c&gt;" in text


def test_warnings_stand_before_all_values(pets):
    text = text_of(page_of(pets, *models_of(pets)))
    assert text.index("swapped &lt;columns&gt;?") < text.index("Main values")
    assert "1 warning" in text


def test_values_have_intervals_chance_and_differences(pets):
    text = text_of(page_of(pets, *models_of(pets)))
    assert re.search(r"top1 41.7% ±\d+\.\d 100.0% ≥\d+\.\d \+58.3 \(\d+\.\d to \d+\.\d\) p = 0.0\d+, better", text)
    assert "33.3%" in text
    # the median has no interval, and it is no share
    assert re.search(r"median_rank 1 1 \+0", text)


def test_the_worst_mistakes_are_shown_with_truth_and_answer(pets):
    first, _ = models_of(pets)
    page = page_of(pets, first)
    # 7 of 12 wrong classes and 4 wrong ranks, of which the same two classes are shown twice at most
    assert "5 of 7 wrong" in text_of(page)
    assert "4 of 4 wrong; left the right image, right the one ranked first" in text_of(page)
    mistakes = worst_mistakes(first.measurements[0], Thumbnails(sets={"pets": pets}, bytes_left=10**6), limit=9)
    assert mistakes[0].probability == max(mistake.probability for mistake in mistakes)
    pairs = [(mistake.truth, mistake.prediction) for mistake in mistakes]
    assert sorted(pairs) == [
        (CLASSES[2], "cat"),
        (CLASSES[2], "cat"),
        ("cat", CLASSES[1]),
        (CLASSES[1], "cat"),
        (CLASSES[1], "cat"),
    ]
    queries = worst_mistakes(first.measurements[1], Thumbnails(sets={"pets": pets}, bytes_left=10**6), limit=9)
    assert [mistake.rank for mistake in queries] == [12, 7, 3, 2]
    assert [image.key for image in queries[0].images] == [pets.keys[4], pets.keys[5]]
    assert all(image.jpeg for mistake in queries for image in mistake.images)
    assert page.count("data:image/jpeg") == 5 + 8


def test_images_that_are_not_at_hand_are_said_and_the_page_stays_small(pets):
    first, _ = models_of(pets)
    assert "the image is not at hand" in page_of(pets, first, sets=False)
    thumbnails = Thumbnails(sets={"pets": pets}, bytes_left=1500)
    mistakes = worst_mistakes(first.measurements[1], thumbnails, limit=9)
    reasons = [image.reason for mistake in mistakes for image in mistake.images]
    assert 0 < reasons.count("") < 8
    assert set(reasons) == {"", "left out to keep the page small"}


def test_classes_are_listed_the_hardest_first_and_confusions_the_most_frequent(pets):
    first, second = models_of(pets)
    rows = class_rows([("a", first.measurements[0]), ("b", second.measurements[0])], rng=np.random.default_rng(0))
    assert [(row.name, row.num_images, row.accuracies[0].value) for row in rows] == [
        (CLASSES[1], 4, 0.0),
        (CLASSES[2], 4, 0.5),
        ("cat", 4, 0.75),
    ]
    assert rows[0].accuracies[1].value == 1
    pairs = [(row.truth, row.prediction, row.num_images, row.share) for row in confusion_rows(first.measurements[0])]
    assert pairs == [(CLASSES[1], "cat", 4, 1.0), (CLASSES[2], "cat", 2, 0.5), ("cat", CLASSES[1], 1, 0.25)]
    # captions are no classes
    assert confusion_rows(first.measurements[1]) == []


def test_curves_show_recall_reliability_and_shots(pets):
    first, second = models_of(pets)
    charts = line_charts([("a", first.measurements[0]), ("b", second.measurements[0])])
    assert [chart.title for chart in charts] == ["Recall", "Reliability", "top1"]
    shots = charts[2]
    assert [(point.x, point.y) for point in shots.lines[0].points] == [(0, 0.225), (1, pytest.approx(0.3))]
    assert [text for _, text in shots.x_ticks] == ["1", "4"]
    (recall,) = line_charts([("a", first.measurements[1])])
    assert recall.lines[0].points[0].y == pytest.approx(8 / 12)
    assert recall.lines[0].points[-1] == Point(x=1, y=1)
    assert "a from 66.7% to 100.0%" in recall.description
    for line in charts[1].lines:
        assert all(0 <= point.x <= 1 and 0 <= point.y <= 1 for point in line.points)


def test_conditions_show_the_drop_against_the_unaltered_images(pets):
    first, second = models_of(pets)
    clean, (fog,) = condition_rows([("a", first.measurements[0]), ("b", second.measurements[0]), ("c", None)])
    assert (clean, fog.name) == ("top1", "fog")
    assert fog.values == (pytest.approx(0.3), pytest.approx(0.3), None)
    assert fog.drops == (pytest.approx(5 / 12 - 0.3), pytest.approx(0.7), None)


def test_a_measurement_without_samples_shows_its_values_alone():
    bare = Measurement(evaluator="probe", data="d", data_digest="", num_images=3, values={"accuracy": Value(value=0.5)})
    comparison = compare([ModelMeasurements(model="m", measurements=(bare,))], rng=np.random.default_rng(0))
    page = evaluation_page(comparison)
    assert "50.0%" in page
    assert '<svg class="chart"' not in page
    nothing = evaluation_page(compare([ModelMeasurements(model="m")], rng=np.random.default_rng(0)))
    assert "Nothing was measured." in nothing


def test_the_page_is_written_the_same_again(pets, tmp_path):
    comparison = compare(models_of(pets), rng=np.random.default_rng(0))
    for name in ("a.html", "b.html"):
        write_evaluation_page(comparison, tmp_path / name, sets={"pets": pets}, provenance=PROVENANCE)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
