"""What can be minimised, by name, and the expression that adds it up."""

import re
from dataclasses import dataclass

from vlm.config import choose
from vlm.errors import UsageError
from vlm.train.objectives.captioning import CAPTION
from vlm.train.objectives.contrastive import CLIP, DCL, SIGLIP
from vlm.train.objectives.distillation import DISTILL, TEXT_ALIGN
from vlm.train.objectives.parallel_captioning import CAPPA
from vlm.train.objectives.ranking import RANKING
from vlm.train.objectives.self_distillation import LOCAL_TO_GLOBAL
from vlm.train.objectives.sub_captions import GROUPING, SUB_CAPTIONS
from vlm.train.objectives.term import Term

TERMS: dict[str, Term] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "dcl": DCL,
    "ranking": RANKING,
    "distill": DISTILL,
    "text_align": TEXT_ALIGN,
    "caption": CAPTION,
    "cappa": CAPPA,
    "sub_captions": SUB_CAPTIONS,
    "grouping": GROUPING,
    "local_to_global": LOCAL_TO_GLOBAL,
}
"""Adding an objective is one function in a file of this folder and one line here."""

ALIASES: dict[str, str] = {
    "coca": "clip + 2*caption",
    "dreamlip": "clip + sub_captions + grouping",
}
"""Names of sums that papers train with."""

_SUMMAND = re.compile(r"(?:(?P<weight>[0-9.eE+-]+)\s*\*\s*)?(?P<name>[a-z][a-z0-9_-]*)")


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A term of a sum."""

    name: str
    weight: float
    term: Term


def parse_objective(expression: str) -> tuple[WeightedTerm, ...]:
    """The terms of an expression such as `siglip + 2*caption`.

    >>> [(part.name, part.weight) for part in parse_objective("coca")]
    [('clip', 1.0), ('caption', 2.0)]

    Raises:
        UsageError: it cannot be read, names an unknown term (the nearest is named) or one twice.
    """
    found: list[WeightedTerm] = []
    for summand in ALIASES.get(expression.strip(), expression).split("+"):
        match = _SUMMAND.fullmatch(summand.strip())
        try:
            weight = float(match["weight"] or 1) if match else 0.0
        except ValueError:
            weight = 0.0
        if not match or not 0 < weight < float("inf"):
            raise UsageError(
                f"objective = {expression!r}: {summand.strip()!r} is no term; write NAME or WEIGHT*NAME joined by +, "
                f"e.g. 'clip + 2*caption'. Names: {', '.join([*TERMS, *ALIASES])}."
            )
        name = match["name"]
        found.append(WeightedTerm(name=name, weight=weight, term=choose(TERMS, name, "objective")))
    names = [part.name for part in found]
    if len(set(names)) < len(names):
        raise UsageError(f"objective = {expression!r} names a term twice; give it one weight.")
    return tuple(found)
