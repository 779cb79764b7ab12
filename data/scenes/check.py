"""Whether an English caption, such as a captioner wrote, is true of a scene."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from vlm.data.scenes.languages.english import COUNT_WORDS, PLACES, PLURALS
from vlm.data.scenes.scene import BACKGROUNDS, COLOURS, SIZES, Scene

COUNTS_SAID = {word: count for count, word in COUNT_WORDS.items()} | {"an": 1, "one": 1}
SHAPES_SAID = {plural: shape for shape, plural in PLURALS.items()} | {shape: shape for shape in PLURALS}
POSITIONS_SAID = {place: position for position, place in PLACES.items()}


@dataclass(frozen=True, kw_only=True)
class CaptionCheck:
    """The verdict: `facts` were said, `wrong` names those that do not hold, `reason` explains."""

    is_true: bool
    facts: Mapping[str, str | int]
    wrong: tuple[str, ...]
    reason: str


def check_caption(caption: str, scene: Scene) -> CaptionCheck:
    """True if the caption is built like those of `describe` and every fact it says holds.

    It must name shape and colour: "something small on the left" is too vague to be true.
    "two red circle" is forgiven its number, not its count.

    >>> scene = Scene(shape="star", colour="red", size="small", count=3,
    ...               position="left", background="white")
    >>> check_caption("three red stars on the right", scene).reason
    'said position right, is left'
    """
    text = " ".join(caption.lower().split())
    match = next(filter(None, (form.match(text) for form in _forms())), None)
    if match is None:
        return CaptionCheck(is_true=False, facts={}, wrong=(), reason="not a caption of a scene")
    facts = _facts(match.groupdict())
    wrong = tuple(fact for fact, said in facts.items() if said != getattr(scene, fact))
    reasons = [f"said {fact} {facts[fact]}, is {getattr(scene, fact)}" for fact in wrong]
    if not {"shape", "colour"} <= facts.keys():
        reasons.append("does not name shape and colour")
    return CaptionCheck(is_true=not reasons, facts=facts, wrong=wrong, reason=", ".join(reasons))


def _facts(said: Mapping[str, str | None]) -> dict[str, str | int]:
    readings: dict[str, Mapping[str, str | int]] = {
        "shape": SHAPES_SAID,
        "count": COUNTS_SAID,
        "place": POSITIONS_SAID,
    }
    return {
        {"place": "position"}.get(name, name): readings[name][words] if name in readings else words
        for name, words in said.items()
        if words is not None
    }


@cache
def _forms() -> tuple[re.Pattern[str], ...]:
    """The grammar: shapes then ground, ground then shapes, and vague hints."""
    group = (
        rf"(?:{_one_of('count', COUNTS_SAID)} )?(?:{_one_of('size', SIZES)} )?"
        rf"{_one_of('colour', COLOURS)} {_one_of('shape', SHAPES_SAID)}"
    )
    place = _one_of("place", POSITIONS_SAID)
    ground = rf"an? {_one_of('background', BACKGROUNDS)} background"
    opening = r"(?:a picture of )?"
    patterns = (
        rf"{opening}{group}(?: {place})?(?: on {ground})?",
        rf"{opening}{group} {place} of {ground}",
        rf"{opening}{ground} with {group}(?: {place})?",
        rf"{_one_of('count', COUNTS_SAID)} {_one_of('shape', SHAPES_SAID)}",
        rf"something (?:{_one_of('size', SIZES)} )?{place}",
    )
    return tuple(re.compile(rf"{pattern}\.?\Z") for pattern in patterns)


def _one_of(name: str, words: Iterable[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return rf"(?P<{name}>{'|'.join(map(re.escape, longest_first))})"
