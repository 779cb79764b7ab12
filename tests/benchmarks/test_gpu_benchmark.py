"""The GPU benchmark runs whole in its small form, wherever there is no GPU, so that it cannot rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
PARTS = {"speed", "open_clip", "decode", "embed", "caption", "search", "equality, fp32", "equality, bf16"}
PARTS |= {"exact", "largest"}


@pytest.fixture(scope="module")
def result():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--json"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_every_part_has_results(result):
    assert {name.removeprefix("tiny: ") for name in result["parts"]} == PARTS
    for name, part in result["parts"].items():
        assert part["rows"], (name, part["problem"])


def test_results_are_those_of_the_cpu(result):
    assert result["wrong"] == []
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    values = {row["what"]: row.get("value", row.get("difference")) for row in rows}
    assert values["exact search, equal results"] == 1
    assert values["least cosine with float32 on the CPU"] > 0.99
    assert values["equal, fp32"] < 1e-4


def test_speeds_are_positive(result):
    rows = [row for part in result["parts"].values() for row in part["rows"] if "samples_per_second" in row]
    assert len(rows) >= 11
    assert all(row["samples_per_second"] > 0 for row in rows)
