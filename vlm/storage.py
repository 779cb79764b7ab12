"""Shard URLs: paths on this machine, and remote files read through fsspec.

Of a remote file: its version, its bytes from any position on, the files next to it.

Every access to the network goes through `Retry`: it says which errors are worth another try, how long to wait for it
(exponential backoff with jitter), and when to give up.
"""

import importlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
import fsspec.config
import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint

PROTOCOLS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""The protocols that may be read, and the package each needs. Nothing else is opened: no commands, no chained URLs."""

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_COMPRESSED = (".tar.gz", ".tgz")
_GZIP_BEGINS = b"\x1f\x8b"
_LOCAL = frozenset({"file", "local"})
_KNOWN_ELSEWHERE = frozenset({"pipe", "ssh", "sftp", "ftp", "cmd", "exec", "file", "local", "s3a"})
_BETWEEN = re.compile(r"::(?![0-9a-fA-F:.]*\])")  # but not inside the brackets of an IPv6 host
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):(//)?")


def protocol_of(url: str) -> str:
    """The protocol of a URL in lower case; empty for a path on this machine.

    Raises:
        UsageError: it is not one of `PROTOCOLS`, or protocols are chained.
    """
    match = _SCHEME.match(url)
    if match is None or not (match[2] or _is_command(url, match[1])):
        return ""
    protocol = match[1].lower()
    if match[2] and protocol in _LOCAL:
        return ""
    if not match[2] or protocol not in PROTOCOLS:
        raise UsageError(
            f"The protocol {protocol!r} of {url!r} is not supported for shards; "
            f"give a path on this machine, or one of {', '.join(f'{name}://' for name in PROTOCOLS)}."
        )
    return protocol


def split_urls(joined: str) -> list[str]:
    """The URLs joined with `::`.

    Raises:
        UsageError: one of them is the bare name of a protocol, as in the chained URLs of fsspec.
    """
    parts = _BETWEEN.split(joined)
    for part in parts:
        # fsspec chains protocols as simplecache::s3://…, in which the first part is a bare name
        protocol_of(part if ":" in part else f"{part}:")
    return parts


def _is_command(url: str, word: str) -> bool:
    """Whether `word:` at the beginning names something other than a file of that name."""
    # a file may have a colon in its name; then it exists
    is_known = word.lower() in _KNOWN_ELSEWHERE or word.lower() in fsspec.available_protocols()
    return is_known and not Path(url.split("/")[0].rstrip(":")).exists()


def is_remote(url: str) -> bool:
    """Whether a URL is read over a protocol rather than from this machine's own files.

    Raises:
        UsageError: over one that is not allowed.
    """
    return bool(protocol_of(url))


def is_compressed(url: str) -> bool:
    """Whether a shard has to be unpacked before it can be read by position: by its name, or its first bytes if local.

    Some data sets are handed out as gzip under the name of a plain tar. Of a remote file only the name is known here.
    """
    return has_compressed_name(url) or (not is_remote(url) and _begins_with_gzip(local_path(url)))


def has_compressed_name(url: str) -> bool:
    """Whether the name of a shard says that it has to be unpacked."""
    return url_basename(url).lower().endswith(_COMPRESSED)


def _begins_with_gzip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_GZIP_BEGINS)) == _GZIP_BEGINS
    except OSError:  # a folder, a pattern, or nothing at all
        return False


def needs_cache(url: str) -> bool:
    """Whether a shard is read from the cache rather than from its own place."""
    return is_remote(url) or is_compressed(url)


def url_basename(url: str) -> str:
    """The last part of a URL, without the query of a web URL.

    >>> url_basename("https://host/a/B.tar?key=1")
    'B.tar'
    """
    return _without_query(url).rpartition("/")[2]


def is_shard(url: str) -> bool:
    """Whether a URL names a tar rather than a folder."""
    return url_basename(url).lower().endswith(SHARD_SUFFIXES)


def local_path(url: str) -> str:
    """A path on this machine, without `file://` before it."""
    match = _SCHEME.match(url)
    if match is None or not match[2] or match[1].lower() not in _LOCAL:
        return url
    return unquote(urlsplit(url).path)


def sibling_url(url: str, name: str) -> str:
    """The URL of the file `name` in the folder of a remote URL; the query of a web URL is left out.

    >>> sibling_url("s3://bucket/a/0.tar", "manifest.json")
    's3://bucket/a/manifest.json'
    """
    return f"{_without_query(url).rpartition('/')[0]}/{name}"


def require_package(protocol: str) -> None:
    """Import what a protocol needs.

    Raises:
        UsageError: it is not installed.
    """
    package = PROTOCOLS[protocol]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{protocol}:// needs {package}; install it with: pip install {package}") from error


def _without_query(url: str) -> str:
    is_web = url.lower().startswith(("http://", "https://"))
    return urlsplit(url)._replace(query="", fragment="").geturl() if is_web else url


# refusals that pass with time, such as 429 (too many requests)
_TRANSIENT_STATUSES = frozenset({408, 416, 425, 429})
# by name, since the packages that define them are optional and slow to import
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
    first_wait, longest_wait: seconds; the wait doubles from one to the other, times a random factor in [0.5, 1.5).
    """

    attempts: int = 8
    seconds: float = 600.0
    first_wait: float = 0.5
    longest_wait: float = 30.0


# a name server that is restarted answers so for a moment; a machine without network always does
_UNKNOWN_HOST_ATTEMPTS = 3


class FetchCancelled(Exception):
    """A fetch was cancelled; what it had is kept."""


class Retry:
    """The attempts at one URL: says after each failure whether, and how soon, another one follows.

    stop: set by whoever cancels the work; ends a wait at once.
    """

    def __init__(self, url: str, retry_policy: RetryPolicy, *, stop: threading.Event | None = None) -> None:
        self.url = url
        self.stop = stop or threading.Event()
        self.num_failures = 0
        self._retry_policy = retry_policy
        self._rng = _jitter_rng(url)
        self._first_failure = 0.0

    def reset_attempts(self) -> None:
        """A new byte came: count from zero again."""
        self.num_failures = 0

    def after(self, error: Exception) -> None:
        """Wait for the next try, or raise what ends them.

        Raises:
            UsageError: there is no such file.
            VlmError: access is denied, or no tries are left.
            FetchCancelled: the work was cancelled.
        """
        if isinstance(error, VlmError | FetchCancelled):
            raise error
        outcome = classify_error(error)
        if outcome == "absent":
            raise UsageError(f"There is no shard {self.url!r}.") from error
        if outcome == "refused":
            raise VlmError(
                f"{self.url} may not be read: {describe_error(error)}. Not tried again; check the credentials "
                "in the environment of this command, and the permissions of that URL."
            ) from error
        if outcome == "offline":
            raise VlmError(
                f"{self.url} is not read: HF_HUB_OFFLINE is set in the environment of this command. Unset it, or give "
                "shards on this machine."
            ) from error
        if self.wait(error):
            return
        if self.stop.is_set() and self._has_tries_left():
            raise FetchCancelled
        raise VlmError(
            f"{self.url} cannot be read: {describe_error(error)}. Given up after {self.num_failures} attempts in "
            f"{time.monotonic() - self._first_failure:.0f} s without a new byte; check the network and the URL, "
            "then run again: what was fetched is kept."
        ) from error

    def wait(self, error: Exception) -> bool:
        """Count a failure and wait for the next try; False if none would help, none is left, or work was cancelled."""
        if not self.num_failures:
            self._first_failure = time.monotonic()
        self.num_failures += 1
        if classify_error(error) != "again" or not self._has_tries_left():
            return False
        policy = self._retry_policy
        wait = min(policy.longest_wait, policy.first_wait * 2.0 ** (self.num_failures - 1))
        # many processes that lost the same server must not come back to it at the same moment
        return not self.stop.wait(wait * (0.5 + self._rng.random()))

    def _has_tries_left(self) -> bool:
        seconds = time.monotonic() - self._first_failure
        return self.num_failures < self._retry_policy.attempts and seconds <= self._retry_policy.seconds


def _jitter_rng(url: str) -> np.random.Generator:
    """Randomness for the waits between tries; it differs between processes and URLs, and touches no sample."""
    return np.random.default_rng(int(compute_fingerprint(url, str(os.getpid())), 16))


def classify_error(error: BaseException) -> Literal["absent", "refused", "offline", "again"]:
    """Whether the file does not exist, may not be read, may not be asked for, or is worth another try.

    fsspec's HTTP file system reports every failure to ask for a size as a missing file; its cause says what it was.
    """
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return classify_error(error.__cause__)

    status = _status(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError | IsADirectoryError)):
        return "absent"
    # no other try helps where the Hugging Face Hub may not be asked at all (HF_HUB_OFFLINE)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "offline"
    # object stores answer 403 for a missing file, too, where listing is not allowed
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
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:  # requests, httpx
        status = getattr(response, "status_code", None)
    else:  # aiohttp, gcsfs
        status = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return status if isinstance(status, int) and 100 <= status < 600 else None


ResultT = TypeVar("ResultT")

BLOCK_BYTES = 8 << 20
"""Bytes of one request, where a file system reads by ranges."""

# what file systems call the version of a file, the most exact first
_VERSION_FIELDS = (
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

    size: in bytes. version: ETag or modification time, as far as the server reports one.
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
    """The identity of a file, requested once per process for a remote one, so that a whole run sees one version of it.

    Raises:
        UsageError: there is no such file.
        VlmError: the server cannot be reached, or does not report the size.
    """
    if not is_remote(url):
        return fetch_identity(url)
    if url not in _IDENTITIES:
        _IDENTITIES[url] = fetch_identity(url, retry_policy)
    return _IDENTITIES[url]


def clear_identity_cache() -> None:
    """Look again at files that may have changed since this process first read them."""
    _IDENTITIES.clear()


def fetch_identity(
    url: str, retry_policy: RetryPolicy | None = None, stop: threading.Event | None = None
) -> FileIdentity:
    """The identity of a file as it is now; raises as `file_identity`."""
    if not is_remote(url):
        try:
            status = os.stat(url)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"There is no shard {url!r}.") from error
        return FileIdentity(size=status.st_size, version=f"{status.st_mtime_ns}/{status.st_ctime_ns}")
    info = _with_retries(url, _info, retry_policy, stop)
    # without a size neither a cut nor the end can be told
    if not isinstance(info.get("size"), int):
        raise VlmError(f"The server of {url} does not report its size; copy the shard to this machine first.")
    version = next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), "")
    stored = info.get("lfs") or {}
    sha256 = stored.get("sha256") if isinstance(stored, dict) else getattr(stored, "sha256", None)
    return FileIdentity(size=info["size"], version=version, sha256=sha256 or "")


def read_small(url: str, *, max_bytes: int, retry_policy: RetryPolicy | None = None) -> bytes | None:
    """The whole of a small remote file; None if it does not exist, may not be read, or is larger than `max_bytes`."""

    def read(url: str) -> bytes | None:
        system, path = open_system(url)
        size = system.info(path).get("size")
        return system.cat_file(path) if isinstance(size, int) and size <= max_bytes else None

    try:
        return _with_retries(url, read, retry_policy)
    except VlmError:
        return None


def list_files(url: str) -> list[str]:
    """The URLs of the files in a remote folder, or of those that match a pattern with `*`, sorted.

    Raises:
        UsageError: the server cannot list, or there is no such folder.
        VlmError: the server cannot be reached.
    """

    def find(url: str) -> list[str]:
        system, path = open_system(url)
        names = system.glob(path) if "*" in url else system.ls(path, detail=False)
        return sorted(system.unstrip_protocol(name) for name in names)

    try:
        return _with_retries(url, find)
    except (UsageError, NotImplementedError) as error:
        raise UsageError(
            f"Nothing can be listed at {url!r}; give the shards by name, as in {{00000..00099}}.tar."
        ) from error


def read_blocks(url: str, start: int, identity: FileIdentity, *, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The bytes of a file from `start` to its end, in blocks of at most `block_bytes`.

    Raises:
        Exception: whatever the file system raises; the blocks before it count.
    """
    protocol = protocol_of(url)
    if not protocol:
        with open(url, "rb") as file:
            file.seek(start)
            while block := file.read(block_bytes):
                yield block
        return
    system, path = open_system(url)
    read = _http_blocks if protocol in ("http", "https") else _ranged_blocks
    yield from read(system, path, start, identity, block_bytes)


def open_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, one for each process and thread, and the path in it.

    File systems of a parent process are kept, unused: collecting one in a forked child would take the sockets of
    the parent's event loop out of the epoll set they share.

    Raises:
        UsageError: the protocol is not allowed or its package is not installed.
    """
    protocol = protocol_of(url)
    require_package(protocol)
    kind: Any = fsspec.get_filesystem_class(protocol)
    options = kind._get_kwargs_from_urls(url) | _OPTIONS.get(protocol, dict)()
    # asynchronous file systems share an event loop thread, which a forked child does not have
    key = (os.getpid(), threading.get_ident(), f"{protocol}/{options}")
    if key not in _SYSTEMS:
        _SYSTEMS[key] = fsspec.filesystem(protocol, **options)
    return _SYSTEMS[key], kind._strip_protocol(url)


def clear_file_systems() -> None:
    """Open file systems again at their next use, with the credentials and endpoints of the environment as it is now."""
    for protocol in {key[2].partition("/")[0] for key in _SYSTEMS}:
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
    _SYSTEMS.clear()


def _http_options() -> dict[str, Any]:
    """No limit on the time a whole shard takes, but one on the time without a byte."""
    import aiohttp

    configured = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, **configured}}


_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {"http": _http_options, "https": _http_options}


def _info(url: str) -> dict[str, Any]:
    system, path = open_system(url)
    system.invalidate_cache()  # fsspec would go on reporting the file as it was first seen
    return system.info(path)


def _with_retries(
    url: str,
    work: Callable[[str], ResultT],
    retry_policy: RetryPolicy | None = None,
    stop: threading.Event | None = None,
) -> ResultT:
    policy = retry_policy or RetryPolicy()
    retry = Retry(url, policy, stop=stop)
    while True:
        try:
            return work(url)
        # a server that cannot list never will
        except (NotImplementedError, FetchCancelled):
            raise
        except Exception as error:
            if _is_unknown_host(error) and retry.num_failures + 1 >= min(policy.attempts, _UNKNOWN_HOST_ATTEMPTS):
                raise VlmError(
                    f"{url} cannot be read: the name of its server is not known ({describe_error(error)}). This "
                    "machine has no network, or the URL is misspelt."
                ) from error
            retry.after(error)


def _is_unknown_host(error: BaseException) -> bool:
    """Whether the name of a server has no address, according to whatever error is at the bottom."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME


def _http_blocks(system: Any, path: str, start: int, identity: FileIdentity, block_bytes: int) -> Iterator[bytes]:
    """One request from `start` on; of a server that ignores ranges the bytes before it are thrown away."""
    # identity: a server that compresses on the fly would shift every position
    headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with system.open(path, "rb", block_size=0, size=identity.size, headers=headers) as file:
        # 200 in place of 206 is the whole file
        surplus = start if file.r.status != 206 else 0
        while block := file.read(block_bytes):
            dropped = min(surplus, len(block))
            surplus -= dropped
            if dropped < len(block):
                yield block[dropped:]


def _ranged_blocks(system: Any, path: str, start: int, identity: FileIdentity, block_bytes: int) -> Iterator[bytes]:
    """A request for each block."""
    while start < identity.size:
        end = min(start + block_bytes, identity.size)
        block = system.cat_file(path, start=start, end=end)
        # a short answer must not shift the blocks after it
        if len(block) != end - start:
            raise OSError(f"requested {end - start} bytes at {start}, got {len(block)}")
        yield block
        start = end
