"""What a run streams: one address, or several sources in proportions, each with its selection."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm.config import nearest
from vlm.data.mixture import Mixture, whole_shares
from vlm.data.order import DEFAULT_WINDOW, Order, SampleOrder
from vlm.data.selection import read_selection
from vlm.data.shards import count_samples, expand_shards, shards_fingerprint
from vlm.data.storage.cache import ShardCache
from vlm.errors import UsageError
from vlm.files import fingerprint_of

MIXTURE_SUFFIX = ".toml"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Shards that share an order.

    weight: its share of what is drawn, against the weights of the others; 0 lets its visits times `repeats` decide.
    selection: file of a selection; empty takes every sample once.
    """

    data: str
    name: str = ""
    selection: str = ""
    weight: float = 0.0
    repeats: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Sources opened: their shards numbered through, and the order they are seen in.

    samples, filtered: of each shard, how many there are, and how many its selection leaves out.
    first_shards: of each source. fingerprint: of the sequence; the same content, selections and shares give the same.
    """

    sources: tuple[Source, ...]
    first_shards: tuple[int, ...]
    shards: tuple[str, ...]
    samples: tuple[int, ...]
    filtered: tuple[int, ...]
    order: Order
    fingerprint: str

    def shards_of(self, source: int) -> range:
        """The numbers of the shards of a source."""
        return range(*(*self.first_shards, len(self.shards))[source : source + 2])


def read_sources(address: str, selection: str = "") -> tuple[Source, ...]:
    """The sources an address means: a mixture file (`.toml` with `[[source]]` tables), or shards.

    Raises:
        UsageError: the file does not exist or says what a source does not have.
    """
    if not address.endswith(MIXTURE_SUFFIX):
        return (Source(data=address, selection=selection, name="data"),)
    if selection:
        raise UsageError(f"{address} names a selection for each of its sources; leave out --selection {selection}.")
    path = Path(address)
    if not path.is_file():
        raise UsageError(f"There is no mixture file {address!r}.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("source", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{address} is not TOML: {error}.") from error
    sources = tuple(_source(table, f"{address}, source {number}") for number, table in enumerate(tables, 1))
    if not sources:
        raise UsageError(f"{address} has no [[source]] table; write one for each source, with data = 'SHARDS'.")
    if len({source.weight > 0 for source in sources}) > 1:
        raise UsageError(f"{address} gives a weight to some sources only; give one to each, or to none.")
    return tuple(replace(source, name=source.name or f"source-{number}") for number, source in enumerate(sources, 1))


def open_corpus(
    sources: Sequence[Source],
    *,
    seed: int = 0,
    window: int = DEFAULT_WINDOW,
    allow_damage: bool = False,
    cache: ShardCache | None = None,
) -> Corpus:
    """Find the shards of all sources, count their samples, and settle the order.

    Raises:
        UsageError: a source has no shards, its selection does not know them, or leaves nothing.
        VlmError: a shard is damaged (unless allowed) or cannot be fetched.
    """
    opened = [
        _open_source(source, _Opening(_own_seed(seed, number), window, allow_damage, cache))
        for number, source in enumerate(sources)
    ]
    order, shares = _mixed(sources, [one.order for one in opened])
    return Corpus(
        sources=tuple(sources),
        first_shards=(0, *accumulate(len(one.shards) for one in opened[:-1])),
        shards=tuple(shard for one in opened for shard in one.shards),
        samples=tuple(count for one in opened for count in one.samples),
        filtered=tuple(count for one in opened for count in one.filtered),
        order=order,
        fingerprint=fingerprint_of(str(seed), str(window), *(one.identity for one in opened), *map(str, shares)),
    )


class _Opening(NamedTuple):
    seed: int
    window: int
    allow_damage: bool
    cache: ShardCache | None


class _Opened(NamedTuple):
    shards: list[str]
    samples: list[int]
    filtered: list[int]
    order: SampleOrder
    identity: str


def _own_seed(seed: int, number: int) -> int:
    return seed if number == 0 else int(fingerprint_of(f"{seed}/{number}"), 16) >> 1


def _open_source(source: Source, told: _Opening) -> _Opened:
    shards = expand_shards(source.data)
    counts = count_samples(shards, allow_damage=told.allow_damage, cache=told.cache)
    content = shards_fingerprint(shards, told.cache)
    if not source.selection:
        order = SampleOrder(counts=tuple(counts), seed=told.seed, window=told.window)
        return _Opened(shards, counts, [0] * len(counts), order, content)
    selection = read_selection(Path(source.selection))
    times = selection.times_of(shards, cache=told.cache)
    order = SampleOrder.of_selection(times, seed=told.seed, window=told.window)
    if not order.num_samples:
        raise UsageError(f"The selection {source.selection} leaves nothing of {source.data}.")
    filtered = [int(np.count_nonzero(part == 0)) for part in times]
    return _Opened(shards, counts, filtered, order, fingerprint_of(content, selection.fingerprint))


def _mixed(sources: Sequence[Source], orders: Sequence[SampleOrder]) -> tuple[Order, tuple[int, ...]]:
    """One order out of several, and the shares of its sources."""
    repeats = [Fraction(str(source.repeats)) for source in sources]
    if len(orders) == 1 and repeats[0] == 1:
        return orders[0], (1,)
    visits = [order.num_samples * times for order, times in zip(orders, repeats, strict=True)]
    weights = [Fraction(str(source.weight)) for source in sources]
    shares = whole_shares(weights if weights[0] else visits)
    return Mixture(orders=tuple(orders), shares=shares, num_samples=max(1, round(sum(visits)))), shares


def _source(table: dict[str, Any], where: str) -> Source:
    known = Source.__dataclass_fields__
    for name, value in table.items():
        if name not in known:
            raise UsageError(f"{where}: unknown key {name!r}; {nearest(name, list(known))}.")
        is_number = name in ("weight", "repeats")
        if not isinstance(value, (int, float) if is_number else str) or isinstance(value, bool):
            raise UsageError(f"{where}: {name} = {value!r} must be a {'number' if is_number else 'string'}.")
    if not table.get("data"):
        raise UsageError(f"{where}: data is needed: a folder, pattern or address of shards.")
    source = Source(**table)
    if not 0 <= source.weight < float("inf") or not 0 < source.repeats < float("inf"):
        raise UsageError(f"{where}: weight = {source.weight}, repeats = {source.repeats}; they must be above 0.")
    return source
