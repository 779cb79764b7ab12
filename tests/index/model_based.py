"""The index against a model of it: random changes, searches and crashes beside a plain dictionary.

python -m tests.index.model_based --operations 20000 --seed 1 [--engine milvus]
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tests.index.oracle_rows import COLOURS, DIMENSION, SPACE, Row, Rows, as_stored, new_rows, origin
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingsWriter, normalize_rows
from vlm.index.engine_base import EngineIndex, RowSelection, open_engine_index, open_writer
from vlm.index.engine_writer import EngineWriter
from vlm.index.filter_language import parse_filter
from vlm.index.milvus.milvus_writer import MilvusWriter, build_milvus_index
from vlm.index.writer import IndexWriter
from vlm.manifest import read_manifest

KILLED = 77


class Killed(BaseException):
    """Ends a change at a failpoint within this process, which has the server of milvus-lite and so cannot be forked."""


@dataclass
class Oracle:
    """Random operations on an index folder and on a dictionary, compared after each.

    engine: faiss or milvus.
    exact: whether the index's kind is; else its answers may miss some, but must be right where they answer.
    readers: indexes that stay open, each with the rows it was opened or refreshed with.
    before: the rows of the version before, which a rollback brings back; None without one.
    """

    folder: Path
    rng: np.random.Generator
    rows: Rows
    kind: str
    engine: str = "faiss"
    done: Counter[str] = field(default_factory=Counter)
    readers: list[tuple[EngineIndex, Rows]] = field(default_factory=list)
    recalled: list[float] = field(default_factory=list)
    num_named: int = 0
    before: Rows | None = None

    @classmethod
    def begin(
        cls, folder: Path, seed: int, *, kind: str, rows: int, tuning: TuningParams, engine: str = "faiss"
    ) -> "Oracle":
        """Build the first generation of `rows` random rows."""
        oracle = cls(folder=folder / "index", rng=np.random.default_rng(seed), rows={}, kind=kind, engine=engine)
        oracle.rows = oracle.draw(rows)
        writer = EmbeddingsWriter(folder / "embeddings", space=SPACE, identity={})
        vectors = np.stack([row.vector for row in oracle.rows.values()])
        writer.add("/nowhere/0.tar", vectors, [origin(*item) for item in oracle.rows.items()])
        writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
        build = build_index if engine == "faiss" else build_milvus_index
        build(folder / "embeddings", oracle.folder, kind=kind, tuning=tuning)
        oracle.readers = [(open_engine_index(oracle.folder), dict(oracle.rows)) for _ in range(2)]
        return oracle

    def draw(self, count: int, uids: list[str] | None = None) -> Rows:
        """New rows, some of them copies of vectors that are there, so that there are ties."""
        drawn: Rows = {}
        for number in range(count):
            vector = normalize_rows(self.rng.standard_normal((1, DIMENSION)).astype(np.float32))[0]
            if self.rows and self.rng.random() < 0.1:
                vector = self.rows[self.some_uids(1)[0]].vector
            uid = uids[number] if uids else f"u{self.num_named}"
            self.num_named += 1
            drawn[uid] = Row(vector, str(self.rng.choice(COLOURS)), int(self.rng.integers(100)))
        return drawn

    def some_uids(self, most: int) -> list[str]:
        """Distinct names of living rows."""
        names = sorted(self.rows)
        return [names[number] for number in self.rng.permutation(len(names))[:most]]

    def step(self, *, crash_share: float) -> None:
        """One random operation."""
        change = self.random_change() if self.rng.random() < 0.4 else None
        if change is None:
            self.ask()
        elif self.rng.random() < crash_share:
            self.crash(*change)
        else:
            name, after, act = change
            with open_writer(self.folder) as writer:
                number = writer.snapshot.number
                act(writer)
                has_moved = writer.snapshot.number > number
            self.replace_rows(after, has_moved=has_moved)
            self.done[name] += 1
            self.refresh_after(name)
        if self.rng.random() < 0.1:
            self.check_readers()

    def replace_rows(self, after: Rows, *, has_moved: bool) -> None:
        """The rows after a change, which made a version or had nothing to do."""
        if has_moved:
            self.before = self.rows
        self.rows = after

    def refresh_after(self, name: str) -> None:
        """FAISS's readers keep the files of their version; a compaction of Milvus takes theirs from them."""
        if name == "compact" and self.engine == "milvus":
            for index, _ in self.readers:
                index.refresh()
            self.readers = [(index, dict(self.rows)) for index, _ in self.readers]

    def random_change(self) -> tuple[str, Rows, Callable[[EngineWriter], object]]:
        """Its name, the rows after it, and how it is done."""
        name = str(
            self.rng.choice(
                ["add", "update", "delete", "delete where", "compact", "set", "rollback"],
                p=[0.3, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1],
            )
        )
        count = int(self.rng.integers(1, 12))
        gone = self.some_uids(count)
        if name == "update":
            fresh = self.draw(len(gone), gone) | self.draw(2)
            return name, self.rows | fresh, lambda writer: writer.update(new_rows(fresh))
        if name == "delete" and gone:
            rest = {uid: row for uid, row in self.rows.items() if uid not in gone}
            return name, rest, lambda writer: writer.delete(gone)
        if name == "delete where" and self.rows:
            colour, size = str(self.rng.choice(COLOURS)), int(self.rng.integers(100))
            rest = {uid: row for uid, row in self.rows.items() if not (row.colour == colour and row.size == size)}
            text = f"colour = '{colour}' and size = {size}"
            if {row.colour for row in self.rows.values()} == set(COLOURS):
                return (
                    name,
                    rest,
                    lambda writer: writer.delete_rows(writer.snapshot.catalogue.where(parse_filter(text))),
                )
        if name == "compact":
            return name, dict(self.rows), lambda writer: writer.compact()
        if name == "rollback" and self.before is not None:
            return name, dict(self.before), lambda writer: writer.rollback()
        if name == "set" and gone:
            sizes = {uid: int(self.rng.integers(100)) for uid in gone}
            edited = {uid: replace(self.rows[uid], size=size) for uid, size in sizes.items()}
            return name, self.rows | edited, lambda writer: set_sizes(writer, sizes)
        fresh = self.draw(count)
        return "add", self.rows | fresh, lambda writer: writer.add(new_rows(fresh))

    def crash(self, name: str, after: Rows, act: Callable[[EngineWriter], object]) -> None:
        """Do it in a process that is killed at a random write point, then find one of the two states."""
        # a change of Milvus has fewer steps than one of files
        last = int(self.rng.integers(1, 24 if self.engine == "faiss" else 8))
        number = read_manifest(self.folder, "index").generation
        was_killed = _was_killed(self.folder, act, last) if self.engine == "milvus" else self.forked(name, act, last)
        index = open_engine_index(self.folder)
        if self.contents(index) == names_of(after) and (not was_killed or matches(index, after)):
            self.replace_rows(after, has_moved=index.snapshot.number > number)
            self.done[f"{name}, killed after the commit" if was_killed else f"{name}, done in time"] += 1
        else:
            assert was_killed, f"{name} ended well but left another state"
            assert self.contents(index) == names_of(self.rows)
            assert matches(index, self.rows)
            self.done[f"{name}, killed before the commit"] += 1
        index.close()
        self.refresh_after(name)

    def forked(self, name: str, act: Callable[[EngineWriter], object], last: int) -> bool:
        """Whether a process of its own was killed at the write point, or had done by then."""
        child = os.fork()
        if not child:
            _act_and_die(self.folder, act, last)
        _, status = os.waitpid(child, 0)
        was_killed = os.waitstatus_to_exitcode(status) == KILLED
        assert was_killed or os.waitstatus_to_exitcode(status) == 0, f"the {name} failed: {status}"
        return was_killed

    def contents(self, index: EngineIndex) -> list[str]:
        """The uids an index has."""
        return sorted(entry.uid for entry in index.catalogue.entries(index.snapshot.rows.tolist()))

    def ask(self) -> None:
        """A search by one of the readers, with or without a filter, against brute force."""
        which = int(self.rng.integers(len(self.readers)))
        index, rows = self.readers[which]
        if self.rng.random() < 0.7:
            index.refresh()
            rows = dict(self.rows)
            self.readers[which] = index, rows
        kind, allowed_rows, living = "search", None, rows
        if self.rng.random() < 0.5 and rows:
            text, holds = self.random_filter()
            allowed_rows = index.catalogue.where(parse_filter(text))
            kind, living = "search where", {uid: row for uid, row in rows.items() if holds(row)}
        queries = normalize_rows(self.rng.standard_normal((2, DIMENSION)).astype(np.float32))
        top = int(self.rng.choice([1, 5, 20, 1000]))
        self.compare(index, queries, top, allowed_rows, living)
        self.done[kind] += 1

    def random_filter(self) -> tuple[str, Callable[[Row], bool]]:
        """A filter as people write it, and in Python."""
        colour, size = str(self.rng.choice(COLOURS)), int(self.rng.integers(100))
        return [
            (f"colour = '{colour}'", lambda row: row.colour == colour),
            (f"size < {size}", lambda row: row.size < size),
            (f"size >= {size} or not colour = '{colour}'", lambda row: row.size >= size or row.colour != colour),
        ][int(self.rng.integers(3))]

    def compare(
        self, index: EngineIndex, queries: np.ndarray, top: int, allowed_rows: RowSelection | None, living: Rows
    ) -> None:
        """Answers are complete, true, and for exact kinds the best there are, up to ties."""
        names = sorted(living)
        matrix = np.stack([as_stored(living[uid].vector) for uid in names]) if names else np.zeros((0, DIMENSION))
        for query, hits in zip(queries, index.search(queries, top, allowed_rows=allowed_rows), strict=True):
            best = np.sort(matrix @ query)[::-1][:top]
            assert len(hits) == len(best), f"{len(hits)} answers, {len(best)} there are"
            assert len({hit.entry.uid for hit in hits}) == len(hits)
            scores = np.array([hit.score for hit in hits])
            true = np.array([float(as_stored(living[hit.entry.uid].vector) @ query) for hit in hits])
            assert np.allclose(scores, true, atol=1e-5), "a score is not the cosine of its row"
            assert (np.diff(scores) <= 1e-6).all()
            if self.kind == "flat":
                assert np.allclose(scores, best, atol=1e-5)
            elif len(best):
                self.recalled.append(float(np.mean(true >= best[-1] - 1e-6)))

    def check_readers(self) -> None:
        """Every reader still shows the rows of its own generation; then one is opened anew."""
        for index, rows in self.readers:
            assert len(index) == len(rows)
            assert self.contents(index) == names_of(rows)
        self.readers[0][0].close()
        self.readers[0] = open_engine_index(self.folder), dict(self.rows)
        self.done["reopen"] += 1


def set_sizes(writer: EngineWriter, sizes: dict[str, int]) -> None:
    """Change the size of some rows and nothing else."""
    rows = writer.snapshot.catalogue.rows_by_uid(sizes)
    writer.set_metadata({rows[uid]: {"size": size} for uid, size in sizes.items()})


def names_of(rows: Rows) -> list[str]:
    """Sorted uids."""
    return sorted(rows)


def matches(index: EngineIndex, rows: Rows) -> bool:
    """Whether every row has the vector and the facts the oracle knows."""
    entries = index.catalogue.entries(index.snapshot.rows.tolist())
    vectors = index.snapshot.vectors(index.snapshot.rows)
    for entry, vector in zip(entries, vectors, strict=True):
        row = rows[entry.uid]
        if not np.allclose(vector, as_stored(row.vector), atol=1e-6) or entry.metadata["size"] != row.size:
            return False
    return True


def _was_killed(folder: Path, act: Callable[[EngineWriter], object], last: int) -> bool:
    """Whether a change of Milvus was ended at a write point; nothing is undone by then, as if the process were gone."""
    passed = 0

    def die_at_last(point: str) -> None:
        nonlocal passed
        passed += 1
        # what rolls the change back ends there too
        if passed >= last:
            raise Killed

    writer = None
    try:
        writer = MilvusWriter(folder, failpoint=die_at_last)
        act(writer)
    except Killed:
        return True
    finally:
        if writer is not None:
            writer.close()
    return False


def _act_and_die(folder: Path, act: Callable[[EngineWriter], object], last: int) -> None:
    passed = 0

    def die_at_last(point: str) -> None:
        nonlocal passed
        passed += 1
        if passed == last:
            os._exit(KILLED)

    try:
        with IndexWriter(folder, failpoint=die_at_last) as writer:
            act(writer)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Run until so many operations are done, and say which they were."""
    import faiss

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="flat")
    parser.add_argument("--engine", default="faiss")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--crash-share", type=float, default=0.3)
    asked = parser.parse_args()
    # a child of fork has only the one thread
    faiss.omp_set_num_threads(1)
    folder, started = Path(tempfile.mkdtemp()), time.perf_counter()
    try:
        oracle = Oracle.begin(
            folder, asked.seed, kind=asked.kind, rows=asked.rows, tuning=TuningParams(), engine=asked.engine
        )
        for number in range(asked.operations):
            oracle.step(crash_share=asked.crash_share)
            if (number + 1) % 1000 == 0:
                print(
                    f"{number + 1:,} operations, {len(oracle.rows):,} rows, {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
        for name, count in sorted(oracle.done.items()):
            print(f"{count:8,}  {name}")
        if oracle.recalled:
            print(f"recall {np.mean(oracle.recalled):.4f} over {len(oracle.recalled):,} searches")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
