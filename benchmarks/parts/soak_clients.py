"""Clients of the soak of `vlm serve`: searchers, one who adds and deletes, and what each of them has seen."""

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import vlm
from vlm.errors import UsageError, VlmError

MAX_OWN = 60
"""Rows that the changer keeps; above that it deletes."""
_TOP = 10
_MAX_TRIES = 50


@dataclass
class Observations:
    """counts: requests by kind that were answered as they should. faults: what was not."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def expect(self, is_right: bool, what: str) -> None:
        """Count a comparison, and note it if it is wrong."""
        self.counts["compared"] += 1
        if not is_right:
            self.faults.append(what)


@dataclass(kw_only=True)
class Soak:
    """A server, its index on disk, queries, and the clients' shared state.

    may_change: held by whoever changes the index over HTTP or damages its newest version. may_open: held by whoever
    opens the newest version or damages it.
    """

    address: str
    index: Path
    captions: list[str]
    vectors: np.ndarray
    token: str
    seen: Observations = field(default_factory=Observations)
    may_change: asyncio.Lock = field(default_factory=asyncio.Lock)
    may_open: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    async def search_on(self, seed: int) -> None:
        """Ask all kinds of queries, a wrong one now and then, until the end."""
        rng = random.Random(seed)
        async with vlm.AsyncClient(self.address, retries=0) as client:
            while not self.is_over.is_set():
                kind = rng.choice(["text", "vector", "image", "filter", "wrong"])
                try:
                    await self._ask(client, kind, rng)
                except VlmError as error:
                    self.seen.faults.append(f"{kind}: {error}")
                else:
                    self.seen.counts[kind] += 1

    async def _ask(self, client: vlm.AsyncClient, kind: str, rng: random.Random) -> None:
        vector = self.vectors[rng.randrange(len(self.vectors))].tolist()
        if kind == "text":
            result = await client.search(rng.choice(self.captions), top=_TOP)
        elif kind == "vector":
            result = await client.search(vector=vector, top=_TOP)
        elif kind == "image":
            result = await client.search(image=random_picture(rng), top=_TOP)
        elif kind == "filter":
            result = await client.search(vector=vector, where="number < 1000", top=_TOP)
        else:
            try:
                await client.search(vector=vector, where="number <")
            except UsageError:
                return
            raise VlmError("a wrong filter was accepted")
        self.seen.expect(len(result) == _TOP, f"{kind}: {len(result)} hits")

    async def compare_on(self) -> None:
        """Ask server and index the same; where both answer from one version they must answer alike."""
        rng = random.Random(1)
        direct = vlm.open_index(self.index)
        async with vlm.AsyncClient(self.address, retries=0) as client:
            while not self.is_over.is_set():
                vector = self.vectors[rng.randrange(len(self.vectors))].tolist()
                for _ in range(_MAX_TRIES):
                    async with self.may_change:
                        mine = await asyncio.to_thread(direct.search, vector=vector, top=_TOP)
                        theirs = await client.search(vector=vector, top=_TOP)
                    if mine.generation == theirs.generation:
                        break
                same = [hit.entry.uid for hit in mine.hits] == [hit.uid for hit in theirs]
                self.seen.expect(same and mine.generation == theirs.generation, "answers differ from the index's")
                self.seen.counts["as the index"] += 1
                await asyncio.sleep(0.05)
        direct.close()

    async def change_on(self) -> None:
        """Add images, find them, delete the oldest, miss them, until the end."""
        rng = random.Random(2)
        own: list[str] = []
        async with vlm.AsyncClient(self.address, token=self.token, retries=20) as client:
            for number in itertools.count():
                if self.is_over.is_set():
                    return
                async with self.may_change:
                    uids = [f"soak/{number}/{place}" for place in range(rng.randint(1, 4))]
                    await self._add(client, uids, rng)
                    own += uids
                    if len(own) > MAX_OWN:
                        await self._delete(client, own[:20])
                        own = own[20:]
                await asyncio.sleep(0.2)

    async def _add(self, client: vlm.AsyncClient, uids: list[str], rng: random.Random) -> None:
        pictures = [random_picture(rng) for _ in uids]
        items = [{"image": picture, "uid": uid, "captions": [uid]} for picture, uid in zip(pictures, uids, strict=True)]
        try:
            answer = await client.add(items)
            found = await client.search(image=pictures[0], top=1)
        except VlmError as error:
            self.seen.faults.append(f"add: {error}")
            return
        self.seen.expect(answer["added"] == len(uids), "not all were added")
        self.seen.expect([hit.uid for hit in found] == uids[:1], "an added row was not found")
        self.seen.expect(found.generation >= answer["generation"], "the version went back")
        self.seen.counts["add"] += 1

    async def _delete(self, client: vlm.AsyncClient, uids: list[str]) -> None:
        try:
            answer = await client.delete(uids)
        except VlmError as error:
            self.seen.faults.append(f"delete: {error}")
            return
        self.seen.expect(answer["deleted"] == len(uids), "not all were deleted")
        try:
            await client.image(uids[0])
            self.seen.faults.append("a deleted row has an image")
        except UsageError:
            self.seen.counts["delete"] += 1

    async def compact_now(self) -> None:
        """Compact the index as another process would; searches go on, the server's own changes wait their turn."""
        async with self.may_open:
            direct = vlm.open_index(self.index)
            for _ in range(_MAX_TRIES):
                try:
                    await asyncio.to_thread(direct.compact)
                except UsageError:
                    # the server is changing it
                    await asyncio.sleep(0.1)
                else:
                    self.seen.counts["compaction"] += 1
                    break
            else:
                self.seen.faults.append("compaction found no turn")
            direct.close()

    async def damage_for(self, seconds: float) -> None:
        """Put a damaged newest version there, see that the one before goes on, and take it away."""
        manifest = self.index / "manifest.json"
        async with self.may_change, self.may_open, vlm.AsyncClient(self.address, retries=0) as client:
            whole = manifest.read_bytes()
            before = (await client.indexes())[0]["generation"]
            self._replace(manifest, whole[: len(whole) // 2])
            try:
                await client.search(self.captions[0])
                await asyncio.sleep(seconds)
                during = (await client.indexes())[0]
            except VlmError as error:
                self.seen.faults.append(f"damaged: {error}")
            else:
                self.seen.expect(during["generation"] == before, "a damaged version changed the answers")
                self.seen.expect(bool(during["reload_error"]), "a damaged version was not reported")
            finally:
                self._replace(manifest, whole)
            await client.search(self.captions[0])
            self.seen.expect(not (await client.indexes())[0]["reload_error"], "the whole version was not taken up")
            self.seen.counts["damage"] += 1

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        beside = path.with_name("soak.tmp")
        beside.write_bytes(content)
        beside.replace(path)


def random_picture(rng: random.Random) -> np.ndarray:
    """Pixels that no other picture has."""
    return np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (48, 64, 3), dtype=np.uint8)
