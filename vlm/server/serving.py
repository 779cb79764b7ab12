"""Open indexes as a service and run it until it is told to end; `vlm.serve` does both."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.console import pluralize
from vlm.errors import UsageError, VlmError
from vlm.index.encoder import AnyEncoder
from vlm.results import Result
from vlm.server.app import Service, create_app
from vlm.server.guard import Limits, Tokens
from vlm.server.served_index import ServedIndex
from vlm.service.query import load_query_encoder

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
SHUTDOWN_SECONDS = 30
"""How long requests that were accepted may take after the signal to end."""
CLOSING_SECONDS = 30
"""How long after that the threads that still work, on a batch or a change of an index, are waited for."""


def open_service(
    folders: Mapping[str, Path],
    *,
    model_spec: str = "",
    rerank_spec: str = "",
    shows_paths: bool = False,
    cache_size: int = 10_000,
    read_tokens: frozenset[str] = frozenset(),
    write_tokens: frozenset[str] = frozenset(),
    max_results: int = 1000,
    max_body_bytes: int = 20_000_000,
    requests_per_second: float = 0.0,
    max_batch: int = 64,
    workers: int = 1,
    cors_origins: tuple[str, ...] = (),
    load: Callable[[str], AnyEncoder] = load_query_encoder,
) -> Service:
    """Open index folders by name; arguments as the options of `vlm serve`.

    Raises:
        UsageError: a number is out of range; otherwise as `SearchService.open`.
    """
    numbers = {"max_results": max_results, "max_body_bytes": max_body_bytes, "max_batch": max_batch, "workers": workers}
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} = {number} is out of range: it must be at least 1.")
    indexes: dict[str, ServedIndex] = {}
    for name, folder in folders.items():
        indexes[name] = ServedIndex.open(
            name,
            folder,
            model_spec=model_spec,
            rerank_spec=rerank_spec,
            shows_paths=shows_paths,
            cache_size=cache_size,
            load=load,
        )
    return Service(
        indexes=indexes,
        limits=Limits(max_body_bytes=max_body_bytes, max_results=max_results, requests_per_second=requests_per_second),
        tokens=Tokens(read=read_tokens, write=write_tokens),
        max_batch=max_batch,
        workers=workers,
        cors_origins=cors_origins,
    )


@dataclass(frozen=True, kw_only=True)
class ServerInfo(Result):
    """A server that answers: its address, and the indexes by name with their rows."""

    address: str
    indexes: dict[str, int]


def run_service(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    logs_requests: bool = False,
    on_ready: Callable[[ServerInfo], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; accepted requests are answered before this returns.

    What hangs is not waited for: a second SIGINT, or `SHUTDOWN_SECONDS` and `CLOSING_SECONDS` after the first signal,
    end the process with exit code 1.

    on_ready: called once when requests are answered.

    Raises:
        VlmError: the address is taken or not one of this machine.
    """
    listener = _listen(host, port)
    if logs_requests:
        logging.getLogger("vlm.server.guard").setLevel(logging.DEBUG)
    server = _make_server(service)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            announcing = tasks.create_task(_announce(server, service, _address_of(listener), on_ready))
            await server.serve(sockets=[listener])
            announcing.cancel()

    # uvloop's, where it is installed
    with _ending_on_signals(server), asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(run())


@contextlib.contextmanager
def _ending_on_signals(server: Any) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the server well, and the process where that cannot be."""
    seconds = SHUTDOWN_SECONDS + CLOSING_SECONDS
    late = threading.Timer(seconds, _end_process, [f"it had not ended {seconds:g} seconds after the signal"])
    late.daemon = True

    def end(number: int, _: object) -> None:
        if not server.should_exit:
            server.should_exit = True
            late.start()
        elif number == signal.SIGINT:
            _end_process("a second Ctrl-C")

    # in place of uvicorn's own, which raises the signal again when it has ended well, as if it had been killed
    server.handle_exit = end
    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        late.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_process(reason: str) -> None:
    """End at once: a thread that hangs would be waited for by Python's own exit, too."""
    # not logged: whatever hangs may hold the lock of a log handler
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"The service was ended with work under way: {reason}. Changes that were answered are kept.\n")
        sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def serve_in_background(service: Service, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve from a thread while the block runs, as in a notebook; gives the address.

    Raises: as of `run_service`.
    """
    listener = _listen(host, port)
    server = _make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield _address_of(listener)
    finally:
        server.should_exit = True
        thread.join(SHUTDOWN_SECONDS + CLOSING_SECONDS)
        if thread.is_alive():
            logger.warning("The service still has work under way, which hangs; it is left alone.")
        listener.close()


def _make_server(service: Service) -> Any:
    import uvicorn

    config = uvicorn.Config(
        create_app(service),
        # httptools would be faster, but with it uvicorn bounds neither headers nor the requests that one connection
        # sends ahead, and misreads some that h11 reads right
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        # longer than clients keep idle connections (uvicorn's 5 s are httpx's, too): a request that is sent while the
        # server closes the connection is lost
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        lifespan="on",
    )
    return uvicorn.Server(config)


def _address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named, because asyncio sets TCP_NODELAY only where the protocol is: without it each answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise VlmError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port (0: any)."
        ) from error
    return listener


async def _announce(server: Any, service: Service, address: str, on_ready: Callable[[ServerInfo], None] | None) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    rows = {name: len(index.service.index) for name, index in service.indexes.items()}
    logger.info(f"Serving {', '.join(rows)} ({pluralize(sum(rows.values()), 'row')}) at {address}; Ctrl-C ends it.")
    if on_ready:
        on_ready(ServerInfo(address=address, indexes=rows))
