"""German captions: gender, case and adjective endings."""

from vlm.data.scenes.scene import Scene

# gender, singular, plural, dative plural
NOUNS = {
    "circle": ("m", "Kreis", "Kreise", "Kreisen"),
    "square": ("n", "Quadrat", "Quadrate", "Quadraten"),
    "triangle": ("n", "Dreieck", "Dreiecke", "Dreiecken"),
    "star": ("m", "Stern", "Sterne", "Sternen"),
    "heart": ("n", "Herz", "Herzen", "Herzen"),
    "cross": ("n", "Kreuz", "Kreuze", "Kreuzen"),
}
# Stems that take endings; "orange", "lila" and "rosa" do not, hence "-farben" and "violett".
ADJECTIVES = {
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
PLACES = {
    "left": "links",
    "right": "rechts",
    "top": "oben",
    "bottom": "unten",
    "centre": "in der Mitte",
}
NUMBERS = {2: "zwei", 3: "drei"}
STRONG_ENDINGS = {"m": "er", "f": "e", "n": "es"}


def describe_in_german(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and a vague hint."""
    gender, singular, _, _ = NOUNS[scene.shape]
    size, colour = ADJECTIVES[scene.size], ADJECTIVES[scene.colour]
    ground = ADJECTIVES[scene.background]
    place = PLACES[scene.position]
    return (
        f"{_nominative(scene, size, colour)} {place} auf {ground}em Hintergrund",
        f"{ground}er Hintergrund mit {_dative(scene, size, colour)} {place}",
        f"{place} {_nominative(scene, colour)}",
        f"{_nominative(scene, colour)} auf {ground}em Hintergrund",
        f"ein Bild mit {_dative(scene, colour)}",
        _nominative(scene, colour),
        f"{colour}{STRONG_ENDINGS[gender]} {singular}",
        f"etwas {size.capitalize()}es {place}",
        f"etwas {place}",
    )


def _nominative(scene: Scene, *stems: str) -> str:
    """ "ein kleiner roter Kreis", "drei kleine rote Kreise"."""
    gender, singular, plural, _ = NOUNS[scene.shape]
    if scene.count == 1:
        article = "eine" if gender == "f" else "ein"
        return " ".join([article, *(stem + STRONG_ENDINGS[gender] for stem in stems), singular])
    return " ".join([NUMBERS[scene.count], *(f"{stem}e" for stem in stems), plural])


def _dative(scene: Scene, *stems: str) -> str:
    """ "einem kleinen roten Kreis", "drei kleinen roten Kreisen"."""
    gender, singular, _, dative_plural = NOUNS[scene.shape]
    adjectives = [f"{stem}en" for stem in stems]
    if scene.count == 1:
        return " ".join(["einer" if gender == "f" else "einem", *adjectives, singular])
    return " ".join([NUMBERS[scene.count], *adjectives, dative_plural])
