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
from vlm.files import compute_fingerprint
from vlm.storage.urls import is_remote, protocol_of, require_package

_TRANSIENT_STATUSES = frozenset({408, 416, 425, 429})
_ACCESS_ERRORS = frozenset(
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
class RetryPolicy:
    """When to give up.

    attempts: failures in a row without a new byte between them.
    seconds: time since the first of these.
    first_wait, longest_wait: seconds; the wait doubles from one to the other, times a chance factor in [0.5, 1.5).
    """

    attempts: int = 8
    seconds: float = 600.0
    first_wait: float = 0.5
    longest_wait: float = 30.0


class FetchCancelled(Exception):
    """A fetch was called off; what it had is kept."""


class Retry:
    """The tries at one address: tells each failure whether, and after how long, another one follows.

    stop: set by whoever calls the work off; ends a wait at once.
    """

    def __init__(
        self, url: str, retry_policy: RetryPolicy, *, rng: np.random.Generator, stop: threading.Event | None = None
    ) -> None:
        self.url, self._retry_policy, self._rng = url, retry_policy, rng
        self.stop = stop or threading.Event()
        self.num_failures = 0
        self._since = 0.0

    def reset_attempts(self) -> None:
        """A new byte came: count from nought again."""
        self.num_failures = 0

    def wait(self, error: Exception) -> bool:
        """Wait for the next attempt; False where none is to follow: the error will stay, or the policy is exhausted."""
        now = time.monotonic()
        self._since = self._since if self.num_failures else now
        self.num_failures += 1
        policy = self._retry_policy
        if (
            classify_error(error) != "again"
            or self.num_failures >= policy.attempts
            or now - self._since > policy.seconds
        ):
            return False
        wait = min(policy.longest_wait, policy.first_wait * 2.0 ** (self.num_failures - 1))
        return not self.stop.wait(wait * (0.5 + self._rng.random()))

    def after(self, error: Exception) -> None:
        """Wait for the next try, or raise what ends them.

        Raises:
            UsageError: there is no such file.
            VlmError: access is refused, or patience is at its end.
            Stopped: the work was called off.
        """
        if isinstance(error, VlmError | FetchCancelled):
            raise error
        outcome = classify_error(error)
        if outcome == "absent":
            raise UsageError(f"There is no shard {self.url!r}.") from error
        if outcome == "refused":
            raise VlmError(
                f"{self.url} may not be read: {describe_error(error)}. Not tried again; check the credentials "
                "in the environment of this command, and the rights to that address."
            ) from error
        if self.wait(error):
            return
        if self.stop.is_set():
            raise FetchCancelled
        raise VlmError(
            f"{self.url} cannot be read: {describe_error(error)}. Given up after {self.num_failures} attempts in "
            f"{time.monotonic() - self._since:.0f} s without a new byte; check the network and the address, then run "
            "again: what was fetched is kept."
        ) from error


def classify_error(error: BaseException) -> Literal["absent", "refused", "again"]:
    """Whether the file is not there, may not be read, or is worth another try.

    fsspec's HTTP file system tells every failure to ask for a size as a missing file; its cause says what it was.
    """
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return classify_error(error.__cause__)
    status = _status(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError | IsADirectoryError)):
        return "absent"
    is_refusal = isinstance(error, PermissionError) or type(error).__name__ in _ACCESS_ERRORS
    if is_refusal or (status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUSES):
        return "refused"
    return "again"


def describe_error(error: BaseException) -> str:
    """An error in one line, with its kind."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return describe_error(error.__cause__)
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


ResultT = TypeVar("ResultT")

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
_IDENTITIES: dict[str, "FileIdentity"] = {}


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
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


def file_identity(url: str, retry_policy: RetryPolicy | None = None) -> FileIdentity:
    """The identity of a file, asked once per process for a remote one, so that a whole run sees one version of it.

    Raises:
        UsageError: there is no such file.
        VlmError: it cannot be asked, or the server does not say its size.
    """
    if not is_remote(url):
        return fetch_identity(url)
    if url not in _IDENTITIES:
        _IDENTITIES[url] = fetch_identity(url, retry_policy)
    return _IDENTITIES[url]


def clear_identity_cache() -> None:
    """Ask again about files that may have changed since this process first read them."""
    _IDENTITIES.clear()


def fetch_identity(
    url: str, retry_policy: RetryPolicy | None = None, stop: threading.Event | None = None
) -> FileIdentity:
    """The identity of a file as it is now; raises as `identity_of`."""
    if not is_remote(url):
        try:
            status = os.stat(url)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"There is no shard {url!r}.") from error
        return FileIdentity(size=status.st_size, version=f"{status.st_mtime_ns}/{status.st_ctime_ns}")
    info = _with_retries(url, _info, retry_policy, stop)
    if not isinstance(info.get("size"), int):
        raise VlmError(f"The server of {url} does not say its size; copy the shard to this machine first.")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    stored = info.get("lfs") or {}
    sha256 = stored.get("sha256") if isinstance(stored, dict) else getattr(stored, "sha256", None)
    return FileIdentity(size=info["size"], version=version, sha256=sha256 or "")


def read_small(url: str, *, max_bytes: int, retry_policy: RetryPolicy | None = None) -> bytes | None:
    """The whole of a small remote file; None if it is not there, may not be read, or is larger than `max_bytes`."""

    def read(url: str) -> bytes | None:
        system, path = open_system(url)
        size = system.info(path).get("size")
        return system.cat_file(path) if isinstance(size, int) and size <= max_bytes else None

    try:
        return _with_retries(url, read, retry_policy)
    except VlmError:
        return None


def list_files(url: str) -> list[str]:
    """The addresses of the files a remote folder or a pattern with `*` names, sorted.

    Raises:
        UsageError: the server cannot list, or there is no such folder.
        VlmError: the server cannot be reached.
    """

    def find(url: str) -> list[str]:
        system, path = open_system(url)
        found = system.glob(path) if "*" in url else system.ls(path, detail=False)
        return sorted(system.unstrip_protocol(name) for name in found)

    try:
        return _with_retries(url, find)
    except (UsageError, NotImplementedError) as error:
        raise UsageError(
            f"Nothing can be listed at {url!r}; give the shards by name, as in {{00000..00099}}.tar."
        ) from error


def read_blocks(url: str, start: int, identity: FileIdentity) -> Iterator[bytes]:
    """The bytes of a file from `start` to its end, in blocks of at most 8 MiB.

    Raises:
        Exception: whatever the file system raises; the blocks before it count.
    """
    protocol = protocol_of(url)
    if not protocol:
        with open(url, "rb") as file:
            file.seek(start)
            while block := file.read(BLOCK_BYTES):
                yield block
        return
    system, path = open_system(url)
    read = _http_blocks if protocol in ("http", "https") else _ranged_blocks
    yield from read(system, path, start, identity)


def clear_file_systems() -> None:
    """Open file systems again at their next use, with the credentials and endpoints of the environment as it is now."""
    _SYSTEMS.clear()


def open_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, one for each process and thread, and the path in it.

    File systems of a parent process are kept, unused: collecting one in a forked child would take the sockets of
    the parent's event loop out of the epoll set they share.

    Raises:
        UsageError: the protocol is not allowed or its package is not installed.
    """
    protocol = protocol_of(url)
    require_package(protocol)
    kind: Any = fsspec.get_filesystem_class(protocol)
    options = kind._get_kwargs_from_urls(url) | _OPTIONS.get(protocol, dict)()
    key = (os.getpid(), threading.get_ident(), f"{protocol}/{options}")
    if key not in _SYSTEMS:
        _SYSTEMS[key] = fsspec.filesystem(protocol, **options)
    return _SYSTEMS[key], kind._strip_protocol(url)


def _http_options() -> dict[str, Any]:
    """No limit on the time a whole shard takes, one on the time without a byte."""
    import aiohttp

    configured = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, **configured}}


_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {"http": _http_options, "https": _http_options}


def _info(url: str) -> dict[str, Any]:
    system, path = open_system(url)
    system.invalidate_cache()
    return system.info(path)


def _with_retries(
    url: str,
    work: Callable[[str], ResultT],
    retry_policy: RetryPolicy | None = None,
    stop: threading.Event | None = None,
) -> ResultT:
    retry = Retry(url, retry_policy or RetryPolicy(), rng=jitter_rng(url), stop=stop)
    while True:
        try:
            return work(url)
        except (NotImplementedError, FetchCancelled):
            raise
        except Exception as error:
            retry.after(error)


def jitter_rng(url: str) -> np.random.Generator:
    """Chance for the waits between tries; it differs between processes and addresses, and touches no sample."""
    return np.random.default_rng(int(compute_fingerprint(url, str(os.getpid())), 16))


def _http_blocks(system: Any, path: str, start: int, identity: FileIdentity) -> Iterator[bytes]:
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


def _ranged_blocks(system: Any, path: str, start: int, identity: FileIdentity) -> Iterator[bytes]:
    """A request for each block."""
    while start < identity.size:
        end = min(start + BLOCK_BYTES, identity.size)
        block = system.cat_file(path, start=start, end=end)
        if len(block) != end - start:
            raise OSError(f"asked for {end - start} bytes at {start}, got {len(block)}")
        yield block
        start = end
