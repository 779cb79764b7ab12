"""vlm embed in a process of its own, killed by SIGKILL in its writes and repeated."""

import os
import random
from pathlib import Path

import pytest

from tests.index.kill_embed import Trial, kill_many, make_data


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_killed_while_it_writes_a_part_and_the_manifest_it_leaves_the_files_of_an_uninterrupted_run(
    tmp_path: Path, backend: str
) -> None:
    shards, model = make_data(tmp_path, shards=6, has_export=backend == "onnx")
    trial = Trial(
        shards=shards,
        model=model,
        work=tmp_path,
        kills=2,
        aims=("a part", "the manifest"),
        chance=random.Random(os.urandom(8)),
        backend=backend,
    )
    kill_many(trial)
    assert trial.hit.total() == 2
    assert trial.compared
