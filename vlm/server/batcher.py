"""Micro-batching: concurrent requests wait while a batch is under way, and the next batch takes all that wait.

No request waits for company: an idle worker takes what is there at once, so one client alone sees no delay. Under load
the batches grow by themselves to the number of clients, and the model embeds their texts together. What a request waits
is bounded by the batches before it, and the number of requests that may wait is bounded too.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vlm.errors import VlmError

Request = TypeVar("Request")
Answer = TypeVar("Answer")

RunBatch = Callable[[Sequence[Request]], Sequence[Answer | VlmError]]
"""Answers a batch in the order of its requests; an error stands in the place of the request that it is about."""


class Overloaded(VlmError):
    """More requests wait than the service accepts; `retry_after` is in seconds."""

    retry_after = 1


@dataclass
class BatchCounts:
    """What a batcher has done: requests, the batches they came in, and requests refused."""

    requests: int = 0
    batches: int = 0
    refused: int = 0


@dataclass
class MicroBatcher(Generic[Request, Answer]):
    """Runs requests in batches of at most `max_batch`, in `workers` threads; call from one event loop.

    max_waiting: requests that may wait beyond those under way. run: called in a thread, by several at a time if there
    are several workers. prepare_thread: called once in each of the threads.
    """

    run: RunBatch[Request, Answer]
    max_batch: int = 64
    max_waiting: int = 1024
    workers: int = 1
    prepare_thread: Callable[[], None] | None = None
    counts: BatchCounts = field(default_factory=BatchCounts)
    _waiting: deque[tuple[Request, asyncio.Future[Answer]]] = field(default_factory=deque, init=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    _working: int = field(default=0, init=False)
    _threads: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.workers, "batch", self.prepare_thread)

    async def submit(self, request: Request) -> Answer:
        """The answer to one request.

        Raises:
            Overloaded: too many requests wait. VlmError: as `run` gives for this request.
        """
        # refused at once: an answer that comes after the client has given up is of no use to anyone
        if len(self._waiting) >= self.max_waiting:
            self.counts.refused += 1
            raise Overloaded(f"The service is busy: {len(self._waiting)} requests wait. Try again in a second.")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        # no timer: the first request goes ahead alone, and what comes meanwhile is the next batch
        if self._working < self.workers:
            self._working += 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def close(self) -> None:
        """Wait until all that was submitted is answered, then end the threads."""
        # again and again, since a request that waits may begin another task
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown()

    async def _work(self) -> None:
        """Take batches until nothing waits."""
        loop = asyncio.get_running_loop()
        while batch := self._take():
            requests = [request for request, _ in batch]
            self.counts.requests += len(batch)
            self.counts.batches += 1
            try:
                answers = await loop.run_in_executor(self._threads, self.run, requests)
            except Exception as error:  # each request of the batch gets it, and the next batch goes ahead
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                _settle(future, answer)
        # here and not when the task is done, which is later: a request in between would wait for a worker that has left
        self._working -= 1

    def _take(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        batch: list[tuple[Request, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self.max_batch:
            request, future = self._waiting.popleft()
            # whoever asked has gone, so nobody needs the answer
            if not future.cancelled():
                batch.append((request, future))
        return batch


def _settle(future: "asyncio.Future[Answer]", answer: "Answer | Exception") -> None:
    # whoever asked may have gone while the batch was under way
    with contextlib.suppress(asyncio.InvalidStateError):
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
