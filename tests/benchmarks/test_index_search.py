"""`benchmarks/run index_search --keep`: vectors of a run before are used again only where they are those asked for."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

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
    (tmp_path / "made-from.json").unlink()
    assert benchmark._kept_shape(asked, tmp_path) is None
