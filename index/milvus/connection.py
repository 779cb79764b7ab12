"""A connection to Milvus: a server by its address, or milvus-lite on a local file; errors name the address.

pymilvus is imported here and nowhere else, and only when an index of Milvus is opened. Credentials come from the
environment (`VLM_MILVUS_TOKEN`) and are never written anywhere.
"""

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.tensor_types import Array, Float32, Int64

if TYPE_CHECKING:
    from pymilvus import MilvusClient

TOKEN_VARIABLE = "VLM_MILVUS_TOKEN"
"""The environment variable with a server's token: user:password, or an API key."""

LOCAL_SUFFIX = ".db"
MOST_RESULTS = 16_384
"""Results of one search, and rows of one answer, of which a server gives no more."""

_CONNECT_SECONDS = 10.0
_IDLE_MILLISECONDS = 3_600_000
# pymilvus goes on trying for as long as this
_CALL_SECONDS = 120.0
# a message of gRPC holds 64 MB with the settings of a Milvus server; entities are bigger there than here
_BATCH_BYTES = 8 << 20
_ROWS_AT_ONCE = 1000
_QUERIES_AT_ONCE = 100
# partial upserts, by which rows are marked as deleted, came with this version
_OLDEST_SERVER = (2, 6, 2)


@dataclass(frozen=True)
class MilvusAddress:
    """Where a collection lies: a file of milvus-lite, or the http(s) address of a server.

    text: as the manifest has it; the path of a file inside the index folder is relative to that.
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> "MilvusAddress":
        """Of an option or a manifest.

        Raises:
            UsageError: it is neither a local .db file nor an http(s) address, or holds a password.
        """
        if "://" not in text:
            if not text.endswith(LOCAL_SUFFIX):
                raise UsageError(
                    f"{text!r} is not an address of Milvus: give http://HOST:19530 of a server, or a local file "
                    f"that ends in {LOCAL_SUFFIX}, for milvus-lite."
                )
            return cls(text)
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"{text!r} is not an address of a Milvus server: give http://HOST:19530 or https://HOST:PORT."
            )
        # not repeated in the message: it may be a password
        if parts.username is not None or parts.password is not None or parts.query:
            raise UsageError(
                f"The address of {parts.hostname} holds credentials, and an index folder must not: put user:password "
                f"or the API key into the environment as {TOKEN_VARIABLE}, and leave it out of the address."
            )
        return cls(text)

    @property
    def is_local(self) -> bool:
        """Whether it is a file of milvus-lite."""
        return "://" not in self.text

    def uri(self, folder: Path) -> str:
        """As pymilvus takes it. folder: the index folder."""
        return str((folder / self.text).absolute()) if self.is_local else self.text


_NO_DOTENV = "PYTHON_DOTENV_DISABLED"

# milvus-lite runs its server within the process; it is stopped when the last index on its file is closed, so that
# another process can open the file
_users: Counter[str] = Counter()
_users_lock = threading.Lock()


def load_pymilvus() -> Any:
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    switch = os.environ.get(_NO_DOTENV)
    # its first import reads the .env file above site-packages into this process (findings)
    os.environ[_NO_DOTENV] = "1"
    # gRPC, which it imports, would say on stderr of every process that is forked while a connection is open, that it
    # leaves that one alone
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        import pymilvus
    except ImportError as error:
        raise UsageError(
            f"An index of the engine milvus needs pymilvus ({error}): pip install 'vlm-pipeline[milvus]'."
        ) from error
    finally:
        if switch is None:
            del os.environ[_NO_DOTENV]
        else:
            os.environ[_NO_DOTENV] = switch
    # it logs each refusal with a traceback before it raises it, and so does the server of milvus-lite
    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus


class MilvusConnection:
    """One client of Milvus; every call has a time limit, and its errors name the address.

    Raises:
        UsageError: pymilvus or milvus-lite is not installed, or another process has the file of milvus-lite open.
        VlmError: the server does not answer, refuses the token, or is too old.
    """

    def __init__(self, address: MilvusAddress, folder: Path) -> None:
        self.address = address
        self.uri = address.uri(folder)
        self.client: MilvusClient = self._connect()
        self._is_closed = False

    def _connect(self) -> "MilvusClient":
        pymilvus = load_pymilvus()
        if self.address.is_local:
            with _users_lock:
                client = self._connect_locally(pymilvus)
                _users[self.uri] += 1
            return client
        token = os.environ.get(TOKEN_VARIABLE, "")
        with self.explained("cannot be reached"):
            client = pymilvus.MilvusClient(self.uri, token=token, timeout=_CONNECT_SECONDS)
            version = str(client.get_server_version(timeout=_CONNECT_SECONDS))
        # v2.6.4-dev has the numbers 2, 6 and 4
        released = version.lstrip("v").split("-")[0]
        numbers = tuple(map(int, filter(str.isdigit, released.split("."))))
        # a build from source has no number
        if numbers and numbers < _OLDEST_SERVER:
            oldest = ".".join(map(str, _OLDEST_SERVER))
            raise VlmError(f"Milvus at {self.uri} is {version}; {oldest} or later is needed: update the server.")
        return client

    def _connect_locally(self, pymilvus: Any) -> "MilvusClient":
        try:
            import milvus_lite  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"{self.uri} is a file of milvus-lite, which is not installed ({error}): pip install "
                "'vlm-pipeline[milvus]', or build the index on a server."
            ) from error
        if not Path(self.uri).parent.is_dir():
            raise UsageError(f"{self.uri} cannot be opened: there is no folder {Path(self.uri).parent}.")
        try:
            # an idle client would ask every ten seconds whether the server lives, which hangs up on that with a message
            return pymilvus.MilvusClient(
                self.uri, timeout=_CONNECT_SECONDS, grpc_options={"grpc.keepalive_time_ms": _IDLE_MILLISECONDS}
            )
        except pymilvus.exceptions.MilvusException as error:
            raise UsageError(
                f"{self.uri} cannot be opened by milvus-lite ({_message(error)}). One process at a time can have it "
                "open: end the other one (as vlm serve), or keep the index on a Milvus server."
            ) from error

    def close(self) -> None:
        """Let go of the server; that of milvus-lite stops with the last one that uses it."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(Exception):
            self.client.close()
        if not self.address.is_local:
            return
        from milvus_lite.server_manager import server_manager_instance

        with _users_lock:
            _users[self.uri] -= 1
            if not _users[self.uri]:
                server_manager_instance.release_server(self.uri)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Raise what pymilvus raises as one sentence.

        what: that failed, as "cannot be searched".

        Raises:
            VlmError: the block failed.
        """
        pymilvus = load_pymilvus()
        try:
            yield
        except pymilvus.exceptions.MilvusException as error:
            cure = "" if self.address.is_local else f"; is the server up, and {TOKEN_VARIABLE} right?"
            raise VlmError(f"Milvus at {self.uri} {what}: {_message(error)}{cure}") from error

    def has(self, collection: str) -> bool:
        """Whether there is a collection of this name."""
        with self.explained("cannot list its collections"):
            return bool(self.client.has_collection(collection, timeout=_CALL_SECONDS))

    def load(self, collection: str) -> None:
        """Let a collection be searched; milvus-lite forgets that when its file is closed, a server does not."""
        with self.explained(f"cannot load {collection}"):
            self.client.load_collection(collection, timeout=_CALL_SECONDS)

    def drop(self, collection: str) -> None:
        """Remove a collection, if there is one of this name."""
        with self.explained(f"cannot drop {collection}"):
            self.client.drop_collection(collection, timeout=_CALL_SECONDS)

    def insert(self, collection: str, entities: Iterable[Mapping[str, Any]]) -> None:
        """Insert entities, as many at once as fit into a message."""
        for batch in _batches(entities):
            with self.explained(f"cannot insert into {collection}"):
                self.client.insert(collection, batch, timeout=_CALL_SECONDS)

    def set_field(self, collection: str, rows: Iterable[int], field: str, value: int) -> None:
        """Set one field of rows; the others stay as they are."""
        for batch in _batches({"row": row, field: value} for row in rows):
            with self.explained(f"cannot update {collection}"):
                self.client.upsert(collection, batch, partial_update=True, timeout=_CALL_SECONDS)

    def delete(self, collection: str, expression: str) -> None:
        """Delete the entities that an expression selects."""
        with self.explained(f"cannot delete from {collection}"):
            self.client.delete(collection, filter=expression, timeout=_CALL_SECONDS)

    def flush(self, collection: str) -> None:
        """Seal what was inserted, so that it is indexed."""
        with self.explained(f"cannot flush {collection}"):
            self.client.flush(collection, timeout=_CALL_SECONDS)

    def count(self, collection: str, expression: str) -> int:
        """The number of entities that an expression selects."""
        with self.explained(f"cannot count in {collection}"):
            answer = self.client.query(
                collection,
                filter=expression,
                output_fields=["count(*)"],
                consistency_level="Strong",
                timeout=_CALL_SECONDS,
            )
        return int(answer[0]["count(*)"])

    def fetch(
        self, collection: str, field: str, values: Sequence[int] | Sequence[str], fields: Sequence[str], *, where: str
    ) -> Iterator[dict[str, Any]]:
        """The entities that have one of the values in a field, in no order.

        values: whole numbers or hex digits, which need no quoting. where: an expression that they fulfil too.
        """
        for first in range(0, len(values), _ROWS_AT_ONCE):
            block = values[first : first + _ROWS_AT_ONCE]
            literals = ", ".join(str(value) if isinstance(value, int) else f'"{value}"' for value in block)
            with self.explained(f"cannot query {collection}"):
                yield from self.client.query(
                    collection,
                    filter=f"{field} in [{literals}] and {where}",
                    output_fields=list(fields),
                    consistency_level="Strong",
                    limit=MOST_RESULTS,
                    timeout=_CALL_SECONDS,
                )

    def iterate(self, collection: str, expression: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All entities that an expression selects, in the order of their rows, in answers of bounded size."""
        with self.explained(f"cannot query {collection}"):
            iterator = self.client.query_iterator(
                collection,
                filter=expression,
                output_fields=list(fields),
                batch_size=_ROWS_AT_ONCE,
                consistency_level="Strong",
                timeout=_CALL_SECONDS,
            )
        try:
            while True:
                with self.explained(f"cannot query {collection}"):
                    batch = iterator.next()
                if not batch:
                    return
                yield from batch
        finally:
            iterator.close()

    def search(
        self,
        collection: str,
        queries: Float32[Array, "Q D"],
        top: int,
        *,
        expression: str,
        parameters: Mapping[str, int],
    ) -> list[list[tuple[float, int]]]:
        """For each query the nearest entities that an expression selects: cosine and row, best first.

        top: at most `MOST_RESULTS`.
        """
        results: list[list[tuple[float, int]]] = []
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            with self.explained(f"cannot search {collection}"):
                answer = self.client.search(
                    collection,
                    data=list(queries[first : first + _QUERIES_AT_ONCE]),
                    anns_field="vector",
                    filter=expression,
                    limit=top,
                    # an empty list would be answered with all fields by milvus-lite, vectors included
                    output_fields=["row"],
                    search_params={"metric_type": "COSINE", "params": dict(parameters)},
                    consistency_level="Strong",
                    timeout=_CALL_SECONDS,
                )
            for hits in answer:
                results.append([(float(hit["distance"]), int(hit["row"])) for hit in hits])
        return results

    def rows(self, collection: str, expression: str) -> Int64[Array, " N"]:
        """The rows that an expression selects, ascending."""
        entities = self.iterate(collection, expression, ["row"])
        return np.sort(np.fromiter((entity["row"] for entity in entities), np.int64))


def _batches(entities: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Entities by as many as one message may hold."""
    batch: list[dict[str, Any]] = []
    num_bytes = 0
    for entity in entities:
        size = sum(map(_size, entity.values()))
        if batch and (num_bytes + size > _BATCH_BYTES or len(batch) == _ROWS_AT_ONCE):
            yield batch
            batch = []
            num_bytes = 0
        batch.append(dict(entity))
        num_bytes += size
    if batch:
        yield batch


def _size(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(name) + _size(content) for name, content in value.items())
    return sum(map(len, value)) if isinstance(value, list) else 8


def _message(error: Exception) -> str:
    """What a server says, in one line."""
    text = str(getattr(error, "message", "") or error)
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else type(error).__name__
