"""Spanish captions: adjectives follow the noun and agree in gender and number."""

from vlm.data.scenes.scene import Scene

# is feminine, singular, plural
NOUNS = {
    "circle": (False, "círculo", "círculos"),
    "square": (False, "cuadrado", "cuadrados"),
    "triangle": (False, "triángulo", "triángulos"),
    "star": (True, "estrella", "estrellas"),
    "heart": (False, "corazón", "corazones"),
    "cross": (True, "cruz", "cruces"),
}
# Masculine singular; a final "o" becomes "a" for feminine nouns.
ADJECTIVES = {
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
GROUNDS = {
    "white": "fondo blanco",
    "grey": "fondo gris",
    "beige": "fondo beige",
    "yellow": "fondo amarillo",
    "turquoise": "fondo turquesa",
    "lavender": "fondo lavanda",
}
PLACES = {
    "left": "a la izquierda",
    "right": "a la derecha",
    "top": "arriba",
    "bottom": "abajo",
    "centre": "en el centro",
}
NUMBERS = {2: "dos", 3: "tres"}


def describe_in_spanish(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and a vague hint."""
    is_feminine, singular, _ = NOUNS[scene.shape]
    place, ground = PLACES[scene.position], GROUNDS[scene.background]
    sized = _group(scene, scene.colour, scene.size)
    plain = _group(scene, scene.colour)
    colour = _agree(ADJECTIVES[scene.colour], is_feminine=is_feminine, is_plural=False)
    return (
        f"{sized} {place} sobre {ground}",
        f"{ground} con {sized} {place}",
        f"{place} {plain}",
        f"{plain} sobre {ground}",
        f"una imagen de {plain}",
        plain,
        f"{singular} {colour}",
        f"algo {ADJECTIVES[scene.size]} {place}",
        f"algo {place}",
    )


def _group(scene: Scene, *words: str) -> str:
    """ "una estrella roja pequeña", "tres estrellas rojas pequeñas"."""
    is_feminine, singular, plural = NOUNS[scene.shape]
    is_plural = scene.count > 1
    number = NUMBERS[scene.count] if is_plural else ("una" if is_feminine else "un")
    adjectives = (_agree(ADJECTIVES[word], is_feminine=is_feminine, is_plural=is_plural) for word in words)
    return " ".join([number, plural if is_plural else singular, *adjectives])


def _agree(adjective: str, *, is_feminine: bool, is_plural: bool) -> str:
    if is_feminine and adjective.endswith("o"):
        adjective = f"{adjective[:-1]}a"
    if not is_plural:
        return adjective
    if adjective == "marrón":
        return "marrones"
    return f"{adjective}{'s' if adjective[-1] in 'aeo' else 'es'}"
