"""`vlm serve`: the search service and its page."""

import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import read_text
from vlm.errors import UsageError
from vlm.files import json_text

if TYPE_CHECKING:
    from vlm.server.serving import ServerInfo

logger = logging.getLogger(__name__)

_TOKENS_HELP = (
    "File with a token a line, each after its right: `read SECRET` or `write SECRET`; also the environment variables "
    "VLM_READ_TOKEN and VLM_WRITE_TOKEN. Without tokens to read everyone may read; without tokens to write the indexes "
    "cannot be changed."
)
_INDEX_HELP = "Index folders; NAME=FOLDER gives an index another name than its folder's."


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve indexes over HTTP: a search page at /, the API at /api/v1 (OpenAPI: /api/v1/openapi.json).

    It also answers OpenAI's /v1/embeddings and clip-retrieval's /knn-service. New versions of an index are taken up
    while it runs. It ends when all accepted requests are answered (Ctrl-C, SIGTERM).
    """

    indexes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INDEX", help=_INDEX_HELP)]

    model: str = ""
    """New location of the indexes' model, if it has moved."""

    rerank: str = ""
    """Model with a caption decoder that reranks where a query asks for it."""

    host: str = "127.0.0.1"
    """Address to listen on; only this machine by default."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    tokens: Annotated[Path | None, tyro.conf.arg(help=_TOKENS_HELP)] = None

    cors: tuple[str, ...] = ()
    """Origins whose pages may use the API, e.g. https://example.org."""

    show_paths: bool = False
    """Name files and shards in answers."""

    rate: float = 0.0
    """Requests a second of one address, on average; 0 does not limit them."""

    max_results: int = 1000
    """Maximum number of hits of one page."""

    max_body_mb: float = 20.0
    """Maximum size of a request in MB (10⁶ bytes)."""

    max_batch: int = 64
    """Maximum number of concurrent queries embedded and searched together; 1 turns micro-batching off."""

    cache: int = 10_000
    """Number of texts whose embeddings are remembered."""

    workers: int = 1
    """Threads that search each index."""

    log_requests: bool = False
    """Log each request as a JSON line."""

    json: bool = False
    """Print one line of JSON with the address when requests are answered."""

    def run(self) -> None:
        """Open the indexes and serve until the end."""
        try:
            from vlm.server.serving import open_service, serve
        except ImportError as error:
            raise UsageError(f"vlm serve needs {error.name}: pip install 'vlm-pipeline[serve]'.") from error
        if not self.indexes:
            raise UsageError("Name an index to serve: vlm serve INDEX.")
        read_tokens, write_tokens = read_tokens_of(self.tokens)
        service = open_service(
            name_indexes(self.indexes),
            model_spec=self.model,
            rerank_spec=self.rerank,
            shows_paths=self.show_paths,
            cache_size=self.cache,
            read_tokens=read_tokens,
            write_tokens=write_tokens,
            max_results=self.max_results,
            max_body_bytes=int(self.max_body_mb * 1e6),
            requests_per_second=self.rate,
            max_batch=self.max_batch,
            workers=self.workers,
            cors_origins=self.cors,
        )
        if not is_loopback(self.host) and not read_tokens:
            logger.warning(f"{self.host} is open to other machines and there is no token: everyone there may search.")
        serve(
            service,
            host=self.host,
            port=self.port,
            logs_requests=self.log_requests,
            on_ready=show_address if self.json else None,
        )


def show_address(server: "ServerInfo") -> None:
    """One line of JSON on stdout, at once, for the program that has started the server."""
    print(json_text(server.to_json()), flush=True)


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
