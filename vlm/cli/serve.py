"""`vlm serve`: the search service and its page."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import call_options
from vlm.files import json_text

if TYPE_CHECKING:
    from vlm.server.serving import ServerInfo

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
    while it runs. It ends when all accepted requests are answered (Ctrl-C, SIGTERM), at the latest a
    minute after the signal; a second Ctrl-C ends it at once.
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
    """Requests a second of one address, on average; 0 does not limit them.

    The page's own files do not count; its results ask for up to 40 images at a time.
    """

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
        from vlm.server import serve

        serve(**call_options(self), on_ready=show_address if self.json else None)


def show_address(server: "ServerInfo") -> None:
    """One line of JSON on stdout, at once, for the program that has started the server."""
    print(json_text(server.to_json()), flush=True)
