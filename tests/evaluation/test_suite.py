import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import COLOURS, colour_shards, png, write_tar
from vlm.data.pack import PackConfig, pack
from vlm.data.sources.source_registry import open_source
from vlm.data.tar import open_index
from vlm.errors import UsageError
from vlm.evaluation.comparison import ModelMeasurements
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.suite import (
    EVALUATORS,
    FailedEvaluation,
    OpenSets,
    SuiteAverage,
    average_figures,
    evaluate_models,
    measure_model,
    parse_suite,
    read_suite,
    suite_names,
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of images whose strongest channel is that of a colour, in a set or beside another one."""

    name: str = "share"
    colours: tuple[str, ...] = ("red",)
    train: EvaluationSet | None = None

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        data, images = model.image_features(data)
        wanted = [list(COLOURS).index(colour) for colour in self.colours]
        share = sum(float((images.argmax(axis=1) == axis).mean()) for axis in wanted)
        values = {"share": Value(value=share), "images": Value(value=len(data))}
        if self.train is not None:
            values["training images"] = Value(value=len(self.train))
        return Measurement(
            evaluator=self.name, data=data.name, data_digest=data.digest, num_images=len(data), values=values
        )


@pytest.fixture(autouse=True)
def evaluators(monkeypatch):
    monkeypatch.setitem(EVALUATORS, "share", f"{__name__}:Share")


@pytest.fixture
def root(tmp_path):
    colour_shards(tmp_path / "root" / "colours")
    return tmp_path / "root"


def suite_of(*entries, **data):
    return parse_suite({"data": data, "evaluate": list(entries)}, "mine")


def measured(suite, root, encoder=None):
    return list(measure_model(EvaluatedModel(encoder or ColourEncoder()), OpenSets(suite=suite, root=root)))


def test_an_entry_is_an_evaluator_with_its_settings_on_each_of_its_sets(root):
    suite = suite_of(
        {"evaluator": "share", "data": ["all", "two"], "colours": ["red", "blue"], "name": "red or blue"},
        {"evaluator": "share", "data": "two", "train": "all", "main": "training images"},
        all={"path": "colours"},
        two={"path": "colours", "limit": 2},
    )
    encoder = ColourEncoder()
    first, second, third = measured(suite, root, encoder)
    assert (first.evaluator, first.data, first.values["share"].value) == ("red or blue", "all", pytest.approx(2 / 3))
    assert (second.data, second.num_images, second.values["share"].value) == ("two", 2, 0.5)
    # the value asked for stands for all
    assert next(iter(third.values)) == "training images"
    assert third.values["training images"].value == 3
    assert encoder.num_images == 5


def test_an_average_is_the_mean_of_its_sets_or_says_which_is_missing(root):
    colour_shards(root / "others")
    entry = {"evaluator": "share", "data": ["first", "second"]}
    values = {
        "data": {"first": {"path": "colours"}, "second": {"path": "others"}, "third": {"path": "none"}},
        "evaluate": [entry | {"colours": ["red", "blue"]}],
        "average": [
            {"name": "both", "evaluator": "share", "data": ["first", "second"]},
            {"name": "images", "evaluator": "share", "data": ["first", "second"], "value": "images"},
            {"name": "all", "evaluator": "share", "data": ["first", "second", "third"]},
        ],
    }
    evaluation = evaluate_models([EvaluatedModel(ColourEncoder())], OpenSets(suite=parse_suite(values, "s"), root=root))
    measured = [measurement.values for measurement in evaluation.comparison.models[0].measurements]
    both, images, everything = evaluation.averages
    assert both.value == Value(value=(measured[0]["share"].value + measured[1]["share"].value) / 2)
    assert images.value == Value(value=(measured[0]["images"].value + measured[1]["images"].value) / 2)
    assert (everything.value, everything.missing) == (None, ("third",))
    assert [entry["name"] for entry in evaluation.to_json()["averages"]] == ["both", "images", "all"]


def test_the_interval_of_an_average_is_that_of_independent_sets():
    def of(data, value, half):
        values = {"top1": Value(value=value, low=value - half, high=value + half)}
        return Measurement(evaluator="e", data=data, data_digest="", num_images=1, values=values)

    model = ModelMeasurements(model="m", measurements=(of("a", 0.2, 0.03), of("b", 0.6, 0.04)))
    average = SuiteAverage(name="n", evaluator="e", data=("a", "b"))
    (figure,) = average_figures([average], [model])
    assert figure.value is not None
    assert (figure.value.value, figure.value.low, figure.value.high) == pytest.approx((0.4, 0.375, 0.425))
    with pytest.raises(UsageError, match="top1"):
        average_figures([SuiteAverage(name="n", evaluator="e", data=("a", "b"), value="top5")], [model])


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ({"name": "n", "evaluator": "share", "data": ["colours", "colour"]}, "colours"),
        ({"name": "n", "evaluator": "shares", "data": ["colours", "second"]}, "share"),
        ({"name": "n", "evaluator": "share", "data": ["colours"]}, "two different"),
        ({"name": "n", "evaluator": "share", "data": ["colours", "colours"]}, "two different"),
        ({"name": "n", "evaluator": "share"}, "data"),
        ("shift", "table"),
    ],
)
def test_a_mistake_in_an_average_is_named(average, message):
    data = {"colours": {"path": "a"}, "second": {"path": "b"}}
    values = {"data": data, "evaluate": [{"evaluator": "share", "data": ["colours"]}], "average": [average]}
    with pytest.raises(UsageError, match=message):
        parse_suite(values, "s")


@pytest.mark.parametrize("name", ["clip-benchmark", "datacomp"])
def test_basics_five_shifts_are_one_figure(name):
    (average,) = read_suite(name).averages
    assert set(average.data) == {"imagenet-a", "imagenet-r", "imagenetv2", "imagenet_sketch", "objectnet"}


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("zero-shot", "zero-shot-patches"),
        ({"evaluator": "nearest-neighbours", "train": "all", "neighbours": 1}, "nearest-neighbours-projected-patches"),
    ],
)
def test_an_evaluator_may_measure_another_one(root, of, name):
    suite = suite_of(
        {"evaluator": "robustness", "data": "two", "of": of, "edits": "patches", "shares": [0.0], "pixels": 0},
        all={"path": "colours", "label": "label"},
        two={"path": "colours", "label": "label", "limit": 2},
    )
    (measurement,) = measured(suite, root)
    assert (measurement.evaluator, measurement.values["drop"].value) == (name, 0.0)
    assert measurement.values["edited"].value == 1.0


def test_what_is_absent_is_left_out_with_how_to_fetch_it(root):
    suite = suite_of(
        {"evaluator": "share", "data": ["all", "gone", "far"]},
        {"evaluator": "share", "data": "all", "train": "gone"},
        all={"path": "colours"},
        gone={"path": "nothing/*.tar", "fetch": "ask the author"},
        far={"path": "wds_far", "layout": "clip-benchmark", "hub": "someone/wds_far"},
    )
    sets = OpenSets(suite=suite, root=root)
    assert sorted(sets.absent) == ["far", "gone"]
    assert sets.absent["gone"].fetch == "ask the author"
    assert sets.absent["far"].fetch == f"hf download someone/wds_far --repo-type dataset --local-dir {root / 'wds_far'}"
    assert [one.data for one in measure_model(EvaluatedModel(ColourEncoder()), sets)] == ["all"]


def test_an_evaluator_that_fails_ends_no_other(root):
    (root / "broken").mkdir()
    (root / "broken" / "0.tar").write_bytes(b"")
    suite = suite_of(
        {"evaluator": "share", "data": "broken"},
        {"evaluator": "share", "data": "all", "main": "shares"},
        {"evaluator": "share", "data": "all"},
        all={"path": "colours"},
        broken={"path": "broken"},
    )
    broken, misnamed, whole = measured(suite, root)
    assert isinstance(broken, FailedEvaluation)
    assert (broken.model, broken.evaluator, broken.data) == ("colours", "share", "broken")
    assert "did you mean 'share'" in misnamed.error
    assert whole.values["images"].value == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"titel": "x"}, "unknown key 'titel'; did you mean 'title'"),
        ({"data": {"a": {"path": "x", "lable": "y"}}}, "unknown key 'lable'; did you mean 'label'"),
        ({"data": {"a": {"path": "x", "limit": "many"}}}, "limit = 'many' does not fit"),
        ({"data": {"a": "x"}}, "a table is needed"),
        ({"data": {"a": {}}}, "path"),
        ({"evaluate": [{"evaluator": "shore", "data": "a"}]}, "no evaluator 'shore'; did you mean 'share'"),
        ({"evaluate": [{"evaluator": "share"}]}, "names no data"),
        ({"evaluate": [{"evaluator": "share", "data": "b"}]}, "there is no data 'b'; known: a"),
        ({"evaluate": [{"evaluator": "share", "data": "a", "train": "b"}]}, "there is no data 'b'"),
        ({"evaluate": [{"evaluator": "share", "data": "a", "colors": []}]}, "did you mean 'colours'"),
        ({"evaluate": [{"evaluator": "share", "data": "a", "colours": 3}]}, "colours = 3 does not fit"),
        ({"evaluate": [{"evaluator": "robustness", "data": "a", "of": "shore"}]}, "mean 'share'"),
        ({"evaluate": [{"evaluator": "robustness", "data": "a", "of": {"evaluator": "share", "hue": 3}}]}, "'hue'"),
        ({"evaluate": [{"evaluator": "robustness", "data": "a", "of": {"evaluator": "share", "train": "b"}}]}, "'b'"),
        ({"evaluate": [{"evaluator": "robustness", "data": "a", "of": 3}]}, "a table is needed"),
        ({"evaluate": []}, "evaluates nothing"),
    ],
)
def test_a_mistake_in_a_suite_is_named_with_what_was_meant(values, message):
    whole = {"data": {"a": {"path": "x"}}, "evaluate": [{"evaluator": "share", "data": "a"}]}
    with pytest.raises(UsageError, match=message):
        parse_suite(whole | values, "mine")


def test_a_file_is_a_suite_and_an_unknown_name_gets_the_nearest(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[data.a]\npath = "x"\n[[evaluate]]\nevaluator = "share"\ndata = "a"\n')
    assert read_suite(str(file)).name == "mine"
    with pytest.raises(UsageError, match="did you mean 'small-sets'"):
        read_suite("smal-sets")
    file.write_text("title = ")
    with pytest.raises(UsageError, match="is not TOML"):
        read_suite(str(file))


@pytest.mark.parametrize("name", suite_names())
def test_the_suites_of_the_package_can_be_read(name):
    suite = read_suite(name)
    assert suite.title
    used = {data for entry in suite.entries for data in (*entry.data, *entry.named_sets())}
    # what no evaluator takes is named with the reason
    assert used == {data for data in suite.data if not suite.data[data].not_evaluated}


def test_datacomp_has_38_sets_and_clip_benchmark_40():
    assert len(read_suite("datacomp").data) == 38
    assert len(read_suite("clip-benchmark").data) == 40


def clip_benchmark_set(folder, kind, members):
    (folder / "test").mkdir(parents=True)
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    (folder / "test" / "nshards.txt").write_text("1")
    write_tar(folder / "test" / "0.tar", members)
    return parse_suite(
        {
            "data": {"a": {"path": folder.name, "layout": "clip-benchmark"}},
            "evaluate": [{"evaluator": "share", "data": "a"}],
        },
        "mine",
    )


def test_clip_benchmark_says_by_its_files_what_a_set_is(tmp_path, logged):
    members = [("0.png", png("red")), ("0.txt", b"a red one\n\na rose"), ("0.cls", b"1")]
    opened = OpenSets(suite=clip_benchmark_set(tmp_path / "captions", "retrieval\n", members), root=tmp_path).get("a")
    assert (opened.captions, opened.labels) == (({"": ("a red one", "a rose")},), None)
    opened = OpenSets(suite=clip_benchmark_set(tmp_path / "plain", "", members), root=tmp_path).get("a")
    assert opened.labels == (("1",),)
    assert "has no classnames.txt" in logged.text
    with pytest.raises(UsageError, match="says 'retreival'; did you mean 'retrieval'"):
        OpenSets(suite=clip_benchmark_set(tmp_path / "odd", "retreival", members), root=tmp_path).get("a")


def test_a_set_of_several_labels_has_a_number_for_each_class(tmp_path):
    members = []
    for number, row in enumerate(([1, 0, 1], [0, 0, 0])):
        file = io.BytesIO()
        np.save(file, np.array(row))
        members += [(f"{number}.png", png("red")), (f"{number}.npy", file.getvalue())]
    suite = clip_benchmark_set(tmp_path / "several", "multilabel", members)
    (tmp_path / "several" / "classnames.txt").write_text("rose\nleaf\nsky\n")
    assert OpenSets(suite=suite, root=tmp_path).get("a").labels == (("rose", "sky"), ())


def test_the_pairs_held_out_are_those_of_a_pack(tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = []
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pairs / f"{number}.png")
        rows.append({"file": f"{number}.png", "title": f"title {number // 2}"})
    (pairs / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(open_source(str(pairs)), tmp_path / "packed", PackConfig(hold_out=2))
    packed = open_index(str(tmp_path / "packed" / "val-00000.tar")).sample_keys()
    suite = suite_of({"evaluator": "share", "data": "a"}, a={"path": "pairs", "hold_out": 2})
    for _ in range(2):
        opened = OpenSets(suite=suite, root=tmp_path, cache=tmp_path / "cache").get("a")
        assert [key.removesuffix(".png") for key in opened.keys] == sorted(packed, key=int)
    assert len(list((tmp_path / "cache").glob("held-out-*.json"))) == 1


def test_scenes_are_drawn_on_the_spot(tmp_path):
    suite = suite_of(
        {"evaluator": "share", "data": "a"}, a={"path": "scenes", "label": "scene.shape", "scenes": {"number": 5}}
    )
    opened = OpenSets(suite=suite, root=tmp_path / "nowhere").get("a")
    assert len(opened) == 5
    assert all(len(labels) == 1 for labels in opened.labels)
    assert "en" in opened.captions[0]
