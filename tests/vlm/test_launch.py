import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until
from vlm.cli.embed import Embed
from vlm.errors import UsageError, VlmError
from vlm.launch import run_in_processes

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = """
import sys
from pathlib import Path
from tests.vlm.test_launch import Task, work
from vlm.launch import run_in_processes
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


def work(task: Task) -> int:
    """Write down the number, and return, fail, or never end."""
    rank = int(os.environ["RANK"])
    told = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    (task.folder / f"{rank}").write_text(" ".join([*told, str(os.getpid())]))
    if rank == task.failing:
        raise {1: VlmError, 2: UsageError, 3: ZeroDivisionError}[task.code]("a shard is damaged")
    if task.endless:
        time.sleep(600)
    return rank


def test_each_process_is_told_its_number_and_what_they_return_comes_back(tmp_path):
    assert run_in_processes(work, Task(folder=tmp_path), 3) == [0, 1, 2]
    told = [path.read_text().split()[:3] for path in sorted(tmp_path.iterdir())]
    assert told == [[str(rank), "3", str(rank)] for rank in range(3)]
    assert "RANK" not in os.environ


@pytest.mark.parametrize(("code", "error"), [(1, VlmError), (2, UsageError)])
def test_when_one_fails_its_error_is_raised_once_and_the_others_are_ended(tmp_path, capfd, code, error):
    with pytest.raises(VlmError, match=r"^a shard is damaged \(From process 1 of 2; the others were ended") as raised:
        run_in_processes(work, Task(folder=tmp_path, failing=1, code=code, endless=True), 2)
    assert type(raised.value) is error
    assert raised.value.exit_code == code
    # whoever shows the error says it; the processes themselves are silent
    assert "damaged" not in capfd.readouterr().err


def test_an_error_that_nobody_foresaw_comes_with_its_trace(tmp_path):
    with pytest.raises(VlmError, match=r"(?s)Process 0 of 2 failed:\nTraceback.*ZeroDivisionError: a shard is damaged"):
        run_in_processes(work, Task(folder=tmp_path, failing=0, code=3, endless=True), 2)


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    def kill_the_first() -> None:
        wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "0").read_text())
        os.kill(int((tmp_path / "0").read_text().split()[-1]), signal.SIGKILL)

    threading.Thread(target=kill_the_first, daemon=True).start()
    with pytest.raises(VlmError, match="Process 0 of 2 was killed by signal 9"):
        run_in_processes(work, Task(folder=tmp_path, endless=True), 2)


def test_they_end_when_the_one_that_started_them_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], cwd=ROOT)
    wait_until(lambda: sum(path.read_text().count(" ") for path in tmp_path.iterdir()) == 6, process=parent)
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
