import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from vlm.cli.embed import Embed
from vlm.cli.launch import run_in_processes
from vlm.errors import UsageError, VlmError

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = """
import sys
from pathlib import Path
from tests.cli.test_launch import Task, work
from vlm.cli.launch import run_in_processes
if __name__ == "__main__":
    run_in_processes(work, Task(folder=Path(sys.argv[1]), endless=True), 2)
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What each process of a test does."""

    folder: Path
    failing: int = -1
    code: int = 1
    endless: bool = False


def work(task: Task) -> None:
    """Write down the number and go on, fail, or never end."""
    rank = int(os.environ["RANK"])
    told = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    (task.folder / f"{rank}").write_text(" ".join([*told, str(os.getpid())]))
    if rank == task.failing:
        raise {1: VlmError, 2: UsageError}[task.code]("a shard is damaged")
    while task.endless:
        time.sleep(0.05)


def test_each_process_is_told_its_number(tmp_path):
    run_in_processes(work, Task(folder=tmp_path), 3)
    told = [path.read_text().split()[:3] for path in sorted(tmp_path.iterdir())]
    assert told == [[str(rank), "3", str(rank)] for rank in range(3)]


@pytest.mark.parametrize(("code", "error"), [(1, VlmError), (2, UsageError)])
def test_when_one_fails_it_says_why_and_the_others_are_ended(tmp_path, capfd, code, error):
    with pytest.raises(VlmError, match=f"Process 1 of 2 failed with exit code {code}") as raised:
        run_in_processes(work, Task(folder=tmp_path, failing=1, code=code, endless=True), 2)
    assert type(raised.value) is error
    assert "vlm: a shard is damaged" in capfd.readouterr().err


def test_they_end_when_the_one_that_started_them_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], cwd=ROOT)
    while sum(path.read_text().count(" ") for path in tmp_path.iterdir()) < 6:
        assert parent.poll() is None
        time.sleep(0.05)
    children = [psutil.Process(int(path.read_text().split()[-1])) for path in tmp_path.iterdir()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_embedding_refuses_processes_within_processes(monkeypatch, tmp_path):
    def embed(**options):
        Embed(model="m", shards="s", out=tmp_path / "out", **options).run()

    with pytest.raises(UsageError, match="give at least 1"):
        embed(processes=0)
    with pytest.raises(UsageError, match="GPU of its own"):
        embed(processes=2, device="cuda:1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="has started 2 processes"):
        embed(processes=2)
