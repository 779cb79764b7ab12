"""The page of an evaluation: what stands on it."""

import base64
import re

import numpy as np
import pyarrow as pa
import pytest

from tests.evaluation.measured_pets import CLASSES, measurement_of, models_of, pets_at
from vlm.evaluation.comparison import ModelMeasurements, compare
from vlm.evaluation.evaluation_page import evaluation_page, write_evaluation_page
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.mistakes import Thumbnails, answers_of, worst_mistakes
from vlm.evaluation.report_charts import Point, class_rows, condition_rows, confusion_rows, line_charts
from vlm.pages import Provenance

PROVENANCE = Provenance(command="vlm eval 'a b' --out <c>", date="2026-01-02 03:04 UTC", version="9.8")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return pets_at(tmp_path_factory.mktemp("pets"))


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
    assert re.search(r"text → image median rank 1 1 \+0", text)


def test_languages_have_a_table_of_their_own(pets):
    text = text_of(page_of(pets, *models_of(pets)))
    assert "language top1, first top1, second de 25.0% 25.0%" in text
    assert "language text → image recall@1, first text → image recall@1, second de 100.0%" in text
    assert "top1/de" not in text


def test_the_worst_mistakes_are_shown_with_truth_and_answer(pets):
    first, _ = models_of(pets)
    page = page_of(pets, first)
    # 7 of 12 wrong classes and 4 wrong ranks, of which the same two classes are shown twice at most
    assert "5 of 7 wrong" in text_of(page)
    assert "4 of 4 wrong; left the right image, right the one ranked first" in text_of(page)
    thumbnails = Thumbnails(sets={"pets": pets}, bytes_left=10**6)
    (answers,) = answers_of(first.measurements[0])
    mistakes = worst_mistakes(answers, "pets", thumbnails, limit=9)
    assert mistakes[0].probability == max(mistake.probability for mistake in mistakes)
    pairs = [(mistake.truth, mistake.prediction) for mistake in mistakes]
    assert sorted(pairs) == [
        (CLASSES[2], "cat"),
        (CLASSES[2], "cat"),
        ("cat", CLASSES[1]),
        (CLASSES[1], "cat"),
        (CLASSES[1], "cat"),
    ]
    (answers,) = answers_of(first.measurements[1])
    queries = worst_mistakes(answers, "pets", thumbnails, limit=9)
    assert [mistake.rank for mistake in queries] == [12, 7, 3, 2]
    assert [image.key for image in queries[0].images] == [pets.keys[4], pets.keys[5]]
    assert all(image.jpeg for mistake in queries for image in mistake.images)
    assert page.count("data:image/jpeg") == 5 + 8


def test_images_that_are_not_at_hand_are_said_and_the_page_stays_small(pets):
    first, _ = models_of(pets)
    assert "the image is not at hand" in page_of(pets, first, sets=False)
    thumbnails = Thumbnails(sets={"pets": pets}, bytes_left=1500)
    mistakes = worst_mistakes(answers_of(first.measurements[1])[0], "pets", thumbnails, limit=9)
    reasons = [image.reason for mistake in mistakes for image in mistake.images]
    assert 0 < reasons.count("") < 8
    assert set(reasons) == {"", "left out to keep the page small"}


def test_heat_maps_stand_beside_the_images_of_mistakes(pets):
    first, second = models_of(pets)
    asked = []

    def explain(image, text, other):
        asked.append((image.size, text, other))
        return None if text == "cat" else b"heat of " + text.encode()

    comparison = compare([first, second], rng=np.random.default_rng(0))
    page = evaluation_page(comparison, sets={"pets": pets}, explainers={first.model: explain})
    # of queries both images, of classes the answer rather than the truth; the second model has no mistakes
    assert sum(other == "" for _, _, other in asked) == 8
    pairs = [("cat", CLASSES[1]), ("cat", CLASSES[1]), ("cat", CLASSES[2]), ("cat", CLASSES[2]), (CLASSES[1], "cat")]
    assert sorted((text, other) for _, text, other in asked if other) == sorted(pairs)
    assert {size for size, _, _ in asked} == {(40, 30)}
    assert page.count("data:image/jpeg") == 5 + 8 + 1 + 8
    assert base64.b64encode(b"heat of " + CLASSES[1].encode()).decode() in page
    assert page.count("Where ") == 9
    text = text_of(page)
    assert "heat maps: bright where the image speaks for ✗ rather than ✓" in text
    assert "heat maps: bright where the image speaks for the text" in text
    # the space for images holds for maps as well
    thumbnails = Thumbnails(sets={"pets": pets}, bytes_left=3000)
    (answers,) = answers_of(first.measurements[1])
    mistakes = worst_mistakes(answers, "pets", thumbnails, limit=9, explain=lambda *_: b"0" * 400)
    assert 0 < sum(image.heat is not None for mistake in mistakes for image in mistake.images) < 8


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


def charts_of(pets, number):
    first, second = models_of(pets)
    return line_charts([("a", first.measurements[number]), ("b", second.measurements[number])])


def test_curves_show_recall_reliability_and_shots(pets):
    recall, reliability = charts_of(pets, 0)
    assert (recall.title, reliability.title) == ("Recall", "Reliability")
    for line in reliability.lines:
        assert all(0 <= point.x <= 1 and 0 <= point.y <= 1 for point in line.points)
    (recall,) = charts_of(pets, 1)
    assert recall.title == "text → image"
    assert recall.lines[0].points[0].y == pytest.approx(8 / 12)
    assert recall.lines[0].points[-1] == Point(x=1, y=1)
    assert "a from 66.7% to 100.0%" in recall.description
    (shots,) = charts_of(pets, 2)
    assert [(point.x, point.y) for point in shots.lines[0].points] == [(0, 0.225), (1, pytest.approx(0.3))]
    assert [text for _, text in shots.x_ticks] == ["1", "4"]


def test_edits_show_the_drop_against_the_unaltered_images(pets):
    first, second = models_of(pets)
    (fog,) = condition_rows([("a", first.measurements[3]), ("b", second.measurements[3]), ("c", None)])
    assert (fog.name, [value and value.value for value in fog.values]) == ("fog", [0.3, 0.3, None])
    assert fog.drops == (pytest.approx(0.3), pytest.approx(0.5), None)
    (levels,) = charts_of(pets, 3)
    assert [point.y for point in levels.lines[1].points] == pytest.approx([0.8, 0.4, 0.2])
    assert "fog 30.0% −30.0" in text_of(page_of(pets, first))


def test_sentence_pairs_show_the_false_sentence_that_was_preferred(pets):
    outcomes = [1.0, 0.0, *[1.0] * 10]
    columns = {"key": list(pets.keys), "true": ["a cat"] * 12, "false": ["a dog"] * 12, "category": ["swap"] * 12}
    values = {"accuracy": Value(value=11 / 12), "swap/accuracy": Value(value=11 / 12)}
    measurement = measurement_of(pets, "pairs", values, pa.table(columns | {"accuracy": outcomes}))
    text = text_of(page_of(pets, ModelMeasurements(model="m", measurements=(measurement,))))
    assert "1 of 1 wrong" in text
    assert "✗ a dog ✓ a cat" in text
    assert "By category category accuracy swap 91.7%" in text


def test_captions_that_were_checked_show_what_is_wrong(pets):
    verdicts = [1.0, 0.0, *[1.0] * 10]
    columns = {"key": list(pets.keys), "caption": ["a red cat"] * 12, "accuracy": verdicts, "reason": ["no cat"] * 12}
    measurement = measurement_of(pets, "scenes", {"accuracy": Value(value=11 / 12)}, pa.table(columns))
    text = text_of(page_of(pets, ModelMeasurements(model="m", measurements=(measurement,))))
    assert "1 of 1 wrong" in text
    assert re.search("✗ a red cat .*no cat", text)


def test_captions_that_were_written_stand_beside_those_of_the_image(pets):
    scores = [float(number) for number in range(12)]
    samples = pa.table({"key": list(pets.keys), "caption": [f"caption {n}" for n in range(12)], "cider_d": scores})
    measurement = measurement_of(pets, "captions", {"cider_d": Value(value=5.5)}, samples)
    (answers,) = answers_of(measurement)
    mistakes = worst_mistakes(answers, "pets", Thumbnails(sets={"pets": pets}, bytes_left=10**6), limit=3)
    assert [mistake.prediction for mistake in mistakes] == ["caption 0", "caption 1", "caption 2"]
    page = page_of(pets, ModelMeasurements(model="m", measurements=(measurement,)))
    assert "6 of 6 in the lower half" in text_of(page)
    assert re.search(r"cider d 5.5 ±\d", text_of(page))


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
