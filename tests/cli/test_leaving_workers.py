"""How a command ends whose workers do not."""

import os
import signal
import sys

import psutil

from tests import preloaded
from tests.waiting import wait_until

HANGING = """
import multiprocessing, os, sys, time
from pathlib import Path
from vlm.cli import main as cli

def work():
    Path(sys.argv[1] + ".new").write_text(str(os.getpid()))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(600)

def run_verb(verb, rest):
    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    time.sleep(600)

cli.run_verb, cli.main.__defaults__ = run_verb, (["embed"],)
cli.enter()
"""


def test_an_interrupted_command_does_not_wait_for_a_worker_that_is_stopped(tmp_path):
    told = tmp_path / "pid"
    process = preloaded.Popen([sys.executable, "-c", HANGING, str(told)])
    wait_until(told.exists, process=process)
    worker = psutil.Process(int(told.read_text()))
    try:
        os.kill(worker.pid, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 1
        wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.kill()
        if worker.is_running():
            worker.kill()
