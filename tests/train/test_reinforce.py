"""Shards with what teachers make of them: whole, resumable, and what the student is shown."""

import errno
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.reinforce_case import (
    CONFIG,
    GEOMETRY,
    LOADER,
    batch_of,
    content_of,
    tars,
    teachers_of,
    write_shards,
)
from vlm.data.precomputed_features import view_rng
from vlm.data.shards import expand_shards
from vlm.data.tar import ShardReader
from vlm.errors import UsageError, VlmError
from vlm.manifest import read_manifest
from vlm.models.model import VisionLanguageModel
from vlm.train.dataset_reinforcement import UNREINFORCED, Teachers, reinforce
from vlm.train.teacher_views import ViewGeometry, check_views, read_reinforcement, view_seeds


@pytest.mark.parametrize("workers", [0, 2])
def test_the_student_is_given_what_the_teacher_makes_of_the_very_pixels_it_sees(tmp_path, make_teacher, workers):
    shards, teacher = write_shards(tmp_path / "in", range(10)), make_teacher(1)
    summary = reinforce(shards, tmp_path / "out", teachers_of(teacher), CONFIG, batch_size=7, workers=workers)
    assert (summary.samples, summary.reinforced, summary.bad, summary.shards) == (10, 10, 0, 3)
    assert summary.arrays == {"teacher_image": 16, "teacher_text": 16}
    reinforced = expand_shards(str(tmp_path / "out"))
    check_views(reinforced, LOADER)
    seen = set()
    for epoch in range(4):
        batch = batch_of(reinforced, size=32, epoch=epoch)
        assert not batch.failures
        images, texts = teacher.embed_images(batch.images), teacher.embed_texts(batch.captions)
        torch.testing.assert_close(batch.arrays["teacher_image"], images, atol=1e-3, rtol=0)
        torch.testing.assert_close(batch.arrays["teacher_text"], texts, atol=1e-3, rtol=0)
        others = images.roll(1, dims=0)
        assert (batch.arrays["teacher_image"] - others).abs().amax(dim=1).min() > 1e-2  # or the test could not fail
        seen |= {(key, image.numpy().tobytes()) for key, image in zip(batch.keys, batch.images, strict=True)}
        assert {caption.language for caption in batch.drawn} == {"en", "de"}
    assert len(seen) > 20  # views differ from visit to visit


def test_all_stays_but_the_arrays(tmp_path, make_teacher):
    shards = write_shards(tmp_path / "in", range(6))
    reinforce(shards, tmp_path / "out", teachers_of(make_teacher(1)), CONFIG)
    for before, after in zip(shards, expand_shards(str(tmp_path / "out")), strict=True):
        old, new = ShardReader(before), ShardReader(after)
        assert Path(before).name == Path(after).name
        for number in range(len(old)):
            names = ("view_seeds", "teacher_image", "teacher_text")
            sample = new.read(number, arrays=names)
            assert content_of(old.read(number)) == content_of(sample)
            assert [sample.arrays[name].shape for name in names] == [(3,), (3, 16), (3, 16)]
            assert [sample.arrays[name].dtype.str for name in names] == ["<u8", "<f2", "<f2"]
            assert sample.arrays["view_seeds"].tolist() == view_seeds(4, sample.key, 3).tolist()
            np.testing.assert_allclose(np.linalg.norm(sample.arrays["teacher_image"].astype(float), axis=1), 1, 0, 1e-3)


def test_dot_products_of_several_teachers_are_their_mean(tmp_path, make_teacher):
    shards = write_shards(tmp_path / "in", range(4))
    models = (make_teacher(1), make_teacher(2, embed_dim=24), make_teacher(3, size=48))
    reinforce(shards, tmp_path / "out", teachers_of(*models), CONFIG)
    told = read_reinforcement(expand_shards(str(tmp_path / "out")))
    assert [(each["name"], each["columns"], each["pixels"]) for each in told["teachers"]] == [
        ("1", 16, 32),
        ("2", 24, 32),
        ("3", 16, 48),
    ]
    sample = ShardReader(expand_shards(str(tmp_path / "out"))[0]).read(2, arrays=("teacher_image", "teacher_text"))
    image, texts = (sample.arrays[name].astype(np.float32) for name in ("teacher_image", "teacher_text"))
    captions = [text for some in sample.captions.values() for text in some]
    cosines = torch.zeros(3, 3)
    for model in models:
        view = GEOMETRY.view_for(model.view)
        views = [view(sample.image, view_rng(seed)) for seed in view_seeds(4, sample.key, 3).tolist()]
        cosines += model.embed_images(torch.from_numpy(np.stack(views))) @ model.embed_texts(captions).T / 3
    np.testing.assert_allclose(image @ texts.T, cosines.numpy(), atol=2e-3)
    assert image.shape == (3, 56)


@pytest.mark.parametrize("killed_at", [0, 1, 3, 4])
def test_killed_and_repeated_it_leaves_the_same_bytes(tmp_path, make_teacher, monkeypatch, killed_at):
    shards, teacher = write_shards(tmp_path / "in", range(10), bad=(3,)), make_teacher(1)
    reinforce(shards, tmp_path / "whole", teachers_of(teacher), CONFIG, batch_size=6)
    out, embed, batches = tmp_path / "out", VisionLanguageModel.embed_images, 0

    def die(model, images):
        nonlocal batches
        batches += 1
        if batches == killed_at + 1:
            raise KeyboardInterrupt
        return embed(model, images)

    with monkeypatch.context() as patch:
        patch.setattr(VisionLanguageModel, "embed_images", die)
        with pytest.raises(KeyboardInterrupt):
            reinforce(shards, out, teachers_of(teacher), CONFIG, batch_size=6)
    assert not (out / "manifest.json").exists()
    with pytest.raises(UsageError, match="unfinished"):
        expand_shards(str(out))
    with pytest.raises(UsageError, match="begun with another"):
        reinforce(shards, out, teachers_of(teacher), replace(CONFIG, seed=5), batch_size=6)
    (out / ".00001.tar.99.part").write_bytes(b"what kill -9 leaves")
    summary = reinforce(shards, out, teachers_of(teacher), CONFIG, batch_size=6, workers=1)
    assert (summary.samples, summary.bad) == (10, 1)
    assert tars(out) == tars(tmp_path / "whole")
    assert sorted(path.name for path in out.glob(".*")) == [f".0000{number}.tar.vlm-index" for number in range(3)]
    assert read_manifest(out, "shards").files == read_manifest(tmp_path / "whole", "shards").files
    with pytest.raises(UsageError, match="exists already and is complete"):
        reinforce(shards, out, teachers_of(teacher), CONFIG)


def test_bad_samples_are_carried_over_and_named(tmp_path, make_teacher):
    shards = write_shards(tmp_path / "in", range(8), bad=(1, 2, 7))
    summary = reinforce(shards, tmp_path / "out", teachers_of(make_teacher(1)), CONFIG, batch_size=6)
    assert (summary.samples, summary.reinforced, summary.bad) == (8, 5, 3)
    assert summary.unreinforced == {"unreadable image": 2, "no caption": 1}
    left = [json.loads(line) for line in (tmp_path / "out" / UNREINFORCED).read_text().splitlines()]
    assert [(each["shard"], each["key"]) for each in left] == [
        ("00000.tar", "k1"),
        ("00000.tar", "k2"),
        ("00001.tar", "k7"),
    ]
    old, new = (ShardReader(expand_shards(str(tmp_path / name))[0]) for name in ("in", "out"))
    assert [bool(new.index[number].arrays) for number in range(4)] == [True, False, False, True]
    assert content_of(new.read(2)) == content_of(old.read(2))
    assert new.read(1).image == old.read(1).image
    batch = batch_of(expand_shards(str(tmp_path / "out")), size=32)
    assert {incident.key for incident in batch.failures if not incident.is_replacement} == {"k1", "k2", "k7"}


def test_nothing_usable_ends_the_work_at_the_first_shard(tmp_path, make_teacher):
    shards = write_shards(tmp_path / "in", [0, 2, 4, 6, 8], bad=(0, 2, 4, 6))
    with pytest.raises(VlmError, match=r"None of the 4 samples .* the first, 'k0': no caption"):
        reinforce(shards, tmp_path / "out", teachers_of(make_teacher(1)), CONFIG)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_diverged_teacher_is_named(tmp_path, make_teacher):
    teacher = make_teacher(1)
    with torch.no_grad():
        teacher.network.get_parameter("visual.proj").fill_(math.nan)
    with pytest.raises(VlmError, match="1 gave numbers that are not finite in float16 for 'k0'"):
        reinforce(write_shards(tmp_path / "in", range(2)), tmp_path / "out", teachers_of(teacher), CONFIG)


def test_text_embeddings_are_added_to_what_teachers_stored(tmp_path, make_teacher):
    shards, model = write_shards(tmp_path / "in", range(5)), make_teacher(2)
    reinforce(shards, tmp_path / "one", teachers_of(make_teacher(1)), CONFIG)
    one = expand_shards(str(tmp_path / "one"))
    texts = Teachers(text_model=model, text_name="two")
    reinforce(one, tmp_path / "two", texts, replace(CONFIG, geometry=ViewGeometry()))
    two = expand_shards(str(tmp_path / "two"))
    assert read_reinforcement(two)["views"] == read_reinforcement(one)["views"]
    assert read_reinforcement(two)["text_embedding"]["name"] == "two"
    check_views(two, LOADER)
    names = ("teacher_image", "teacher_text", "text_embedding")
    batch = batch_of(two, size=32, names=names)
    torch.testing.assert_close(batch.arrays["text_embedding"], model.embed_texts(batch.captions), atol=1e-5, rtol=0)
    halved = reinforce(one, tmp_path / "half", texts, replace(CONFIG, half=True))
    assert halved.arrays == {"text_embedding": 16}
    sample = ShardReader(expand_shards(str(tmp_path / "half"))[0]).read(0, arrays=("text_embedding",))
    assert sample.arrays["text_embedding"].dtype == np.float16


def test_a_text_model_alone_decodes_no_image(tmp_path, make_teacher):
    shards = write_shards(tmp_path / "in", range(4), bad=(1,))
    summary = reinforce(shards, tmp_path / "out", Teachers(text_model=make_teacher(1), text_name="t"), CONFIG)
    assert (summary.reinforced, summary.arrays) == (4, {"text_embedding": 16})
    assert "views" not in read_reinforcement(expand_shards(str(tmp_path / "out")))


def test_shards_of_one_name_are_numbered(tmp_path, make_teacher):
    shards = [*write_shards(tmp_path / "a", range(2)), *write_shards(tmp_path / "b", range(2, 4))]
    reinforce(shards, tmp_path / "out", teachers_of(make_teacher(1)), CONFIG)
    found = expand_shards(str(tmp_path / "out"))
    assert [Path(shard).name for shard in found] == ["00000-00000.tar", "00001-00000.tar"]
    assert [ShardReader(shard).index[0].key for shard in found] == ["k0", "k2"]


def test_a_full_disk_leaves_no_half_written_tar(tmp_path, make_teacher, monkeypatch):
    shards, teacher = write_shards(tmp_path / "in", range(8)), make_teacher(1)
    plain_open = Path.open

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_on_full_disk(path, mode="r", *args, **kwargs):
        is_second = path.name.startswith(".00001.tar.") and path.name.endswith(".part")
        return FullDisk(str(path), "wb") if is_second else plain_open(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(OSError, match="No space left"):
            reinforce(shards, tmp_path / "out", teachers_of(teacher), CONFIG)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if ".tar" in path.name) == ["00000.tar"]
    assert reinforce(shards, tmp_path / "out", teachers_of(teacher), CONFIG).samples == 8
