"""The shard cache: whole, plain copies of remote and compressed shards on this machine, in bounded space.

From the bottom up: `CacheSpace` keeps a folder within its bound across processes; `Inflater` unpacks gzip as it streams
in; `fetch` brings one shard whole, resumed after a cut or a kill and checked; `ShardCache` joins them for all processes
of a machine: fetched once, least recently used out first; `Prefetcher` fetches the shards of the next window while
this one is read.
"""

import hashlib
import json
import logging
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, fsync_folder, sha256_file, write_text
from vlm.manifest import MANIFEST
from vlm.storage import (
    BLOCK_BYTES,
    FetchCancelled,
    FileIdentity,
    Retry,
    RetryPolicy,
    fetch_identity,
    file_identity,
    is_compressed,
    is_remote,
    needs_cache,
    protocol_of,
    read_blocks,
    read_small,
    require_package,
    sibling_url,
    url_basename,
)

logger = logging.getLogger(__name__)

_CACHE_FILE = re.compile(r"([0-9a-f]{16})\.(tar|part|json)")
_METADATA_BYTES = 2048
"""Kept free for the .json of a shard, with its URL on top (see `largest`)."""


@dataclass(kw_only=True)
class _Entry:
    """What is in the folder under one key. used: time of the last use in ns."""

    bytes: int = 0
    used: int = 0
    is_whole: bool = False


@dataclass(frozen=True)
class CacheSpace:
    """Space in a folder for files by key: KEY.tar is whole, KEY.part on its way, KEY.json says what they are.

    max_bytes: bound of all of them together. Files without such a .json are neither counted nor touched: a person may
    name the folder of their own shards. Whoever writes to a key holds its lock; whoever reserves space holds that of
    the folder, so that the bound is kept across processes.
    """

    folder: Path
    max_bytes: int

    def path(self, key: str, kind: str) -> Path:
        """The file of a key: kind tar, part, json or lock."""
        return self.folder / f"{key}.{kind}"

    def lock(self, key: str) -> FileLock:
        """The lock of a key."""
        return FileLock(self.path(key, "lock"))

    def reserve(self, key: str, num_bytes: int, url: str) -> bool:
        """Reserve `num_bytes` for a key whose lock is held, what it has now included; unused files are removed.

        False if what is in use leaves too little; try again later.

        Raises:
            UsageError: it is more than the folder may ever hold.
        """
        reserved_bytes = num_bytes + self.max_bytes - self.largest(url)
        if reserved_bytes > self.max_bytes:
            raise UsageError(
                f"{url} has {num_bytes:,} bytes, but the cache at {self.folder} may hold {self.max_bytes:,}; "
                "allow more by VLM_CACHE_GB, or pack smaller shards."
            )
        with FileLock(self.folder / ".lock"):
            entries = self._entries()
            entries.pop(key, None)
            surplus = sum(entry.bytes for entry in entries.values()) + reserved_bytes - self.max_bytes
            # least recently used first; a key whose lock is held is being fetched, and stays
            for victim, entry in sorted(entries.items(), key=lambda item: item[1].used):
                if surplus <= 0:
                    break
                if self._remove_unused(victim):
                    surplus -= entry.bytes
            if surplus > 0:
                return False
            self.write_metadata(key, {"address": url, "reserved": reserved_bytes})
        return True

    def largest(self, url: str) -> int:
        """The size of the largest shard of that URL for which there can be space, in bytes."""
        return self.max_bytes - _METADATA_BYTES - 2 * len(url)

    def write_metadata(self, key: str, metadata: dict[str, Any]) -> None:
        """Record what a key is."""
        write_text(self.path(key, "json"), json.dumps(metadata))

    def metadata(self, key: str) -> dict[str, Any]:
        """What was recorded of a key; empty if it has gone."""
        try:
            metadata = json.loads(self.path(key, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return metadata if isinstance(metadata, dict) else {}

    def drop(self, key: str) -> None:
        """Remove the files of a key whose lock is held."""
        for kind in ("part", "tar", "json"):
            self.path(key, kind).unlink(missing_ok=True)

    def touch(self, key: str) -> bool:
        """Mark a whole file as used now; False if there is none."""
        path = self.path(key, "tar")
        try:
            os.utime(path)
        except PermissionError:  # another user's, which can be read all the same
            return path.exists()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _remove_unused(self, key: str) -> bool:
        lock = self.lock(key)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        try:
            self.drop(key)
            self.path(key, "lock").unlink(missing_ok=True)  # whoever waits for it notices and makes a new one
        finally:
            lock.release()
        return True

    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for file in os.scandir(self.folder):
            match = _CACHE_FILE.fullmatch(file.name)
            if match is None:
                continue
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            entry = entries.setdefault(match[1], _Entry())
            entry.bytes += status.st_size
            entry.is_whole |= match[2] == "tar"
            if match[2] != "json":
                entry.used = max(entry.used, status.st_mtime_ns)
        cached: dict[str, _Entry] = {}
        for key, entry in entries.items():
            metadata = self.metadata(key)
            # written before all else of a shard: without it the files are somebody's own, whatever their names
            if "address" not in metadata:
                continue
            # a shard on its way counts as large as it will be, or two fetches could take the same space
            if not entry.is_whole:
                entry.bytes = max(entry.bytes, metadata.get("reserved", 0))
            cached[key] = entry
        return cached


MAX_RATIO = 100
"""More plain bytes than this for each compressed one count as a gzip bomb; tars of images come to about 1."""

_ALWAYS_ALLOWED_BYTES = 16 << 20
_MAX_INPUT_BYTES = 64 << 10
_MAX_OUTPUT_BYTES = 1 << 20
_RECOVERY_BYTES = 512
_GZIP = 16 + zlib.MAX_WBITS


class Inflater:
    """Turns the compressed bytes of one file into plain ones; files of several gzip members are read through.

    damage: why the rest cannot be unpacked, or empty.
    """

    def __init__(self, url: str) -> None:
        self.damage = ""
        self._url = url
        self._bytes_in = 0
        self._bytes_out = 0
        self._limit = _MAX_OUTPUT_BYTES
        self._member: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes of the next compressed ones, at most 1 MiB at a time; none once there is damage.

        Raises:
            VlmError: they are more than `MAX_RATIO` times the compressed ones.
        """
        for start in range(0, len(data), _MAX_INPUT_BYTES):
            piece = data[start : start + _MAX_INPUT_BYTES]
            self._bytes_in += len(piece)
            for plain in self._feed_piece(piece):
                self._bytes_out += len(plain)
                if self._bytes_out > _ALWAYS_ALLOWED_BYTES + MAX_RATIO * self._bytes_in:
                    raise VlmError(
                        f"{self._url} unpacks to more than {MAX_RATIO} times its size ({self._bytes_in:,} bytes came "
                        f"to {self._bytes_out:,} so far), as gzip bombs do; unpack it by hand if you know better."
                    )
                yield plain

    def finish(self) -> None:
        """Take note that no more comes; a member that is still open is damage."""
        if self._member is not None and not self.damage:
            self.damage = f"its gzip is cut short at byte {self._bytes_in:,}"

    def _feed_piece(self, piece: bytes) -> Iterator[bytes]:
        """Decompress one piece; `self._limit` bounds each step, so that a bomb is noticed before it has unfolded."""
        is_full = False
        while (piece or is_full) and not self.damage:
            if self._member is None:
                piece = piece.lstrip(b"\x00") if self._bytes_out else piece  # padding between members
                if not piece:
                    return
                self._member = zlib.decompressobj(_GZIP)
            before = self._member.copy()  # an error leaves the decompressor unusable
            try:
                plain = self._member.decompress(piece, self._limit)
            except zlib.error as error:
                self._member = before
                if self._limit == 1:
                    self.damage = f"its gzip cannot be unpacked near byte {self._bytes_in:,}: {error}"
                # zlib throws away what came before an error in the same call: go up to it in smaller steps
                self._limit = _RECOVERY_BYTES if self._limit > _RECOVERY_BYTES else 1
                continue
            if plain:
                yield plain
            is_full = len(plain) == self._limit
            piece = self._member.unconsumed_tail
            if self._member.eof:
                is_full = False
                piece = self._member.unused_data
                self._member = None


_MAX_MANIFEST_BYTES = 256 << 20
_FULL_ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True)
class FetchRequest:
    """What to fetch, and under which conditions.

    identity: the version to fetch. sha256: of the file as it is stored there, in hex; empty if unknown.
    free_space: called with the bytes that the plain tar of a compressed shard comes to, before they are written.
    block_bytes: of one request. stop: set to cancel the fetch.
    """

    url: str
    identity: FileIdentity
    sha256: str = ""
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    free_space: Callable[[int], None] = lambda _: None
    block_bytes: int = BLOCK_BYTES
    stop: threading.Event = field(default_factory=threading.Event)


def fetch(request: FetchRequest, path: Path) -> str:
    """Bring a shard to `path` as a plain tar; returns why its compressed form ends early, or an empty string.

    Bytes that an earlier fetch of the same version left at `path` are kept, and only the rest is requested, unless the
    shard is compressed; so `path` must belong to this version alone.

    Raises:
        UsageError: there is no such shard.
        VlmError: all tries failed, it has another checksum than is known, or changed meanwhile.
        OSError: `path` cannot be written; a failure of the network never is one.
        FetchCancelled: it was cancelled.
    """
    sha256 = ""
    for _ in range(_FULL_ATTEMPTS):  # once more, since a resumed part may be what is damaged
        retry = Retry(request.url, request.retry_policy, stop=request.stop)
        download = _unpack if is_compressed(request.url) else _download
        sha256, damage = download(request, path, retry)
        _check_unchanged(request, path)
        if not request.sha256 or sha256 == request.sha256:
            return damage
        path.unlink()
    raise VlmError(
        f"{request.url} came twice with the checksum {sha256}, where {request.sha256} was recorded when it was "
        "made: the file there is damaged; pack or copy it again."
    )


def published_sha256(url: str, identity: FileIdentity, retry_policy: RetryPolicy) -> str:
    """The checksum of a remote shard in hex, or empty if it is not known.

    It comes from the server if that has one, else from the `manifest.json` that `vlm pack` wrote into the folder,
    if that is about a file of this size.
    """
    if identity.sha256 or not is_remote(url):
        return identity.sha256
    record = _manifest_files(sibling_url(url, MANIFEST), retry_policy).get(url_basename(url))
    if not isinstance(record, dict) or record.get("bytes") != identity.size:
        return ""
    return str(record.get("sha256", ""))


@lru_cache(maxsize=256)
def _manifest_files(url: str, retry_policy: RetryPolicy) -> dict[str, Any]:
    """The files in a folder's manifest, read once per process; empty if it has none."""
    data = read_small(url, max_bytes=_MAX_MANIFEST_BYTES, retry_policy=retry_policy)
    try:
        manifest = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("kind") == "shards" else None
    return files if isinstance(files, dict) else {}


def clear_manifest_cache() -> None:
    """Read manifests again that may have changed since this process first read them."""
    _manifest_files.cache_clear()


def _check_unchanged(request: FetchRequest, path: Path) -> None:
    now = fetch_identity(request.url, request.retry_policy, request.stop)
    if now != request.identity:
        path.unlink(missing_ok=True)  # it may hold bytes of both versions
        raise VlmError(
            f"{request.url} changed since it was first looked at (then {request.identity.token}, now {now.token}); "
            "start again to read it as it is now."
        )


def _download(request: FetchRequest, path: Path, retry: Retry) -> tuple[str, str]:
    """Append what `path` lacks; its checksum if one is known, and no damage."""
    size = path.stat().st_size if path.exists() else 0
    if size > request.identity.size:
        path.unlink()
        size = 0
    with path.open("ab") as file:
        for block in _blocks(request, size, retry):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return sha256_file(path) if request.sha256 else "", ""


def _unpack(request: FetchRequest, path: Path, retry: Retry) -> tuple[str, str]:
    """Write the plain bytes to `path` from the start; the checksum of the compressed ones, and the damage found."""
    inflater = Inflater(request.url)
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:
        for block in _blocks(request, 0, retry):
            digest.update(block)
            for plain in inflater.feed(block):
                written += len(plain)
                request.free_space(written)
                file.write(plain)
        inflater.finish()
        file.flush()
        os.fsync(file.fileno())
    is_as_stored = not request.sha256 or digest.hexdigest() == request.sha256
    if is_as_stored and not written:
        raise VlmError(f"{request.url} is not gzip, or damaged from the start: {inflater.damage or 'it is empty'}.")
    return digest.hexdigest(), inflater.damage


def _blocks(request: FetchRequest, position: int, retry: Retry) -> Iterator[bytes]:
    """The bytes from `position` to the end; after a failure the next try resumes behind the last byte that came."""
    url = request.url
    size = request.identity.size
    while position < size:
        try:
            for block in read_blocks(url, position, request.identity, block_bytes=request.block_bytes):
                if request.stop.is_set():
                    raise FetchCancelled
                position += len(block)
                if position > size:
                    raise VlmError(f"{url} has more than the {size:,} bytes its server reported; start again.")
                retry.reset_attempts()
                yield block
            if position < size:
                raise ConnectionError(f"the response ended at byte {position:,} of {size:,}")
        except Exception as error:
            retry.after(error)


_WAIT_SECONDS = 0.1
_QUIET_SECONDS = 60.0
_RESERVATION_GROWTH = 1.5
_FIRST_GUESS = 1.25
"""Of the plain size of a compressed shard, relative to its compressed size."""
_DEFAULT_GB = 50.0


class _OutOfSpace(Exception):
    """A shard being unpacked came to more than is free now. bytes: its size so far."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = num_bytes


@dataclass(frozen=True)
class ShardCache:
    """A folder of whole, plain shards that never holds more than `max_bytes`.

    It is safe to share between threads, processes and runs of one machine, and pickles into workers. A file of it may
    be removed by any of them to make room for another: open it, read, close it, and ask again if it has gone.

    retry_policy: how long to try to reach a shard. block_bytes: of one request.
    """

    folder: Path
    max_bytes: int
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    block_bytes: int = BLOCK_BYTES

    def local_path(self, url: str, identity: FileIdentity | None = None) -> Path:
        """The shard as a plain tar on this machine, fetched if it is not cached.

        identity: the version to have; the one this process saw first if not given.

        Raises:
            UsageError: there is no such shard, or it is larger than the cache.
            VlmError: it cannot be fetched.
        """
        identity = identity or file_identity(url, self.retry_policy)
        key = self._key(url, identity)
        while not self._space.touch(key):  # which also marks it as used
            self._fetch_or_wait(url, identity, threading.Event(), should_wait=True)
        return self._space.path(key, "tar")

    def prefetch(self, url: str, stop: threading.Event) -> bool:
        """Fetch a shard unless it is cached; False if another process fetches it, or there is no space for it now.

        Raises:
            VlmError: as `local_path`.
            FetchCancelled: `stop` was set; what was fetched is kept.
        """
        identity = file_identity(url, self.retry_policy)
        return self.touch(url) or self._fetch_or_wait(url, identity, stop, should_wait=False)

    def touch(self, url: str) -> bool:
        """Mark a shard as used now; False if it is not cached."""
        return self._space.touch(self._key(url, file_identity(url, self.retry_policy)))

    def footprint(self, url: str) -> int:
        """The bytes a shard takes here; for a compressed one that is not cached yet, those of its compressed form.

        Raises:
            VlmError: it cannot be reached.
        """
        identity = file_identity(url, self.retry_policy)
        try:
            size = self._space.path(self._key(url, identity), "tar").stat().st_size
        except FileNotFoundError:
            size = identity.size
        return size + self.max_bytes - self._largest(url)

    def damage(self, url: str, identity: FileIdentity) -> str:
        """Why a compressed shard could not be unpacked to its end; empty if it could."""
        return str(self._space.metadata(self._key(url, identity)).get("damage", ""))

    @property
    def _space(self) -> CacheSpace:
        return CacheSpace(self.folder, self.max_bytes)

    def _key(self, url: str, identity: FileIdentity) -> str:
        return compute_fingerprint(url if is_remote(url) else str(Path(url).absolute()), identity.token)

    def _fetch_or_wait(self, url: str, identity: FileIdentity, stop: threading.Event, *, should_wait: bool) -> bool:
        try:
            return self._try_fetch(url, identity, stop, should_wait=should_wait)
        except OSError as error:  # of this machine: those of the network end in `Retry`
            raise VlmError(
                f"{url} cannot be kept in the cache at {self.folder}: {error}. Free space there, or name another "
                "folder by VLM_CACHE."
            ) from error

    def _try_fetch(self, url: str, identity: FileIdentity, stop: threading.Event, *, should_wait: bool) -> bool:
        """One try to lock the shard, find space for it and fetch it; whether it is cached now.

        While there is no space its lock is released, so that what it has of the shard can make room for others.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self._key(url, identity)
        lock = self._space.lock(key)
        if not _acquire(lock, url, should_wait=should_wait):
            return False
        try:
            if self._space.path(key, "tar").exists() or self._fetch_locked(url, identity, key, stop):
                return True
        finally:
            lock.release()
        if should_wait:
            time.sleep(_WAIT_SECONDS)
        return False

    def _fetch_locked(self, url: str, identity: FileIdentity, key: str, stop: threading.Event) -> bool:
        """Fetch under the lock of the key; False if there is no space now."""
        space = self._space
        part = space.path(key, "part")
        reserved_bytes = self._estimated_bytes(url, identity, key)
        if not space.reserve(key, reserved_bytes, url):
            return False

        # the plain size of a compressed shard shows only while it is unpacked: the reservation grows with it
        def free_space(num_bytes: int) -> None:
            nonlocal reserved_bytes
            if num_bytes > reserved_bytes:
                grown = min(int(num_bytes * _RESERVATION_GROWTH), self._largest(url))
                reserved_bytes = max(num_bytes, grown)
                if not space.reserve(key, reserved_bytes, url):
                    raise _OutOfSpace(reserved_bytes)

        request = FetchRequest(
            url=url,
            identity=identity,
            sha256=published_sha256(url, identity, self.retry_policy),
            retry_policy=self.retry_policy,
            free_space=free_space,
            block_bytes=self.block_bytes,
            stop=stop,
        )
        try:
            damage = fetch(request, part)
        except _OutOfSpace as error:
            # begin again later, with a larger guess; meanwhile what was unpacked must not take space from others
            part.unlink(missing_ok=True)
            space.write_metadata(key, {"address": url, "next": min(2 * error.bytes, self._largest(url))})
            return False
        except Exception:
            if is_compressed(url) or not part.exists():
                space.drop(key)
            raise
        space.write_metadata(key, {"address": url, "identity": identity.token, "damage": damage})
        part.replace(space.path(key, "tar"))
        fsync_folder(self.folder)
        return True

    def _estimated_bytes(self, url: str, identity: FileIdentity, key: str) -> int:
        """The bytes to reserve: the size, or for a compressed shard a guess that grows when it was too small."""
        if not is_compressed(url):
            return identity.size
        guess = max(int(identity.size * _FIRST_GUESS), self._space.metadata(key).get("next", 0))
        return min(guess, self._largest(url)) if identity.size < self._largest(url) else guess

    def _largest(self, url: str) -> int:
        return self._space.largest(url)


def _acquire(lock: FileLock, url: str, *, should_wait: bool) -> bool:
    """Lock a shard; False if another process has it, unless that is to be waited for, which is said when it is long."""
    try:
        lock.acquire(timeout=_QUIET_SECONDS if should_wait else 0)
    except Timeout:
        if not should_wait:
            return False
        logger.warning(
            f"{url} has been locked by another process for {_QUIET_SECONDS:g} seconds, which fetches it into "
            f"{lock.lock_file}; waiting for it. If it hangs, end it: what it has fetched is kept."
        )
        lock.acquire()
    return True


def default_cache() -> ShardCache:
    """The cache the environment names: VLM_CACHE, its folder (`~/.cache/vlm/shards`), and VLM_CACHE_GB, its bound (50).

    Raises:
        UsageError: the bound is not a positive number.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    configured = os.environ.get("VLM_CACHE_GB", "")
    try:
        gigabytes = float(configured) if configured else _DEFAULT_GB
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise UsageError(f"VLM_CACHE_GB is {configured!r}; give the bound of the cache in gigabytes, a number above 0.")
    return ShardCache(Path(os.environ.get("VLM_CACHE") or base / "vlm" / "shards"), int(gigabytes * 1e9))


_CLOSING_SECONDS = 5.0


class Prefetcher:
    """Fetches the shards that will be needed into the cache, in order, on a few threads of this process.

    cache: None takes the default one. urls: all shards; local ones cost nothing. Failures are not reported here: the
    reader meets them itself when it comes to that shard.
    """

    def __init__(self, cache: ShardCache | None, urls: Sequence[str], *, threads: int = 4) -> None:
        self._cache = cache or default_cache()
        self._urls = tuple(urls)
        self._num_threads = threads
        self._cached = frozenset(number for number, url in enumerate(urls) if needs_cache(url))
        for protocol in {protocol_of(urls[number]) for number in self._cached} - {""}:
            require_package(protocol)  # here, so that no thread is importing while workers are forked
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._needed: tuple[int, ...] = ()
        self._settled: set[int] = set()  # fetched, being fetched, or failed
        self._postponed: set[int] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(self, numbers: Sequence[int]) -> None:
        """Say which shards are needed from now on, the next one first; cheap if nothing has changed."""
        needed = tuple(filter(self._cached.__contains__, dict.fromkeys(numbers)))
        if needed == self._needed or self._stop.is_set():
            return
        with self._changed:
            self._needed = needed
            # those postponed for lack of room get another chance: the window has moved on, and room may have been made
            self._settled = (self._settled & set(needed)) - self._postponed
            self._postponed.clear()
            self._changed.notify_all()
        while len(self._threads) < min(self._num_threads, len(needed)):
            thread = threading.Thread(target=self._run_worker, name="vlm-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Cancel what is under way; half-fetched shards are kept and resumed later."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def _run_worker(self) -> None:
        while (number := self._next()) is not None:
            try:
                if not (self._fits_with_nearer(number) and self._cache.prefetch(self._urls[number], self._stop)):
                    self._postponed.add(number)
            except (VlmError, FetchCancelled):
                continue

    def _fits_with_nearer(self, number: int) -> bool:
        """Whether a shard fits into the cache with those needed before it; marks these as used, the next one last."""
        needed = self._needed
        num_before = needed.index(number) if number in needed else 0
        total_bytes = self._cache.footprint(self._urls[number])
        nearer: list[str] = []
        for nearer_number in needed[:num_before]:
            url = self._urls[nearer_number]
            try:
                total_bytes += self._cache.footprint(url)
                nearer.append(url)
            except VlmError:  # it cannot be reached, and takes no space
                continue
        if total_bytes > self._cache.max_bytes:
            return False
        # the one needed next is touched last, so eviction takes it last
        for url in reversed(nearer):
            self._cache.touch(url)
        return True

    def _next(self) -> int | None:
        """The next shard to fetch, which no other thread then fetches; None at the end."""
        with self._changed:
            while not self._stop.is_set():
                for number in self._needed:
                    if number not in self._settled:
                        # under the lock, so that no other thread takes it too
                        self._settled.add(number)
                        return number
                self._changed.wait()
        return None
