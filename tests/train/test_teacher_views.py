"""The views a teacher saw: their seeds, their geometry, and that the student draws them again."""

from dataclasses import replace

import numpy as np
import pytest

from tests.train.reinforce_case import CONFIG, LOADER, teachers_of, write_shards
from vlm.data.precomputed_features import view_rng
from vlm.data.shards import expand_shards
from vlm.data.transforms import EvalTransform, RandomResizedCrop
from vlm.errors import UsageError
from vlm.train.dataset_reinforcement import reinforce
from vlm.train.run_config import LoaderConfig
from vlm.train.teacher_views import ViewGeometry, check_views, view_seeds


@pytest.mark.parametrize("crop_scale", [(0.1, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_a_seed_gives_the_same_crop_at_any_size_up_to_a_pixel_of_it(crop_scale):
    geometry, rng = ViewGeometry(crop_scale=crop_scale, flip=0.5), np.random.default_rng(0)
    for seed in range(300):
        width, height = rng.integers(40, 3000, 2).tolist()
        exact = geometry.view_for(EvalTransform(size=5000)).draw(
            width, height, view_rng(seed)
        )  # never on a coarser grid
        for size in (32, 224, 384):
            crop = geometry.view_for(EvalTransform(size=size)).draw(width, height, view_rng(seed))
            assert crop.is_flipped == exact.is_flipped
            pixel = max(min(exact.width, exact.height) / size, 1)
            for edge in ("left", "top", "width", "height"):
                assert 0 <= getattr(exact, edge) - getattr(crop, edge) < pixel


def test_the_seeds_depend_on_seed_key_and_number_alone():
    assert view_seeds(0, "a", 5)[:2].tolist() == view_seeds(0, "a", 2).tolist()
    drawn = [seed for key in ("a", "b", "0/a") for base in (0, 1) for seed in view_seeds(base, key, 4).tolist()]
    assert len(set(drawn)) == len(drawn)
    assert view_seeds(0, "ä\udcff", 1).dtype == np.uint64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"crop_scale": (0.9, 1.0)},
            r"crops of 0\.3 to 0\.8 .*crops of 0\.9 to 1 .*give --crop-scale 0\.3 0\.8",
        ),
        ({"flip": 0.0}, r"with probability 0\.5 .*probability 0: give .*--flip 0\.5"),
    ],
)
def test_the_student_must_draw_as_the_teacher_did(tmp_path, make_teacher, changes, expected):
    reinforce(write_shards(tmp_path / "in", range(2)), tmp_path / "out", teachers_of(make_teacher(1)), CONFIG)
    shards = expand_shards(str(tmp_path / "out"))
    with pytest.raises(UsageError, match=expected):
        check_views(shards, replace(LOADER, **changes))
    check_views(shards, replace(LOADER, arrays=("teacher_text",), **changes))  # rows of captions know no views
    with pytest.raises(UsageError, match="crops of"):
        check_views([*expand_shards(str(tmp_path / "in")), *shards], replace(LOADER, **changes))


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "{", '{"details": {"reinforcement": 3}}'])
def test_shards_that_do_not_tell_their_views_are_warned_of(tmp_path, caplog, manifest):
    shards = write_shards(tmp_path / "in", range(2))
    if manifest is not None:
        (tmp_path / "in" / "manifest.json").write_text(manifest)
    check_views(shards, LOADER)
    assert "does not say how the stored views were cropped" in caplog.text
    caplog.clear()
    check_views(shards, LoaderConfig())
    assert not caplog.text


@pytest.mark.parametrize("changes", [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"flip": 1.5}])
def test_impossible_views_are_refused(changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        ViewGeometry(**changes)


def test_the_default_views_are_those_of_training():
    loader = LoaderConfig()
    assert ViewGeometry() == ViewGeometry(
        crop_scale=loader.crop_scale, flip=loader.flip, ratio=RandomResizedCrop().ratio
    )
