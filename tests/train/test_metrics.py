import json
import sys

import pytest

from vlm.errors import UsageError
from vlm.train.history import MetricsLog, read_metrics
from vlm.train.logger import TensorBoardLog


def test_nothing_after_a_resumed_step_survives(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resumed_step=0)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0 / step})
    log = MetricsLog(path, resumed_step=20)
    log.write(25, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(10, 0.1), (20, 0.05), (25, 7.0)]


def test_a_line_a_crash_cut_short_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 10, "loss": 1.0}) + '\n{"step": 20, "lo')
    assert [line["step"] for line in read_metrics(path)] == [10]


def test_tensorboard_that_is_not_installed_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path, resumed_step=0)


def test_tensorboard_shows_the_numbers_and_nothing_after_a_resumed_step(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    log = TensorBoardLog(tmp_path, resumed_step=0)
    for step in (10, 20, 30):
        log.write(step, {"loss": float(step), "samples": "abc"})
    log.close()
    resumed = TensorBoardLog(tmp_path, resumed_step=20)
    resumed.write(25, {"loss": 7.0})
    resumed.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert shown.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(10, 10.0), (20, 20.0), (25, 7.0)]
