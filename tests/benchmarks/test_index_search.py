"""`benchmarks/run index_search --keep`: vectors of a run before are used again only where they are those asked for."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import UsageError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("index_search")
    for name in [name for name in sys.modules if name == "index_search" or name.split(".")[0] == "parts"]:
        del sys.modules[name]


def test_kept_vectors_are_those_asked_for_or_refused(benchmark, tmp_path):
    asked = benchmark.Arguments(rows=300, dimension=8, questions=20)
    assert benchmark._kept_shape(asked, tmp_path) is None
    assert benchmark._write(asked, tmp_path) == (300, 8)
    assert benchmark._kept_shape(replace(asked, recall=0.9, rounds=3), tmp_path) == (300, 8)
    with pytest.raises(UsageError, match="--rows 300, not 200"):
        benchmark._kept_shape(replace(asked, rows=200), tmp_path)
    made_from = tmp_path / "made-from.json"
    older = {name: value for name, value in json.loads(made_from.read_text()).items() if "link" not in name}
    made_from.write_text(json.dumps(older))
    assert benchmark._kept_shape(asked, tmp_path) == (300, 8)
    made_from.unlink()
    assert benchmark._kept_shape(asked, tmp_path) is None


def test_texts_that_link_are_others_than_those_that_ask(benchmark, tmp_path):
    benchmark._write(benchmark.Arguments(rows=300, dimension=8, questions=20, link_drawn=30), tmp_path)
    linking, *asking = (np.load(tmp_path / f"{name}.npy") for name in ("linking", "planned", "questions"))
    assert [len(linking), *map(len, asking)] == [30, 10, 10]
    assert not (linking[:, None] == np.concatenate(asking)).all(axis=2).any()
