import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import psutil
import pytest

from tests.waiting import wait_until
from vlm.data import forked_map
from vlm.data.forked_map import can_fork, map_forked
from vlm.errors import BadSample, VlmError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on Linux alone")


def results_of(work, numbers, *, processes=2, size_of=len):
    return map_forked(work, numbers, processes=processes, size_of=size_of)


@pytest.mark.parametrize("numbers", [range(1), range(2), range(33), range(5, 700), range(255, 258)])
@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_numbers(numbers, processes):
    made = list(results_of(lambda number: bytes([number % 251]), numbers, processes=processes))
    assert made == [bytes([number % 251]) for number in numbers]


def test_other_processes_do_the_work():
    made = set(results_of(lambda _: os.getpid(), range(600), size_of=lambda _: 1 << 16))
    # the first number is done here
    assert len(made - {os.getpid()}) == 2
    assert os.getpid() in made


def test_large_results_come_one_by_one_and_in_order():
    sizes = [(number * 7 % 5) << 20 for number in range(70)]
    made = results_of(lambda number: bytes(sizes[number]), range(70))
    assert list(map(len, made)) == sizes


def test_results_that_are_not_taken_wait(monkeypatch):
    """Far more than may wait, and a consumer that begins late: nothing is lost, and nothing hangs."""
    monkeypatch.setattr(forked_map, "_MAX_WAITING_BYTES", 1 << 18)
    results = results_of(lambda number: bytes(1 << 14) + bytes([number % 251]), range(600))
    made = [next(results)]
    time.sleep(0.5)
    made += results
    assert [result[-1] for result in made] == [number % 251 for number in range(600)]


def test_more_batches_than_may_wait_come_in_order(monkeypatch):
    monkeypatch.setattr(forked_map, "_MAX_PENDING", 2)
    made = []
    for result in map_forked(lambda number: number, range(200), processes=2, size_of=lambda _: 0, max_batch=1):
        time.sleep(0.001)
        made.append(result)
    assert made == list(range(200))


def test_a_slow_number_holds_back_those_after_it_alone():
    made = []
    for result in results_of(
        lambda number: time.sleep(0.2 * (number == 40)) or number, range(400), size_of=lambda _: 1
    ):
        made.append(result)
    assert made == list(range(400))


@pytest.mark.parametrize("at", [0, 1, 200, 399])
def test_what_the_work_raises_comes_after_the_results_before_it(at):
    def work(number):
        if number >= at:
            raise FileNotFoundError(2, "gone", f"{number}.jpg")
        return number

    results = results_of(work, range(400), size_of=lambda _: 1)
    assert list(islice(results, at)) == list(range(at))
    with pytest.raises(FileNotFoundError, match=f"{at}.jpg"):
        next(results)
    assert not multiprocessing.active_children()


def test_an_error_that_cannot_be_sent_comes_as_its_text():
    class Local(Exception):
        pass

    def work(number):
        if number == 3:
            raise Local("of this function")
        return b""

    with pytest.raises(RuntimeError, match="Local: of this function"):
        list(results_of(work, range(10)))


def test_a_bad_sample_travels():
    bad = pickle.loads(pickle.dumps(BadSample("no image", "k1 has none")))
    assert (bad.reason, bad.detail, str(bad)) == ("no image", "k1 has none", "no image: k1 has none")


def test_a_killed_process_is_an_error_that_names_the_cure():
    parent = os.getpid()

    def work(number):
        if number == 300 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(VlmError, match=r"killed by signal 9.*memory.*Rerun.*taskset -c 0"):
        list(results_of(work, range(1000), size_of=lambda _: 1))
    assert not multiprocessing.active_children()


def test_closing_it_ends_the_processes_even_one_that_hangs():
    parent = os.getpid()
    results = results_of(
        lambda number: time.sleep(3600 * (os.getpid() != parent and number > 40)), range(400), size_of=bool
    )
    for _ in range(20):
        next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


def test_processes_whose_parent_was_killed_end_before_their_next_number():
    """Long before the end of their batch, of 32 numbers here."""
    script = "import time; from vlm.data.forked_map import map_forked\n"
    script += "work = lambda number: time.sleep(2 * (number > 0))\n"
    script += "list(map_forked(work, range(400), processes=2, size_of=lambda _: 0))"
    started = subprocess.Popen([sys.executable, "-c", script])
    parent = psutil.Process(started.pid)
    wait_until(lambda: len(parent.children()) == 2, process=started)
    workers = parent.children()
    # into the first batch: before that they end by the pipe
    time.sleep(0.5)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_results_are_all_there_where_the_ends_of_processes_are_not_told():
    """As supervisors may leave it: nobody can wait for a child then."""
    script = "import signal; from vlm.data.forked_map import map_forked\n"
    script += "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    script += "print(sum(map_forked(lambda number: number, range(400), processes=2, size_of=lambda _: 1)))"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60).stdout == b"79800\n"
    )


@pytest.mark.parametrize("at", [0, 1])
def test_without_room_for_processes_this_one_does_the_work(monkeypatch, at):
    fork = forked_map._fork

    def refuse(work, size_of, earlier):
        if len(earlier) == at:
            raise OSError(24, "Too many open files")
        return fork(work, size_of, earlier)

    monkeypatch.setattr(forked_map, "_fork", refuse)
    assert list(results_of(lambda _: os.getpid(), range(400), size_of=lambda _: 1)) == [os.getpid()] * 400
    assert not multiprocessing.active_children()


def test_the_last_numbers_are_shared_by_all():
    def work(_):
        time.sleep(0.002)
        return os.getpid()

    made = list(results_of(work, range(600), size_of=lambda _: 1))
    assert len(set(made[-64:])) == 2


def test_a_process_with_threads_does_not_fork():
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert not can_fork()
    finally:
        end.set()
        thread.join()
