"""The same random filters and searches on an index of FAISS and one of Milvus: the answers have to be equal.

python -m tests.index.compare_engines --filters 1000 --rows 500 [--address http://HOST:19530]
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.index.origin_fixture import make_origin
from vlm.errors import UsageError
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, normalize_rows
from vlm.index.engine_base import EngineIndex, open_engine_index, row_numbers
from vlm.index.filter_language import parse_filter
from vlm.index.milvus.milvus_writer import build_milvus_index

DIMENSION = 8
SPACE = EmbeddingSpace(model="given", fingerprint="given", dimension=DIMENSION, modality="image")
TOP = 10
TEXTS = (
    *("", "a", "A", "ab", "b", "Dog", "dog", "dogs", "ä", "Ä", "狗", "狗狗", "1", "1.0", "true", "null", "a_b", "axb"),
    *("a'b", 'a"b', "a\\b", "a%b", "100%_sure", "a\nb", "%", "_", "\\", "'", '"', '" or row >= 0 or "', "\U0001f600"),
)
TIMES = ("2025-12-01T08:30+09:00", "2025-11-30T23:30Z", "2025-11-30", "2025-12-01T00:00", "2024-05-31", "noon")
NUMBERS: tuple[float, ...] = (
    *(0, 1, -1, 2, 7, 0.5, -0.5, 1.0, 0.1, 1e300, -1e300, 5e-324, math.inf, -math.inf),
    *(2**53, 2**53 + 1, float(2**53), 2**62, 2**62 + 1, 2**63 - 1, -(2**63), 2**70),
)
# of one row, so that these fields have numbers and texts, and every comparison of them is allowed
BOTH_KINDS: dict[str, Any] = {"n": [7, "seven"], "t": [7, "seven"], "mixed": [7, "seven"], "when": [7, "noon"]}
FIELDS = ("n", "t", "when", "mixed", "many", "sometimes", "deep.er", 'odd "name', "never")


def random_metadata(rng: random.Random) -> dict[str, Any]:
    """Metadata of a row: numbers, texts, times, both, lists, null, NaN, what is nested, and what is not there."""
    mixed = (*NUMBERS, *TEXTS, True, False, None, math.nan)
    values: dict[str, Any] = {
        "n": rng.choice((*NUMBERS, None, math.nan)),
        "t": rng.choice((*TEXTS, None)),
        "when": rng.choice((*TIMES, None)),
        "mixed": rng.choice(mixed),
        "many": rng.sample(mixed, rng.randrange(4)),
        "sometimes": rng.choice((1, "a", None)),
        "deep": {"er": rng.choice((1, 2, "x", [1, "x"], None))},
        'odd "name': rng.choice(("a", 'b"', 1)),
    }
    values["many"] += [rng.choice((3, "three"))]
    present = {name: value for name, value in values.items() if rng.random() < 0.8}
    return present | {"never": None}


def random_filter(rng: random.Random, depth: int = 2) -> str:
    """A filter as people write it."""
    if depth and rng.random() < 0.5:
        parts = [f"({random_filter(rng, depth - 1)})" for _ in range(rng.choice((1, 2, 3)))]
        joined = f" {rng.choice(('and', 'or'))} ".join(parts)
        return f"not ({joined})" if rng.random() < 0.4 else joined
    name = '"' + rng.choice(FIELDS).replace('"', '""') + '"'
    kind = rng.choice(("=", "!=", "<", "<=", ">", ">=", "in", "not in", "like", "not like", "has", "missing"))
    if name == '"never"' or kind == "missing":
        return f"{name} is {rng.choice(('', 'not '))}missing"
    if kind in ("in", "not in"):
        return f"{name} {kind} ({', '.join(_literal(rng) for _ in range(rng.randrange(1, 4)))})"
    if kind in ("like", "not like"):
        cut = rng.choice(TEXTS)
        begin, end = sorted(rng.choices(range(len(cut) + 1), k=2))
        pattern = rng.choice(
            (cut, cut[begin:end], f"%{cut[begin:end]}%", f"{cut[:begin]}%", f"{cut[:begin]}%{cut[end:]}")
        )
        return f"{name} {kind} {_quoted(pattern)}"
    return f"{name} {kind} {_literal(rng)}"


def _literal(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return _quoted(rng.choice((*TEXTS, *TIMES)))
    number = rng.choice([number for number in NUMBERS if -(2**63) <= number < 2**63])
    return str(number) if isinstance(number, int) else f"{number:.17g}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How many filters both engines answered, of how many; refused: by both, with the same message.

    matched: rows in all. differences: filters with different answers, and both answers.
    """

    filters: int
    answered: int
    refused: int
    matched: int
    differences: tuple[str, ...]
    faiss_seconds: float
    milvus_seconds: float


def write_embeddings(folder: Path, metadata: Sequence[dict[str, Any]], *, seed: int) -> Path:
    """Random unit rows with metadata, one of them twice, so that there is a tie."""
    vectors = normalize_rows(np.random.default_rng(seed).standard_normal((len(metadata), DIMENSION)).astype(np.float32))
    vectors[-1] = vectors[0]
    writer = EmbeddingsWriter(folder, space=SPACE, identity={})
    origins = [make_origin(f"u{row}", values, {"en": (f"row {row}",)}) for row, values in enumerate(metadata)]
    writer.add("/nowhere/0.tar", vectors, origins)
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    return folder


def build_both(folder: Path, *, rows: int, seed: int, address: str = "", kind: str = "flat") -> list[EngineIndex]:
    """The same random rows in an index of FAISS and in one of Milvus."""
    rng = random.Random(seed)
    embeddings = write_embeddings(
        folder / "embeddings", [BOTH_KINDS, *(random_metadata(rng) for _ in range(rows - 1))], seed=seed
    )
    build_index(embeddings, folder / "faiss", kind="flat")
    build_milvus_index(embeddings, folder / "milvus", address=address, kind=kind)
    return [open_engine_index(folder / "faiss"), open_engine_index(folder / "milvus")]


def compare(indexes: Sequence[EngineIndex], *, filters: int, seed: int) -> Comparison:
    """Ask both the same: the rows of a filter, and the nearest of them to a vector."""
    rng = random.Random(seed + 1)
    queries = normalize_rows(np.random.default_rng(seed).standard_normal((filters, DIMENSION)).astype(np.float32))
    differences: list[str] = []
    refused = matched = 0
    seconds = [0.0, 0.0]
    for query in queries:
        text = random_filter(rng)
        answers: list[Answer] = []
        for number, index in enumerate(indexes):
            started = time.perf_counter()
            answers.append(_answer(index, text, query))
            seconds[number] += time.perf_counter() - started
        faiss, milvus = answers
        refused += bool(faiss.refusal)
        matched += len(faiss.uids)
        if not faiss.equals(milvus):
            differences.append(f"{text}: {faiss} by FAISS, {milvus} by Milvus")
    return Comparison(
        filters=filters,
        answered=filters - refused,
        refused=refused,
        matched=matched,
        differences=tuple(differences),
        faiss_seconds=seconds[0],
        milvus_seconds=seconds[1],
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine says to a filter: the uids of its rows, and the nearest of them to a vector; or why it refuses."""

    uids: tuple[str, ...] = ()
    nearest: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    refusal: str = ""

    def equals(self, other: "Answer") -> bool:
        """Up to the last bits of the scores, since the engines sum in another order."""
        return (self.uids, self.nearest, self.refusal) == (other.uids, other.nearest, other.refusal) and np.allclose(
            self.scores, other.scores, atol=2e-6
        )


def _answer(index: EngineIndex, text: str, query: np.ndarray) -> Answer:
    try:
        selection = index.catalogue.where(parse_filter(text))
    except UsageError as error:
        return Answer(refusal=str(error))
    entries = index.catalogue.entries(row_numbers(selection).tolist())
    hits = index.search(query[None], TOP, allowed_rows=selection)[0]
    # the last row has the vector of the first: either may be the one that is cut off
    twin = f"u{len(index) - 1}"
    nearest = sorted("u0" if hit.entry.uid == twin else hit.entry.uid for hit in hits)
    return Answer(
        uids=tuple(sorted(entry.uid for entry in entries)),
        nearest=tuple(nearest),
        scores=tuple(hit.score for hit in hits),
    )


def main() -> None:
    """Compare, and print the numbers; a difference makes it fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filters", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="flat")
    parser.add_argument("--address", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        indexes = build_both(
            Path(name), rows=options.rows, seed=options.seed, address=options.address, kind=options.kind
        )
        comparison = compare(indexes, filters=options.filters, seed=options.seed)
        for index in indexes:
            index.close()
    print(json.dumps(asdict(comparison), indent=2, ensure_ascii=False))
    sys.exit(1 if comparison.differences else 0)


if __name__ == "__main__":
    main()
