"""The bounded cache of shards on this machine, shared by all processes: fetched once, least recently used out first."""

import math
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from vlm.data.storage.addresses import is_compressed, is_remote
from vlm.data.storage.checksums import known_sha256
from vlm.data.storage.fetch import Order, fetch
from vlm.data.storage.remote import Identity, identity_of, jitter_rng
from vlm.data.storage.retry import Patience
from vlm.data.storage.room import Room
from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of, sync_folder

_WAIT_SECONDS = 0.1
_GROWTH = 1.5
_DEFAULT_GB = 50.0


class _NoRoom(Exception):
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
    patience: Patience = field(default_factory=Patience)

    def local_path(self, address: str, identity: Identity | None = None) -> Path:
        """The shard as a plain tar on this machine, fetched if it is not there.

        identity: the version that is wanted; the one this process saw first if not given.

        Raises:
            UsageError: there is no such shard, or it is larger than the cache.
            VlmError: it cannot be fetched.
        """
        identity = identity or identity_of(address, self.patience)
        key = self._key(address, identity)
        while not self._room.touch(key):
            self._bring(address, identity, threading.Event(), is_patient=True)
        return self._room.path(key, "tar")

    def prefetch(self, address: str, stop: threading.Event) -> bool:
        """Fetch a shard unless it is there; False if somebody else is at it, or there is no room for it now.

        Raises:
            VlmError: as `local_path`.
            Stopped: `stop` was set; what was fetched is kept.
        """
        identity = identity_of(address, self.patience)
        return self.touch(address) or self._bring(address, identity, stop, is_patient=False)

    def touch(self, address: str) -> bool:
        """Mark a shard as used now; False if it is not here."""
        return self._room.touch(self._key(address, identity_of(address, self.patience)))

    def footprint(self, address: str) -> int:
        """The bytes a shard takes here; for a compressed one that is not here yet, those of its compressed form.

        Raises:
            VlmError: it cannot be reached.
        """
        identity = identity_of(address, self.patience)
        try:
            size = self._room.path(self._key(address, identity), "tar").stat().st_size
        except FileNotFoundError:
            size = identity.size
        return size + self.max_bytes - self._largest(address)

    def damage(self, address: str, identity: Identity) -> str:
        """Why a compressed shard could not be unpacked to its end; empty if it could."""
        return str(self._room.facts(self._key(address, identity)).get("damage", ""))

    @property
    def _room(self) -> Room:
        return Room(self.folder, self.max_bytes)

    def _key(self, address: str, identity: Identity) -> str:
        return fingerprint_of(address if is_remote(address) else str(Path(address).absolute()), identity.token)

    def _bring(self, address: str, identity: Identity, stop: threading.Event, *, is_patient: bool) -> bool:
        try:
            return self._try_fetch(address, identity, stop, is_patient=is_patient)
        except OSError as error:  # of this machine: those of the network end in `Retry`
            raise VlmError(
                f"{address} cannot be kept in the cache at {self.folder}: {error}. Free space there, or name another "
                "folder by VLM_CACHE."
            ) from error

    def _try_fetch(self, address: str, identity: Identity, stop: threading.Event, *, is_patient: bool) -> bool:
        """One try to lock the shard, find room for it and fetch it; whether it is there now.

        While there is no room its lock is given back, so that what it has of the shard can make room for others.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key, lock = self._key(address, identity), self._room.lock(self._key(address, identity))
        try:
            lock.acquire(blocking=is_patient)
        except Timeout:
            return False
        try:
            if self._room.path(key, "tar").exists() or self._fetch_locked(address, identity, key, stop):
                return True
        finally:
            lock.release()
        if is_patient:
            time.sleep(_WAIT_SECONDS)
        return False

    def _fetch_locked(self, address: str, identity: Identity, key: str, stop: threading.Event) -> bool:
        """Fetch under the lock of the key; False if there is no room now."""
        room, part, held = self._room, self._room.path(key, "part"), self._first_guess(address, identity, key)
        if not room.reserve(key, held, address):
            return False

        def make_room(num_bytes: int) -> None:
            nonlocal held
            if num_bytes > held:
                held = max(num_bytes, min(int(num_bytes * _GROWTH), self._largest(address)))
                if not room.reserve(key, held, address):
                    raise _NoRoom(held)

        order = Order(
            address=address,
            identity=identity,
            sha256=known_sha256(address, identity, self.patience),
            patience=self.patience,
            make_room=make_room,
            stop=stop,
        )
        try:
            damage = fetch(order, part, rng=jitter_rng(address))
        except _NoRoom as error:
            part.unlink(missing_ok=True)
            room.note(key, {"address": address, "next": min(2 * error.bytes, self._largest(address))})
            return False
        except Exception:
            if is_compressed(address) or not part.exists():
                room.drop(key)
            raise
        room.note(key, {"address": address, "identity": identity.token, "damage": damage})
        part.replace(room.path(key, "tar"))
        sync_folder(self.folder)
        return True

    def _first_guess(self, address: str, identity: Identity, key: str) -> int:
        """The bytes to ask for: the size, or for a compressed shard a guess that grows when it was too small."""
        if not is_compressed(address):
            return identity.size
        guess = max(int(identity.size * 1.25), self._room.facts(key).get("next", 0))
        return min(guess, self._largest(address)) if identity.size < self._largest(address) else guess

    def _largest(self, address: str) -> int:
        return self._room.largest(address)


def default_cache() -> ShardCache:
    """The cache the environment names: VLM_CACHE, its folder (`~/.cache/vlm/shards`), and VLM_CACHE_GB, its bound (50).

    Raises:
        UsageError: the bound is no positive number.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    given = os.environ.get("VLM_CACHE_GB", "")
    try:
        gigabytes = float(given) if given else _DEFAULT_GB
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise UsageError(f"VLM_CACHE_GB is {given!r}; give the bound of the cache in gigabytes, a number above 0.")
    return ShardCache(Path(os.environ.get("VLM_CACHE") or base / "vlm" / "shards"), int(gigabytes * 1e9))
