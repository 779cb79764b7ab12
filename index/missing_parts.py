"""The parts that embeddings folders lack, made in one pass over their shards."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vlm.console import progress
from vlm.data.loader import stream_batches
from vlm.data.plan import ShardPlan
from vlm.errors import VlmError
from vlm.index.batches import AssembleForEmbedding
from vlm.index.collect import PartRows
from vlm.index.compiled import compile_encoder
from vlm.index.embeddings import EmbeddingsWriter, Space
from vlm.index.encoder import Encoder
from vlm.index.parts import part_name
from vlm.index.uids import UidNamer
from vlm.manifest import Manifest


@dataclass(kw_only=True)
class Target:
    """A folder to fill. writer: None where it was complete. manifest: once it is whole. new_rows: written by us."""

    path: Path
    space: Space
    writer: EmbeddingsWriter | None
    manifest: Manifest | None = None
    new_rows: int = 0

    def lacks(self, number: int) -> bool:
        """Whether a part is not there, or not as it was written."""
        return self.writer is not None and self.writer.part(number, verify=True) is None

    def add(self, rows: PartRows) -> None:
        """Write a part."""
        assert self.writer is not None
        vectors = rows.matrix(self.space.dimension)
        self.writer.add(rows.shard, vectors, rows.origins, rows.incidents, number=rows.number)
        self.new_rows += len(rows.origins)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A way through shards. counts: samples of each. times: of a selection (`ShardPlan`)."""

    shards: Sequence[str]
    counts: Sequence[int]
    times: Sequence[np.ndarray] | None
    batch_size: int
    workers: int
    is_compiled: bool

    def write_missing(self, model: Encoder, targets: Sequence[Target], numbers: range) -> None:
        """Write those parts of these numbers that are missing; what is finished stays whatever happens then.

        Raises:
            VlmError: a shard cannot be read, a vector is not of unit length, or a batch does not fit into memory.
        """
        lacking = {number: [target for target in targets if target.lacks(number)] for number in numbers}
        lacking = {number: lacks for number, lacks in lacking.items() if lacks}
        if not lacking:
            return
        has_pictures = any(target.space.modality == "image" for lacks in lacking.values() for target in lacks)
        try:
            if has_pictures and self.is_compiled:
                model = compile_encoder(model, self.batch_size)
            self._write(model, lacking, all_numbers=numbers, has_pictures=has_pictures)
        except torch.OutOfMemoryError as error:
            raise VlmError(
                f"A batch of {self.batch_size} does not fit into memory; finished parts are kept: repeat with a "
                "smaller --batch-size."
            ) from error

    def _write(
        self, model: Encoder, lacking: dict[int, list[Target]], *, all_numbers: range, has_pictures: bool
    ) -> None:
        plan, namer = self._plan(lacking), UidNamer(self.shards)
        shards = [self.shards[number] for number in lacking]
        assemble = AssembleForEmbedding(view=model.view if has_pictures else None)
        stream = stream_batches(plan, shards, assemble, numbers=range(len(plan)), workers=self.workers)
        total, pending = sum(self._plan(all_numbers).kept), None
        with (
            progress(total=total, done=total - sum(plan.kept), what="embed", unit=" samples") as shown,
            ThreadPoolExecutor(1) as pool,
        ):
            for (number, targets), kept in zip(lacking.items(), plan.kept, strict=True):
                made = [(target, self._rows(number, target, namer)) for target in targets]
                for batch in islice(stream, -(-kept // self.batch_size)):
                    for _, rows in made:
                        rows.take(batch, model)
                    shown.update(len(batch.items) + len(batch.unread))
                if pending:
                    pending.result()
                pending = pool.submit(_add, made)  # written while the next part is embedded
            if pending:
                pending.result()

    def _rows(self, number: int, target: Target, namer: UidNamer) -> PartRows:
        return PartRows(
            name=part_name(number),
            shard=self.shards[number],
            number=number,
            namer=namer,
            modality=target.space.modality,
        )

    def _plan(self, numbers: Iterable[int]) -> ShardPlan:
        chosen = list(numbers)
        times = None if self.times is None else [self.times[number] for number in chosen]
        return ShardPlan(counts=[self.counts[number] for number in chosen], batch_size=self.batch_size, times=times)


def _add(made: list[tuple[Target, PartRows]]) -> None:
    for target, rows in made:
        target.add(rows)
