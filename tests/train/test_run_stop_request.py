import logging
import os
import signal
import time

import pytest

from vlm.data import loader
from vlm.train.run import StopRequest


def test_sigterm_and_sigint_are_remembered_and_a_second_sigint_ends(caplog):
    caplog.set_level(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert stop.signal_name == number.name
            assert not stop.is_save_requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert "SIGTERM: saving after this step" in caplog.text


def test_sigusr1_asks_for_a_checkpoint_again_and_again(caplog):
    caplog.set_level(logging.INFO)
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.is_save_requested
            assert not stop
            stop.mark_saved()
            assert not stop.is_save_requested
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "training continues" in caplog.text


@pytest.mark.parametrize(
    ("number", "want"), [(signal.SIGUSR1, 7), (signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_in_a_worker_only_sigterm_has_an_effect(number, want, capfd):
    with StopRequest() as stop:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == want
        assert not stop
        assert not stop.is_save_requested
    assert capfd.readouterr().err == ""


def test_a_loader_worker_outlives_sigterm_by_the_time_the_run_needs(monkeypatch):
    monkeypatch.setattr(loader, "_STOP_SECONDS", 0.5)
    started = time.monotonic()
    child = os.fork()
    if not child:
        loader._init_worker(0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert time.monotonic() - started >= 0.5
