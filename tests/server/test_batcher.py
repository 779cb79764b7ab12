"""Micro-batching: who waits together, and whom an error reaches."""

import asyncio
import threading

import pytest

from vlm.errors import UsageError, VlmError
from vlm.server.batcher import MicroBatcher, Overloaded


def squares(numbers):
    return [UsageError(f"{number} is negative") if number < 0 else number**2 for number in numbers]


def test_requests_that_wait_come_together_and_in_order():
    sizes, gate = [], threading.Event()

    def run(numbers):
        sizes.append(len(numbers))
        gate.wait(5)
        return squares(numbers)

    async def ask():
        batcher = MicroBatcher(run, max_batch=4)
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(7)]
        await asyncio.sleep(0.05)
        gate.set()
        answers = await asyncio.gather(*tasks)
        await batcher.close()
        return answers, batcher.counts

    answers, counts = asyncio.run(ask())
    assert answers == [number**2 for number in range(7)]
    assert max(sizes) == 4
    assert (counts.requests, counts.batches) == (7, len(sizes))


def test_one_alone_does_not_wait():
    async def ask():
        batcher = MicroBatcher(squares)
        return [await batcher.submit(number) for number in (2, 3)], batcher.counts.batches

    assert asyncio.run(ask()) == ([4, 9], 2)


def test_an_error_reaches_only_whom_it_is_about():
    async def ask():
        batcher = MicroBatcher(squares)
        return await asyncio.gather(*(batcher.submit(number) for number in (1, -2, 3)), return_exceptions=True)

    one, two, three = asyncio.run(ask())
    assert (one, three) == (1, 9)
    assert isinstance(two, UsageError)


def test_a_batch_that_fails_fails_its_requests_and_no_later_one():
    calls = []

    def run(numbers):
        calls.append(list(numbers))
        if len(calls) == 1:
            raise VlmError("the index is damaged")
        return squares(numbers)

    async def ask():
        batcher = MicroBatcher(run)
        with pytest.raises(VlmError, match="damaged"):
            await batcher.submit(1)
        return await batcher.submit(2)

    assert asyncio.run(ask()) == 4


def test_more_than_may_wait_are_refused_at_once():
    gate = threading.Event()

    def run(numbers):
        gate.wait(5)
        return squares(numbers)

    async def ask():
        batcher = MicroBatcher(run, max_batch=1, max_waiting=2)
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests wait"):
            await batcher.submit(4)
        gate.set()
        return await asyncio.gather(first, *waiting), batcher.counts.refused

    assert asyncio.run(ask()) == ([1, 4, 9], 1)


def test_who_has_left_is_not_computed_for():
    seen, gate = [], threading.Event()

    def run(numbers):
        seen.extend(numbers)
        gate.wait(5)
        return squares(numbers)

    async def ask():
        batcher = MicroBatcher(run, max_batch=1)
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        gone, stays = (asyncio.create_task(batcher.submit(number)) for number in (2, 3))
        await asyncio.sleep(0)
        gone.cancel()
        gate.set()
        return await first, await stays

    assert asyncio.run(ask()) == (1, 9)
    assert seen == [1, 3]


def test_close_answers_what_was_accepted():
    async def ask():
        batcher = MicroBatcher(squares, max_batch=1)
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(5)]
        await asyncio.sleep(0)
        await batcher.close()
        return [task.result() for task in tasks]

    assert asyncio.run(ask()) == [0, 1, 4, 9, 16]
