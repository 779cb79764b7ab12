"""The rules of `vlm curate`. Adding one is a function and a line here.

Rules in their order over shards, and the selection that comes out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.curation import caption_filters, image_filters
from vlm.data.curation.filter import AskedRule, NoParameters, Rule, Situation, Verdict
from vlm.data.curation.sample_table import Facts, Need, scan
from vlm.data.curation.score_columns import SIGNALS, Columns
from vlm.data.selection import MAX_TIMES, SelectedShard, Selection, round_times
from vlm.errors import UsageError
from vlm.files import fingerprint_of

_SIZE = frozenset({Need.SIZE})
_CAPTIONS = frozenset({Need.CAPTIONS})
_FILE = frozenset({Need.SIZE, Need.DIGEST})
_LOOK = frozenset({Need.SIZE, Need.LOOK})
_BOTH = frozenset({Need.DIGEST, Need.LOOK})
_NONE: frozenset[Need] = frozenset()


def _rule(line: str, parameters: type, weigh: Callable[..., Verdict], needs: frozenset[Need], signal: str = "") -> Rule:
    return Rule(help=line, parameters=parameters, weigh=weigh, needs=needs, signal=signal)


RULES: dict[str, Rule] = {
    "usable": _rule("drop what cannot be decoded", NoParameters, image_filters.by_decoding, frozenset({Need.DECODED})),
    "size": _rule(
        "shorter side at least min, longer at most max, in pixels",
        image_filters.SizeLimits,
        image_filters.by_size,
        _SIZE,
    ),
    "aspect": _rule(
        "longer side at most max times the shorter", image_filters.AspectLimit, image_filters.by_aspect, _SIZE
    ),
    "words": _rule(
        "a caption of min to max words, a character counting as one in Chinese, Japanese, Thai",
        caption_filters.LengthLimits,
        caption_filters.by_words,
        _CAPTIONS,
    ),
    "characters": _rule(
        "a caption of min to max characters", caption_filters.LengthLimits, caption_filters.by_characters, _CAPTIONS
    ),
    "language": _rule(
        "a caption in any of the languages, with a share of at least script of its letters in their script",
        caption_filters.Languages,
        caption_filters.by_language,
        _CAPTIONS,
    ),
    "repeated-caption": _rule(
        "no caption on more than max samples", caption_filters.CaptionLimit, caption_filters.by_repetition, _CAPTIONS
    ),
    "exact-duplicates": _rule("one of the samples with equal files", NoParameters, image_filters.by_bytes, _FILE),
    "near-duplicates": _rule(
        "one of the pictures that differ by encoding, size, a little brightness or a hair at the edges",
        image_filters.Nearness,
        image_filters.by_look,
        _LOOK,
    ),
    "embedding-duplicates": _rule(
        "one of the samples with nearly equal embeddings",
        NoParameters,
        image_filters.by_embedding,
        _SIZE,
        "duplicates",
    ),
    "decontaminate": _rule(
        "nothing that the evaluation shards also hold", image_filters.Evaluation, image_filters.by_evaluation, _BOTH
    ),
    "similarity": _rule(
        "picture and caption alike: min cosine, or the top share",
        image_filters.AtLeast,
        image_filters.by_similarity,
        _NONE,
        "similarity",
    ),
    "near": _rule(
        "near to a target set: min, or the top share", image_filters.AtLeast, image_filters.by_target, _NONE, "near"
    ),
    "typical": _rule(
        "the k, or the share, most typical",
        image_filters.HowMany,
        image_filters.by_typicality,
        _NONE,
        "centre-distance",
    ),
    "atypical": _rule(
        "the k, or the share, least typical",
        image_filters.HowMany,
        image_filters.by_atypicality,
        _NONE,
        "centre-distance",
    ),
    "cluster-balance": _rule(
        "at most cap expected of a cluster", image_filters.ClusterCap, image_filters.by_cluster, _NONE, "cluster"
    ),
    "balance": _rule(
        "frequent concepts less often, after MetaCLIP",
        caption_filters.ConceptCap,
        caption_filters.by_concepts,
        _CAPTIONS,
    ),
    "sample": _rule("a share, drawn", image_filters.Share, image_filters.by_chance, _NONE),
    "weight": _rule("everything so many times", image_filters.Times, image_filters.by_weight, _NONE),
}
"""Each rule by its name, as `--rule NAME:PARAMETER=VALUE` calls it."""


def listed_rules() -> str:
    """Every rule with its parameters, a line each."""
    return "\n".join(f"  {rule.usage(name)} – {rule.help}" for name, rule in RULES.items())


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rule as it went.

    before, kept: distinct samples; visits: of an epoch; is_left_before (bool [N]), times (uint16 [N]): of each sample.
    """

    asked: AskedRule
    verdict: Verdict
    before: int
    kept: int
    visits: int
    is_left_before: np.ndarray
    times: np.ndarray

    @property
    def dropped(self) -> int:
        """Samples it dropped."""
        return self.before - self.kept

    def described(self) -> dict[str, Any]:
        """For the lineage, as plain JSON."""
        counts = {"before": self.before, "kept": self.kept, "visits": self.visits}
        if self.asked.rule.signal:
            counts["without_value"] = self.verdict.without_value
        return {"step": "rule", **self.asked.described(), **counts, **self.verdict.record}


@dataclass(frozen=True, kw_only=True)
class Curated:
    """A selection with how it came about. corrupt: samples that cannot be used, by reason."""

    selection: Selection
    steps: tuple[Step, ...]
    facts: Facts
    corrupt: dict[str, int]


def curate(
    shards: Sequence[str],
    rules: Sequence[AskedRule],
    *,
    columns: Columns | None = None,
    seed: int = 0,
    workers: int = 1,
    allow_damage: bool = False,
) -> Curated:
    """Apply the rules in their order, each on what the earlier ones left; the times a sample gets multiply.

    A sample found unusable, as far as the rules made the scan look, is left out before the first rule. A fractional
    expectation is drawn from (seed, place of the rule, its name), so the result depends on nothing else.

    Raises:
        UsageError: a rule asks for a stored column that is not given.
    """
    given = columns or Columns()
    for asked in rules:
        _refuse_missing(asked, given)

    def look(addresses: Sequence[str], needs: frozenset[Need]) -> Facts:
        return scan(addresses, needs, workers=workers, allow_damage=allow_damage)

    facts = look(shards, frozenset().union(*(asked.rule.needs for asked in rules)))
    times = facts.is_usable.astype(np.uint16)
    steps: list[Step] = []
    for number, asked in enumerate(rules):
        rng = np.random.default_rng(int(fingerprint_of(f"{seed}/{number}/{asked.name}"), 16))
        is_left = times > 0
        situation = Situation(facts=facts, is_left=is_left, columns=given, rng=rng, scan=look)
        verdict = asked.rule.weigh(situation, asked.parameters)
        drawn = round_times(verdict.weights, rng)
        times = np.minimum(times.astype(np.int64) * drawn, MAX_TIMES).astype(np.uint16)
        steps.append(_step(asked, verdict, is_left, times))
    corrupt = _corrupt(facts)
    begin = {"step": "curate", "seed": seed, "samples": len(facts), "corrupt": corrupt}
    lineage = (begin, *(step.described() for step in steps))
    return Curated(selection=_selection(facts, times, lineage), steps=tuple(steps), facts=facts, corrupt=corrupt)


def _step(asked: AskedRule, verdict: Verdict, is_left: np.ndarray, times: np.ndarray) -> Step:
    return Step(
        asked=asked,
        verdict=verdict,
        before=int(is_left.sum()),
        kept=int(np.count_nonzero(times)),
        visits=int(times.sum(dtype=np.int64)),
        is_left_before=is_left,
        times=times,
    )


def _refuse_missing(asked: AskedRule, columns: Columns) -> None:
    signal = asked.rule.signal
    if signal and signal not in columns:
        raise UsageError(
            f"--rule {asked.name} reads the stored column {signal!r} ({SIGNALS[signal][1]}), which no --columns FILE "
            "holds; make it by vlm signals EMBEDDINGS …"
        )


def _corrupt(facts: Facts) -> dict[str, int]:
    counted = facts.table.column("reason").value_counts().to_pylist()
    return {each["values"]: each["counts"] for each in counted if each["values"]}


def _selection(facts: Facts, times: np.ndarray, lineage: tuple[dict[str, Any], ...]) -> Selection:
    shards = tuple(
        SelectedShard(name=shard.address.rpartition("/")[2], fingerprint=shard.fingerprint, samples=shard.samples)
        for shard in facts.shards
    )
    return Selection(shards=shards, times=tuple(np.split(times, facts.starts[1:-1])), lineage=lineage)
