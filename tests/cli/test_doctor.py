import json

import pytest

import vlm
import vlm.data.profiling as profiling
from vlm.cli.main import main

DATA_STAGES = [
    "disk, in order",
    "disk, at random",
    "index, scanned",
    "index, cached",
    "read",
    "decode",
    "view",
    "tokenize",
    "stack",
    "assemble",
    "hand-over",
]


def run(capsys, *words):
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def fresh_run(scene_shards, scene_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "run"
    flags = ["--steps", "0", "--batch-size", "16", "--workers", "0", "--tokenizer", scene_tokenizer]
    words = ["train", "tiny", "--data", scene_shards / "train", "--run", folder, *flags]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def small(scene_tokenizer):
    return ["--samples", 32, "--batch-size", 16, "--workers", "0,1", "--tokenizer", scene_tokenizer]


def test_all_stages_of_the_data_are_measured_and_one_is_named(capsys, scene_shards, small):
    code, out, _ = run(capsys, "doctor", scene_shards / "train", *small, "--size", 32, "--json")
    found = json.loads(out)
    assert code == 0
    assert [stage["name"] for stage in found["stages"]] == DATA_STAGES
    assert [tried["workers"] for tried in found["loader"]] == [0, 1]
    assert found["verdict"]["slowest"] in DATA_STAGES
    assert found["samples"] == 32


def test_a_model_adds_its_stages_and_the_call_gives_what_the_verb_prints(
    capsys, scene_shards, scene_tokenizer, fresh_run, monkeypatch
):
    calls = []
    measure = profiling.profile_pipeline

    def measure_once(setup, workers, **options):
        calls.append((setup.shards, setup.view, setup.samples, setup.batch_size, list(workers)))
        profiles.append(profiles[0] if profiles else measure(setup, workers, **options))
        return profiles[0]

    profiles = []
    monkeypatch.setattr(profiling, "profile_pipeline", measure_once)
    train = scene_shards / "train"
    options = {"workers": [1, 0], "samples": 32, "batch_size": 16, "device": "cpu"}
    diagnosis = vlm.doctor([train], vlm.load(fresh_run), **options)
    flags = ["--workers", "0,1,1", "--samples", 32, "--batch-size", 16, "--device", "cpu", "--json"]
    code, out, err = run(capsys, "doctor", train, fresh_run, *flags)
    assert code == 0, err
    found = json.loads(out)
    assert [stage["name"] for stage in found["stages"]] == [
        *DATA_STAGES,
        "model, forward",
        "model, forward and backward",
    ]
    assert found["shares_cores"] is True
    assert found == diagnosis.to_json()
    assert calls[0] == calls[1]
    with pytest.raises(vlm.UsageError, match="omit size = 8"):
        vlm.doctor(train, fresh_run, size=8)
    with pytest.raises(vlm.UsageError, match="give whole numbers from 0 on"):
        vlm.doctor(train, tokenizer=scene_tokenizer, workers=[-1])


def test_people_see_a_bar_for_each_stage_and_the_verdict(capsys, scene_shards, small):
    code, out, _ = run(capsys, "doctor", scene_shards / "train", *small, "--size", 32)
    assert code == 0
    assert all(name in out for name in DATA_STAGES)
    assert out.count("→") == 1
    assert "█" in out
    assert "Give MODEL" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "two"], "is not a list of numbers"),
        (["--workers", "0.5"], "give whole numbers from 0 on"),
        (["--workers", "-1"], "give whole numbers from 0 on"),
        (["--workers", ""], "give whole numbers from 0 on"),
        (["--samples", "4", "--batch-size", "8"], "must hold a batch"),
        (["--size", "0"], "size = 0 pixels show nothing"),
        (["--size", "-3"], "size = -3 pixels show nothing"),
        (["--device", "abacus"], "There is no device"),
        (["--device", "cuda:99"], "torch sees no device"),
        (["--tokenizer", "nowhere"], "There is no tokenizer"),
    ],
)
def test_misuse_is_explained(capsys, scene_shards, scene_tokenizer, flags, words):
    flags = flags if "--tokenizer" in flags else ["--tokenizer", str(scene_tokenizer), *flags]
    joined = [f"{name}={value}" for name, value in zip(flags[::2], flags[1::2], strict=True)]
    code, _, err = run(capsys, "doctor", scene_shards / "train", *joined)
    assert code == 2
    assert words in err


def test_a_size_that_is_not_the_models_is_refused(capsys, scene_shards, fresh_run):
    code, _, err = run(capsys, "doctor", scene_shards / "train", fresh_run, "--size", 1000)
    assert code == 2
    assert "omit size = 1000" in err


def test_shards_that_are_not_there_are_named(capsys, tmp_path, scene_tokenizer):
    code, _, err = run(capsys, "doctor", tmp_path / "none.tar", "--tokenizer", scene_tokenizer)
    assert code == 2
    assert "none.tar" in err
