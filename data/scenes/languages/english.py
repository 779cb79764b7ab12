"""English captions, and the words that `check` reads them back with."""

from vlm.data.scenes.scene import Scene

COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
}
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}


def describe_in_english(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and vague hints."""
    number = COUNT_WORDS[scene.count]
    shape = scene.shape if scene.count == 1 else PLURALS[scene.shape]
    place = PLACES[scene.position]
    ground = f"{scene.background} background"
    sized = f"{number} {scene.size} {scene.colour} {shape}"
    plain = f"{_with_article(scene.colour) if scene.count == 1 else f'{number} {scene.colour}'}"
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


def _with_article(adjective: str) -> str:
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"
