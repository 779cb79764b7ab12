"""Packing: pairs of any source become WebDataset shards, checked, resumable, the same bytes each time.

Forked processes read, check and encode where that is worth it, else threads. A journal has a line for each finished
shard; an interrupted run resumes after the last one.
"""

import json
import logging
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from vlm.console import list_counts, pluralize, progress, track
from vlm.data.decode import open_image, packable_formats, storable_image, to_rgb
from vlm.data.dedup import rgb_thumbnail
from vlm.data.forked_map import can_fork, map_forked
from vlm.data.json_columns import JsonColumns
from vlm.data.samples import REPLACEMENT_CHARACTER, Captions, Pair, WordedSource, Words, select_languages
from vlm.data.shards import expand_shards, shards_fingerprint
from vlm.data.sources.source import ForkableSource, NamedSource, PairSource
from vlm.data.sources.source_registry import Recognition, holds_shards, open_source
from vlm.data.split import GroupedSplit, HeldOutSplit
from vlm.data.tar import IMAGE_EXTENSIONS, open_index
from vlm.data.tar_entries import SampleWriter, npy_bytes, sample_members
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import append_line, atomic_write, json_text, read_lines, write_text
from vlm.manifest import MANIFEST, FileRecord, Manifest, begin_or_resume_folder, record_file, write_manifest
from vlm.results import Result

if TYPE_CHECKING:
    from tqdm import tqdm


logger = logging.getLogger(__name__)

# made once: json.dumps makes another encoder for each text
_to_json = json.JSONEncoder(ensure_ascii=False).encode


def encode_pair(pair: Pair, *, verify: bool = True, columns: JsonColumns | None = None) -> dict[str, Any]:
    """A pair as `__key__`, an image, `txt`, `json` and `NAME.npy`, ready for `SampleWriter`.

    The text is the first caption of the first language, and is left out where there is none; the JSON holds the
    metadata with all captions, as the columns of all samples ask for it.

    Raises:
        BadSample: the image cannot be decoded (one that is kept unchanged is only decoded if `verify`).
    """
    extension, image = storable_image(pair.image, verify=verify)
    texts = next(iter(pair.captions.values()), ())
    columns = columns or JsonColumns()
    content = _to_json(columns.conform(Words(pair.captions, pair.metadata)))
    arrays = {f"{name}.npy": npy_bytes(array) for name, array in pair.arrays.items()}
    words = {"txt": texts[0].encode(errors="replace")} if texts else {}

    return arrays | {"__key__": pair.key, extension: image} | words | {"json": content.encode(errors="replace")}


def captions_to_json(captions: Captions) -> dict[str, Any]:
    """Captions as `parse_captions` reads them from `key.json`.

    >>> captions_to_json({"": ("a dog",), "zh": ("狗",)})
    {'captions': ['a dog'], 'captions_zh': ['狗']}
    >>> captions_to_json({"de": ("Hund",)})
    {'captions': {'de': ['Hund']}}
    """
    return JsonColumns().conform(Words(captions, {}))


class JournalEntry(Protocol):
    """What each line holds at least: the shard's file name and its size."""

    @property
    def name(self) -> str:
        """File name, in the journal's folder."""
        ...

    @property
    def bytes(self) -> int:
        """Size of the file."""
        ...


Entry = TypeVar("Entry", bound=JournalEntry)
Made = TypeVar("Made")


def read_journal(journal: Path, kind: type[Entry]) -> list[Entry]:
    """The shards an earlier run finished, in the journal's folder; a line it could not finish is removed.

    Raises:
        VlmError: one of them is no longer there as it was.
    """
    lines = read_lines(journal)
    # written again whole: half a line at its end would swallow the line that is appended next
    if journal.exists():
        write_text(journal, "\n".join([*lines, ""]))
    shards = [kind(**json.loads(line)) for line in lines]
    for shard in shards:
        path = journal.parent / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise VlmError(f"{path} was changed since it was written; remove {journal.parent} and repeat the command.")
    return shards


REJECTED = "rejected.jsonl"
_JOURNAL = ".shards-done.jsonl"
_HELD_OUT = ".held-out.json"
_MIN_DECODED_PIXELS = 64
# captions are said to be nearly all equal where there are enough of them to tell
_MIN_JUDGED_CAPTIONS = 20
_NEARLY_ALL = 0.95
_MAX_COUNTED_CAPTIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How pairs become shards.

    hold_out: at least so many samples go to `val-*.tar`, the rest to `train-*.tar`; those with a common caption or
        the same image stay on one side.
    seed: of the draw of what is held out.
    max_bad_share: largest share of unusable pairs, in [0, 1], before the work stops.
    languages: captions kept, the first one first; all of them, as the source has them, if empty.
    verify: decode each image, to reject damaged ones.
    """

    samples_per_shard: int = 1000
    hold_out: int = 0
    seed: int = 0
    max_bad_share: float = 0.01
    languages: tuple[str, ...] = ()
    verify: bool = True

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.hold_out < 0 or not 0 <= self.max_bad_share <= 1:
            raise UsageError(
                f"samples_per_shard = {self.samples_per_shard} must be at least 1, hold_out = {self.hold_out} at least "
                f"0, and max_bad_share = {self.max_bad_share} between 0 and 1."
            )


@dataclass(frozen=True, kw_only=True)
class PackSummary(Result):
    """What was packed; `seconds` and `pairs_per_second` are of this run, without what an earlier one had done.

    recognised: what the source was taken for, where it was found by looking.
    """

    out: str
    samples: int
    bad: int
    shards: int
    splits: dict[str, int]
    rejected: dict[str, int]
    held_out: dict[str, int]
    fingerprint: str
    seconds: float
    pairs_per_second: float
    warnings: tuple[str, ...] = ()
    recognised: Recognition | None = None


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A finished shard: `upto` pairs of its split are dealt with, among them those rejected since the last one.

    endings: of its members.
    """

    name: str
    split: str
    samples: int
    upto: int
    bytes: int
    sha256: str
    endings: list[str] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def pack(source: PairSource, out: Path, config: PackConfig | None = None) -> PackSummary:
    """Write the pairs of a source as shards into a new folder, or resume where an interrupted run stopped.

    The folder ends with the same bytes however often it was interrupted. Unusable pairs are listed in
    `rejected.jsonl`.

    Raises:
        UsageError: `out` holds something else already, or so many samples cannot be held out.
        VlmError: too many pairs are unusable.
    """
    config = config or PackConfig()
    identity = asdict(config)
    # a run that failed on this limit is resumed with a higher one
    del identity["max_bad_share"]
    is_resumed = begin_or_resume_folder(out, kind="shards", configuration=identity | {"source": source.fingerprint()})
    if is_resumed:
        for half_written in out.glob(".*.part"):
            half_written.unlink()
    started = time.perf_counter()
    # the split is saved before the first shard: a resumed run must not draw another one
    held_out = _hold_out(source, out, config) if config.hold_out else None
    splits = _splits(len(source), held_out)
    columns = _scan_columns(source, config)
    shards = read_journal(out / _JOURNAL, _Shard)
    already = sum(shard.samples + len(shard.rejected) for shard in shards)
    with progress(total=len(source), what="packing", done=already, unit="pair") as shown:
        work = _PackJob(source, out, config, columns=columns, shards=shards, shown=shown)
        for split, numbers in splits.items():
            work.write_split(split, numbers)
    manifest = _finish(source, out, config, work, held_out)
    seconds = time.perf_counter() - started
    return PackSummary(
        out=str(out),
        samples=manifest.counts["samples"],
        bad=manifest.counts["bad"],
        shards=manifest.counts["shards"],
        splits={split: manifest.counts.get(split, 0) for split in splits} if held_out else {},
        rejected=manifest.details["rejected"],
        held_out=manifest.details["held_out"],
        fingerprint=manifest.fingerprint,
        seconds=seconds,
        pairs_per_second=(len(source) - already) / seconds,
        warnings=work.warnings(),
    )


def shards_at(url: str) -> list[str]:
    """The shards at an address; whatever else `pack` reads is packed once, into the cache of this machine.

    Raises:
        UsageError: nothing is there, or no single reading of it.
    """
    if holds_shards(url):
        return expand_shards(url)
    source = open_source(url)
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    out = base / "vlm" / "packed" / source.fingerprint()
    if not (out / MANIFEST).is_file():
        logger.info(
            f"{url} is not a set of shards; it is packed to {out} first. vlm pack writes them where you choose."
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        # no one is there to mend the source: what is usable is used, and the rest reported
        summary = pack(source, out, PackConfig(max_bad_share=1.0))
        if summary.bad:
            logger.warning(f"{summary.bad:,} of its pairs cannot be used; {out / REJECTED} names them.")
    return expand_shards(str(out))


class _PackedPair(NamedTuple):
    """A pair as it stands in a shard, and what is counted of it; one without captions has no first one."""

    members: bytes
    endings: set[str]
    first_caption: str | None
    is_garbled: bool


class _PackJob:
    """The shards written so far, and the next ones."""

    def __init__(
        self,
        source: PairSource,
        out: Path,
        config: PackConfig,
        *,
        columns: JsonColumns,
        shards: list[_Shard],
        shown: "tqdm",
    ) -> None:
        self.shards = shards
        self.rejected: list[dict[str, Any]] = []
        for shard in shards:
            self.rejected += shard.rejected
        self._source = source
        self._out = out
        self._config = config
        self.columns = columns
        self._shown = shown
        self._upto = 0
        # written with the next shard, so that shards and rejects are journaled together
        self._since_last: list[dict[str, Any]] = []
        self._captions: Counter[str] = Counter()
        self._num_garbled = 0

    def warnings(self) -> tuple[str, ...]:
        """What is odd about the pairs as a whole."""
        return self._garbled_captions() + self._equal_captions() + self.columns.warnings()

    def _garbled_captions(self) -> tuple[str, ...]:
        if not self._num_garbled:
            return ()
        number = pluralize(self._num_garbled, "image")
        cure = "name their encoding, as in --encoding latin-1"
        return (f"{number} with captions that hold bytes that are not UTF-8; {cure}.",)

    def _equal_captions(self) -> tuple[str, ...]:
        number = self._captions.total()
        caption, most = next(iter(self._captions.most_common(1)), ("", 0))
        if number < _MIN_JUDGED_CAPTIONS or most < _NEARLY_ALL * number:
            return ()
        cause = (
            "the folders are perhaps no classes: --captions FILE names the captions, --captions none packs without"
            if self._source.captions_are_labels
            else "the column of captions is perhaps another: --caption-column"
        )
        return (f"{most:,} of {number:,} images have the same caption, {caption[:60]!r}; {cause}.",)

    def write_split(self, split: str, numbers: Sequence[int]) -> None:
        """Write what is missing of a split, a shard at a time."""
        done = [shard for shard in self.shards if shard.split == split]
        size = self._config.samples_per_shard
        # at least WebDataset's usual five, more for splits of 100,000 shards: names sort as numbers
        digits = max(5, len(str(len(numbers) // size)))
        # closed before an error goes on, for processes may be at work
        with closing(self._samples(numbers, first=done[-1].upto if done else 0)) as samples:
            for place, sample in enumerate(samples, start=len(done)):
                path = self._out / f"{split}-{place:0{digits}d}.tar"
                count = 0
                endings: set[str] = set()
                with atomic_write(path) as file, SampleWriter(file) as tar:
                    # the first sample is read before the file is opened: no shard is empty
                    for packed in chain([sample], islice(samples, size - 1)):
                        tar.write_members(packed.members)
                        count += 1
                        endings |= packed.endings
                self._record(path, split, count, sorted(endings))

    def _record(self, path: Path, split: str, count: int, endings: list[str]) -> None:
        file = record_file(path)
        shard = _Shard(
            name=path.name,
            split=split,
            samples=count,
            upto=self._upto,
            bytes=file.bytes,
            sha256=file.sha256,
            endings=endings,
            rejected=self._since_last,
        )
        # after the shard itself: a line is a promise that its shard is whole
        append_line(self._out / _JOURNAL, json.dumps(asdict(shard)))
        self.shards.append(shard)
        # of use at the end and to whoever reads the shard; made here, while others work on the next one
        open_index(str(path))
        self._since_last = []

    def _samples(self, numbers: Sequence[int], *, first: int) -> Generator[_PackedPair, None, None]:
        """The usable pairs, from place `first` of the numbers on."""
        places = range(first, len(numbers))
        with closing(_work_through(self._source, numbers, places, self._config, self._pack_pair)) as results:
            for place, packed in zip(places, results, strict=True):
                # set before the yield: the writer records it once the last sample of a shard is written
                self._upto = place + 1
                self._shown.update()
                if isinstance(packed, BadSample):
                    self._reject(numbers[place], packed)
                else:
                    self._count_captions(packed)
                    yield packed

    def _pack_pair(self, pair: Pair | BadSample) -> _PackedPair | BadSample:
        if isinstance(pair, BadSample):
            return pair
        try:
            sample = encode_pair(pair, verify=self._config.verify, columns=self.columns)
        except BadSample as error:
            return error
        texts = chain.from_iterable(pair.captions.values())
        return _PackedPair(
            members=sample_members(sample),
            endings=sample.keys() - {"__key__"},
            first_caption=next(iter(pair.captions.values()), (None,))[0],
            is_garbled=any(REPLACEMENT_CHARACTER in text for text in texts),
        )

    def _file_of(self, number: int) -> dict[str, str]:
        return {"file": self._source.file_of(number)} if isinstance(self._source, NamedSource) else {}

    def _count_captions(self, packed: _PackedPair) -> None:
        self._num_garbled += packed.is_garbled
        text = packed.first_caption
        if text is None:
            return
        # of many different captions no single one can become nearly all later on
        if text in self._captions or len(self._captions) < _MAX_COUNTED_CAPTIONS:
            self._captions[text] += 1

    def _reject(self, number: int, error: BadSample) -> None:
        reject = {"number": number} | self._file_of(number) | {"reason": error.reason, "detail": error.detail}
        self.rejected.append(reject)
        self._since_last.append(reject)
        total = len(self._source)
        limit = self._config.max_bad_share
        # a share of all pairs rather than of those read: bad ones may come first
        if len(self.rejected) > limit * total:
            first = "; ".join(map(_describe_reject, self.rejected[:3]))
            listing = list_counts(_count_reasons(self.rejected).most_common())
            raise VlmError(
                f"{len(self.rejected):,} of {total:,} pairs cannot be used so far, more than the {limit:.1%} allowed. "
                f"The first: {first}. By reason: {listing}. Mend the source, or allow more with --max-bad (up to 1)."
            )


def _count_reasons(rejected: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(map(itemgetter("reason"), rejected))


def _describe_reject(reject: dict[str, Any]) -> str:
    name = reject.get("file") or f"number {reject['number']}"
    return f"{name}: {reject['reason']}: {reject['detail']}"


def _read_pair(source: PairSource, number: int, config: PackConfig) -> Pair | BadSample:
    """A pair with the captions of the configured languages, or why it cannot be used.

    A source without captions has none to select.
    """
    try:
        pair = source.read(number)
        return replace(pair, captions=_in_languages(pair.captions, config)) if config.languages else pair
    except BadSample as error:
        return error


def _in_languages(captions: Captions, config: PackConfig) -> Captions:
    return select_languages(captions, config.languages) if config.languages and captions else captions


# fewer take less time than the start of processes, about 10 ms each; few large photos want a process on each core
_MIN_FORKED_PAIRS, _MIN_PAIRS_OF_PROCESS, _MIN_TEXTS_OF_PROCESS = 2_000, 100, 4_000
_TEXTS_AT_ONCE = 256
# between Flickr8k's (1.4 of the images/s on two cores) and photos of 400 × 533 pixels (0.9)
_SMALL_IMAGE_BYTES = 20 << 10
_NUM_SAMPLED = 16


def _scan_columns(source: PairSource, config: PackConfig) -> JsonColumns:
    """What the JSON of all pairs has in common; a source that tells no words gives the same keys and types anyway."""
    if not isinstance(source, WordedSource):
        return JsonColumns()
    all_numbers = range(len(source))
    parts = [all_numbers[first : first + _TEXTS_AT_ONCE] for first in all_numbers[::_TEXTS_AT_ONCE]]
    processes = _num_processes(source, len(source), least=_MIN_TEXTS_OF_PROCESS)
    columns = JsonColumns()
    with progress(total=len(source), what="reading texts", unit="pair") as shown:
        if processes < 2:
            for numbers in parts:
                _add_columns(columns, source, numbers, config)
                shown.update(len(numbers))
            return columns

        def scan(place: int) -> JsonColumns:
            return _add_columns(JsonColumns(), source, parts[place], config)

        results = map_forked(scan, range(len(parts)), processes=processes, size_of=lambda _: 0, max_batch=1)
        with closing(results):
            for numbers, part in zip(parts, results, strict=True):
                columns.merge(part)
                shown.update(len(numbers))
    # such a part does not tell all that one after another tells
    return _add_columns(JsonColumns(), source, all_numbers, config) if columns.is_capped else columns


def _add_columns(columns: JsonColumns, source: WordedSource, numbers: Iterable[int], config: PackConfig) -> JsonColumns:
    for number in numbers:
        try:
            words = source.words(number)
            columns.add(words._replace(captions=_in_languages(words.captions, config)))
        except BadSample:
            # named by the packing, which meets it again
            continue
    return columns


def _hold_out(source: PairSource, out: Path, config: PackConfig) -> HeldOutSplit:
    """The split, from an earlier run if it came so far."""
    kept = out / _HELD_OUT
    if kept.is_file():
        values = json.loads(kept.read_text(encoding="utf-8"))
        return HeldOutSplit(**values | {"numbers": frozenset(values["numbers"])})
    held_out = held_out_split(source, config)
    # sorted, for a set has no order, and a file of the same pack has the same bytes
    write_text(kept, json.dumps(asdict(held_out) | {"numbers": sorted(held_out.numbers)}))
    return held_out


def held_out_split(source: PairSource, config: PackConfig) -> HeldOutSplit:
    """The pairs that a pack of this configuration holds out; bad ones are left to the packing to name.

    Raises:
        UsageError: so many cannot be held out.
    """
    groups = GroupedSplit(by_caption=not source.captions_are_labels)
    numbers = range(len(source))
    with closing(_work_through(source, numbers, numbers, config, _thumbnail_pair)) as results:
        for number, grouped in enumerate(track(results, total=len(source), what="grouping", unit="pair")):
            if grouped is not None:
                groups.add(number, *grouped)
    return groups.hold_out(config.hold_out, seed=config.seed)


def _thumbnail_pair(pair: Pair | BadSample) -> tuple[str, Captions, np.ndarray] | None:
    if isinstance(pair, BadSample):
        return None
    try:
        pil_image = open_image(pair.image, formats=packable_formats())
        # grouping needs a thumbnail: a JPEG is decoded only as large as that
        rgb = to_rgb(pil_image, resolution=min(1.0, _MIN_DECODED_PIXELS / min(pil_image.size)))
    except BadSample:
        return None
    return pair.key, pair.captions, rgb_thumbnail(rgb)


# so few images are read ahead that they take no memory to speak of, and so many that no thread waits for one
_BATCH_PAIRS = 256
_BATCH_BYTES = 1 << 20
_BATCHES_AHEAD = 2


def _work_through(
    source: PairSource,
    numbers: Sequence[int],
    places: range,
    config: PackConfig,
    work: Callable[[Pair | BadSample], Made],
) -> Generator[Made, None, None]:
    """What the work makes of the pairs at some places of the numbers, in their order, by all cores."""
    is_worth_it = len(places) >= _MIN_FORKED_PAIRS
    processes = _num_processes(source, len(places), least=_MIN_PAIRS_OF_PROCESS) if is_worth_it else 1
    if processes > 2 or (processes == 2 and _has_small_images(source, numbers, places)):
        return map_forked(
            lambda place: work(_read_pair(source, numbers[place], config)),
            places,
            processes=processes,
            size_of=lambda made: len(made.members) if isinstance(made, _PackedPair) else 0,
        )
    return _in_threads(work, (_read_pair(source, numbers[place], config) for place in places), threads=_num_cores())


def _has_small_images(source: PairSource, numbers: Sequence[int], places: range) -> bool:
    """Whether Python takes more of the work than decoding, which two threads share as well as two processes."""
    sizes: list[int] = []
    for place in places[:: -(-len(places) // _NUM_SAMPLED)]:
        with suppress(Exception):  # the packing meets it again
            sizes.append(len(source.read(numbers[place]).image))
    return sum(sizes) <= _SMALL_IMAGE_BYTES * len(sizes)


def _num_processes(source: object, num_pairs: int, *, least: int) -> int:
    """How many processes share so many pairs, of which each has these at least; 1 where threads do the work."""
    may_fork = num_pairs >= 2 * least and isinstance(source, ForkableSource) and source.is_fork_safe and can_fork()
    return min(_num_cores(), num_pairs // least) if may_fork else 1


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_threads(
    work: Callable[[Pair | BadSample], Made], pairs: Iterator[Pair | BadSample], *, threads: int
) -> Generator[Made, None, None]:
    """What the work makes of each pair, in their order.

    The caller reads the pairs, for sources need not be safe for threads. What reading raises, Ctrl-C as well, comes
    after the results of the pairs before it: as much is written as if one pair were done after another.
    """
    pending: deque[Future[list[Made]]] = deque()
    pool = ThreadPoolExecutor(threads, "packing")
    failure: BaseException | None = None
    # each thread sets Python's filters of warnings and takes them back, in any order; here they are set right again
    with warnings.catch_warnings():
        try:
            while failure is None:
                batch, failure = _read_batch(pairs)
                pending.append(pool.submit(lambda batch: list(map(work, batch)), batch))
                while len(pending) > (_BATCHES_AHEAD * threads if failure is None else 0):
                    yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    if not isinstance(failure, StopIteration):
        raise failure


def _read_batch(pairs: Iterator[Pair | BadSample]) -> tuple[list[Pair | BadSample], BaseException | None]:
    """The next pairs, and what ended them: `StopIteration` at their end, or what reading raised."""
    batch: list[Pair | BadSample] = []
    num_bytes = 0
    try:
        while len(batch) < _BATCH_PAIRS and num_bytes < _BATCH_BYTES:
            pair = next(pairs)
            batch.append(pair)
            if isinstance(pair, Pair):
                num_bytes += len(pair.image) + sum(array.nbytes for array in pair.arrays.values())
    except BaseException as error:
        return batch, error
    return batch, None


def _splits(total: int, held_out: HeldOutSplit | None) -> dict[str, Sequence[int]]:
    """The numbers of the pairs of each split, by the name its shards begin with."""
    if held_out is None:
        return {"shard": range(total)}
    train = [number for number in range(total) if number not in held_out.numbers]
    return {"train": train, "val": sorted(held_out.numbers)}


def _finish(
    source: PairSource, out: Path, config: PackConfig, work: _PackJob, held_out: HeldOutSplit | None
) -> Manifest:
    if not work.shards:
        raise VlmError(
            f"None of the {len(source):,} pairs can be used; the first: {_describe_reject(work.rejected[0])}."
        )
    shards = sorted(work.shards, key=lambda shard: shard.name)
    files: dict[str, FileRecord] = {}
    paths: list[str] = []
    endings: set[str] = set()
    samples: Counter[str] = Counter()
    for shard in shards:
        files[shard.name] = FileRecord(bytes=shard.bytes, sha256=shard.sha256)
        paths.append(str(out / shard.name))
        endings.update(shard.endings)
        samples[shard.split] += shard.samples
    if work.rejected:
        write_text(out / REJECTED, "".join(json_text(reject) + "\n" for reject in work.rejected))
        files[REJECTED] = record_file(out / REJECTED)
    counts = {"samples": samples.total(), "bad": len(work.rejected), "shards": len(shards)}
    facts = asdict(held_out) if held_out else {}
    # which pairs they are is recorded in the shards
    facts.pop("numbers", None)
    manifest = Manifest(
        kind="shards",
        fingerprint=shards_fingerprint(paths),
        counts=counts | (dict(samples) if held_out else {}),
        configuration=asdict(config),
        inputs={"source": source.fingerprint()},
        files=files,
        details={
            "source": source.describe(),
            "rejected": dict(_count_reasons(work.rejected)),
            "held_out": facts,
        },
    )
    card = dataset_card(work.columns, splits=samples, endings=endings, samples=samples.total())
    write_text(out / CARD, card)
    # the manifest marks the folder complete; only then is the journal of no more use
    write_manifest(out, manifest)
    (out / _JOURNAL).unlink()
    (out / _HELD_OUT).unlink(missing_ok=True)
    return manifest


CARD = "README.md"
_KEYS = ("__key__", "__url__")


def dataset_card(columns: JsonColumns, *, splits: Iterable[str], endings: Iterable[str], samples: int) -> str:
    """The README.md of a folder of shards, by which Hugging Face datasets knows its splits and the type of each column.

    Without it `load_dataset` takes the types from the first five samples: it drops what comes later, or fails where a
    column is empty in those five. The block between `---` is YAML, of which JSON is a part
    (https://huggingface.co/docs/hub/datasets-cards). The types are left out where a column has none that holds all its
    values, and where arrays are stored.

    splits: the names before the number of a shard. endings: of the members in all shards.
    """
    endings = sorted(set(endings))
    data_files: list[dict[str, str]] = []
    for split in splits:
        # shards that are not split are called shard-*.tar
        data_files.append({"split": "train" if split == "shard" else split, "path": f"{split}-*.tar"})
    card: dict[str, Any] = {"configs": [{"config_name": "default", "data_files": data_files}]}
    json_feature = columns.feature()
    if json_feature is not None and not any(ending.endswith("npy") for ending in endings):
        features: list[dict[str, Any]] = []
        for ending in endings:
            if ending == "json":
                features.append({"name": ending} | json_feature)
            else:
                features.append({"name": ending, "dtype": "image" if ending in IMAGE_EXTENSIONS else "string"})
        features += [{"name": key, "dtype": "string"} for key in _KEYS]
        card["dataset_info"] = {"features": features}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in card.items()]
    parts = ", ".join(endings)
    return "\n".join(
        ["---", *lines, "---", "", f"{samples:,} samples in WebDataset shards ({parts}), written by vlm pack.", ""]
    )
