"""The loss terms by name, and the expression that sums them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vlm.config import lookup
from vlm.errors import UsageError
from vlm.train.objectives.captioning import CAPPA, CAPTION
from vlm.train.objectives.classification import CLASSIFY
from vlm.train.objectives.contrastive import CLIP, DCL, RANKING, SIGLIP, WEIGHTED_DCL
from vlm.train.objectives.distillation import DINO, DISTILL, LOCAL_TO_GLOBAL, TEXT_ALIGN
from vlm.train.objectives.fine_grained import GROUPING, JOINT_SUB_CAPTIONS, SPARC, SUB_CAPTIONS
from vlm.train.objectives.global_contrastive import FASTCLIP, SOGCLR
from vlm.train.objectives.loss_term import LossTerm

LOSS_TERMS: dict[str, LossTerm] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "dcl": DCL,
    "weighted_dcl": WEIGHTED_DCL,
    "ranking": RANKING,
    "sogclr": SOGCLR,
    "fastclip": FASTCLIP,
    "distill": DISTILL,
    "text_align": TEXT_ALIGN,
    "classify": CLASSIFY,
    "caption": CAPTION,
    "cappa": CAPPA,
    "sub_captions": SUB_CAPTIONS,
    "joint_sub_captions": JOINT_SUB_CAPTIONS,
    "grouping": GROUPING,
    "sparc": SPARC,
    "local_to_global": LOCAL_TO_GLOBAL,
    "dino": DINO,
}
"""Adding an objective is one function in a file of this folder and one line here."""

ALIASES: dict[str, str] = {
    "coca": "clip + 2*caption",
    "dreamlip": "clip + sub_captions + grouping",
    "gpt4image": "classify + text_align",
    "rs-m-clip": "clip + dino",
}
"""Aliases of sums that papers use."""

FORMER_NAMES: dict[str, str] = {"sub_captions": "joint_sub_captions", "grouping": "sparc"}
"""What two terms computed before 2026-11-29 is computed by these since; their names went to DreamLIP's own forms."""

_SUMMAND = re.compile(r"(?:(?P<weight>[0-9.eE+-]+)\s*\*\s*)?(?P<name>[a-z][a-z0-9_-]*)")


@dataclass(frozen=True, kw_only=True)
class WeightedLossTerm:
    """A term of a sum."""

    name: str
    weight: float
    term: LossTerm


def input_names(terms: Iterable[WeightedLossTerm]) -> frozenset[str]:
    """Names of the inputs that any of the terms reads."""
    names: set[str] = set()
    for weighted in terms:
        names.update(weighted.term.inputs)
    return frozenset(names)


def parse_objective(expression: str) -> tuple[WeightedLossTerm, ...]:
    """The terms of an expression such as `siglip + 2*caption`.

    >>> [(weighted.name, weighted.weight) for weighted in parse_objective("coca")]
    [('clip', 1.0), ('caption', 2.0)]

    Raises:
        UsageError: it cannot be read, names an unknown term (the nearest is named) or one twice.
    """
    terms: list[WeightedLossTerm] = []
    # an alias stands for a whole expression, not for a term of one
    for summand in ALIASES.get(expression.strip(), expression).split("+"):
        match = _SUMMAND.fullmatch(summand.strip())
        try:
            weight = float(match["weight"] or 1) if match else 0.0
        except ValueError:
            weight = 0.0
        # a term without weight still costs its forward pass, and nan passes every other comparison
        if not match or not 0 < weight < float("inf"):
            raise UsageError(
                f"objective = {expression!r}: {summand.strip()!r} is not a term; write NAME or WEIGHT*NAME joined by "
                f"+, e.g. 'clip + 2*caption'. Names: {', '.join([*LOSS_TERMS, *ALIASES])}."
            )
        name = match["name"]
        terms.append(WeightedLossTerm(name=name, weight=weight, term=lookup(LOSS_TERMS, name, "objective")))
    # losses are kept by name: the second would replace the first
    names = [weighted.name for weighted in terms]
    if len(set(names)) < len(names):
        raise UsageError(f"objective = {expression!r} names a term twice; give it one weight.")
    return tuple(terms)
