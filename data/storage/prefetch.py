"""Fetching the shards of the next window while this one is read."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vlm.data.storage.addresses import needs_cache, protocol_of, require_package
from vlm.data.storage.cache import ShardCache
from vlm.data.storage.retry import Stopped
from vlm.errors import VlmError

_CLOSING_SECONDS = 5.0


class Prefetcher:
    """Fetches the shards that will be wanted into the cache, in order, on a few threads of this process.

    addresses: all shards; those that are read where they lie cost nothing. Failures are kept quiet: the reader meets
    them itself when it comes to that shard, and says so.
    """

    def __init__(self, cache: ShardCache, addresses: Sequence[str], *, threads: int = 4) -> None:
        self._cache, self._addresses = cache, tuple(addresses)
        self._cached = frozenset(number for number, address in enumerate(addresses) if needs_cache(address))
        self._num_threads = threads
        for protocol in {protocol_of(addresses[number]) for number in self._cached} - {""}:
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

    def want(self, numbers: Sequence[int]) -> None:
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
            thread = threading.Thread(target=self._work, name="vlm-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Call off what is under way; half-fetched shards are kept and gone on with later."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        while (number := self._next()) is not None:
            try:
                if not (self._keep_nearer(number) and self._cache.prefetch(self._addresses[number], self._stop)):
                    self._postponed.add(number)
            except (VlmError, Stopped):
                continue

    def _keep_nearer(self, number: int) -> bool:
        """Whether a shard fits into the cache with those wanted before it; marks these as used, the next one last."""
        wanted = self._wanted
        needed = self._cache.footprint(self._addresses[number])
        nearer: list[str] = []
        for address in (self._addresses[place] for place in wanted[: wanted.index(number) if number in wanted else 0]):
            try:
                needed += self._cache.footprint(address)
                nearer.append(address)
            except VlmError:  # it cannot be had, and takes no room
                continue
        if needed > self._cache.max_bytes:
            return False
        for address in reversed(nearer):
            self._cache.touch(address)
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
