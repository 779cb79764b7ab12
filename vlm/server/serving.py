"""Open indexes as a service and run it until it is told to end; the same as `vlm serve`, from Python."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm.errors import UsageError, VlmError
from vlm.index.encoder import Encoder
from vlm.server.app import Service, create_app
from vlm.server.guard import Limits, Tokens
from vlm.server.served_index import ServedIndex
from vlm.service.search import load_encoder

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 30
"""How long requests that were accepted may take after the signal to end."""


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
    load: Callable[[str], Encoder] = load_encoder,
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


def serve(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    logs_requests: bool = False,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; accepted requests are answered before this returns.

    on_start: called with the address once requests are accepted.

    Raises:
        VlmError: the address is taken or not one of this machine.
    """
    import uvicorn

    listener = _listen(host, port)
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listener.getsockname()[1]}"
    if logs_requests:
        logging.getLogger("vlm.server.guard").setLevel(logging.DEBUG)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        lifespan="on",
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        announcing = asyncio.create_task(_announce(server, service, address, on_start))
        await server.serve(sockets=[listener])
        announcing.cancel()

    # uvicorn raises the signal again when it has ended well; that is no error here
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise VlmError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port (0: any)."
        ) from error
    return listener


async def _announce(server: Any, service: Service, address: str, on_start: Callable[[str], None] | None) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    rows = sum(len(index.service.index) for index in service.indexes.values())
    logger.info(f"Serving {len(service.indexes)} index(es), {rows:,} rows: {address} (Ctrl-C ends)")
    if on_start:
        on_start(address)
