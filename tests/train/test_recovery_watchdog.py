"""Real processes that hang, and are ended."""

import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]


def is_alive(pid):
    """Whether a process runs; one that nobody has collected yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def hang(tmp_path, body, *, minutes=0.02, fallback_seconds=30.0):
    script = f"""
    import sys, time
    from pathlib import Path
    from vlm.train.recovery import Watchdog
    folder = Path({str(tmp_path)!r})
    seconds = {fallback_seconds}
    with Watchdog(folder, minutes={minutes}, process=3, num_processes=1, fallback_seconds=seconds) as watchdog:
        watchdog.set_phase("step 12", after="step 11 is done")
    """
    code = textwrap.dedent(script) + textwrap.indent(textwrap.dedent(body), "    ")
    return preloaded.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )


def test_a_process_that_hangs_ends_with_where_it_stood(tmp_path):
    done = hang(
        tmp_path,
        """
        def waiting_for_a_lock():
            time.sleep(300)

        watchdog.set_phase("waiting for data")
        waiting_for_a_lock()
        """,
    )
    assert done.returncode == 1
    assert "Process 3 of 1 (pid " in done.stderr
    assert "has been waiting for data for 0.02" in done.stderr
    assert "before that: step 11 is done" in done.stderr
    assert f"vlm train {tmp_path} --resume" in done.stderr
    told = (tmp_path / "hang-3.txt").read_text()
    assert "waiting_for_a_lock" in told
    assert "has been waiting for data" in told


def test_the_workers_are_named_with_the_shard_they_have_open(tmp_path):
    (tmp_path / "00003.tar").write_bytes(b"")
    done = hang(
        tmp_path,
        """
        import multiprocessing

        def read():
            with (folder / "00003.tar").open("rb"):
                time.sleep(300)

        worker = multiprocessing.get_context("fork").Process(target=read, daemon=True)
        worker.start()
        (folder / "pid").write_text(str(worker.pid))
        time.sleep(300)
        """,
    )
    assert done.returncode == 1
    assert f"(sleeping) has {tmp_path / '00003.tar'} open" in done.stderr
    assert "00003.tar" in (tmp_path / "hang-3.txt").read_text()
    deadline = time.monotonic() + 20
    while is_alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_goes_on_is_left_alone_and_leaves_nothing(tmp_path):
    done = hang(
        tmp_path,
        """
        for number in range(12):
            time.sleep(0.2)
            watchdog.set_phase(f"step {number}")
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_code_that_holds_pythons_lock_is_ended_too(tmp_path):
    body = """
        import ctypes
        watchdog.set_phase("step 13")
        ctypes.PyDLL(None).sleep(300)
    """
    done = hang(tmp_path, body, fallback_seconds=1.0)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
