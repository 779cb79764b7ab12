"""The data ledger of a run as files: one for each finished epoch of a source, one for the whole."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm.data.corpus import Corpus
from vlm.data.ledger import Epoch, Ledger, ShardCount, total_of
from vlm.errors import VlmError
from vlm.files import write_text
from vlm.train.guard.rewind import PassedOver, visits_in
from vlm.train.processes import summed_ledger
from vlm.train.session import Session

FOLDER = "ledger"
_ALLOWED_AT_FIRST = 10


def close_epochs(session: Session, *, before: int) -> None:
    """Write the ledger of every epoch that ended since a position; all processes call it at the same step."""
    corpus, state = session.corpus, session.state
    passed = zip(corpus.order.finished_epochs(before), corpus.order.finished_epochs(state.position), strict=True)
    ended = [(source, epoch) for source, (first, last) in enumerate(passed) for epoch in range(first, last)]
    for source, epoch in ended:
        shards = corpus.shards_of(source)
        whole = summed_ledger(state.ledger)
        counts = whole.close(epoch, shards)
        state.ledger.close(epoch, shards)
        if session.accelerator.is_main_process:
            path = session.folder / FOLDER / f"{corpus.sources[source].name}-epoch-{epoch:05d}.json"
            write_ledger(path, corpus, counts, whole, shards=shards)


def count_passed_over(session: Session, passed: PassedOver) -> None:
    """Count the visits that a run which went back passes over, and close the epochs they end; all processes call it.

    The main process carries on the restored ledger, which is that of all.
    """
    order, state = session.corpus.order, session.state
    if session.accelerator.is_main_process:
        for visits in visits_in(passed, order.locate):
            state.ledger.pass_over(visits)
    close_epochs(session, before=passed.first)


def write_ledger(path: Path, corpus: Corpus, counts: Epoch, ledger: Ledger, *, shards: Iterable[int]) -> None:
    """Counts by shard, their sum, and the samples among these shards that cannot be used."""
    chosen = list(shards)
    content = {
        "total": total_of(counts).to_values() | {"filtered": sum(corpus.filtered[shard] for shard in chosen)},
        "shards": [shard_row(corpus, shard, counts.get(shard, ShardCount())) for shard in chosen],
        "failures": failure_rows(corpus, ledger, set(chosen)),
    }
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def shard_row(corpus: Corpus, shard: int, count: ShardCount) -> dict[str, Any]:
    """What became of one shard's samples; filtered counts the samples its selection leaves out of every epoch."""
    told = {"shard": corpus.shards[shard], "samples": corpus.samples[shard], "filtered": corpus.filtered[shard]}
    return told | count.to_values()


def failure_rows(corpus: Corpus, ledger: Ledger, shards: set[int]) -> list[dict[str, Any]]:
    """The samples that cannot be used: shard, number, key, byte offset, reason, detail."""
    return [
        {"shard": corpus.shards[shard], "number": number} | told
        for (shard, number), told in sorted(ledger.failures.items())
        if shard in shards
    ]


def refuse_too_many_bad(ledger: Ledger, limit: float, corpus: Corpus) -> None:
    """End the run when more samples than allowed cannot be used; the first ten are allowed unless the limit is 0.

    Raises:
        VlmError: naming one of them.
    """
    allowed = max(limit * ledger.num_asked, _ALLOWED_AT_FIRST) if limit else 0
    if ledger.num_replaced > allowed:
        told = failure_rows(corpus, ledger, set(range(len(corpus.shards))))[-1]
        raise VlmError(
            f"{ledger.num_replaced:,} of {ledger.num_asked:,} samples cannot be used, the limit is {limit:.1%}; "
            f"e.g. {told['key']!r} (number {told['number']} of {told['shard']}, byte {told['offset']:,}): "
            f"{told['reason']}: {told['detail']}. See vlm inspect, or raise --max-bad."
        )


def ledger_table(corpus: Corpus, ledger: Ledger, *, most: int = 20) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for people: the sum, then the shards that lost most."""
    counts = ledger.by_shard()
    reasons = sorted({reason for count in counts.values() for reason in count.corrupt})
    columns = ["shard", "samples", "filtered", "asked", "seen", "repeated", "replaced", "stood in", "passed over"]
    columns += reasons
    losing = sorted((shard for shard in counts if counts[shard].replaced), key=lambda shard: -counts[shard].replaced)
    rows = [_row("all", sum(corpus.samples), sum(corpus.filtered), total_of(counts), reasons)]
    for shard in losing[:most]:
        name = corpus.shards[shard].rpartition("/")[2]
        rows.append(_row(name, corpus.samples[shard], corpus.filtered[shard], counts[shard], reasons))
    return columns, rows


def _row(name: str, samples: int, filtered: int, count: ShardCount, reasons: list[str]) -> list[Any]:
    numbers = [count.asked, count.seen, count.repeated, count.replaced, count.stood_in, count.passed_over]
    return [name, samples, filtered, *numbers, *(count.corrupt[reason] for reason in reasons)]
