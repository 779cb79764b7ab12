import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from vlm.index.ann.index_types import TuningParams

CHANGES = ("add", "update", "delete", "compact", "set", "rollback")
ORACLE = runpy.run_path(str(Path(__file__).with_name("model_based.py")))["Oracle"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place, because an operation waits for the disk some ten times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """FAISS without threads of its own: a child of fork has only one."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("kind", "tuning", "operations", "least"),
    [
        ("flat", TuningParams(), 200, 1.0),
        ("ivf", TuningParams(nlist=12, nprobe=6), 80, 0.8),
        ("sq8", TuningParams(), 80, 0.97),
    ],
)
def test_random_changes_searches_and_crashes_leave_what_a_plain_dictionary_has(
    folder: Path, kind: str, tuning: TuningParams, operations: int, least: float
) -> None:
    oracle = ORACLE.begin(folder, 3, kind=kind, rows=400, tuning=tuning)
    for _ in range(operations):
        oracle.step(crash_share=0.3)
    done = " ".join(oracle.done)
    assert all(name in done for name in (*CHANGES, "before the commit", "search where"))
    assert np.mean(oracle.recalled or [1.0]) >= least
