"""`benchmarks/run time_to_quality`: our runs are configurations that train, short ones without the preset's average."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("time_to_quality")
    for name in [name for name in sys.modules if name == "time_to_quality" or name.split(".")[0] == "parts"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["fashion", "flickr8k"])
def test_our_runs_are_short_ones_and_one_at_open_clip_s_time(benchmark, name):
    from parts.quality_data import DataSet
    from parts.quality_plan import configuration

    data = DataSet(
        name=name, train="t.tar", val="v.tar", num_train=6000, tokenizer=Path("words.model"), first_captions="t.tar"
    )
    short, full = benchmark._our_runs(data, benchmark.Arguments(epochs=(2,), full_epochs=-1))
    assert (short.steps, full.steps > 240) == (48, True)
    assert short.identity != full.identity
    one, other = configuration(short), configuration(full)
    assert (one.optimizer.warmup_steps, one.optimizer.average_decay, one.precision) == (5, 0, "bf16")
    assert other.optimizer.average_decay == 0.98
    assert ("tags" in other.loader.languages) == (name == "fashion")
    assert one.model.channels_last
    assert other.model.channels_last
    assert [run.epochs for run in benchmark._our_runs(data, benchmark.Arguments(epochs=(3,), full_epochs=0))] == [3]


def test_a_run_from_pretrained_weights_is_added_where_it_is_asked_for(benchmark):
    from parts.quality_data import DataSet
    from parts.quality_plan import configuration

    data = DataSet(
        name="fashion", train="t.tar", val="v.tar", num_train=7383, tokenizer=Path("w.model"), first_captions="t.tar"
    )
    (run,) = benchmark._our_runs(data, benchmark.Arguments(epochs=(), full_epochs=0, pretrained=True))
    config = configuration(run)
    assert (run.name, config.steps, config.batch_size) == ("ours, lit-words", 150, 512)
    assert "initial_weights" in config.model.architecture
