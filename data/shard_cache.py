"""SHA-256 of remote shards, as far as somebody wrote it down.

The bound of the cache folder: what lies in it, what is promised to fetches under way, and what has to go.

Unpacking gzip as it streams in, with a limit on what comes out.

Fetching one shard whole: resumed after a cut or a kill, checked, and unpacked on the way if it is compressed.

The bounded cache of shards on this machine, shared by all processes: fetched once, least recently used out first.

Fetching the shards of the next window while this one is read.
"""

import hashlib
import json
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

import numpy as np
from filelock import FileLock, Timeout

from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, fsync_folder, sha256_file, write_text
from vlm.manifest import MANIFEST
from vlm.storage.remote import (
    FetchCancelled,
    FileIdentity,
    Retry,
    RetryPolicy,
    fetch_identity,
    file_identity,
    jitter_rng,
    read_blocks,
    read_small,
)
from vlm.storage.urls import (
    is_compressed,
    is_remote,
    needs_cache,
    protocol_of,
    require_package,
    sibling_url,
    url_basename,
)

_MAX_MANIFEST_BYTES = 256 << 20


def published_sha256(url: str, identity: FileIdentity, retry_policy: RetryPolicy) -> str:
    """The checksum of a remote shard in hex, or empty if nobody knows it.

    It is taken from the server where that has one, else from the `manifest.json` that `vlm pack` wrote into the folder,
    if what is said there is about a file of this size.
    """
    if identity.sha256 or not is_remote(url):
        return identity.sha256
    record = _manifest_files(sibling_url(url, MANIFEST), retry_policy).get(url_basename(url))
    if not isinstance(record, dict) or record.get("bytes") != identity.size:
        return ""
    return str(record.get("sha256", ""))


@lru_cache(maxsize=256)
def _manifest_files(url: str, retry_policy: RetryPolicy) -> dict[str, Any]:
    """What a folder's manifest says of its files, asked once per process; nothing if it has none."""
    data = read_small(url, max_bytes=_MAX_MANIFEST_BYTES, retry_policy=retry_policy)
    try:
        manifest = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("kind") == "shards" else None
    return files if isinstance(files, dict) else {}


_CACHE_FILE = re.compile(r"([0-9a-f]{16})\.(tar|part|json)")
_NOTE_BYTES = 2048


@dataclass(kw_only=True)
class _Entry:
    """What lies in the folder under one key. used: time of last use in ns."""

    bytes: int = 0
    used: int = 0
    is_whole: bool = False


@dataclass(frozen=True)
class CacheSpace:
    """Space in a folder for files by key: KEY.tar whole, KEY.part on its way, KEY.json what they are.

    max_bytes: what they may come to together. Files of other names are neither counted nor touched. Whoever writes to a
    key holds its lock; who promises space holds that of the folder, so that the bound is kept across processes.
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
        """Promise `num_bytes` to a key whose lock is held, for what it has now included; unused files go.

        False if what is in use leaves too little; try again later.

        Raises:
            UsageError: it is more than the folder may ever hold.
        """
        wanted = num_bytes + self.max_bytes - self.largest(url)
        if wanted > self.max_bytes:
            raise UsageError(
                f"{url} has {num_bytes:,} bytes, but the cache at {self.folder} may hold {self.max_bytes:,}; "
                "allow more by VLM_CACHE_GB, or pack smaller shards."
            )
        with FileLock(self.folder / ".lock"):
            entries = self._entries()
            entries.pop(key, None)
            surplus = sum(entry.bytes for entry in entries.values()) + wanted - self.max_bytes
            for victim, entry in sorted(entries.items(), key=lambda item: item[1].used):
                if surplus <= 0:
                    break
                if self._remove_unused(victim):
                    surplus -= entry.bytes
            if surplus > 0:
                return False
            self.write_metadata(key, {"address": url, "reserved": wanted})
        return True

    def largest(self, url: str) -> int:
        """The size of the largest shard of that address for which there can be room, in bytes."""
        return self.max_bytes - _NOTE_BYTES - 2 * len(url)

    def write_metadata(self, key: str, metadata: dict[str, Any]) -> None:
        """Write down what a key is."""
        write_text(self.path(key, "json"), json.dumps(metadata))

    def metadata(self, key: str) -> dict[str, Any]:
        """What was written down of a key; nothing if it has gone."""
        try:
            return json.loads(self.path(key, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def drop(self, key: str) -> None:
        """Remove the files of a key whose lock is held."""
        for kind in ("part", "tar", "json"):
            self.path(key, kind).unlink(missing_ok=True)

    def touch(self, key: str) -> bool:
        """Mark a whole file as used now; False if there is none."""
        path = self.path(key, "tar")
        try:
            os.utime(path)
        except PermissionError:  # another user's, which may be read all the same
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
            self.path(key, "lock").unlink(missing_ok=True)  # who waits for it finds out and takes a new one
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
        for key, entry in entries.items():
            if not entry.is_whole:
                entry.bytes = max(entry.bytes, self.metadata(key).get("reserved", 0))
        return entries


MAX_RATIO = 100
"""More plain bytes than this for each compressed one are taken for a bomb; tars of pictures come to about 1."""

_FREE_BYTES = 16 << 20
_IN_BYTES, _OUT_BYTES, _RECOVERY_BYTES = 64 << 10, 1 << 20, 512
_GZIP = 16 + zlib.MAX_WBITS


class Inflater:
    """Turns the compressed bytes of one file into plain ones; files of several gzip members are read through.

    damage: why the rest cannot be unpacked, or empty.
    """

    def __init__(self, url: str) -> None:
        self.damage = ""
        self._url = url
        self._taken, self._given, self._limit = 0, 0, _OUT_BYTES
        self._member: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes of the next compressed ones, at most 1 MiB at a time; none once there is damage.

        Raises:
            VlmError: they are more than `MAX_RATIO` times the compressed ones.
        """
        for start in range(0, len(data), _IN_BYTES):
            piece = data[start : start + _IN_BYTES]
            self._taken += len(piece)
            for plain in self._feed_piece(piece):
                self._given += len(plain)
                if self._given > _FREE_BYTES + MAX_RATIO * self._taken:
                    raise VlmError(
                        f"{self._url} unpacks to more than {MAX_RATIO} times its size ({self._taken:,} bytes came "
                        f"to {self._given:,} so far), as gzip bombs do; unpack it by hand if you know better."
                    )
                yield plain

    def finish(self) -> None:
        """Say that no more comes; a member that is still open is damage."""
        if self._member is not None and not self.damage:
            self.damage = f"its gzip is cut short at byte {self._taken:,}"

    def _feed_piece(self, piece: bytes) -> Iterator[bytes]:
        is_full = False
        while (piece or is_full) and not self.damage:
            if self._member is None:
                piece = piece.lstrip(b"\x00") if self._given else piece  # padding between members
                if not piece:
                    return
                self._member = zlib.decompressobj(_GZIP)
            before = self._member.copy()
            try:
                plain = self._member.decompress(piece, self._limit)
            except zlib.error as error:
                self._member = before
                if self._limit == 1:
                    self.damage = f"its gzip cannot be unpacked near byte {self._taken:,}: {error}"
                # zlib throws away what came before an error in the same call: go up to it in smaller steps
                self._limit = _RECOVERY_BYTES if self._limit > _RECOVERY_BYTES else 1
                continue
            if plain:
                yield plain
            is_full, piece = len(plain) == self._limit, self._member.unconsumed_tail
            if self._member.eof:
                is_full, piece, self._member = False, self._member.unused_data, None


_FULL_ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True)
class FetchRequest:
    """What is to be fetched, and under which conditions.

    identity: the version that is wanted. sha256: of the file as it lies there, in hex; empty if unknown.
    make_room: told how many bytes the plain tar of a compressed shard comes to, before they are written.
    stop: set to call the work off.
    """

    url: str
    identity: FileIdentity
    sha256: str = ""
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    free_space: Callable[[int], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)


def fetch(request: FetchRequest, path: Path, *, rng: np.random.Generator) -> str:
    """Bring a shard to `path` as a plain tar; returns why its compressed form ends early, or an empty string.

    Bytes that an earlier fetch of the same version left at `path` are kept, and only the rest is asked for, unless the
    shard is compressed; so `path` must stand for this version alone.
    rng: chance of the waits between tries.

    Raises:
        UsageError: there is no such shard.
        VlmError: it cannot be had after all tries, has another checksum than is known, or changed meanwhile.
        OSError: `path` cannot be written; what goes wrong on the network never is one.
        Stopped: it was called off.
    """
    found = ""
    for _ in range(_FULL_ATTEMPTS):
        retry = Retry(request.url, request.retry_policy, rng=rng, stop=request.stop)
        found, damage = (_unpack if is_compressed(request.url) else _download)(request, path, retry)
        _check_unchanged(request, path)
        if not request.sha256 or found == request.sha256:
            return damage
        path.unlink()
    raise VlmError(
        f"{request.url} came twice with the checksum {found}, where {request.sha256} was written down when it was "
        "made: the file there is damaged; pack or copy it again."
    )


def _check_unchanged(request: FetchRequest, path: Path) -> None:
    now = fetch_identity(request.url, request.retry_policy, request.stop)
    if now != request.identity:
        path.unlink(missing_ok=True)
        raise VlmError(
            f"{request.url} changed since it was first looked at (then {request.identity.token}, now {now.token}); "
            "start again to read it as it is now."
        )


def _download(request: FetchRequest, path: Path, retry: Retry) -> tuple[str, str]:
    """Append what `path` lacks; its checksum if one is known, and no damage."""
    have = path.stat().st_size if path.exists() else 0
    if have > request.identity.size:
        path.unlink()
        have = 0
    with path.open("ab") as file:
        for block in _blocks(request, have, retry):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return sha256_file(path) if request.sha256 else "", ""


def _unpack(request: FetchRequest, path: Path, retry: Retry) -> tuple[str, str]:
    """Write the plain bytes to `path`, anew; the checksum of the compressed ones, and the damage found."""
    inflater, digest, written = Inflater(request.url), hashlib.sha256(), 0
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
    is_checked = not request.sha256 or digest.hexdigest() == request.sha256
    if is_checked and not written:
        raise VlmError(f"{request.url} is no gzip, or damaged from the start: {inflater.damage or 'it is empty'}.")
    return digest.hexdigest(), inflater.damage


def _blocks(request: FetchRequest, position: int, retry: Retry) -> Iterator[bytes]:
    """The bytes from `position` to the end, whatever happens on the way."""
    url, size = request.url, request.identity.size
    while position < size:
        try:
            for block in read_blocks(url, position, request.identity):
                if request.stop.is_set():
                    raise FetchCancelled
                position += len(block)
                if position > size:
                    raise VlmError(f"{url} has more than the {size:,} bytes its server told; start again.")
                retry.reset_attempts()
                yield block
            if position < size:
                raise ConnectionError(f"the answer ended at byte {position:,} of {size:,}")
        except Exception as error:
            retry.after(error)


_WAIT_SECONDS = 0.1
_GROWTH = 1.5
_DEFAULT_GB = 50.0


class _OutOfSpace(Exception):
    """A shard being unpacked came to more than is free just now. bytes: what it had come to."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = num_bytes


@dataclass(frozen=True)
class ShardCache:
    """A folder of whole, plain shards that never holds more than `max_bytes`.

    It is safe to share between threads, processes and runs of one machine, and pickles into workers. A file of it may
    be removed by any of them to make room for another: open it, read, close it, and ask again if it has gone.

    patience: how long to try to reach a shard.
    """

    folder: Path
    max_bytes: int
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)

    def local_path(self, url: str, identity: FileIdentity | None = None) -> Path:
        """The shard as a plain tar on this machine, fetched if it is not there.

        identity: the version that is wanted; the one this process saw first if not given.

        Raises:
            UsageError: there is no such shard, or it is larger than the cache.
            VlmError: it cannot be fetched.
        """
        identity = identity or file_identity(url, self.retry_policy)
        key = self._key(url, identity)
        while not self._space.touch(key):
            self._fetch_or_wait(url, identity, threading.Event(), should_wait=True)
        return self._space.path(key, "tar")

    def prefetch(self, url: str, stop: threading.Event) -> bool:
        """Fetch a shard unless it is there; False if somebody else is at it, or there is no room for it now.

        Raises:
            VlmError: as `local_path`.
            Stopped: `stop` was set; what was fetched is kept.
        """
        identity = file_identity(url, self.retry_policy)
        return self.touch(url) or self._fetch_or_wait(url, identity, stop, should_wait=False)

    def touch(self, url: str) -> bool:
        """Mark a shard as used now; False if it is not here."""
        return self._space.touch(self._key(url, file_identity(url, self.retry_policy)))

    def footprint(self, url: str) -> int:
        """The bytes a shard takes here; for a compressed one that is not here yet, those of its compressed form.

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
        """One try to lock the shard, find room for it and fetch it; whether it is there now.

        While there is no room its lock is given back, so that what it has of the shard can make room for others.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key, lock = self._key(url, identity), self._space.lock(self._key(url, identity))
        try:
            lock.acquire(blocking=should_wait)
        except Timeout:
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
        """Fetch under the lock of the key; False if there is no room now."""
        space, part, held = self._space, self._space.path(key, "part"), self._estimated_bytes(url, identity, key)
        if not space.reserve(key, held, url):
            return False

        def free_space(num_bytes: int) -> None:
            nonlocal held
            if num_bytes > held:
                held = max(num_bytes, min(int(num_bytes * _GROWTH), self._largest(url)))
                if not space.reserve(key, held, url):
                    raise _OutOfSpace(held)

        request = FetchRequest(
            url=url,
            identity=identity,
            sha256=published_sha256(url, identity, self.retry_policy),
            retry_policy=self.retry_policy,
            free_space=free_space,
            stop=stop,
        )
        try:
            damage = fetch(request, part, rng=jitter_rng(url))
        except _OutOfSpace as error:
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
        """The bytes to ask for: the size, or for a compressed shard a guess that grows when it was too small."""
        if not is_compressed(url):
            return identity.size
        guess = max(int(identity.size * 1.25), self._space.metadata(key).get("next", 0))
        return min(guess, self._largest(url)) if identity.size < self._largest(url) else guess

    def _largest(self, url: str) -> int:
        return self._space.largest(url)


def default_cache() -> ShardCache:
    """The cache the environment names: VLM_CACHE, its folder (`~/.cache/vlm/shards`), and VLM_CACHE_GB, its bound (50).

    Raises:
        UsageError: the bound is no positive number.
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
    """Fetches the shards that will be wanted into the cache, in order, on a few threads of this process.

    addresses: all shards; those that are read where they lie cost nothing. Failures are kept quiet: the reader meets
    them itself when it comes to that shard, and says so.
    """

    def __init__(self, cache: ShardCache, urls: Sequence[str], *, threads: int = 4) -> None:
        self._cache, self._urls = cache, tuple(urls)
        self._cached = frozenset(number for number, url in enumerate(urls) if needs_cache(url))
        self._num_threads = threads
        for protocol in {protocol_of(urls[number]) for number in self._cached} - {""}:
            require_package(protocol)  # here, so that no thread is importing while workers are forked
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._wanted: tuple[int, ...] = ()
        self._settled: set[int] = set()
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
        wanted = tuple(number for number in dict.fromkeys(numbers) if number in self._cached)
        if wanted == self._wanted or self._stop.is_set():
            return
        with self._changed:
            self._wanted = wanted
            self._settled = (self._settled & set(wanted)) - self._postponed
            self._postponed.clear()
            self._changed.notify_all()
        while len(self._threads) < min(self._num_threads, len(wanted)):
            thread = threading.Thread(target=self._run_worker, name="vlm-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Call off what is under way; half-fetched shards are kept and gone on with later."""
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
        """Whether a shard fits into the cache with those wanted before it; marks these as used, the next one last."""
        wanted = self._wanted
        needed = self._cache.footprint(self._urls[number])
        nearer: list[str] = []
        for url in (self._urls[place] for place in wanted[: wanted.index(number) if number in wanted else 0]):
            try:
                needed += self._cache.footprint(url)
                nearer.append(url)
            except VlmError:  # it cannot be had, and takes no room
                continue
        if needed > self._cache.max_bytes:
            return False
        for url in reversed(nearer):
            self._cache.touch(url)
        return True

    def _next(self) -> int | None:
        """The next shard to fetch, marked as taken; None at the end."""
        with self._changed:
            while not self._stop.is_set():
                number = next((number for number in self._wanted if number not in self._settled), None)
                if number is not None:
                    self._settled.add(number)
                    return number
                self._changed.wait()
        return None
