"""The loader whole, with real worker processes: each sample exactly once, under any split and restore."""

import gc
import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.selection_fixture import select_all
from tests.data.tar_fixture import damages_for, write_tar
from vlm.data.collate import TrainingCollator
from vlm.data.corpus import Corpus, open_corpus, read_sources
from vlm.data.loader import WORKER_THREADS, stream_batches
from vlm.data.pack import pack
from vlm.data.sample_ledger import Ledger, sum_counts
from vlm.data.sampler import BatchSampler, Mixture
from vlm.data.selection import Selection, write_selection
from vlm.data.shards import expand_shards
from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import open_source
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import VlmError

SEED = 11


class Letters:
    """A tokenizer without a vocabulary to load."""

    context_length, pad_token = 12, 0

    def encode(self, texts):
        rows = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            codes = [ord(letter) for letter in text][-len(row) :]
            row[: len(codes)] = codes
        return rows


@dataclass(frozen=True)
class Split:
    processes: int
    workers: int
    threads: int = 1


splits = st.builds(
    Split, processes=st.integers(1, 4), workers=st.integers(0, 5), threads=st.sampled_from([1, 2, WORKER_THREADS])
)


def stream(corpus: Corpus, split: Split, *, batch_size: int, position: int, batches: int, ledger: Ledger | None = None):
    """The global batches: (keys, captions, digests of pictures and tokens), put together over processes."""
    tokenizer: Any = Letters()
    parts = []
    for process in range(split.processes):
        plan = BatchSampler(
            order=corpus.order,
            batch_size=batch_size,
            position=position,
            process=process,
            num_processes=split.processes,
        )
        collate = TrainingCollator(plan=plan, view=RandomResizedCrop(size=8), tokenizer=tokenizer, seed=SEED)
        shared = {"workers": split.workers, "threads": split.threads}
        parts.append(list(stream_batches(plan, corpus.shards, collate, numbers=range(batches), **shared)))
    for part in parts:
        for batch in part:
            if ledger is not None:
                ledger.count(batch)
    return [
        (
            [key for part in same for key in part.keys],
            [caption for part in same for caption in part.captions],
            [
                hashlib.sha256(image.tobytes() + row.tobytes()).hexdigest()
                for part in same
                for image, row in zip(part.images.numpy(), part.tokens.numpy(), strict=True)
            ],
        )
        for same in zip(*parts, strict=True)
    ]


def make_source(folder: Path, sizes: list[int], *, bad: float, selected: bool, rng: np.random.Generator) -> Path:
    """Shards, and beside them a selection if asked for, of which something is always left."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        damages = damages_for(size, bad, rng)
        if number == 0:
            damages[0] = ""
        write_tar(folder / f"{number:03d}.tar", damages, prefix=f"{folder.name}-")
    if selected:
        whole = select_all(expand_shards(str(folder)))
        times = [rng.choice([0, 1, 1, 3], len(part)).astype(np.uint16) for part in whole.times]
        times[0][0] = 1
        write_selection(folder / "some.selection", Selection(shards=whole.shards, times=tuple(times)))
    return folder


def make_corpus(folder: Path, draw_sources: list[tuple[list[int], bool]], *, bad: float, seed: int) -> Corpus:
    rng = np.random.default_rng(seed)
    lines = []
    for number, (sizes, selected) in enumerate(draw_sources):
        made = make_source(folder / f"s{number}", sizes, bad=bad, selected=selected, rng=rng)
        lines += ["[[source]]", f"data = '{made}'", f"weight = {number + 1}"]
        lines += [f"selection = '{made / 'some.selection'}'"] if selected else []
    (folder / "mix.toml").write_text("\n".join(lines))
    return open_corpus(read_sources(str(folder / "mix.toml")), seed=seed, window=64)


sources = st.lists(
    st.tuples(st.lists(st.integers(1, 80), min_size=1, max_size=10), st.booleans()), min_size=1, max_size=3
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=sources,
    bad=st.sampled_from([0.0, 0.1, 0.4]),
    one=splits,
    other=splits,
    batch_size=st.sampled_from([12, 24, 48]),
    restored_after=st.integers(0, 4),
    seed=st.integers(0, 3),
)
def test_batches_and_ledger_are_the_same_for_every_split_and_restore(
    tmp_path_factory, drawn, bad, one, other, batch_size, restored_after, seed
):
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), drawn, bad=bad, seed=seed)
    batches = 5
    alone, parted = Ledger(), [Ledger(), Ledger()]
    want = stream(corpus, Split(1, 0), batch_size=batch_size, position=0, batches=batches, ledger=alone)
    first = stream(corpus, one, batch_size=batch_size, position=0, batches=restored_after, ledger=parted[0])
    rest = stream(
        corpus,
        other,
        batch_size=batch_size,
        position=restored_after * batch_size,
        batches=batches - restored_after,
        ledger=parted[1],
    )
    assert first + rest == want
    assert parted[0].merged(parted[1:]).to_values() == alone.to_values()


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=10),
    selected=st.booleans(),
    bad=st.sampled_from([0.0, 0.15]),
    split=splits,
    seed=st.integers(0, 3),
)
def test_the_ledger_of_an_epoch_accounts_for_every_sample(tmp_path_factory, sizes, selected, bad, split, seed):
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), [(sizes, selected)], bad=bad, seed=seed)
    visits, batch_size = corpus.order.num_samples, 24
    ledger = Ledger()
    stream(corpus, split, batch_size=batch_size, position=0, batches=-(-visits // batch_size) + 1, ledger=ledger)
    epoch = ledger.close(0, range(len(corpus.shards)))
    (source,) = corpus.order.orders if isinstance(corpus.order, Mixture) else (corpus.order,)
    times = getattr(source, "times", None) or [np.ones(size, int) for size in sizes]
    assert {shard: count.requested for shard, count in epoch.items()} == {
        shard: int(part.sum()) for shard, part in enumerate(times) if part.sum()
    }
    total = sum_counts(epoch)
    assert total.requested == visits == total.seen + total.replaced
    assert total.corrupt.total() == total.replaced == total.used_as_replacement
    if not bad:
        assert total.repeated == sum(int(np.maximum(part.astype(int) - 1, 0).sum()) for part in times)
    assert list(corpus.filtered) == [int((part == 0).sum()) for part in times]


def test_a_full_sized_corpus_is_seen_exactly_once_in_every_epoch(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [500, 1, *rng.integers(1, 100, 38).tolist()]
    corpus = make_corpus(tmp_path, [(sizes, False)], bad=0.0, seed=2)
    total = sum(sizes)
    seen = stream(corpus, Split(2, 5, WORKER_THREADS), batch_size=100, position=0, batches=2 * total // 100)
    keys = [key for batch, _, _ in seen for key in batch]
    assert set(Counter(keys[:total]).values()) == {1}
    assert len(set(keys[:total])) == total


@pytest.mark.parametrize(
    ("sizes", "split"),
    [([7], Split(1, 16)), ([3, 4, 5], Split(2, 2, 2)), ([1], Split(1, 3))],
    ids=["one shard, 16 workers", "3 shards on 2 processes", "one sample"],
)
def test_few_shards_serve_many(tmp_path, sizes, split):
    corpus = make_corpus(tmp_path, [(sizes, False)], bad=0.0, seed=0)
    batches = stream(corpus, split, batch_size=2, position=0, batches=sum(sizes))
    assert set(Counter(key for keys, _, _ in batches for key in keys).values()) == {2}


def test_a_selection_while_streaming_shows_what_the_same_subset_packed_would(tmp_path):
    rng = np.random.default_rng(5)
    made = make_source(tmp_path / "all", [30, 1, 12], bad=0.0, selected=False, rng=rng)
    whole = select_all(expand_shards(str(made)))
    times = tuple(rng.integers(0, 2, len(part)).astype(np.uint16) for part in whole.times)
    path = tmp_path / "half.selection"
    write_selection(path, Selection(shards=whole.shards, times=times))
    pack(open_source(str(made), SourceOptions(selection=path)), tmp_path / "packed")
    streamed = open_corpus(read_sources(str(made), str(path)))
    packed = open_corpus(read_sources(str(tmp_path / "packed")))
    assert streamed.order.num_samples == packed.order.num_samples == sum(int(part.sum()) for part in times)
    shown = [
        sorted(
            row
            for batch in stream(corpus, Split(1, 0), batch_size=1, position=0, batches=corpus.order.num_samples)
            for row in zip(*batch, strict=True)
        )
        for corpus in (streamed, packed)
    ]
    assert shown[0] == shown[1]


def test_workers_share_a_process_where_their_collator_lets_them(tmp_path):
    corpus = make_corpus(tmp_path, [([50], False)], bad=0.0, seed=0)
    plan = BatchSampler(order=corpus.order, batch_size=5)
    tokenizer: Any = Letters()
    collate = TrainingCollator(plan=plan, view=RandomResizedCrop(size=8), tokenizer=tokenizer)
    before = set(psutil.Process().children())
    for workers, threads, processes in ((3, 1, 3), (4, 4, 1), (5, 4, 2)):
        batches = stream_batches(plan, corpus.shards, collate, numbers=range(20), workers=workers, threads=threads)
        next(batches)
        assert len(set(psutil.Process().children()) - before) == processes
        batches.close()


def test_a_killed_worker_ends_the_run_with_a_word(tmp_path):
    corpus = make_corpus(tmp_path, [([200], False)], bad=0.0, seed=0)
    plan = BatchSampler(order=corpus.order, batch_size=10)
    tokenizer: Any = Letters()
    collate = TrainingCollator(plan=plan, view=RandomResizedCrop(size=8), tokenizer=tokenizer)
    before = set(psutil.Process().children())
    batches = stream_batches(plan, corpus.shards, collate, numbers=range(10_000), workers=1)
    next(batches)
    (worker,) = set(psutil.Process().children()) - before

    def kill_and_read():  # torch raises wherever its signal comes, which may be before the next batch is asked for
        worker.kill()
        list(batches)

    with pytest.raises((VlmError, RuntimeError), match=rf"DataLoader worker \(pid(\(s\))? {worker.pid}\)"):
        kill_and_read()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("is_read_whole", [True, False])
def test_no_file_stays_open_after_the_batches(tmp_path, workers, is_read_whole):
    corpus = make_corpus(tmp_path, [([5, 5, 5], False)], bad=0.0, seed=0)
    plan = BatchSampler(order=corpus.order, batch_size=5)
    tokenizer: Any = Letters()
    collate = TrainingCollator(plan=plan, view=RandomResizedCrop(size=8), tokenizer=tokenizer)

    def stream_once():
        batches = stream_batches(plan, corpus.shards, collate, numbers=range(3), workers=workers, threads=4)
        next(batches)
        if is_read_whole:
            list(batches)
        batches.close()

    stream_once()
    before = psutil.Process().num_fds()
    for _ in range(4):
        stream_once()
    # what ended processes leave is collected a moment later; a file that stays open stays
    deadline = time.monotonic() + 10
    while psutil.Process().num_fds() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert psutil.Process().num_fds() <= before
