"""Looking with several processes; what comes out, and in which order, does not depend on how many."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from vlm.data.look.glance import Glance, Glancer, Portion, Wanted
from vlm.errors import VlmError

_AHEAD = 4
_glancer: Glancer | None = None


def glance_all(portions: Iterable[Portion], wanted: Wanted, *, workers: int = 0) -> Iterator[list[Glance]]:
    """What each portion shows, in the order of the portions.

    workers: processes that read and decode; 0 does it in this one. Each has no more than a few portions under way.

    Raises:
        VlmError: a process was ended from outside.
    """
    if not workers:
        glancer = Glancer(wanted)
        try:
            yield from map(glancer, portions)
        finally:
            glancer.close()
        return
    # spawned, not forked: this process may have threads by now
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(wanted,))
    waiting: deque[Future[list[Glance]]] = deque()
    try:
        for portion in portions:
            waiting.append(pool.submit(_glance_in_worker, portion))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise VlmError(
            f"One of the {workers} worker processes ended abruptly, most likely for want of memory; "
            "repeat with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(wanted: Wanted) -> None:
    global _glancer
    _glancer = Glancer(wanted)


def _glance_in_worker(portion: Portion) -> list[Glance]:
    assert _glancer is not None
    return _glancer(portion)
