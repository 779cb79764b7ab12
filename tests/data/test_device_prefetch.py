import tarfile
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.tar_fixture import without_tables
from vlm.data.caption_sampler import SampledCaption
from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.device_prefetch import DevicePrefetcher, decode_batch
from vlm.data.gpu_decode import PreparedView
from vlm.data.loader import stream_batches
from vlm.data.sample_ledger import Ledger, sum_counts
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.samples import SampleIndex
from vlm.data.transforms import Crop, RandomResizedCrop
from vlm.errors import VlmError

CPU = torch.device("cpu")
VIEW = RandomResizedCrop(size=24, scale=(0.3, 1.0), flip=0.5)


def batches(number):
    for place in range(number):
        yield TrainingBatch(
            images=torch.full((2, 3, 4, 4), place, dtype=torch.uint8),
            tokens=torch.full((2, 5), place),
            keys=("a", "b"),
            drawn=(),
            sample_indices=(),
            used=(),
            failures=(),
            arrays={"teacher_text": torch.from_numpy(np.full((2, 3), place, np.float32))},
        )


def with_images(batch):
    """The batch with pictures yet to decode."""
    shown = np.zeros((3, VIEW.size, VIEW.size), np.uint8)
    prepared = PreparedView(crop=Crop(left=0, top=0, width=1, height=1), shown=shown)
    return replace(batch, prepared=(prepared, prepared), offsets=(0, 0))


def values(batch):
    return (batch.images.unique().item(), batch.tokens.unique().item(), batch.arrays["teacher_text"].unique().item())


def test_on_the_cpu_batches_pass_through():
    assert [values(batch) for batch in DevicePrefetcher(batches(3), CPU)] == [(n, n, n) for n in range(3)]
    assert list(DevicePrefetcher(batches(0), CPU)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_all_batches_arrive_in_order():
    arrived = list(DevicePrefetcher((batch.pin_memory() for batch in batches(5)), torch.device("cuda")))
    assert {batch.images.device.type for batch in arrived} == {"cuda"}
    assert [values(batch) for batch in arrived] == [(n, n, n) for n in range(5)]


class Letters:
    """Tokenizes a text as its first letters."""

    def encode(self, texts):
        return np.array([[ord(letter) for letter in text[:4].ljust(4)] for text in texts], np.int64)


def write_shard(path, images):
    """A tar of these pictures; None is a sample without one."""
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            parts = {"txt": f"{number:04d} is what it is".encode()} | ({} if image is None else {"jpg": image})
            for extension, data in parts.items():
                entry = tarfile.TarInfo(f"k{number}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, BytesIO(data))
    return str(path)


def plan_of(number, *, batch_size=6):
    return BatchSampler(order=SampleOrder(counts=(number,), window=1), batch_size=batch_size)


def stream(shard, plan, *, device=CPU, on_device=True, workers=0, epochs=1):
    """All batches of so many epochs."""
    tokenizer: Any = Letters()
    collate = TrainingCollator(plan=plan, view=VIEW, tokenizer=tokenizer, decode_on_device=on_device)
    numbers = range(epochs * plan.order.num_samples // plan.batch_size)
    made = stream_batches(plan, [shard], collate, numbers=numbers, workers=workers)
    return list(DevicePrefetcher(made, device, VIEW if on_device else None))


@pytest.fixture
def encoded_images(make_image):
    """Twelve encoded pictures, one of them no JPEG."""
    return [make_image(number, size=(60 + number, 50), kind="PNG" if number == 4 else "JPEG") for number in range(12)]


def told(batch):
    return (batch.keys, batch.captions, batch.tokens.tolist(), batch.sample_indices, batch.used, batch.failures)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_on_the_device_batches_are_the_same_but_for_the_decoder(tmp_path, encoded_images, workers):
    shard, plan = write_shard(tmp_path / "0.tar", [*encoded_images, None, None]), plan_of(14, batch_size=7)
    want = stream(shard, plan, on_device=False, epochs=2)
    found = stream(shard, plan, workers=workers, epochs=2)
    assert list(map(told, found)) == list(map(told, want))
    assert sum(len(batch.failures) for batch in found) > 2
    for one, other in zip(found, want, strict=True):
        assert (one.images.shape, one.images.dtype, one.prepared) == (other.images.shape, torch.uint8, ())
        assert (one.images.int() - other.images.int()).abs().float().mean() < 1.5


def test_workers_hand_images_over_as_they_lie_in_the_shard(tmp_path, encoded_images):
    shard, plan = write_shard(tmp_path / "0.tar", encoded_images), plan_of(12, batch_size=12)
    tokenizer: Any = Letters()
    collate = TrainingCollator(plan=plan, view=VIEW, tokenizer=tokenizer, decode_on_device=True)
    (batch,) = stream_batches(plan, [shard], collate, numbers=range(1), workers=1)
    assert tuple(batch.images.shape) == (0, 3, 24, 24)
    assert collate.image_bytes == 0
    encoded = {key: one.encoded for key, one in zip(batch.keys, batch.prepared, strict=True)}
    assert encoded == {f"k{number}": None if number == 4 else image for number, image in enumerate(encoded_images)}


def damage(encoded_images, *numbers):
    return [without_tables(image) if number in numbers else image for number, image in enumerate(encoded_images)]


def test_a_image_damaged_only_for_the_device_is_named_and_the_next_whole_row_stands_in(tmp_path, encoded_images):
    images = damage(encoded_images, 2, 3, 9)
    shard, plan = write_shard(tmp_path / "0.tar", images), plan_of(12, batch_size=12)
    (batch,) = stream(shard, plan)
    bad = [row for row, sample_index in enumerate(batch.sample_indices) if sample_index.number in (2, 3, 9)]
    for row in range(12):
        source = next(place % 12 for place in range(row, row + 12) if place % 12 not in bad)
        assert batch.used[row] == batch.sample_indices[source]
        assert batch.keys[row] == f"k{batch.used[row].number}"
        assert batch.captions[row].startswith(f"{batch.used[row].number:04d}")
        assert batch.tokens[row].tolist() == [ord(letter) for letter in batch.captions[row][:4]]
        assert torch.equal(batch.images[row], batch.images[source])
    assert sorted(incident.key for incident in batch.failures) == ["k2", "k3", "k9"]
    with tarfile.open(shard) as tar:
        offsets = {member.name.split(".")[0]: member.offset_data for member in reversed(tar.getmembers())}
    for incident in batch.failures:
        assert (incident.reason, incident.is_replacement) == ("unreadable image", False)
        assert incident.offset == offsets[incident.key]
    assert not stream(shard, plan)[0].images.ne(batch.images).any()


def test_stored_arrays_go_with_the_row_that_stands_in(encoded_images):
    (batch,) = batches(1)
    arrays = {"teacher_text": torch.tensor([[1.0], [2.0]])}
    sample_indices = (SampleIndex(0, 0, 5), SampleIndex(0, 0, 6))
    drawn = tuple(SampledCaption(text=text, language="", number=0) for text in ("one", "two"))
    whole = with_images(batch)
    broken = replace(whole.prepared[0], encoded=without_tables(encoded_images[0]), shown=None)
    found = decode_batch(
        replace(
            whole,
            arrays=arrays,
            sample_indices=sample_indices,
            used=sample_indices,
            drawn=drawn,
            prepared=(whole.prepared[0], broken),
        ),
        VIEW,
        CPU,
    )
    assert found.arrays["teacher_text"].tolist() == [[1.0], [1.0]]
    assert (found.keys, found.captions, found.used) == (("a", "a"), ("one", "one"), sample_indices[:1] * 2)
    assert [incident.sample_index for incident in found.failures] == [sample_indices[1]]


def test_the_ledger_adds_up_with_damage_found_in_workers_and_on_the_device(tmp_path, encoded_images):
    # 7 has no picture; 8, which stands in for it, turns out to be damaged
    images = [None if number == 7 else image for number, image in enumerate(damage(encoded_images, 2, 8))]
    images[10] = encoded_images[10][:-60]
    shard, plan = write_shard(tmp_path / "0.tar", images), plan_of(12)
    ledger, batches = Ledger(), stream(shard, plan, epochs=3)
    for batch in batches:
        ledger.count(batch)
    total = sum_counts(ledger.by_shard())
    assert (total.requested, total.seen, total.replaced, total.used_as_replacement) == (36, 24, 12, 12)
    assert total.corrupt == {"no image": 3, "unreadable image": 9}
    assert [number for _, number in sorted(ledger.failures)] == [2, 7, 8, 10]
    told = {(i.key, i.is_replacement) for batch in batches for i in batch.failures}
    assert told == {("k2", False), ("k7", False), ("k8", False), ("k8", True), ("k10", False)}


def test_a_batch_of_which_no_image_can_be_decoded_ends_the_run(tmp_path, encoded_images):
    shard = write_shard(tmp_path / "0.tar", damage(encoded_images[:4], 0, 1, 2, 3))
    with pytest.raises(VlmError, match=r"None of the 4 images.*unreadable image.*vlm inspect"):
        stream(shard, plan_of(4, batch_size=4))


def test_an_error_of_the_loader_arrives_after_the_batches_before_it():
    def broken():
        yield from batches(1)
        raise VlmError("the shard is gone")

    ahead = iter(DevicePrefetcher((with_images(batch) for batch in broken()), CPU, VIEW))
    next(ahead)
    with pytest.raises(VlmError, match="the shard is gone"):
        next(ahead)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_gpu_decodes_the_same_batches(tmp_path, encoded_images):
    shard, plan = write_shard(tmp_path / "0.tar", damage(encoded_images, 3)), plan_of(12)
    found, want = stream(shard, plan, device=torch.device("cuda"), epochs=4), stream(shard, plan, epochs=4)
    for one, other in zip(found, want, strict=True):
        assert {one.images.device.type, one.tokens.device.type} == {"cuda"}
        assert told(one) == told(other)
        assert (one.images.cpu().int() - other.images.int()).abs().float().mean() < 2
