"""Python processes that need not import torch again: `Popen` and `run` as in subprocess, for `[sys.executable, …]`.

Importing torch, open_clip and transformers takes seconds of every process a test starts. A server imports them once and
forks: each process is a real one, with its own pid, arguments, environment, folder, streams and session, that can be
killed and waited for, and ends as any interpreter does. Tests of the start itself keep to subprocess.
"""

import atexit
import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED_FIRST = (
    "torch",
    "open_clip",
    "accelerate",
    "torch._dynamo",
    "torch.utils.data",
    "faiss",
    "pyarrow.parquet",
    "tyro",
    "vlm.train.run",
    "vlm.index.embed",
    "vlm.index.build",
    "vlm.service.search",
)
_MESSAGE_BYTES = 1 << 20
_server: "_Server | None" = None


class Popen:
    """A process forked from the server; what subprocess.Popen offers, as far as tests use it."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        assert args[0] == sys.executable, "only Python processes are forked"
        self.args, self.returncode = args, None
        self._is_text = text
        out, self.stdout = _stream(stdout, 1)
        err, self.stderr = (out, None) if stderr is subprocess.STDOUT else _stream(stderr, 2)
        request = {
            "args": list(args[1:]),
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "session": start_new_session,
        }
        self._answers = _open_server().request(request, (out, err))
        for file_descriptor in {out, err} - {1, 2}:
            os.close(file_descriptor)
        self.pid = int(self._read_answer()["pid"])

    def _read_answer(self) -> dict[str, int]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the server of preloaded processes ended")
        return json.loads(line)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._answers, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = self._read_answer()["code"]
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read both streams to their end, and wait."""
        read: dict[int, bytes] = {}

        def drain(stream: Any) -> None:
            read[stream.fileno()] = stream.read()

        piped = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        numbers = {id(stream): stream.fileno() for stream in piped}
        threads = [threading.Thread(target=drain, args=(stream,), daemon=True) for stream in piped]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        both = [None if s is None else read[numbers[id(s)]] for s in (self.stdout, self.stderr)]
        for stream in piped:
            stream.close()
        if self._is_text:
            both = [None if value is None else value.decode() for value in both]
        return both[0], both[1]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


def run(
    args: Sequence[str],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Start a process and wait for its end, as subprocess.run does."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Popen(args, **options)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    assert process.returncode is not None
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, err)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def run_ranks(args: Sequence[str], *, processes: int, port: int, env: Mapping[str, str]) -> list[str]:
    """Run the same command in several processes that find each other, as a launcher starts them; all must succeed.

    Returns what each wrote to stderr, by rank.
    """
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        Popen(args, env={**env, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    errors: list[str] = []
    for process in started:
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        errors.append(err)
    return errors


def _stream(wanted: Any, inherited: int) -> tuple[int, Any]:
    """The descriptor the process gets, and our end of a pipe."""
    if wanted is None:
        return inherited, None
    if wanted is subprocess.PIPE:
        ours, theirs = os.pipe()
        return theirs, os.fdopen(ours, "rb")
    if wanted is subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    return os.dup(wanted if isinstance(wanted, int) else wanted.fileno()), None


class _Server:
    """Our side of the server: it is started once in a process, and ends with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="preloaded-")
        self.address = str(Path(self._folder.name) / "socket")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", self.address], cwd=ROOT, env=environment, stdin=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not Path(self.address).exists():
            assert self._process.poll() is None, "the server of preloaded processes ended"
            assert time.monotonic() < deadline, "the server of preloaded processes did not start"
            time.sleep(0.02)
        atexit.register(self.close)

    def request(self, request: dict[str, Any], streams: tuple[int, int]) -> Any:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        connection.connect(self.address)
        socket.send_fds(connection, [json.dumps(request).encode()], list(streams))
        file = connection.makefile("r", buffering=1, encoding="utf-8")
        connection.close()  # the file keeps the socket open
        return file

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _open_server() -> _Server:
    global _server
    if _server is None:
        _server = _Server()
    return _server


def _serve(address: str) -> dict[str, Any]:
    """Fork a process for each request, for ever; in such a process, return what it has to run."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    running: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for readable in (listener.fileno(), wake_read, 0):
        selector.register(readable, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if 0 in ready:  # whoever started the server is gone
            os._exit(0)
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
            _report_ended(running)
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            message, streams, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                # a shell starts what runs in the background with this one ignored, which is inherited
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, stream in zip((1, 2), streams, strict=True):
                    os.dup2(stream, number)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                selector.close()
                for open_file in (listener, connection, *running.values()):
                    open_file.close()
                for descriptor in {*streams, wake_read, wake_write} - {0, 1, 2}:
                    os.close(descriptor)
                return json.loads(message)
            for stream in streams:
                os.close(stream)
            running[pid] = connection
            connection.send(json.dumps({"pid": pid}).encode() + b"\n")


def _report_ended(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection, contextlib.suppress(OSError):
                connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _become(request: dict[str, Any]) -> None:
    """Run what was asked for, as `python …` would."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # those of the server were made for other files
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = [path for path in paths if path not in sys.path]
    for path in paths:
        if (customise := Path(path) / "sitecustomize.py").is_file():
            runpy.run_path(str(customise))
    words = request["args"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = request["cwd"]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import importlib

    for module in IMPORTED_FIRST:
        importlib.import_module(module)
    _become(_serve(sys.argv[1]))
