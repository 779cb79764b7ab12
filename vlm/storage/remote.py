"""Remote files through fsspec: what identifies one, its bytes from any position on, and what lies in a folder.

Patience with the network: what is worth another try, how long to wait for it, and when to give up.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import fsspec
import fsspec.config
import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of
from vlm.storage.urls import is_remote, protocol_of, require_package

_PASSING = frozenset({408, 416, 425, 429})
_REFUSALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
        "DefaultCredentialsError",
        "RefreshError",
        "GatedRepoError",
    }
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When to give up.

    attempts: failures in a row without a new byte between them.
    seconds: time since the first of these.
    first_wait, longest_wait: seconds; the wait doubles from one to the other, times a chance factor in [0.5, 1.5).
    """

    attempts: int = 8
    seconds: float = 600.0
    first_wait: float = 0.5
    longest_wait: float = 30.0


class Stopped(Exception):
    """A fetch was called off; what it had is kept."""


class Retry:
    """The tries at one address: tells each failure whether, and after how long, another one follows.

    stop: set by whoever calls the work off; ends a wait at once.
    """

    def __init__(
        self, address: str, patience: Patience, *, rng: np.random.Generator, stop: threading.Event | None = None
    ) -> None:
        self.address, self._patience, self._rng = address, patience, rng
        self.stop = stop or threading.Event()
        self._failures, self._since = 0, 0.0

    def progressed(self) -> None:
        """A new byte came: count from nought again."""
        self._failures = 0

    def after(self, error: Exception) -> None:
        """Wait for the next try, or raise what ends them.

        Raises:
            UsageError: there is no such file.
            VlmError: access is refused, or patience is at its end.
            Stopped: the work was called off.
        """
        if isinstance(error, VlmError | Stopped):
            raise error
        verdict = judge(error)
        if verdict == "absent":
            raise UsageError(f"There is no shard {self.address!r}.") from error
        if verdict == "refused":
            raise VlmError(
                f"{self.address} may not be read: {describe(error)}. Not tried again; check the credentials "
                "in the environment of this command, and the rights to that address."
            ) from error
        now = time.monotonic()
        self._since = self._since if self._failures else now
        self._failures += 1
        if self._failures >= self._patience.attempts or now - self._since > self._patience.seconds:
            raise VlmError(
                f"{self.address} cannot be read: {describe(error)}. Given up after {self._failures} attempts in "
                f"{now - self._since:.0f} s without a new byte; check the network and the address, then run again: "
                "what was fetched is kept."
            ) from error
        wait = min(self._patience.longest_wait, self._patience.first_wait * 2.0 ** (self._failures - 1))
        if self.stop.wait(wait * (0.5 + self._rng.random())):
            raise Stopped


def judge(error: BaseException) -> Literal["absent", "refused", "again"]:
    """Whether the file is not there, may not be read, or is worth another try.

    fsspec's HTTP file system tells every failure to ask for a size as a missing file; its cause says what it was.
    """
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return judge(error.__cause__)
    status = _status(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError | IsADirectoryError)):
        return "absent"
    is_refusal = isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS
    if is_refusal or (status is not None and 400 <= status < 500 and status not in _PASSING):
        return "refused"
    return "again"


def describe(error: BaseException) -> str:
    """An error in one line, with its kind."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return describe(error.__cause__)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _status(error: Any) -> int | None:
    """The HTTP status an error of aiohttp, botocore, gcsfs, requests or httpx carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    else:
        found = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return found if isinstance(found, int) and 100 <= found < 600 else None


Answer = TypeVar("Answer")

BLOCK_BYTES = 8 << 20
_VERSIONS = (
    "ETag",
    "etag",
    "blob_id",
    "generation",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
_SYSTEMS: dict[tuple[int, int, str], Any] = {}
_IDENTITIES: dict[str, "Identity"] = {}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells one version of a file from another.

    size: in bytes. version: ETag or time of change, as far as the server says.
    sha256: in hex where the server knows it (Hugging Face's large files), else empty.
    """

    size: int
    version: str
    sha256: str = ""

    @property
    def token(self) -> str:
        """Size and version as one word."""
        return f"{self.size}/{self.version}"


def identity_of(address: str, patience: Patience | None = None) -> Identity:
    """The identity of a file, asked once per process for a remote one, so that a whole run sees one version of it.

    Raises:
        UsageError: there is no such file.
        VlmError: it cannot be asked, or the server does not say its size.
    """
    if not is_remote(address):
        return ask_identity(address)
    if address not in _IDENTITIES:
        _IDENTITIES[address] = ask_identity(address, patience)
    return _IDENTITIES[address]


def forget_identities() -> None:
    """Ask again about files that may have changed since this process first read them."""
    _IDENTITIES.clear()


def ask_identity(address: str, patience: Patience | None = None, stop: threading.Event | None = None) -> Identity:
    """The identity of a file as it is now; raises as `identity_of`."""
    if not is_remote(address):
        try:
            status = os.stat(address)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"There is no shard {address!r}.") from error
        return Identity(size=status.st_size, version=f"{status.st_mtime_ns}/{status.st_ctime_ns}")
    info = _patiently(address, _info, patience, stop)
    if not isinstance(info.get("size"), int):
        raise VlmError(f"The server of {address} does not say its size; copy the shard to this machine first.")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    stored = info.get("lfs") or {}
    sha256 = stored.get("sha256") if isinstance(stored, dict) else getattr(stored, "sha256", None)
    return Identity(size=info["size"], version=version, sha256=sha256 or "")


def read_small(address: str, *, max_bytes: int, patience: Patience | None = None) -> bytes | None:
    """The whole of a small remote file; None if it is not there, may not be read, or is larger than `max_bytes`."""

    def read(address: str) -> bytes | None:
        system, path = open_system(address)
        size = system.info(path).get("size")
        return system.cat_file(path) if isinstance(size, int) and size <= max_bytes else None

    try:
        return _patiently(address, read, patience)
    except VlmError:
        return None


def list_files(address: str) -> list[str]:
    """The addresses of the files a remote folder or a pattern with `*` names, sorted.

    Raises:
        UsageError: the server cannot list, or there is no such folder.
        VlmError: the server cannot be reached.
    """

    def find(address: str) -> list[str]:
        system, path = open_system(address)
        found = system.glob(path) if "*" in address else system.ls(path, detail=False)
        return sorted(system.unstrip_protocol(name) for name in found)

    try:
        return _patiently(address, find)
    except (UsageError, NotImplementedError) as error:
        raise UsageError(
            f"Nothing can be listed at {address!r}; give the shards by name, as in {{00000..00099}}.tar."
        ) from error


def read_blocks(address: str, start: int, identity: Identity) -> Iterator[bytes]:
    """The bytes of a file from `start` to its end, in blocks of at most 8 MiB.

    Raises:
        Exception: whatever the file system raises; the blocks before it count.
    """
    protocol = protocol_of(address)
    if not protocol:
        with open(address, "rb") as file:
            file.seek(start)
            while block := file.read(BLOCK_BYTES):
                yield block
        return
    system, path = open_system(address)
    read = _http_blocks if protocol in ("http", "https") else _ranged_blocks
    yield from read(system, path, start, identity)


def open_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, one for each process and thread, and the path in it.

    File systems of a parent process are kept, unused: collecting one in a forked child would take the sockets of
    the parent's event loop out of the epoll set they share.

    Raises:
        UsageError: the protocol is not allowed or its package is not installed.
    """
    protocol = protocol_of(address)
    require_package(protocol)
    kind: Any = fsspec.get_filesystem_class(protocol)
    options = kind._get_kwargs_from_urls(address) | _OPTIONS.get(protocol, dict)()
    key = (os.getpid(), threading.get_ident(), f"{protocol}/{options}")
    if key not in _SYSTEMS:
        _SYSTEMS[key] = fsspec.filesystem(protocol, **options)
    return _SYSTEMS[key], kind._strip_protocol(address)


def _http_options() -> dict[str, Any]:
    """No limit on the time a whole shard takes, one on the time without a byte."""
    import aiohttp

    given = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, **given}}


_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {"http": _http_options, "https": _http_options}


def _info(address: str) -> dict[str, Any]:
    system, path = open_system(address)
    system.invalidate_cache()
    return system.info(path)


def _patiently(
    address: str,
    work: Callable[[str], Answer],
    patience: Patience | None = None,
    stop: threading.Event | None = None,
) -> Answer:
    retry = Retry(address, patience or Patience(), rng=jitter_rng(address), stop=stop)
    while True:
        try:
            return work(address)
        except (NotImplementedError, Stopped):
            raise
        except Exception as error:
            retry.after(error)


def jitter_rng(address: str) -> np.random.Generator:
    """Chance for the waits between tries; it differs between processes and addresses, and touches no sample."""
    return np.random.default_rng(int(fingerprint_of(address, str(os.getpid())), 16))


def _http_blocks(system: Any, path: str, start: int, identity: Identity) -> Iterator[bytes]:
    """One request from `start` on; a server that ignores ranges has the bytes before it thrown away."""
    headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with system.open(path, "rb", block_size=0, size=identity.size, headers=headers) as file:
        surplus = start if file.r.status != 206 else 0
        while block := file.read(BLOCK_BYTES):
            dropped = min(surplus, len(block))
            surplus -= dropped
            if dropped < len(block):
                yield block[dropped:]


def _ranged_blocks(system: Any, path: str, start: int, identity: Identity) -> Iterator[bytes]:
    """A request for each block."""
    while start < identity.size:
        end = min(start + BLOCK_BYTES, identity.size)
        block = system.cat_file(path, start=start, end=end)
        if len(block) != end - start:
            raise OSError(f"asked for {end - start} bytes at {start}, got {len(block)}")
        yield block
        start = end
