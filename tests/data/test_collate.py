import io
import pickle
import tarfile
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.tar_fixture import members, without_tables, write_tar
from vlm.data.caption_sampler import SampledCaption
from vlm.data.collate import TrainingCollator
from vlm.data.pack import encode_pair
from vlm.data.precomputed_features import PrecomputedFeatures, view_rng
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.samples import Pair, SampleIndex
from vlm.data.shards import ShardSet
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import VlmError


class Lengths:
    """Tokenizes a text as its length."""

    def encode(self, texts):
        return np.array([[len(text)] for text in texts], np.int64)


def collate(plan, **options):
    view = options.pop("view", RandomResizedCrop(size=8))
    tokenizer: Any = Lengths()
    return TrainingCollator(plan=plan, view=view, tokenizer=tokenizer, **options)


def plan_of(*counts, batch_size):
    return BatchSampler(order=SampleOrder(counts=counts, window=1), batch_size=batch_size)


@pytest.fixture
def damaged(tmp_path):
    """A shard of six samples: the second and the third unusable."""
    return write_tar(tmp_path / "0.tar", ["", "no image", "unreadable json", "", "", ""])


def test_an_unusable_sample_is_named_and_the_next_usable_one_stands_in(damaged):
    plan = plan_of(6, batch_size=6)
    shards = ShardSet([damaged])
    made = collate(plan)(plan[0], shards)
    by_number = {asked.number: used.number for asked, used in zip(made.sample_indices, made.used, strict=True)}
    assert by_number == {0: 0, 1: 3, 2: 3, 3: 3, 4: 4, 5: 5}
    assert {(i.key, i.reason, i.sample_index.number, i.is_replacement) for i in made.failures} == {
        ("0-1", "no image", 1, False),
        ("0-2", "unreadable json", 1 + 1, True),
        ("0-2", "unreadable json", 2, False),
    }
    for incident in made.failures:
        assert incident.offset == shards.key_and_offset(incident.sample_index)[1] > 0
    rows = {used.number: image.tobytes() for used, image in zip(made.used, made.images.numpy(), strict=True)}
    assert len(set(rows.values())) == 4


def test_too_many_unusable_in_a_row_end_the_run_with_the_last_one_named(tmp_path):
    sample_index = write_tar(tmp_path / "0.tar", ["no image"] * 5)
    plan = plan_of(5, batch_size=1)
    with pytest.raises(VlmError, match=r"3 samples in a row.*no image.*max-bad-in-a-row"):
        collate(plan, max_bad_in_a_row=3)(plan[0], ShardSet([sample_index]))


def test_damage_found_while_decoding_is_told_in_its_place_and_the_next_usable_one_stands_in(tmp_path):
    damages = ["", "no tables", "no image", "no tables", "no caption", ""]
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for number, damage in enumerate(damages):
            for name, data in members(f"k{number}", number, damage):
                broken = without_tables(data) if damage == "no tables" and name.endswith("jpg") else data
                entry = tarfile.TarInfo(name)
                entry.size = len(broken)
                tar.addfile(entry, io.BytesIO(broken))
    plan, shards = plan_of(6, batch_size=6), ShardSet([str(path)])
    asked = [SampleIndex(0, 0, number) for number in (3, 1, 5, 2, 0)]
    made = collate(plan, has_identities=True)(asked, shards)
    assert [sample_index.number for sample_index in made.used] == [5, 5, 5, 5, 0]
    assert made.keys == ("k5", "k5", "k5", "k5", "k0")
    told = [(i.key, i.reason, i.is_replacement) for i in made.failures]
    three, four = ("k3", "unreadable image"), ("k4", "no caption")
    assert told == [
        (*three, False),
        (*four, True),
        ("k1", "unreadable image", False),
        ("k2", "no image", True),
        (*three, True),
        (*four, True),
        ("k2", "no image", False),
        (*three, True),
        (*four, True),
    ]
    images = made.images.numpy()
    assert all((images[place] == images[2]).all() for place in (0, 1, 3))
    assert (images[4] != images[2]).any()
    with pytest.raises(VlmError, match=r"2 samples in a row.*from number 3 .*no caption"):
        collate(plan, max_bad_in_a_row=2)(asked, shards)


@pytest.mark.parametrize("size", [6, 0])
def test_a_batch_arrives_from_a_worker_as_it_was_sent(damaged, size):
    plan = plan_of(6, batch_size=6)
    sent = collate(plan, has_identities=True)(plan[0][:size], ShardSet([damaged]))
    received = pickle.loads(ForkingPickler.dumps(sent))
    for name in ("keys", "drawn", "sample_indices", "used", "failures", "position", "captions"):
        assert getattr(received, name) == getattr(sent, name)
    assert {type(row) for row in received.sample_indices + received.used} <= {SampleIndex}
    assert {type(row) for row in received.drawn} <= {SampledCaption}
    for arrived, left in zip(received.tensors, sent.tensors, strict=True):
        assert torch.equal(arrived, left)


def test_which_caption_was_drawn_is_recorded(damaged):
    plan = plan_of(6, batch_size=1)
    made = [collate(plan)(plan[number], ShardSet([damaged])) for number in range(60)]
    drawn = {(row.number, row.text.rpartition(" ")[2]) for batch in made for row in batch.drawn}
    assert drawn == {(0, "one"), (1, "two"), (2, "three")}
    assert made[0].captions == (made[0].drawn[0].text,)


def test_a_repeated_visit_is_drawn_anew(damaged):
    order = SampleOrder.of_selection([np.array([40, 0, 0, 0, 0, 0], np.uint16)])
    plan = BatchSampler(order=order, batch_size=40)
    made = collate(plan)(plan[0], ShardSet([damaged]))
    assert set(made.keys) == {"0-0"}
    assert len(set(made.captions)) == 3


@pytest.fixture
def reinforced(tmp_path, make_image):
    """A shard of three samples with two stored views and two captions each."""
    from webdataset.writer import TarWriter

    path = tmp_path / "r.tar"
    with TarWriter(str(path), encoder=False) as tar:
        for number in range(3):
            arrays = {
                "view_seeds": np.array([10 * number + 1, 10 * number + 2], np.uint64),
                "teacher_image": np.array([[number, 1], [number, 2]], np.float16),
                "teacher_text": np.array([[number, 10], [number, 20]], np.float32),
            }
            captions = {"": (f"{number} a", f"{number} bb")}
            tar.write(encode_pair(Pair(key=f"k{number}", image=make_image(number), captions=captions, arrays=arrays)))
    return str(path)


def test_the_student_sees_the_view_the_teacher_saw(reinforced, make_image):
    plan, view = plan_of(3, batch_size=12), RandomResizedCrop(size=16, scale=(0.2, 1.0), flip=0.5)
    stored = PrecomputedFeatures(names=("teacher_image", "teacher_text"))
    made = collate(plan, view=view, arrays=stored)(plan[0], ShardSet([reinforced]))
    seen_views = set()
    for key, image, drawn, teacher_image, teacher_text in zip(
        made.keys, made.images, made.drawn, made.arrays["teacher_image"], made.arrays["teacher_text"], strict=True
    ):
        number, stored_view = int(teacher_image[0]), int(teacher_image[1])
        seen_views.add(stored_view)
        assert key == f"k{number}"
        assert np.array_equal(image, view(make_image(number), view_rng(10 * number + stored_view)))
        assert teacher_text.tolist() == [number, 10 * (drawn.number + 1)]
    assert seen_views == {1, 2}


def test_a_sample_without_the_arrays_asked_for_is_bad(damaged):
    plan = plan_of(6, batch_size=1)
    with pytest.raises(VlmError, match="no array"):
        collate(plan, arrays=PrecomputedFeatures(names=("text_embedding",)))(plan[0], ShardSet([damaged]))


def test_captions_are_drawn_by_seed_epoch_and_key_alone(tmp_path):
    shards = ShardSet([write_tar(tmp_path / "0.tar", [""] * 12)])

    def drawn_numbers(seed, epoch):
        plan = plan_of(12, batch_size=12)
        sample_indices = [SampleIndex(epoch, 0, number) for number in range(12)]
        return [caption.number for caption in collate(plan, seed=seed)(sample_indices, shards).drawn]

    # written out, since another process has to draw the same
    assert drawn_numbers(seed=0, epoch=0) == [0, 1, 2, 2, 0, 1, 1, 1, 2, 0, 1, 0]
    assert drawn_numbers(seed=0, epoch=1) == [1, 0, 1, 1, 1, 2, 2, 2, 0, 0, 2, 1]
    assert drawn_numbers(seed=1, epoch=0) == [1, 2, 2, 0, 1, 1, 2, 2, 0, 2, 2, 0]
