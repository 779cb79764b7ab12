"""Changes of a served index: images that come with a request are added, rows are deleted; one change at a time.

Searches go on meanwhile: a change is a new version on disk, which the reader takes up before the change is answered.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.api.index import SearchIndex
from vlm.console import without_progress
from vlm.data.decode import storable_image
from vlm.errors import BadSample, IndexBusy, UsageError, VlmError
from vlm.files import content_digest
from vlm.server.schemas import NewItem, decode_data_url
from vlm.server.served_index import ServedIndex, num_pixels

WAIT_SECONDS = 30.0
"""How long a change waits for the one before it."""


@dataclass
class ChangeQueue:
    """Lets the changes of one index through one by one; call from one event loop."""

    wait_seconds: float = WAIT_SECONDS
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set, init=False)

    async def run(self, change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a change, which blocks, gives; it is carried through even if whoever asked for it leaves.

        Raises:
            IndexBusy: the change before it takes too long.
        """
        try:
            async with asyncio.timeout(self.wait_seconds):
                await self._lock.acquire()
        except TimeoutError:
            raise IndexBusy(
                f"The index is being changed by another request for more than {self.wait_seconds:g} seconds; nothing "
                "was done: try again later."
            ) from None
        task = asyncio.create_task(self._run_locked(change))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # a cancelled request must not free the lock while its thread still writes
        return await asyncio.shield(task)

    async def _run_locked(self, change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(change)
        finally:
            self._lock.release()

    async def close(self) -> None:
        """Wait for the change under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


def add_items(index: ServedIndex, items: Sequence[NewItem], max_pixels: int) -> dict[str, Any]:
    """Embed images and add them, all or none; what the index has already, by the same bytes and no uid, is `known`.

    Raises:
        UsageError: one is no image or too large, or a uid exists or comes twice. IndexBusy: another process changes the
            index.
    """
    images = [_checked_image(number, item, max_pixels) for number, item in enumerate(items)]
    uids: list[str] = []
    for item, image in zip(items, images, strict=True):
        uids.append(item.uid or content_digest(image).hex())
    has_uids = any(item.uid for item in items)
    has_captions = any(item.captions for item in items)
    with _named(index):
        summary = SearchIndex(index.service).add(
            images,
            uids=uids if has_uids else None,
            captions=[item.captions for item in items] if has_captions else None,
            metadata=[item.metadata for item in items],
        )
    index.refresh()
    return {
        "rows": summary.rows,
        "added": summary.added,
        "known": summary.known,
        "generation": summary.generation,
        "uids": uids,
    }


def _checked_image(number: int, item: NewItem, max_pixels: int) -> bytes:
    """The bytes of an image that can be decoded to its end."""
    try:
        data = decode_data_url(item.image)
        num_pixels(data, max_pixels)
        storable_image(data, verify=True)
    except (UsageError, BadSample) as error:
        raise UsageError(f"Image {number + 1} cannot be added: {error} Nothing was added.") from error
    return data


def delete_rows(
    index: ServedIndex, uids: Sequence[str], where: str, *, dry_run: bool, expect: int | None
) -> dict[str, Any]:
    """Delete rows by uid or by a filter; with `dry_run` only say what would go.

    expect: the number of rows to delete; needed for more than half of the index.

    Raises:
        UsageError: a uid does not exist, the filter is malformed, neither or both are given, or `expect` is missing or
            another number. IndexBusy: another process changes the index.
    """
    with _named(index):
        search_index = SearchIndex(index.service)
        preview = search_index.delete(list(uids), where=where, dry_run=True, expect=expect)
        if dry_run:
            return {
                "rows": preview.remaining,
                "deleted": preview.rows,
                "generation": index.generation,
                "examples": list(preview.examples),
                "hint": preview.hint,
            }
        # who sends a filter sees no question, as at a terminal, before most of an index is gone
        if preview.is_majority and expect is None:
            raise UsageError(
                f"{preview.rows:,} of {preview.rows + preview.remaining:,} rows of index {index.name} would be "
                f"deleted, more than half; send expect = {preview.rows} if that is meant, dry_run shows some of them."
            )
        info = search_index.delete(list(uids), where=where, expect=expect)
    index.refresh()
    return {"rows": info.rows, "deleted": info.removed, "generation": info.generation}


@contextlib.contextmanager
def _named(index: ServedIndex) -> Iterator[None]:
    """Let errors name the index by its name, since answers show no paths unless asked to; no progress bars.

    A bar of each request would only fill the log.
    """
    try:
        with without_progress():
            yield
    except VlmError as error:
        folder = str(index.service.index.folder)
        if index.shows_paths or folder not in str(error):
            raise
        message = str(error).replace(folder, f"Index {index.name}")
        kind = next(kind for kind in (IndexBusy, UsageError, VlmError) if isinstance(error, kind))
        raise kind(message) from error
