"""The search service over HTTP and its page; what a request does without HTTP stands in `served_index`.

`vlm.serve` is here, so that a machine without the extra `serve` is told what it lacks.
"""

import ipaddress
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.config import text_list
from vlm.console import read_text
from vlm.errors import UsageError, os_errors_explained

if TYPE_CHECKING:
    from vlm.server.serving import ServerInfo

logger = logging.getLogger(__name__)


@os_errors_explained()
def serve(
    indexes: str | Path | Sequence[str | Path],
    *,
    model: str | Path = "",
    rerank: str | Path = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: str | Path | None = None,
    cors: Sequence[str] = (),
    show_paths: bool = False,
    rate: float = 0.0,
    max_results: int = 1000,
    max_body_mb: float = 20.0,
    max_batch: int = 64,
    cache: int = 10_000,
    workers: int = 1,
    log_requests: bool = False,
    on_ready: "Callable[[ServerInfo], None] | None" = None,
) -> None:
    """Serve indexes over HTTP until SIGTERM or SIGINT, as `vlm serve` does; to be called in the main thread.

    Args:
        indexes: folders, or NAME=FOLDER for another name than the folder's.
        model: where the indexes' model lies now, if it has moved.
        rerank: a model with a caption decoder that reranks where a query asks for it.
        port: 0 takes a free one, which `on_ready` tells.
        tokens: file with a token a line, `read SECRET` or `write SECRET`; VLM_READ_TOKEN and VLM_WRITE_TOKEN in the
            environment are others. Without tokens to write the indexes cannot be changed.
        cors: origins whose pages may use the API. show_paths: name files and shards in answers.
        rate: requests a second of one address, 0 for any number; the page's own files do not count. max_results: of one
            page. max_body_mb: of a request.
        max_batch: queries that are embedded and searched together. cache: texts whose embeddings are remembered.
        workers: threads that search each index. log_requests: log a line for each request.
        on_ready: called once with address and indexes, which `vlm serve --json` prints, when requests are answered.

    Raises:
        UsageError: the extra `serve` is not installed, no index is named, there is none, or a number is out of range.
        VlmError: the address is taken or not one of this machine.
    """
    try:
        from vlm.server.serving import open_service, run_service
    except ImportError as error:
        raise UsageError(f"vlm serve needs {error.name}: pip install 'vlm-pipeline[serve]'.") from error
    folders = [indexes] if isinstance(indexes, str | Path) else list(indexes)
    if not folders:
        raise UsageError("Name an index to serve: vlm serve INDEX.")
    read_tokens, write_tokens = read_tokens_of(None if tokens is None else Path(tokens))
    service = open_service(
        name_indexes(tuple(map(str, folders))),
        model_spec=str(model),
        rerank_spec=str(rerank),
        shows_paths=show_paths,
        cache_size=cache,
        read_tokens=read_tokens,
        write_tokens=write_tokens,
        max_results=max_results,
        max_body_bytes=int(max_body_mb * 1e6),
        requests_per_second=rate,
        max_batch=max_batch,
        workers=workers,
        cors_origins=tuple(text_list(cors, "cors")),
    )
    if not is_loopback(host) and not read_tokens:
        logger.warning(f"{host} is open to other machines and there is no token: everyone there may search.")
    run_service(service, host=host, port=port, logs_requests=log_requests, on_ready=on_ready)


def name_indexes(arguments: tuple[str, ...]) -> dict[str, Path]:
    """Index folders by name: the folder's, or that of NAME=FOLDER.

    >>> name_indexes(("photos", "old=photos/2019"))
    {'photos': PosixPath('photos'), 'old': PosixPath('photos/2019')}

    Raises:
        UsageError: two have one name.
    """
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        # a folder may have the sign in its name
        if not equals or Path(argument).is_dir():
            folder = argument
            name = Path(argument).resolve().name
        if name in named:
            raise UsageError(f"Two indexes are called {name!r}; name one differently: NAME={folder}.")
        named[name] = Path(folder)
    return named


def read_tokens_of(path: Path | None) -> tuple[frozenset[str], frozenset[str]]:
    """Tokens to read and tokens to write, from a file and from the environment.

    Raises:
        UsageError: a line is neither `read SECRET` nor `write SECRET`.
    """
    tokens: dict[str, set[str]] = {"read": set(), "write": set()}
    for right in tokens:
        if secret := os.environ.get(f"VLM_{right.upper()}_TOKEN"):
            tokens[right].add(secret)
    lines = read_text(path).splitlines() if path else []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in tokens:
            raise UsageError(f"Line {number} of {path} must be `read SECRET` or `write SECRET`.")
        tokens[words[0]].add(words[1])
    return frozenset(tokens["read"]), frozenset(tokens["write"])


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
