import json

import pytest

from tests.train.run_folders import falling, write_run
from vlm.errors import UsageError
from vlm.train.history import find_runs, read_run, write_telemetry


def test_runs_are_found_however_deep_and_nothing_else_is(tmp_path):
    deep = write_run(tmp_path / "a" / "b" / "deep", falling())
    flat = write_run(tmp_path / "flat", falling())
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.toml").write_text("seed = 1\n")
    assert set(find_runs(tmp_path)) == {deep, flat}
    assert find_runs(flat) == [flat]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("made", "state"),
    [
        ({"is_finished": True}, "finished"),
        ({"age_seconds": 30}, "running"),
        ({"age_seconds": 3600}, "stopped"),
    ],
)
def test_the_state_is_told_by_the_manifest_and_the_age_of_the_last_line(tmp_path, made, state):
    assert read_run(write_run(tmp_path / "run", falling(), **made)).state == state


def test_a_run_with_rare_lines_is_given_five_pauses(tmp_path):
    lines = [line | {"seconds": line["step"] * 200.0} for line in falling()]  # a line every 1,000 s
    assert read_run(write_run(tmp_path / "patient", lines, age_seconds=4000)).state == "running"
    assert read_run(write_run(tmp_path / "stopped", lines, age_seconds=6000)).state == "stopped"


def test_a_run_is_read_with_its_best_and_usual_values(tmp_path):
    lines = falling(until=60)
    lines[5]["text_to_image_recall@10"] = 0.9
    record = read_run(write_run(tmp_path / "run", lines, steps=100))
    assert (record.step, record.planned_steps) == (60, 100)
    best = record.best()
    assert best is not None
    assert best["step"] == 30
    assert record.last("loss") == pytest.approx(3.2)
    assert record.typical("samples_per_second") == 100  # the first line, which holds the start-up, is left out
    assert record.last("nothing") is None
    assert record.typical("nothing") is None


def test_recall_that_is_full_is_decided_by_the_first_place(tmp_path):
    lines = [line | {"text_to_image_recall@10": 1.0} for line in falling()]
    best = read_run(write_run(tmp_path / "run", lines)).best()
    assert best is not None
    assert best["step"] == 100


def test_the_planned_length_is_the_manifest_s_then_telemetry_s_then_the_configuration_s(tmp_path):
    assert read_run(write_run(tmp_path / "a", falling(), is_finished=True, steps=7)).planned_steps == 100
    assert read_run(write_run(tmp_path / "b", falling(until=50), steps=70)).planned_steps == 70
    assert read_run(write_run(tmp_path / "c", falling(until=50), config="steps = 60\n")).planned_steps == 60
    assert read_run(write_run(tmp_path / "d", falling(until=50), config="steps = -1\n")).planned_steps == 0


def test_a_run_without_a_line_yet_is_read(tmp_path):
    record = read_run(write_run(tmp_path / "run", []))
    assert (record.step, record.best(), record.last("loss")) == (0, None, None)


def test_what_was_evaluated_afterwards_stands_at_the_last_step(tmp_path):
    run = write_run(tmp_path / "run", falling())
    (run / "evaluation").mkdir()
    values = {"zero_shot": {"top1": 0.17}, "retrieval": None, "caption_truth": None}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(values))
    assert read_run(run).measured()[-1] == {"step": 100, "zero_shot_top1": 0.17}


def test_telemetry_is_left_as_plain_values(tmp_path):
    write_telemetry(tmp_path, steps=5, utilisation={"peak_flops": 1e12, "peak_source": "x"})
    told = json.loads((tmp_path / "telemetry.json").read_text())
    assert told == {"steps": 5, "peak_flops": 1e12, "peak_source": "x"}
