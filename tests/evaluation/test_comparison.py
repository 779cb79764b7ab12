import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from vlm.errors import UsageError
from vlm.evaluation.comparison import ModelMeasurements, compare, format_value, is_share, with_intervals
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.sample_files import read_samples, write_samples


def rng(seed=0):
    return np.random.default_rng(seed)


def measured(columns, *, evaluator="zero-shot", data="pets", digest="d1", others=None, **fields):
    """A measurement whose values are the means of the columns of numbers."""
    table = pa.table(columns)
    values = {}
    for name, column in columns.items():
        if name != "key" and not isinstance(next(filter(lambda v: v is not None, column)), str):
            values[name] = Value(value=float(np.mean([entry for entry in column if entry is not None])))
    return Measurement(
        evaluator=evaluator,
        data=data,
        data_digest=digest,
        num_images=len(set(columns["key"])),
        values=values | (others or {}),
        samples=table,
        **fields,
    )


def model_of(name, *measurements):
    return ModelMeasurements(model=name, fingerprint=f"f-{name}", measurements=measurements)


KEYS = [f"k{number}" for number in range(60)]
FIRST = [float(number % 3 == 0) for number in range(60)]
SECOND = [float(number % 3 != 1) for number in range(60)]


def test_values_with_samples_get_the_interval_of_their_images():
    keys = [key for key in KEYS for _ in range(5)]
    repeated = [value for value in FIRST for _ in range(5)]
    measurement = measured(
        {"key": keys, "recall@1": repeated, "prediction": ["x"] * 300}, others={"mAP": Value(value=0.5)}
    )
    complete = with_intervals(measurement, rng=rng())
    one_an_image = with_intervals(measured({"key": KEYS, "recall@1": FIRST}), rng=rng())
    assert complete.values["recall@1"] == one_an_image.values["recall@1"]
    assert complete.values["mAP"] == Value(value=0.5)
    assert with_intervals(complete, rng=rng(9)) == complete


def test_samples_without_an_outcome_do_not_count():
    outcomes = [1.0, None, 0.0, None, 1.0]
    complete = with_intervals(measured({"key": KEYS[:5], "top1": outcomes}), rng=rng())
    alone = with_intervals(measured({"key": KEYS[:3], "top1": [1.0, 0.0, 1.0]}), rng=rng())
    assert complete.values["top1"] == alone.values["top1"]
    nothing = Measurement(
        evaluator="e",
        data="d",
        data_digest="",
        num_images=0,
        values={"top1": Value(value=0.0)},
        samples=pa.table({"key": pa.array([], pa.string()), "top1": pa.array([], pa.float64())}),
    )
    assert with_intervals(nothing, rng=rng()) == nothing


def test_models_are_compared_sample_by_sample_and_the_main_values_corrected():
    baseline = model_of(
        "a", measured({"key": KEYS, "top1": FIRST, "top5": FIRST}), measured({"key": KEYS, "r": FIRST}, data="cars")
    )
    better = model_of(
        "b", measured({"key": KEYS, "top1": SECOND, "top5": FIRST}), measured({"key": KEYS, "r": SECOND}, data="cars")
    )
    comparison = compare([baseline, better], rng=rng())
    top1 = comparison.find("zero-shot", "pets", "top1", "b")
    assert top1.difference == pytest.approx(1 / 3)
    assert top1.low < top1.difference < top1.high
    assert top1.p == pytest.approx(stats.binomtest(20, 20).pvalue)
    # two main values of equal p: Holm doubles both
    assert top1.adjusted_p == pytest.approx(2 * top1.p)
    assert top1.is_significant
    equal = comparison.find("zero-shot", "pets", "top5", "b")
    assert (equal.difference, equal.low, equal.high, equal.p, equal.adjusted_p) == (0, 0, 0, 1, None)
    assert comparison.measured() == [("zero-shot", "pets"), ("zero-shot", "cars")]
    assert comparison.to_json()["differences"][0]["adjusted_p"] == pytest.approx(2 * top1.p)


def test_rows_in_another_order_are_paired_by_key():
    order = rng(3).permutation(60)
    shuffled = measured({"key": [KEYS[i] for i in order], "top1": [SECOND[i] for i in order]})
    straight = measured({"key": KEYS, "top1": SECOND})
    first = model_of("a", measured({"key": KEYS, "top1": FIRST}))
    one = compare([first, model_of("b", shuffled)], rng=rng()).differences[0]
    other = compare([first, model_of("b", straight)], rng=rng()).differences[0]
    assert (one.difference, one.p) == pytest.approx((other.difference, other.p))
    assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_models_with_other_samples_have_a_difference_but_no_test():
    first = model_of("a", measured({"key": KEYS, "top1": FIRST}))
    fewer = model_of("b", measured({"key": KEYS[:50], "top1": SECOND[:50]}))
    entry = compare([first, fewer], rng=rng()).differences[0]
    assert entry.difference != 0
    assert (entry.low, entry.p, entry.adjusted_p) == (None, None, None)


def test_other_images_and_equal_names_are_refused():
    first = model_of("a", measured({"key": KEYS, "top1": FIRST}))
    other = model_of("b", measured({"key": KEYS, "top1": FIRST}, digest="d2"))
    with pytest.raises(UsageError, match=r"a and b were measured on different images of 'pets' \(d1 and d2\)"):
        compare([first, other], rng=rng())
    with pytest.raises(UsageError, match="Models of the same name"):
        compare([first, first], rng=rng())


def test_ranks_are_no_shares():
    assert [is_share(name) for name in ("text_to_image/recall@5", "median rank", "image_to_text/median_rank")] == [
        True,
        False,
        False,
    ]
    assert format_value("median_rank", Value(value=12.0, low=10.0, high=15.0)) == "12 ±2.5"
    assert format_value("top1", Value(value=float("nan"))) == "–"


def test_tables_of_samples_come_back_as_they_were(tmp_path):
    full = with_intervals(
        measured({"key": KEYS, "top1": FIRST, "prediction": ["Katze"] * 60}, warnings=("Accuracy is at chance.",)),
        rng=rng(),
    )
    models = [model_of("runs/a", full), model_of("runs/A", full), model_of("b", measured({"key": KEYS, "x": FIRST}))]
    paths = write_samples(tmp_path / "samples", models)
    assert [path.name for path in paths] == [
        "runs-a.zero-shot.pets.parquet",
        "runs-A.zero-shot.pets-2.parquet",
        "b.zero-shot.pets.parquet",
    ]
    saved = read_samples(paths[0])
    assert (saved.model, saved.fingerprint) == ("runs/a", "f-runs/a")
    assert saved.measurement == full
    # any reader of Parquet can use them
    assert pq.read_table(paths[2]).column_names == ["key", "x"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(path.name for path in paths)


def test_other_files_are_no_tables_of_samples(tmp_path):
    with pytest.raises(UsageError, match="no table of samples at"):
        read_samples(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    for name in ("text.parquet", "other.parquet"):
        with pytest.raises(UsageError, match="is no table of samples that vlm eval wrote"):
            read_samples(tmp_path / name)


def test_a_table_of_a_newer_version_is_refused(tmp_path):
    (path,) = write_samples(tmp_path, [model_of("a", measured({"key": KEYS, "top1": FIRST}))])
    table = pq.read_table(path)
    newer = table.schema.metadata[b"vlm"].replace(b'"format": 1', b'"format": 99')
    pq.write_table(table.replace_schema_metadata({b"vlm": newer}), path)
    with pytest.raises(UsageError, match="has format 99"):
        read_samples(path)
