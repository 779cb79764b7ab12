"""True captions of a scene in English, German, Spanish and Chinese, and a check of what a captioner wrote.

Each language keeps its own grammar, so that captions read as a person would write them: German endings by gender and
case, Spanish adjectives behind the noun and in agreement with it, a measure word for each Chinese noun. `check_caption`
reads an English caption back and says whether it is true of a scene.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from vlm.data.synthetic.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene

ENGLISH_COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
ENGLISH_PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
}
ENGLISH_PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}


def describe_in_english(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and vague hints."""
    number = ENGLISH_COUNT_WORDS[scene.count]
    shape = scene.shape if scene.count == 1 else ENGLISH_PLURALS[scene.shape]
    place = ENGLISH_PLACES[scene.position]
    ground = f"{scene.background} background"
    sized = f"{number} {scene.size} {scene.colour} {shape}"
    # the article goes with the word that follows it: "an orange star"
    plain = f"{_with_english_article(scene.colour) if scene.count == 1 else f'{number} {scene.colour}'}"
    return (
        f"{sized} {place} of a {ground}",
        f"a {ground} with {sized} {place}",
        f"{plain} {shape} {place}",
        f"{number} {shape}",
        f"a picture of {plain} {shape}",
        f"{plain} {shape}",
        f"{scene.colour} {scene.shape}",
        f"something {scene.size} {place}",
        f"something {place}",
    )


def _with_english_article(adjective: str) -> str:
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"


# gender, singular, plural, dative plural
GERMAN_NOUNS = {
    "circle": ("m", "Kreis", "Kreise", "Kreisen"),
    "square": ("n", "Quadrat", "Quadrate", "Quadraten"),
    "triangle": ("n", "Dreieck", "Dreiecke", "Dreiecken"),
    "star": ("m", "Stern", "Sterne", "Sternen"),
    "heart": ("n", "Herz", "Herzen", "Herzen"),
    "cross": ("n", "Kreuz", "Kreuze", "Kreuzen"),
}
# Stems that take endings; "orange", "lila" and "rosa" do not, hence "-farben" and "violett".
GERMAN_ADJECTIVES = {
    "red": "rot",
    "orange": "orangefarben",
    "black": "schwarz",
    "green": "grün",
    "blue": "blau",
    "purple": "violett",
    "pink": "rosafarben",
    "brown": "braun",
    "small": "klein",
    "large": "groß",
    "white": "weiß",
    "grey": "grau",
    "beige": "beigefarben",
    "yellow": "gelb",
    "turquoise": "türkisfarben",
    "lavender": "lavendelfarben",
}
GERMAN_PLACES = {
    "left": "links",
    "right": "rechts",
    "top": "oben",
    "bottom": "unten",
    "centre": "in der Mitte",
}
GERMAN_NUMBERS = {2: "zwei", 3: "drei"}
GERMAN_STRONG_ENDINGS = {"m": "er", "f": "e", "n": "es"}


def describe_in_german(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and a vague hint."""
    gender, singular, _, _ = GERMAN_NOUNS[scene.shape]
    size, colour = GERMAN_ADJECTIVES[scene.size], GERMAN_ADJECTIVES[scene.colour]
    ground = GERMAN_ADJECTIVES[scene.background]
    place = GERMAN_PLACES[scene.position]
    return (
        f"{_german_nominative(scene, size, colour)} {place} auf {ground}em Hintergrund",
        f"{ground}er Hintergrund mit {_german_dative(scene, size, colour)} {place}",
        f"{place} {_german_nominative(scene, colour)}",
        f"{_german_nominative(scene, colour)} auf {ground}em Hintergrund",
        f"ein Bild mit {_german_dative(scene, colour)}",
        _german_nominative(scene, colour),
        f"{colour}{GERMAN_STRONG_ENDINGS[gender]} {singular}",
        f"etwas {size.capitalize()}es {place}",
        f"etwas {place}",
    )


def _german_nominative(scene: Scene, *stems: str) -> str:
    """ "ein kleiner roter Kreis", "drei kleine rote Kreise"."""
    gender, singular, plural, _ = GERMAN_NOUNS[scene.shape]
    if scene.count == 1:
        article = "eine" if gender == "f" else "ein"
        return " ".join([article, *(stem + GERMAN_STRONG_ENDINGS[gender] for stem in stems), singular])
    # strong plural: no article before it shows gender or case
    return " ".join([GERMAN_NUMBERS[scene.count], *(f"{stem}e" for stem in stems), plural])


def _german_dative(scene: Scene, *stems: str) -> str:
    """ "einem kleinen roten Kreis", "drei kleinen roten Kreisen"."""
    gender, singular, _, dative_plural = GERMAN_NOUNS[scene.shape]
    # the dative has one ending: mixed after "einem" or "einer", and strong in the plural, it is -en
    adjectives = [f"{stem}en" for stem in stems]
    if scene.count == 1:
        return " ".join(["einer" if gender == "f" else "einem", *adjectives, singular])
    return " ".join([GERMAN_NUMBERS[scene.count], *adjectives, dative_plural])


# is feminine, singular, plural
SPANISH_NOUNS = {
    "circle": (False, "círculo", "círculos"),
    "square": (False, "cuadrado", "cuadrados"),
    "triangle": (False, "triángulo", "triángulos"),
    "star": (True, "estrella", "estrellas"),
    "heart": (False, "corazón", "corazones"),
    "cross": (True, "cruz", "cruces"),
}
# Masculine singular; a final "o" becomes "a" for feminine nouns.
SPANISH_ADJECTIVES = {
    "red": "rojo",
    "orange": "naranja",
    "black": "negro",
    "green": "verde",
    "blue": "azul",
    "purple": "morado",
    "pink": "rosa",
    "brown": "marrón",
    "small": "pequeño",
    "large": "grande",
}
SPANISH_GROUNDS = {
    "white": "fondo blanco",
    "grey": "fondo gris",
    "beige": "fondo beige",
    "yellow": "fondo amarillo",
    "turquoise": "fondo turquesa",
    "lavender": "fondo lavanda",
}
SPANISH_PLACES = {
    "left": "a la izquierda",
    "right": "a la derecha",
    "top": "arriba",
    "bottom": "abajo",
    "centre": "en el centro",
}
SPANISH_NUMBERS = {2: "dos", 3: "tres"}


def describe_in_spanish(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and a vague hint."""
    is_feminine, singular, _ = SPANISH_NOUNS[scene.shape]
    place, ground = SPANISH_PLACES[scene.position], SPANISH_GROUNDS[scene.background]
    sized = _spanish_group(scene, scene.colour, scene.size)
    plain = _spanish_group(scene, scene.colour)
    colour = _spanish_agree(SPANISH_ADJECTIVES[scene.colour], is_feminine=is_feminine, is_plural=False)
    return (
        f"{sized} {place} sobre {ground}",
        f"{ground} con {sized} {place}",
        f"{place} {plain}",
        f"{plain} sobre {ground}",
        f"una imagen de {plain}",
        plain,
        f"{singular} {colour}",
        f"algo {SPANISH_ADJECTIVES[scene.size]} {place}",
        f"algo {place}",
    )


def _spanish_group(scene: Scene, *words: str) -> str:
    """ "una estrella roja pequeña", "tres estrellas rojas pequeñas"."""
    is_feminine, singular, plural = SPANISH_NOUNS[scene.shape]
    is_plural = scene.count > 1
    number = SPANISH_NUMBERS[scene.count] if is_plural else ("una" if is_feminine else "un")
    parts = [number, plural if is_plural else singular]
    for word in words:
        parts.append(_spanish_agree(SPANISH_ADJECTIVES[word], is_feminine=is_feminine, is_plural=is_plural))
    return " ".join(parts)


def _spanish_agree(adjective: str, *, is_feminine: bool, is_plural: bool) -> str:
    if is_feminine and adjective.endswith("o"):
        adjective = f"{adjective[:-1]}a"
    if not is_plural:
        return adjective
    # the accent falls away in the plural
    if adjective == "marrón":
        return "marrones"
    return f"{adjective}{'s' if adjective[-1] in 'aeo' else 'es'}"


# measure word, noun
CHINESE_NOUNS = {
    "circle": ("个", "圆形"),
    "square": ("个", "正方形"),
    "triangle": ("个", "三角形"),
    "star": ("颗", "星星"),
    "heart": ("颗", "爱心"),
    "cross": ("个", "十字"),
}
CHINESE_COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "black": "黑色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
}
CHINESE_SIZES = {"small": "小", "large": "大"}
CHINESE_GROUNDS = {
    "white": "白色背景",
    "grey": "灰色背景",
    "beige": "米色背景",
    "yellow": "黄色背景",
    "turquoise": "青绿色背景",
    "lavender": "淡紫色背景",
}
CHINESE_PLACES = {"left": "左侧", "right": "右侧", "top": "上方", "bottom": "下方", "centre": "中央"}
# two of a thing are 两, not 二
CHINESE_NUMBERS = {1: "一", 2: "两", 3: "三"}


def describe_in_chinese(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and a vague hint."""
    measure, noun = CHINESE_NOUNS[scene.shape]
    number = f"{CHINESE_NUMBERS[scene.count]}{measure}"
    colour, size = CHINESE_COLOURS[scene.colour], CHINESE_SIZES[scene.size]
    ground, place = CHINESE_GROUNDS[scene.background], CHINESE_PLACES[scene.position]
    return (
        f"{ground}的{place}有{number}{colour}的{size}{noun}",
        f"{number}{colour}的{size}{noun}位于{ground}的{place}",
        f"{place}有{number}{colour}{noun}",
        f"{ground}上有{number}{colour}{noun}",
        f"一张有{number}{colour}{noun}的图片",
        f"{number}{colour}{noun}",
        f"{colour}{noun}",
        f"{place}的{size}图形",
        f"{place}有图形",
    )


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
    give the image away. `language` is a key of `LANGUAGES`.

    >>> scene = Scene(shape="star", colour="red", size="small", count=3,
    ...               position="left", background="white")
    >>> describe(scene)[0]
    'three small red stars on the left of a white background'
    """
    if language not in LANGUAGES:
        raise ValueError(f"no captions in {language!r}: languages are {', '.join(LANGUAGES)}")
    return LANGUAGES[language](scene)


COUNT_OF_WORD = {word: count for count, word in ENGLISH_COUNT_WORDS.items()} | {"an": 1, "one": 1}
SHAPE_OF_WORD = {plural: shape for shape, plural in ENGLISH_PLURALS.items()} | dict(zip(SHAPES, SHAPES, strict=True))
POSITION_OF_PHRASE = {place: position for position, place in ENGLISH_PLACES.items()}


@dataclass(frozen=True, kw_only=True)
class CaptionCheck:
    """The verdict: `facts` were said, `wrong` names those that do not hold, `reason` explains."""

    is_true: bool
    attributes: Mapping[str, str | int]
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
    match = None
    for form in _forms():
        match = match or form.match(text)
    if match is None:
        return CaptionCheck(is_true=False, attributes={}, wrong=(), reason="not a caption of a scene")
    attributes = _parse_attributes(match.groupdict())
    wrong: list[str] = []
    reasons: list[str] = []
    for attribute, said in attributes.items():
        actual = getattr(scene, attribute)
        if said != actual:
            wrong.append(attribute)
            reasons.append(f"said {attribute} {said}, is {actual}")
    if not {"shape", "colour"} <= attributes.keys():
        reasons.append("does not name shape and colour")
    return CaptionCheck(is_true=not reasons, attributes=attributes, wrong=tuple(wrong), reason=", ".join(reasons))


def _parse_attributes(said: Mapping[str, str | None]) -> dict[str, str | int]:
    readings: dict[str, Mapping[str, str | int]] = {
        "shape": SHAPE_OF_WORD,
        "count": COUNT_OF_WORD,
        "place": POSITION_OF_PHRASE,
    }
    attributes: dict[str, str | int] = {}
    for name, words in said.items():
        # an optional group of the pattern that did not match is None: the caption says nothing of it
        if words is not None:
            attribute = "position" if name == "place" else name
            attributes[attribute] = readings[name][words] if name in readings else words
    return attributes


@cache
def _forms() -> tuple[re.Pattern[str], ...]:
    """The grammar: shapes then ground, ground then shapes, and vague hints."""
    group = (
        rf"(?:{_one_of('count', COUNT_OF_WORD)} )?(?:{_one_of('size', SIZES)} )?"
        rf"{_one_of('colour', COLOURS)} {_one_of('shape', SHAPE_OF_WORD)}"
    )
    place = _one_of("place", POSITION_OF_PHRASE)
    ground = rf"an? {_one_of('background', BACKGROUNDS)} background"
    opening = r"(?:a picture of )?"
    patterns = (
        rf"{opening}{group}(?: {place})?(?: on {ground})?",
        rf"{opening}{group} {place} of {ground}",
        rf"{opening}{ground} with {group}(?: {place})?",
        rf"{_one_of('count', COUNT_OF_WORD)} {_one_of('shape', SHAPE_OF_WORD)}",
        rf"something (?:{_one_of('size', SIZES)} )?{place}",
    )
    return tuple(re.compile(rf"{pattern}\.?\Z") for pattern in patterns)


def _one_of(name: str, words: Iterable[str]) -> str:
    # alternation takes the first that matches: "star" before "stars" would leave an "s" behind
    longest_first = sorted(words, key=len, reverse=True)
    return rf"(?P<{name}>{'|'.join(map(re.escape, longest_first))})"
