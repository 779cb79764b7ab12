"""What batches carry on request: sentences, small crops, identities, positions, trimmed tokens."""

import io
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.tar_fixture import write_tar
from vlm.data.caption_sampler import split_sentences
from vlm.data.collate import TrainingCollator
from vlm.data.decode import EncodedImage, open_image, to_rgb
from vlm.data.loader import stream_batches
from vlm.data.pack import encode_pair
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.samples import Pair, SampleIndex, SampleRng
from vlm.data.shards import ShardSet
from vlm.data.transforms import LocalCrops, RandomResizedCrop
from vlm.errors import UsageError

LONG = "One is short. Two is a little longer! Three, which is the longest, ends here?"
CAPTIONS = [(LONG,), (LONG, "One is short. Four."), ("Only one",), ("x",), ("a. b. c. d. e. f.",), ("y",)]
VIEW = RandomResizedCrop(size=16, scale=(0.3, 1.0), flip=0.5)


class Letters:
    """A letter is a token: no vocabulary to load."""

    context_length, pad_token, end_token = 40, 0, 1

    def encode(self, texts):
        rows = np.full((len(texts), self.context_length), self.pad_token, np.int64)
        for row, text in zip(rows, texts, strict=True):
            codes = [*map(ord, text[: len(row) - 1]), self.end_token]
            row[: len(codes)] = codes
        return rows


def read(row) -> str:
    return "".join(chr(code) for code in row.tolist() if code > 1)


def collate(plan, **options) -> TrainingCollator:
    tokenizer: Any = Letters()
    return TrainingCollator(plan=plan, view=options.pop("view", VIEW), tokenizer=tokenizer, **options)


def plan_of(number, *, batch_size, **more) -> BatchSampler:
    return BatchSampler(order=SampleOrder(counts=(number,), window=8), batch_size=batch_size, **more)


@pytest.fixture
def shard(tmp_path, make_image) -> str:
    """Six samples; the pictures of the first two are the same, of the last two a PNG."""
    from webdataset.writer import TarWriter

    path = tmp_path / "extras.tar"
    with TarWriter(str(path), encoder=False) as tar:
        for number, captions in enumerate(CAPTIONS):
            image = make_image(max(number, 1), size=(90 + max(number, 1), 60), kind="JPEG" if number < 4 else "PNG")
            tar.write(encode_pair(Pair(key=f"k{number}", image=image, captions={"": captions})))
    return str(path)


def extras(**changes) -> dict[str, Any]:
    return {
        "num_sentences": 4,
        "local": LocalCrops.for_global_crop(VIEW, number=3),
        "has_identities": True,
    } | changes


def told(batch):
    shown = [batch.keys, batch.captions, batch.used, batch.rows.tolist()]
    return [*shown, *(tensor.numpy().tobytes() for tensor in (batch.images, batch.tokens))]


def test_what_is_asked_for_besides_changes_nothing_of_the_rest(shard):
    plan = plan_of(6, batch_size=12)
    plain = collate(plan)(plan[3], ShardSet([shard]))
    assert (plain.sub_tokens, plain.local_images, plain.identities) == (None, None, None)
    full = collate(plan, **extras())(plan[3], ShardSet([shard]))
    assert told(full) == told(plain)
    assert full.sub_tokens is not None
    fewer = collate(plan, **extras(num_sentences=0, has_identities=False))(plan[3], ShardSet([shard]))
    assert fewer.local_images is not None
    assert full.local_images is not None
    assert torch.equal(fewer.local_images, full.local_images)


def test_sentences_are_drawn_without_replacement_and_padded_by_empty_rows(shard):
    plan = plan_of(6, batch_size=6)
    firsts = set()
    for number in range(30):
        batch = collate(plan, num_sentences=4)(plan[number], ShardSet([shard]))
        assert batch.sub_tokens is not None
        assert (tuple(batch.sub_tokens.shape), batch.sub_tokens.dtype) == ((6, 4, 40), torch.int64)
        for key, rows in zip(batch.keys, batch.sub_tokens, strict=True):
            texts = CAPTIONS[int(key[1:])]
            sentences = {sentence[:39] for text in texts for sentence in split_sentences(text)}
            found = [read(row) for row in rows if row.any()]
            assert len(found) == len(set(found)) == min(4, len(sentences))
            assert set(found) <= sentences
            assert not rows[len(found) :].any()
            if key == "k4":
                firsts.add(found[0])
    assert firsts == {f"{letter}." for letter in "abcdef"}


def test_a_batch_without_sentences_has_rows_of_padding(tmp_path, make_image):
    from webdataset.writer import TarWriter

    from vlm.data.caption_sampler import CaptionSampler

    with TarWriter(str(tmp_path / "t.tar"), encoder=False) as tar:
        pair = Pair(key="k", image=make_image(0), captions={"de": ("Hund.",)}, metadata={"tags": ["dog"]})
        tar.write(encode_pair(pair))
    plan = plan_of(1, batch_size=2)
    draw = CaptionSampler(languages=("tags",))
    batch = collate(plan, num_sentences=2, draw=draw, trim_text=True)(plan[0], ShardSet([str(tmp_path / "t.tar")]))
    assert batch.sub_tokens is not None
    assert (tuple(batch.sub_tokens.shape), int(batch.sub_tokens.sum())) == ((2, 2, 8), 0)
    assert batch.captions == ("dog", "dog")


def test_small_crops_show_what_the_same_crops_of_the_whole_image_show(make_image):
    view = RandomResizedCrop(size=32, scale=(0.9, 1.0), flip=0.5)
    local = LocalCrops.for_global_crop(view, number=5)
    assert (local.view.size, local.view.scale, local.view.flip) == (16, (0.05, 0.4), 0.5)
    steps = set()
    for number, size in enumerate([(800, 600), (1201, 333), (90, 60), (24, 20), (4000, 3000)]):
        jpeg, png = make_image(number, size=size), io.BytesIO()
        to_rgb(open_image(jpeg)).save(png, format="PNG")
        shown = []
        for data in (jpeg, png.getvalue()):
            image = EncodedImage(data)
            crop = view.draw(image.width, image.height, SampleRng(0, number, "k"))
            crops = local.draw(image.width, image.height, SampleRng(0, number, "k", purpose="local"))
            pixels = image.pixels(resolution=view.resolution(crop))
            steps.add(image.reduction_of(pixels))
            made = np.empty((5, 16, 16, 3), np.uint8)
            local.show(image, crops, pixels, out=made)
            shown.append(made.astype(int))
            fresh = [local.view.show(image, crop) for crop in crops]
            assert np.abs(np.stack(fresh).transpose(0, 2, 3, 1) - shown[-1]).mean() < 2
        assert np.abs(shown[0] - shown[1]).mean() < 1.5
        assert len({row.tobytes() for row in shown[0]}) == 5
    assert {1, 8} <= steps


def test_a_image_is_decoded_again_only_where_the_small_crops_need_it_finer(make_image, monkeypatch):
    decoded = []
    pixels_of = EncodedImage.pixels

    def pixels(image, *, resolution=1.0):
        decoded.append(resolution)
        return pixels_of(image, resolution=resolution)

    monkeypatch.setattr(EncodedImage, "pixels", pixels)
    view = RandomResizedCrop(size=64)
    local = LocalCrops.for_global_crop(view, number=4)
    for size, times in [((70, 70), 1), ((700, 560), 2)]:
        image = EncodedImage(make_image(0, size=size))
        crop = view.draw(*size, SampleRng(0, 0, "k"))
        crops, made = local.draw(*size, SampleRng(0, 0, "j")), np.empty((4, 32, 32, 3), np.uint8)
        local.show(image, crops, image.pixels(resolution=view.resolution(crop)), out=made)
        assert len(decoded) == times
        decoded.clear()


def test_batches_hold_the_small_crops_of_their_images(shard):
    plan, local = plan_of(6, batch_size=6), LocalCrops.for_global_crop(VIEW, number=3, size=10, scale=(0.1, 0.2))
    batch = collate(plan, local=local, seed=5)(plan[2], ShardSet([shard]))
    assert batch.local_images is not None
    assert (tuple(batch.local_images.shape), batch.local_images.dtype) == ((6, 3, 3, 10, 10), torch.uint8)
    for address, crops in zip(batch.used, batch.local_images.numpy(), strict=True):
        sample = ShardSet([shard]).read(address)
        image = EncodedImage(sample.image)
        drawn = local.draw(image.width, image.height, SampleRng(5, address.epoch, sample.key, 0, "local"))
        want = [local.view.show(image, crop) for crop in drawn]
        assert np.abs(np.stack(want).astype(int) - crops).max() <= 8


def test_small_crops_cannot_be_decoded_on_the_device_nor_be_none():
    with pytest.raises(UsageError, match="--decode-on-device"):
        collate(plan_of(6, batch_size=6), local=LocalCrops.for_global_crop(VIEW, number=1), decode_on_device=True)
    with pytest.raises(UsageError, match="0 local crops"):
        LocalCrops.for_global_crop(VIEW, number=0)


def test_identities_are_equal_for_equal_keys_and_equal_images_alone(shard):
    plan = plan_of(6, batch_size=12)
    batch = collate(plan, has_identities=True)(plan[0], ShardSet([shard]))
    assert batch.identities is not None
    assert (tuple(batch.identities.shape), batch.identities.dtype) == ((12, 2), torch.int64)
    assert batch.identities.ne(0).all()
    by_key: dict[str, set[tuple[int, ...]]] = {}
    for key, row in zip(batch.keys, batch.identities.tolist(), strict=True):
        by_key.setdefault(key, set()).add(tuple(row))
    assert [len(rows) for rows in by_key.values()] == [1] * 6
    keys, images = zip(*(next(iter(rows)) for _, rows in sorted(by_key.items())), strict=True)
    assert len(set(keys)) == 6
    assert images[0] == images[1]
    assert len(set(images)) == 5


def test_the_identity_of_a_stand_in_is_that_of_what_is_shown(tmp_path):
    address = write_tar(tmp_path / "0.tar", ["", "no caption", "no image"])
    plan = plan_of(3, batch_size=3)
    batch = collate(plan, has_identities=True)(plan[0], ShardSet([address]))
    assert set(batch.keys) == {"0-0"}
    assert batch.identities is not None
    assert len(set(map(tuple, batch.identities.tolist()))) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_extras_are_the_same_for_every_split_and_go_through_workers(shard, processes, workers):
    def whole(processes: int, workers: int) -> list[list[Any]]:
        parts = []
        for process in range(processes):
            plan = plan_of(6, batch_size=8, position=24, process=process, num_processes=processes)
            made = collate(plan, **extras())
            parts.append(list(stream_batches(plan, [shard], made, numbers=range(3), workers=workers)))
        return [
            [
                [row.tolist() for part in same for row in rows_of(part)]
                for rows_of in (
                    lambda batch: batch.rows,
                    lambda batch: batch.sub_tokens,
                    lambda batch: batch.identities,
                    lambda batch: batch.local_images,
                )
            ]
            for same in zip(*parts, strict=True)
        ]

    found = whole(processes, workers)
    assert [batch[0] for batch in found] == [list(range(first, first + 8)) for first in (24, 32, 40)]
    assert found == whole(1, 0)


def test_rows_are_positions_in_the_run_whatever_part_is_asked_for(shard):
    plan = plan_of(6, batch_size=8, position=100, process=1, num_processes=2)
    batch = collate(plan)(plan[3], ShardSet([shard]))
    assert batch.rows.tolist() == [100 + 3 * 8 + 4 + place for place in range(4)]
    assert plan.order.locate(batch.rows.tolist()) == list(batch.sample_indices)
    by_hand = collate(plan)([SampleIndex(0, 0, 0)], ShardSet([shard]))
    with pytest.raises(AssertionError, match="the batch sampler of a run"):
        _ = by_hand.rows


def test_tokens_are_cut_to_the_longest_caption_of_the_batch(shard):
    plan = plan_of(6, batch_size=1)
    for number in range(12):
        whole = collate(plan, num_sentences=2)(plan[number], ShardSet([shard]))
        cut = collate(plan, num_sentences=2, trim_text=True)(plan[number], ShardSet([shard]))
        assert whole.sub_tokens is not None
        assert cut.sub_tokens is not None
        for full, part in ((whole.tokens, cut.tokens), (whole.sub_tokens, cut.sub_tokens)):
            longest = max(len(row.nonzero()) for row in full.reshape(-1, 40))
            assert part.shape[-1] == min(-(-longest // 8) * 8, 40)
            assert torch.equal(full[..., : part.shape[-1]], part)
            assert not full[..., part.shape[-1] :].any()


def test_extras_go_with_the_row_that_stands_in_on_the_device(tmp_path, make_image):
    from tests.data.tar_fixture import without_tables
    from vlm.data.device_prefetch import DevicePrefetcher

    images = [make_image(number, size=(60, 50)) for number in range(4)]
    images[2] = without_tables(images[2])
    address = write_images(tmp_path / "0.tar", images)
    plan = plan_of(4, batch_size=4)
    made = collate(plan, **extras(local=None, decode_on_device=True))
    (batch,) = DevicePrefetcher(iter([made(plan[0], ShardSet([address]))]), torch.device("cpu"), VIEW)
    assert batch.identities is not None
    assert batch.sub_tokens is not None
    shown = {key: row.tolist() for key, row in zip(batch.keys, batch.identities, strict=True)}
    assert len({tuple(row) for row in batch.identities.tolist()}) == len(shown) == 3
    assert [read(rows[0]) for rows in batch.sub_tokens] == [f"caption of {key}" for key in batch.keys]
    assert batch.rows.tolist() == [0, 1, 2, 3]


def write_images(path, images) -> str:
    from webdataset.writer import TarWriter

    with TarWriter(str(path), encoder=False) as tar:
        for number, image in enumerate(images):
            parts: dict[str, Any] = {"__key__": f"k{number}", "jpg": image, "txt": f"caption of k{number}".encode()}
            tar.write(parts)
    return str(path)
