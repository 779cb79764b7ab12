"""The corpus of a run: shards at one URL, or several sources in proportions, each with its selection.

The sources of a mixture are named in a TOML file, one `[[source]]` table each.
"""

import logging
import math
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm.config import suggest
from vlm.console import pluralize
from vlm.data.caption_sampler import CaptionMix, CaptionSidecar, MixedShard
from vlm.data.sampler import DEFAULT_WINDOW, Mixture, SampleOrder, Sampler, integer_shares
from vlm.data.selection import read_selection
from vlm.data.shard_cache import ShardCache
from vlm.data.shards import count_samples, expand_shards, is_remote, shards_fingerprint
from vlm.errors import UsageError
from vlm.files import compute_fingerprint

logger = logging.getLogger(__name__)

MIXTURE_SUFFIX = ".toml"
_NAME = re.compile(r"[\w][\w.\-]*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Shards that share an order.

    weight: its share of the samples, relative to the weights of the others; 0 uses its visits times `repeats`.
    selection: file of a selection; empty shows every sample once.
    captions_from: folder of `vlm caption`; a caption from there is shown with the probability `caption_mix`.
    """

    data: str
    name: str = ""
    selection: str = ""
    weight: float = 0.0
    repeats: float = 1.0
    captions_from: str = ""
    caption_mix: float = 0.5


def read_sources(
    url: str, selection: str = "", *, captions_from: str = "", caption_mix: float = 0.5
) -> tuple[Source, ...]:
    """The sources at a URL: those of a mixture file (`.toml`), or shards as the only one.

    Raises:
        UsageError: the file does not exist or has a key that a source does not have.
    """
    if not url.endswith(MIXTURE_SUFFIX):
        return (
            Source(data=url, selection=selection, name="data", captions_from=captions_from, caption_mix=caption_mix),
        )
    if captions_from:
        raise UsageError(f"{url} names captions for each of its sources; leave out --captions-from {captions_from}.")
    if selection:
        raise UsageError(f"{url} names a selection for each of its sources; leave out --selection {selection}.")
    sources: list[Source] = []
    names: set[str] = set()
    num_weighted = 0
    for number, table in enumerate(_read_tables(Path(url)), 1):
        source = _parse_source(table, f"{url}, source {number}")
        source = replace(source, name=source.name or f"source-{number}")
        sources.append(source)
        names.add(source.name)
        num_weighted += source.weight > 0
    if num_weighted not in (0, len(sources)):
        raise UsageError(f"{url} gives a weight to some sources only; give one to each, or to none.")
    if len(names) < len(sources):
        raise UsageError(f"{url} gives several sources one name; each has its own ledgers and needs its own name.")
    return tuple(sources)


def _read_tables(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"There is no mixture file {str(path)!r}.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not TOML, not UTF-8, or a number with too many digits
        raise UsageError(f"{path} is not TOML: {error}.") from error
    for name in content:
        if name != "source":
            raise UsageError(f"{path}: unknown key {name!r}; a mixture has [[source]] tables and nothing else.")
    tables = content.get("source")
    # `source = 3` and `source = ["a"]` are TOML too
    if not tables or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path} has no [[source]] table; write one for each source, with data = 'SHARDS'.")
    return tables


def _parse_source(table: dict[str, Any], where: str) -> Source:
    known = Source.__dataclass_fields__
    for name, value in table.items():
        if name not in known:
            raise UsageError(f"{where}: unknown key {name!r}; {suggest(name, list(known))}.")
        if name in ("weight", "repeats", "caption_mix"):
            # a bool is an int to Python, and `weight = true` is a slip
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UsageError(f"{where}: {name} = {value!r} must be a number.")
            if not 0 < value < math.inf:
                raise UsageError(f"{where}: {name} = {value} must be above 0, and finite.")
        elif not isinstance(value, str):
            raise UsageError(f"{where}: {name} = {value!r} must be a string.")
    if not table.get("data"):
        raise UsageError(f"{where}: data is required: a folder, pattern or URL of shards.")
    if table["data"].endswith(MIXTURE_SUFFIX):
        raise UsageError(
            f"{where}: data = {table['data']!r} is a mixture itself; write its sources here, with their weights times "
            "its own."
        )
    source = Source(**table)
    if source.caption_mix > 1:
        raise UsageError(f"{where}: caption_mix = {source.caption_mix} is a probability; give at most 1.")
    if source.name and not _NAME.fullmatch(source.name):
        raise UsageError(f"{where}: name = {source.name!r} names files; use letters, digits, dots and dashes.")
    return source


_MAX_POSITION = 10**15


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The opened sources: their shards numbered through, and the order in which samples are seen.

    samples, filtered: of each shard, how many there are, and how many its selection leaves out.
    caption_mix: captions from sidecars, by shard; None if there are none.
    first_shards: of each source. fingerprint: of the sequence; the same content, selections and shares give the same.
    """

    sources: tuple[Source, ...]
    first_shards: tuple[int, ...]
    shards: tuple[str, ...]
    samples: tuple[int, ...]
    filtered: tuple[int, ...]
    order: Sampler
    fingerprint: str
    caption_mix: CaptionMix | None = None

    @cached_property
    def sample_starts(self) -> tuple[int, ...]:
        """The number of each shard's first sample among all samples, with their total at the end."""
        return (0, *accumulate(self.samples))

    def shards_of(self, source: int) -> range:
        """The numbers of the shards of a source."""
        return range(*(*self.first_shards, len(self.shards))[source : source + 2])


def open_corpus(
    sources: Sequence[Source],
    *,
    seed: int = 0,
    window: int = DEFAULT_WINDOW,
    allow_damage: bool = False,
    cache: ShardCache | None = None,
) -> Corpus:
    """Find the shards of all sources, count their samples, and make the sampler.

    Raises:
        UsageError: a source has no shards, its selection does not know them, or leaves nothing.
        VlmError: a shard is damaged (unless allowed) or cannot be fetched.
    """
    opened: list[_OpenedSource] = []
    for number, source in enumerate(sources):
        options = _OpenOptions(_source_seed(seed, number), window, allow_damage, cache)
        opened.append(_open_source(source, options))
    order, shares = _mix_sources(sources, [source.order for source in opened])
    _warn_of_repeated_samples(sources, opened)

    first_shards = [0]
    shards: list[str] = []
    samples: list[int] = []
    filtered: list[int] = []
    mixed: list[MixedShard | None] = []
    for source in opened:
        mixed += source.mixed or [None] * len(source.shards)
        shards += source.shards
        samples += source.samples
        filtered += source.filtered
        first_shards.append(len(shards))
    # all that the sequence depends on: a resumed run compares it, and refuses to resume with other samples
    sequence = map(str, (seed, window, order.num_samples, *shares))
    return Corpus(
        sources=tuple(sources),
        first_shards=tuple(first_shards[:-1]),
        shards=tuple(shards),
        samples=tuple(samples),
        filtered=tuple(filtered),
        order=order,
        fingerprint=compute_fingerprint(*sequence, *(source.identity for source in opened)),
        caption_mix=CaptionMix(shards=tuple(mixed)) if any(mixed) else None,
    )


class _OpenOptions(NamedTuple):
    seed: int
    window: int
    allow_damage: bool
    cache: ShardCache | None


class _OpenedSource(NamedTuple):
    shards: list[str]
    samples: list[int]
    filtered: list[int]
    order: SampleOrder
    identity: str
    mixed: list[MixedShard]


def _source_seed(seed: int, number: int) -> int:
    """The first source keeps the seed, so that a run of one source has the same order with and without a mixture."""
    return seed if number == 0 else int(compute_fingerprint(f"{seed}/{number}"), 16) >> 1


def _open_source(source: Source, options: _OpenOptions) -> _OpenedSource:
    shards = expand_shards(source.data)
    counts = count_samples(shards, allow_damage=options.allow_damage, cache=options.cache)
    content = shards_fingerprint(shards, options.cache)
    mixed: list[MixedShard] = []
    if source.captions_from:
        sidecar = CaptionSidecar.open(Path(source.captions_from))
        for table in sidecar.tables_of(shards, options.cache):
            mixed.append(MixedShard(table, source.caption_mix))
        content = compute_fingerprint(content, sidecar.manifest.fingerprint, str(source.caption_mix))
    if not source.selection:
        order = SampleOrder(counts=tuple(counts), seed=options.seed, window=options.window)
        return _OpenedSource(shards, counts, [0] * len(counts), order, content, mixed)
    selection = read_selection(Path(source.selection))
    times = selection.times_of(shards, cache=options.cache)
    order = SampleOrder.of_selection(times, seed=options.seed, window=options.window)
    # an empty source would divide by zero at its first position
    if not order.num_samples:
        raise UsageError(f"The selection {source.selection} leaves nothing of {source.data}.")
    filtered = [int(np.count_nonzero(part == 0)) for part in times]
    identity = compute_fingerprint(content, selection.fingerprint)
    return _OpenedSource(shards, counts, filtered, order, identity, mixed)


def _warn_of_repeated_samples(sources: Sequence[Source], opened: Sequence[_OpenedSource]) -> None:
    """Log the shards of which samples are read more than once: patterns easily name one twice, and nothing shows it."""
    readers: dict[str, list[str]] = {}
    visits: dict[str, np.ndarray] = {}
    repeated: dict[str, None] = {}
    for source, own in zip(sources, opened, strict=True):
        for number, shard in enumerate(own.shards):
            path = shard if is_remote(shard) else os.path.realpath(shard)
            # selections may divide a shard between sources, which is no repetition
            selected = np.ones(own.samples[number], bool) if own.order.times is None else own.order.times[number] > 0
            if path in visits and bool((visits[path] & selected).any()):
                repeated[path] = None
            visits[path] = visits[path] | selected if path in visits else selected
            readers.setdefault(path, []).append(source.name)
    if repeated:
        first = next(iter(repeated))
        logger.warning(
            f"{pluralize(len(repeated), 'shard')} named more than once, such as {first} (by "
            f"{', '.join(readers[first])}): those samples are seen more often, and may come twice in a batch, where "
            "--same-pairs decides what they are to each other."
        )


def _mix_sources(sources: Sequence[Source], orders: Sequence[SampleOrder]) -> tuple[Sampler, tuple[int, ...]]:
    """The sampler over all sources, and the share of each."""
    repeats = [Fraction(str(source.repeats)) for source in sources]
    if len(orders) == 1 and repeats[0] == 1:
        return orders[0], (1,)
    # as exact fractions of the decimals that were written: 0.1 is a tenth
    visits: list[Fraction] = []
    for order, times in zip(orders, repeats, strict=True):
        visits.append(order.num_samples * times)
    # read_sources lets all have a weight or none, so the first decides
    weights = [Fraction(str(source.weight)) for source in sources]
    shares = integer_shares(weights if weights[0] else visits)
    length = max(1, round(sum(visits)))
    if length > _MAX_POSITION:
        raise UsageError(
            f"repeats make an epoch of {length:.3g} visits; give fewer, at most {_MAX_POSITION:.0e} together."
        )
    return Mixture(orders=tuple(orders), shares=shares, num_samples=length), shares
