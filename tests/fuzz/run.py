"""Mutated tars through index, loader and ledger: python -m tests.fuzz.run --cases 10000

Each case is read in a process of its own group with a limit on time and memory. What is required: no crash, no
hang, nothing written outside its folder, and every sample of the index either shown or named in the ledger.
"""

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutations import mutated_tar
from vlm.console import progress
from vlm.data.collate import TrainingCollator
from vlm.data.corpus import Source, open_corpus
from vlm.data.loader import stream_batches
from vlm.data.precomputed_features import PrecomputedFeatures
from vlm.data.sample_ledger import Ledger, sum_counts
from vlm.data.sampler import BatchSampler
from vlm.data.tar import open_index
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import VlmError

SECONDS_A_CASE = 20
MEMORY_BYTES = 12 << 30
CASES_A_PROCESS = 100


class Bytes:
    """Tokenizes a text as its first letters."""

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = [[min(ord(letter), 60_000) for letter in text[:8]] for text in texts]
        return np.array([row + [0] * (8 - len(row)) for row in rows], np.int64)


@dataclass(frozen=True)
class Outcome:
    """What became of one case. kind: whole, incidents, damaged or refused. fault: what must not happen, or empty."""

    seed: int
    mutation: str
    kind: str
    fault: str = ""


def run_case(seed: int, folder: Path) -> Outcome:
    """Write the mutated tar of a seed into a folder, stream an epoch of it, check the accounts."""
    mutation, data = mutated_tar(np.random.default_rng(seed))
    path = folder / "shards" / f"{seed}.tar"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        kind, fault = _stream(str(path), with_arrays=seed % 4 == 0)
    except VlmError as error:
        kind, fault = "refused", "" if len(str(error)) > 20 else f"says too little: {error}"
    except TimeoutError:
        kind, fault = "hang", "took too long"
    except Exception as error:
        kind, fault = "crash", f"{type(error).__name__}: {error}"
    strangers = [name for name in os.listdir(folder) if name not in ("shards", "cache")]
    strangers += [name for name in os.listdir(folder / "shards") if not name.lstrip(".").startswith(f"{seed}.tar")]
    for left in (folder / "shards").iterdir():
        left.unlink()
    return Outcome(seed, mutation, kind, fault or (f"wrote {strangers}" if strangers else ""))


def _stream(url: str, *, with_arrays: bool) -> tuple[str, str]:
    corpus = open_corpus([Source(data=url, name="fuzz")], allow_damage=True)
    plan = BatchSampler(order=corpus.order, batch_size=1)
    tokenizer: Any = Bytes()
    collate = TrainingCollator(
        plan=plan,
        view=RandomResizedCrop(size=16),
        tokenizer=tokenizer,
        arrays=PrecomputedFeatures(names=("text_embedding",) if with_arrays else ()),
    )
    ledger = Ledger()
    visits = corpus.order.num_samples
    for batch in stream_batches(plan, corpus.shards, collate, numbers=range(visits)):
        ledger.count(batch)
    total = sum_counts(ledger.by_shard())
    if (
        total.requested != visits
        or total.requested != total.seen + total.replaced
        or total.corrupt.total() != total.replaced
    ):
        return "accounts", f"the ledger does not add up: {total} of {visits}"
    if len(ledger.failures) < (total.replaced > 0):
        return "accounts", "a loss has no name"
    if open_index(url).damage:
        return "damaged", ""
    return ("incidents" if total.replaced else "whole"), ""


def _alarm(*_: object) -> None:
    raise TimeoutError


def _work(seeds: list[int], folder: str, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
    signal.signal(signal.SIGALRM, _alarm)
    before = _peak_bytes()
    for seed in seeds:
        results.put(("begun", seed))
        signal.alarm(SECONDS_A_CASE)
        outcome = run_case(seed, Path(folder))
        signal.alarm(0)
        results.put(("done", outcome))
    results.put(("peak", _peak_bytes() - before))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(first: int, cases: int) -> tuple[list[Outcome], int]:
    """The outcomes of so many cases from seed `first` on, and the bytes by which the peak memory of a process grew."""
    outcomes: list[Outcome] = []
    peak = 0
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, progress(total=cases, what="fuzz", unit="case") as shown:
        pending = list(range(first, first + cases))
        while pending:
            results = context.SimpleQueue()
            part = pending[:CASES_A_PROCESS]
            worker = context.Process(target=_work, args=(part, folder, results))
            worker.start()
            running, done = part[0], 0
            while done < len(part):
                if results.empty():
                    worker.join(0.02)
                    if not worker.is_alive() and results.empty():
                        outcomes.append(Outcome(running, "?", "died", f"the process ended with {worker.exitcode}"))
                        done = part.index(running) + 1
                        break
                    continue
                word, value = results.get()
                if word == "begun":
                    running = value
                elif word == "done":
                    outcomes.append(value)
                    done += 1
                    shown.update()
            if done == len(part) and worker.is_alive():
                peak = max(peak, results.get()[1])
            worker.join()
            pending = pending[done:]
    return outcomes, peak


def main() -> int:
    """Run, show what became of the cases, exit 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    chosen = parser.parse_args()
    outcomes, peak = fuzz(chosen.first, chosen.cases)
    print(f"{len(outcomes):,} cases, peak memory {peak / 1e6:,.0f} MB")
    for kind, count in Counter(outcome.kind for outcome in outcomes).most_common():
        print(f"  {kind:<10} {count:,}")
    faults = [outcome for outcome in outcomes if outcome.fault]
    for outcome in faults[:50]:
        print(f"FAULT seed {outcome.seed} ({outcome.mutation}): {outcome.fault}")
    print(f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
