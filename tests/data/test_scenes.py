"""Drawn scenes: reproducible pictures, true captions, combinations kept from training."""

from dataclasses import replace

import numpy as np
import pytest

from vlm.data.synthetic.shape_captions import LANGUAGES, check_caption, describe
from vlm.data.synthetic.shapes import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    COUNTS,
    HELD_OUT,
    POSITIONS,
    RADIUS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Split,
    all_scenes,
    render_scene,
    sample_scene,
    sample_scenes,
    shape_colour_class,
    shape_colour_classes,
)

THREE_STARS = Scene(shape="star", colour="red", size="small", count=3, position="left", background="white")
OTHERS: dict[str, str | int] = {
    "shape": "cross",
    "colour": "blue",
    "size": "large",
    "count": 2,
    "position": "top",
    "background": "lavender",
}


def image_of(scene: Scene, *, seed: int = 0, pixels: int = 96) -> np.ndarray:
    return np.asarray(render_scene(scene, pixels=pixels, rng=np.random.default_rng(seed)))


def inked(scene: Scene, image: np.ndarray) -> np.ndarray:
    """Pixels nearer to the scene's colour than to its background."""
    distances = [
        np.abs(image.astype(float) - rgb).sum(axis=-1)
        for rgb in (COLOUR_RGB[scene.colour], BACKGROUND_RGB[scene.background])
    ]
    return distances[0] < distances[1]


def count_islands(mask: np.ndarray) -> int:
    """Connected groups of pixels, where diagonal neighbours touch."""
    waiting = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    number = 0
    while waiting:
        number += 1
        border = [waiting.pop()]
        while border:
            row, column = border.pop()
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & waiting
            waiting -= near
            border.extend(near)
    return number


@pytest.mark.parametrize("is_distinct", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_scenes_however_many_are_drawn(split: Split, is_distinct: bool) -> None:
    few = list(sample_scenes(split, 5, seed=3, is_distinct=is_distinct))
    many = list(sample_scenes(split, 50, seed=3, is_distinct=is_distinct))
    other = list(sample_scenes(split, 50, seed=4, is_distinct=is_distinct))
    assert few == many[:5]
    assert [scene for _, scene in other] != [scene for _, scene in many]


def test_keys_are_unique_and_name_the_split() -> None:
    keys = [key for split in SPLITS for key, _ in sample_scenes(split, 20, seed=0)]
    assert len(set(keys)) == 40
    assert keys[0] == "train-000000"
    assert keys[-1] == "val-000019"


def test_training_never_shows_a_held_out_combination_and_validation_shows_all_of_them() -> None:
    seen = {split: {(s.shape, s.colour) for s in all_scenes(split)} for split in SPLITS}
    assert not seen["train"] & HELD_OUT
    assert seen["val"] == HELD_OUT


def test_about_a_sixth_is_held_out_and_every_shape_and_colour_is_still_trained() -> None:
    assert 1 / 8 < len(HELD_OUT) / (len(SHAPES) * len(COLOURS)) < 1 / 5
    trained = {(scene.shape, scene.colour) for scene in all_scenes("train")}
    assert all(sum(shape in pair for pair in trained) >= len(COLOURS) - 2 for shape in SHAPES)
    assert all(sum(colour in pair for pair in trained) >= len(SHAPES) - 2 for colour in COLOURS)


def test_single_scenes_come_from_the_split_they_are_asked_for() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene("val", rng) for _ in range(50)]
    assert {(scene.shape, scene.colour) for scene in scenes} <= HELD_OUT


def test_distinct_scenes_have_distinct_full_captions() -> None:
    captions = [describe(s)[0] for _, s in sample_scenes("val", 1000, seed=0, is_distinct=True)]
    assert len(set(captions)) == 1000


def test_asking_for_more_distinct_scenes_than_exist_names_the_limit() -> None:
    limit = len(all_scenes("val"))
    assert len(list(sample_scenes("val", limit, seed=0, is_distinct=True))) == limit
    with pytest.raises(ValueError, match=f"only {limit}"):
        sample_scenes("val", limit + 1, seed=0, is_distinct=True)


@pytest.mark.parametrize("language", LANGUAGES)
def test_full_captions_tell_every_scene_from_every_other(language: str) -> None:
    scenes = [scene for split in SPLITS for scene in all_scenes(split)]
    for position in (0, 1):
        assert len({describe(scene, language)[position] for scene in scenes}) == len(scenes)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_of_a_scene_differ_and_have_no_stray_spaces(language: str) -> None:
    for _, scene in sample_scenes("train", 200, seed=0):
        captions = describe(scene, language)
        assert len(set(captions)) == len(captions) >= 4
        assert all(caption and caption == " ".join(caption.split()) for caption in captions)


def test_an_unknown_language_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="en, de, es, zh"):
        describe(THREE_STARS, "xx")


@pytest.mark.parametrize(
    ("language", "attributes", "caption"),
    [
        ("en", {"count": 1, "colour": "orange"}, "an orange star on the left"),
        ("en", {"shape": "cross", "count": 2}, "a picture of two red crosses"),
        ("de", {"count": 1}, "ein kleiner roter Stern links auf weißem Hintergrund"),
        ("de", {"count": 1, "shape": "heart"}, "ein Bild mit einem roten Herz"),
        ("de", {"count": 1, "shape": "cross"}, "ein Bild mit einem roten Kreuz"),
        ("de", {"colour": "purple"}, "weißer Hintergrund mit drei kleinen violetten Sternen links"),
        ("es", {"shape": "cross"}, "tres cruces rojas pequeñas a la izquierda sobre fondo blanco"),
        ("es", {"count": 1, "colour": "blue"}, "una imagen de una estrella azul"),
        ("es", {"colour": "brown", "shape": "circle"}, "una imagen de tres círculos marrones"),
        ("zh", {"count": 2}, "白色背景的左侧有两颗红色的小星星"),
        ("zh", {"shape": "circle"}, "一张有三个红色圆形的图片"),
    ],
)
def test_captions_agree_in_gender_number_and_measure_word(
    language: str, attributes: dict[str, str | int], caption: str
) -> None:
    assert caption in describe(replace(THREE_STARS, **attributes), language)


def test_every_english_caption_is_true_of_its_scene_but_for_the_vague_ones() -> None:
    for _, scene in sample_scenes("train", 300, seed=1):
        captions = describe(scene)
        vague_ones = (captions[3], *captions[7:])
        assert all(check_caption(caption, scene).is_true for caption in captions if caption not in vague_ones)
        for vague in vague_ones:
            assert check_caption(vague, scene).reason == "does not name shape and colour"


def test_the_full_captions_say_all_six_facts() -> None:
    for caption in describe(THREE_STARS)[:2]:
        assert check_caption(caption, THREE_STARS).attributes == vars(THREE_STARS)


@pytest.mark.parametrize("fact", OTHERS)
def test_a_caption_is_false_of_a_scene_that_differs_in_a_fact_it_says(fact: str) -> None:
    other = replace(THREE_STARS, **{fact: OTHERS[fact]})
    for caption in describe(THREE_STARS):
        before, check = check_caption(caption, THREE_STARS), check_caption(caption, other)
        is_said = fact in before.attributes
        assert check.is_true == (before.is_true and not is_said)
        assert check.wrong == ((fact,) if is_said else ())


@pytest.mark.parametrize(
    ("caption", "is_true"),
    [
        ("red star", True),
        ("three red star on the left", True),
        ("Three  red stars on a white background.", True),
        ("a red star", False),
        ("four red stars", False),
        ("three stars", False),
        ("three red things", False),
        ("three red stars on a red red", False),
        ("three red stars on the left on the right", False),
        ("three red red stars", False),
        ("three red stars on a red background", False),
        ("", False),
    ],
)
def test_only_well_built_captions_without_a_wrong_fact_are_true(caption: str, is_true: bool) -> None:
    assert check_caption(caption, THREE_STARS).is_true == is_true


def test_a_false_caption_says_what_is_wrong() -> None:
    check = check_caption("two blue stars on the left", THREE_STARS)
    assert check.wrong == ("count", "colour")
    assert check.reason == "said count 2, is 3, said colour blue, is red"


@pytest.mark.parametrize(
    ("fact", "value"),
    [("shape", "blob"), ("colour", "white"), ("count", 9), ("position", "nowhere")],
)
def test_a_scene_outside_the_vocabulary_is_refused(fact: str, value: str | int) -> None:
    with pytest.raises(ValueError, match=f"{fact} {value!r}"):
        replace(THREE_STARS, **{fact: value})


def test_a_image_is_the_same_for_the_same_generator_and_another_for_another() -> None:
    assert np.array_equal(image_of(THREE_STARS, seed=1), image_of(THREE_STARS, seed=1))
    assert not np.array_equal(image_of(THREE_STARS, seed=1), image_of(THREE_STARS, seed=2))


@pytest.mark.parametrize("pixels", [32, 64, 97])
def test_images_are_square_rgb_of_the_size_asked(pixels: int) -> None:
    image = render_scene(THREE_STARS, pixels=pixels, rng=np.random.default_rng(0))
    assert (image.mode, image.size) == ("RGB", (pixels, pixels))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_a_group_can_be_counted_in_the_image(shape: str, size: str, count: int) -> None:
    for seed, position in enumerate(POSITIONS):
        scene = replace(THREE_STARS, shape=shape, size=size, count=count, position=position)
        assert count_islands(inked(scene, image_of(scene, seed=seed))) == count


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_colour_stands_out_from_every_background(colour: str, background: str) -> None:
    scene = replace(THREE_STARS, colour=colour, background=background, shape="circle", size="large")
    share = inked(scene, image_of(scene)).mean()
    assert share == pytest.approx(3 * np.pi * (0.96 * RADIUS["large"]) ** 2, rel=0.2)


@pytest.mark.parametrize(
    ("position", "axis", "is_low"),
    [("left", 1, True), ("right", 1, False), ("top", 0, True), ("bottom", 0, False)],
)
def test_groups_stand_where_the_scene_says(position: str, axis: int, is_low: bool) -> None:
    for count in COUNTS:
        scene = replace(THREE_STARS, size="large", count=count, position=position)
        middle = np.argwhere(inked(scene, image_of(scene))).mean(axis=0) / 96 - 0.5
        assert (middle[axis] < -0.07) if is_low else (middle[axis] > 0.07)
        assert abs(middle[1 - axis]) < 0.08


def test_small_shapes_cover_less_than_large_ones() -> None:
    areas = {}
    for size in SIZES:
        scene = replace(THREE_STARS, size=size)
        areas[size] = [inked(scene, image_of(scene, seed=seed)).sum() for seed in range(10)]
    assert max(areas["small"]) < min(areas["large"])


def test_a_scene_belongs_to_one_of_the_classes_and_all_combinations_have_one() -> None:
    classes = shape_colour_classes()
    assert len(set(classes)) == len(classes) == len(SHAPES) * len(COLOURS)
    assert {shape_colour_class(scene) for split in SPLITS for scene in all_scenes(split)} == set(classes)
    assert shape_colour_class(THREE_STARS) == "red star"
