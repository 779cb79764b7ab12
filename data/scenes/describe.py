"""True captions of a scene in several languages."""

from collections.abc import Callable

from vlm.data.scenes.languages.chinese import describe_in_chinese
from vlm.data.scenes.languages.english import describe_in_english
from vlm.data.scenes.languages.german import describe_in_german
from vlm.data.scenes.languages.spanish import describe_in_spanish
from vlm.data.scenes.scene import Scene

LANGUAGES: dict[str, Callable[[Scene], tuple[str, ...]]] = {
    "en": describe_in_english,
    "de": describe_in_german,
    "es": describe_in_spanish,
    "zh": describe_in_chinese,
}


def describe(scene: Scene, language: str = "en") -> tuple[str, ...]:
    """Captions that are all true and all different.

    The first two say all six facts, and so belong to this scene alone. The others say
    fewer: in-batch contrast teaches a fact only where the rest of the caption does not
    give the picture away. `language` is a key of `LANGUAGES`.

    >>> scene = Scene(shape="star", colour="red", size="small", count=3,
    ...               position="left", background="white")
    >>> describe(scene)[0]
    'three small red stars on the left of a white background'
    """
    if language not in LANGUAGES:
        raise ValueError(f"no captions in {language!r}: languages are {', '.join(LANGUAGES)}")
    return LANGUAGES[language](scene)
