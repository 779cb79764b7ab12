"""`vlm serve` as a process: its start, its end, and what it says of mistakes."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

import vlm
from tests import preloaded
from tests.waiting import wait_until
from vlm.cli.main import main
from vlm.errors import UsageError
from vlm.index.reader import Index
from vlm.server import is_loopback, name_indexes, read_tokens_of, serving


def wait_for_text(log, process, pattern):
    """What the pattern's group holds, once the process has written it."""
    return wait_until(lambda: re.search(pattern, log.read_text()), process=process)[1]


@pytest.fixture
def start(index, tmp_path):
    """Starts a server on a free port; gives the process, its address, and the file of its log."""
    processes = []

    def make(*options, environment=None):
        log = tmp_path / f"log{len(processes)}"
        command = [sys.executable, "-m", "vlm", "serve", str(index), "--port", "0", *options]
        with log.open("w") as file:
            process = preloaded.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        processes.append(process)
        return process, wait_for_text(log, process, r"at (http://[^;]+);"), log

    yield make
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_no_accepted_request_is_lost_at_the_end(start, index):
    process, address, log = start("--log-requests")
    uid = Index.open(index).catalogue.entries([0])[0].uid
    answered, lock, is_over = set(), threading.Lock(), threading.Event()

    def ask(thread):
        with httpx.Client(base_url=address) as client:
            for number in range(100_000):
                name = f"{thread}-{number}"
                try:
                    response = client.post(
                        "/api/v1/indexes/index/search", json={"items": [uid]}, headers={"x-request-id": name}
                    )
                except httpx.TransportError:
                    # refused before it was accepted: the server has stopped listening
                    if is_over.is_set():
                        return
                    raise
                assert response.status_code == 200
                with lock:
                    answered.add(name)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(600):
        if len(answered) > 50:
            break
        threading.Event().wait(0.05)
    is_over.set()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert process.wait(timeout=60) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    completed = {line["request"] for line in lines if line["path"].endswith("/search")}
    assert len(completed) > 50
    assert completed == answered
    assert {line["status"] for line in lines} == {200}


def test_a_program_reads_the_address_from_one_line_of_json(index, tmp_path):
    command = [sys.executable, "-m", "vlm", "serve", str(index), "--port", "0", "--json"]
    shown = tmp_path / "shown"
    with shown.open("w") as file:
        process = preloaded.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: shown.read_text().endswith("\n"), process=process)
        [line] = shown.read_text().splitlines()
        started = json.loads(line)
        assert started["indexes"] == {"index": 11}
        assert httpx.get(f"{started['address']}/health").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_the_call_serves_what_the_verb_does(index, capsys, monkeypatch):
    started = []

    def run_service(service, *, on_ready, **options):
        rows = {name: len(served.service.index) for name, served in service.indexes.items()}
        started.append((service.limits, service.max_batch, service.cors_origins, options))
        on_ready(serving.ServerInfo(address="http://127.0.0.1:9", indexes=rows))

    monkeypatch.setattr(serving, "run_service", run_service)
    ready = []
    options = {"port": 9, "rate": 2.5, "max_body_mb": 1.5, "max_batch": 8, "cors": ["https://example.org"]}
    vlm.serve(f"photos={index}", **options, on_ready=ready.append)
    flags = ["--port", "9", "--rate", "2.5", "--max-body-mb", "1.5", "--max-batch", "8"]
    assert main(["serve", f"photos={index}", *flags, "--cors", "https://example.org", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ready[0].to_json()
    assert ready[0].indexes == {"photos": 11}
    assert started[0] == started[1]


def test_without_the_extra_the_cure_is_named(capsys, index, monkeypatch):
    for name in ("vlm.server.serving", "vlm.server.app", "uvicorn", "fastapi"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(index)]) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line == "vlm: vlm serve needs fastapi: pip install 'vlm-pipeline[serve]'."


def test_tokens_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "tokens").write_text("# people\nread abc\nwrite def\n\n")
    monkeypatch.setenv("VLM_READ_TOKEN", "env")
    assert read_tokens_of(tmp_path / "tokens") == (frozenset({"abc", "env"}), frozenset({"def"}))
    (tmp_path / "tokens").write_text("read\n")
    with pytest.raises(UsageError, match=r"Line 1 of .* must be `read SECRET`"):
        read_tokens_of(tmp_path / "tokens")


def test_indexes_are_named_by_their_folders_or_as_asked(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert name_indexes((str(tmp_path / "a=b"), "new=photos/x")) == {"a=b": tmp_path / "a=b", "new": Path("photos/x")}
    with pytest.raises(UsageError, match="Two indexes are called 'x'"):
        name_indexes(("photos/x", "x=old"))


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_what_only_this_machine_reaches(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Name an index to serve"),
        (["nowhere"], "nowhere"),
        (["INDEX", "--max-batch", "0"], "max_batch = 0 is out of range"),
        (["INDEX", "--tokens", "nowhere"], "nowhere"),
        (["INDEX", "--host", "999.1.1.1"], "cannot be listened on"),
    ],
)
def test_a_mistake_is_one_clear_sentence(capsys, index, options, message):
    words = [str(index) if word == "INDEX" else word for word in options]
    assert main(["serve", *words]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vlm: ")
    assert message in lines[-1]


HANGING = """
import sys, time
from pathlib import Path
from tests.server.conftest import ClassifyingModel
from vlm.server import serving

class Hanging(ClassifyingModel):
    def embed_texts(self, texts):
        if "hang" in texts:
            print("hangs", flush=True)
            time.sleep(600)
        return super().embed_texts(texts)

serving.SHUTDOWN_SECONDS, serving.CLOSING_SECONDS = float(sys.argv[2]), 0.5
service = serving.open_service({"index": Path(sys.argv[1])}, load=lambda _: Hanging())
serving.run_service(service, port=0, on_ready=lambda info: print(info.address, flush=True))
"""


@pytest.mark.parametrize(
    ("seconds", "signals", "reason"),
    [
        (0.5, [signal.SIGTERM], "had not ended 1 seconds after the signal"),
        (60, [signal.SIGINT, signal.SIGTERM, signal.SIGINT], "a second Ctrl-C"),
    ],
)
def test_a_request_that_hangs_keeps_no_server_alive(index, tmp_path, seconds, signals, reason):
    log = tmp_path / "log"
    with log.open("w") as file:
        words = [sys.executable, "-c", HANGING, str(index), str(seconds)]
        process = preloaded.Popen(words, stdout=file, stderr=file)
    try:
        address = wait_for_text(log, process, r"http://(\S+)").split(":")
        with socket.create_connection(address) as connection:
            body = b'{"texts":["hang"]}'
            connection.sendall(
                b"POST /api/v1/indexes/index/search HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            wait_for_text(log, process, "(hangs)")
            for number in signals:
                process.send_signal(number)
                time.sleep(0.3)
            assert process.wait(timeout=20) == 1
    finally:
        process.kill()
    assert reason in log.read_text()
