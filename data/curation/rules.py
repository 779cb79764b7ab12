"""The rules of `vlm curate`. Adding one is a function and a line here."""

from collections.abc import Callable

from vlm.data.curation import caption_rules as captions
from vlm.data.curation import concepts, duplicate_rules
from vlm.data.curation import picture_rules as pictures
from vlm.data.curation import signal_rules as signals
from vlm.data.curation.facts import Need
from vlm.data.curation.rule import NoParameters, Rule, Verdict

_SIZE = frozenset({Need.SIZE})
_CAPTIONS = frozenset({Need.CAPTIONS})
_FILE = frozenset({Need.SIZE, Need.DIGEST})
_LOOK = frozenset({Need.SIZE, Need.LOOK})
_BOTH = frozenset({Need.DIGEST, Need.LOOK})
_NONE: frozenset[Need] = frozenset()


def _rule(line: str, parameters: type, weigh: Callable[..., Verdict], needs: frozenset[Need], signal: str = "") -> Rule:
    return Rule(help=line, parameters=parameters, weigh=weigh, needs=needs, signal=signal)


RULES: dict[str, Rule] = {
    "usable": _rule("drop what cannot be decoded", NoParameters, pictures.by_decoding, frozenset({Need.DECODED})),
    "size": _rule(
        "shorter side at least min, longer at most max, in pixels", pictures.SizeLimits, pictures.by_size, _SIZE
    ),
    "aspect": _rule("longer side at most max times the shorter", pictures.AspectLimit, pictures.by_aspect, _SIZE),
    "words": _rule(
        "a caption of min to max words, a character counting as one in Chinese, Japanese, Thai",
        captions.LengthLimits,
        captions.by_words,
        _CAPTIONS,
    ),
    "characters": _rule("a caption of min to max characters", captions.LengthLimits, captions.by_characters, _CAPTIONS),
    "language": _rule(
        "a caption in any of the languages, with a share of at least script of its letters in their script",
        captions.Languages,
        captions.by_language,
        _CAPTIONS,
    ),
    "repeated-caption": _rule(
        "no caption on more than max samples", captions.CaptionLimit, captions.by_repetition, _CAPTIONS
    ),
    "exact-duplicates": _rule("one of the samples with equal files", NoParameters, duplicate_rules.by_bytes, _FILE),
    "near-duplicates": _rule(
        "one of the pictures that differ by encoding, size, a little brightness or a hair at the edges",
        duplicate_rules.Nearness,
        duplicate_rules.by_look,
        _LOOK,
    ),
    "embedding-duplicates": _rule(
        "one of the samples with nearly equal embeddings",
        NoParameters,
        duplicate_rules.by_embedding,
        _SIZE,
        "duplicates",
    ),
    "decontaminate": _rule(
        "nothing that the evaluation shards also hold", duplicate_rules.Evaluation, duplicate_rules.by_evaluation, _BOTH
    ),
    "similarity": _rule(
        "picture and caption alike: min cosine, or the top share",
        signals.AtLeast,
        signals.by_similarity,
        _NONE,
        "similarity",
    ),
    "near": _rule("near to a target set: min, or the top share", signals.AtLeast, signals.by_target, _NONE, "near"),
    "typical": _rule(
        "the k, or the share, most typical", signals.HowMany, signals.by_typicality, _NONE, "centre-distance"
    ),
    "atypical": _rule(
        "the k, or the share, least typical", signals.HowMany, signals.by_atypicality, _NONE, "centre-distance"
    ),
    "cluster-balance": _rule(
        "at most cap expected of a cluster", signals.ClusterCap, signals.by_cluster, _NONE, "cluster"
    ),
    "balance": _rule(
        "frequent concepts less often, after MetaCLIP", concepts.ConceptCap, concepts.by_concepts, _CAPTIONS
    ),
    "sample": _rule("a share, drawn", pictures.Share, pictures.by_chance, _NONE),
    "weight": _rule("everything so many times", pictures.Times, pictures.by_weight, _NONE),
}
"""Each rule by its name, as `--rule NAME:PARAMETER=VALUE` calls it."""


def listed_rules() -> str:
    """Every rule with its parameters, a line each."""
    return "\n".join(f"  {rule.usage(name)} – {rule.help}" for name, rule in RULES.items())
