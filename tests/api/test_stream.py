"""Streams for other people's training loops: the same batches however they are interrupted and shared."""

import json
import multiprocessing
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import vlm
from tests.data.selection_fixture import select_all
from tests.data.tar_fixture import write_tar
from vlm.data.selection import write_selection
from vlm.data.shards import expand_shards
from vlm.data.tokenizers import open_tokenizer

OPTIONS: dict[str, Any] = {"batch_size": 10, "image_size": 16, "seed": 3, "epochs": 2, "workers": 0, "flip": 0.5}
NUM_TRAIN = 96


@pytest.fixture
def train_shards(scene_shards):
    return str(scene_shards / "train")


def changed(options: dict[str, Any]) -> dict[str, Any]:
    return OPTIONS | options


def contents(batches) -> list[tuple]:
    """What is in each batch, comparable."""
    return [(batch.keys, batch.texts, batch.images.numpy().tobytes(), batch.tokens.tolist()) for batch in batches]


@pytest.fixture
def whole(train_shards):
    """All batches of an uninterrupted stream."""
    return contents(vlm.stream(train_shards, **OPTIONS))


@pytest.mark.parametrize("stop", [1, 7, 9, 10, 19, 20])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_loads_a_state_gives_the_batches_that_were_left(train_shards, whole, stop, workers):
    before = []
    state: dict[str, Any] = {}
    with vlm.stream(train_shards, **changed({"workers": workers})) as first:
        for batch in first:
            before.append(batch)
            if len(before) == stop:
                # as a training script saves it; batches that workers have ready do not count
                state = json.loads(json.dumps(first.state_dict()))
                break
    with vlm.stream(train_shards, **changed({"workers": 2 - workers})) as second:
        second.load_state_dict(state)
        assert second.position == stop
        assert contents(before) + contents(second) == whole


def test_every_sample_is_seen_once_an_epoch_and_a_pass_is_filled_from_the_next(train_shards, whole):
    keys = [key for batch in whole for key in batch[0]]
    stream = vlm.stream(train_shards, **OPTIONS)
    assert len(whole) == len(stream) == 20
    assert len(set(keys[:NUM_TRAIN])) == len(set(keys[NUM_TRAIN : 2 * NUM_TRAIN])) == stream.num_samples == NUM_TRAIN
    assert keys[:NUM_TRAIN] != keys[NUM_TRAIN : 2 * NUM_TRAIN]


def test_a_loop_goes_on_after_a_break_and_the_next_pass_after_the_end(train_shards, whole):
    stream = vlm.stream(train_shards, **OPTIONS)
    first = []
    for batch in stream:
        first.append(batch)
        if len(first) == 4:
            break
    assert contents(first) + contents(stream) == whole
    assert stream.epoch == pytest.approx(200 / NUM_TRAIN)
    # the third and fourth epoch: the same number of batches, others
    again = contents(stream)
    assert len(again) == 20
    assert again[0] != whole[0]


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_each_batch(train_shards, whole, world_size):
    shares = [list(vlm.stream(train_shards, **OPTIONS, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for batches, expected in zip(zip(*shares, strict=True), whole, strict=True):
        assert sum((batch.keys for batch in batches), ()) == expected[0]
        assert torch.cat([batch.images for batch in batches]).numpy().tobytes() == expected[2]


def test_the_share_is_the_launchers_unless_it_is_given(train_shards, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(next(iter(vlm.stream(train_shards, **OPTIONS)))) == 5
    assert len(next(iter(vlm.stream(train_shards, **OPTIONS, rank=0, world_size=1)))) == 10
    with pytest.raises(vlm.UsageError, match="multiple of 2 processes"):
        vlm.stream(train_shards, **changed({"batch_size": 9}))


def test_evaluation_gives_each_sample_once_in_file_order(train_shards):
    options: dict[str, Any] = {"batch_size": 16, "image_size": 16, "transform": "evaluation", "workers": 0}
    batches = list(vlm.stream(train_shards, **options))
    keys = [key for batch in batches for key in batch.keys]
    assert keys == sorted(set(keys))
    assert len(keys) == NUM_TRAIN
    # a second loop is a second pass, and a state within it goes on
    stream = vlm.stream(train_shards, **options)
    for number, _ in enumerate(stream, 1):
        if number == 2:
            break
    resumed = vlm.stream(train_shards, **options)
    resumed.load_state_dict(stream.state_dict())
    assert contents(resumed) == contents(batches[2:])
    shares = [list(vlm.stream(train_shards, **options, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(key for batches in shares for batch in batches for key in batch.keys) == keys


@pytest.mark.parametrize("transform", ["training", "evaluation"])
def test_a_selection_says_which_samples_are_seen(train_shards, tmp_path, transform):
    everything = select_all(expand_shards(train_shards))
    halved = tuple(np.arange(len(times), dtype=np.uint16) % 2 for times in everything.times)
    write_selection(tmp_path / "half.selection", replace(everything, times=halved))
    options: dict[str, Any] = {"batch_size": 16, "image_size": 16, "workers": 0, "transform": transform}
    stream = vlm.stream(train_shards, **options, selection=tmp_path / "half.selection")
    keys = [key for batch in stream for key in batch.keys]
    every_other = [sample_index.number % 2 for batch in stream for sample_index in batch.sample_indices]
    assert stream.num_samples == len(set(keys)) == len(keys) == NUM_TRAIN // 2
    assert set(every_other) == {1}
    with pytest.raises(vlm.UsageError, match="another stream"):
        stream.load_state_dict(vlm.stream(train_shards, **options).state_dict())


def test_a_mixture_file_is_streamed_in_its_proportions(train_shards, scene_shards, tmp_path):
    sources = [
        f'[[source]]\ndata = "{shards}"\nweight = {weight}\n'
        for shards, weight in ((train_shards, 3), (scene_shards / "val", 1))
    ]
    (tmp_path / "mix.toml").write_text("".join(sources))
    for batch in vlm.stream(tmp_path / "mix.toml", batch_size=16, image_size=16, workers=0):
        assert sum(key.startswith("val-") for key in batch.keys) == 4


def test_a_state_of_another_stream_is_refused(train_shards, scene_shards):
    state = vlm.stream(train_shards, **OPTIONS).state_dict()
    for change in ({"seed": 4}, {"batch_size": 20}, {"transform": "evaluation"}):
        with pytest.raises(vlm.UsageError, match="state is of another stream"):
            vlm.stream(train_shards, **changed(change)).load_state_dict(state)
    with pytest.raises(vlm.UsageError, match="sequence was"):
        vlm.stream(scene_shards / "val", **OPTIONS).load_state_dict(state)
    with pytest.raises(vlm.UsageError, match="another stream"):
        vlm.stream(train_shards, **OPTIONS).load_state_dict({})
    with pytest.raises(vlm.UsageError, match="position = -1 is none"):
        vlm.stream(train_shards, **OPTIONS).load_state_dict(state | {"position": -1})
    nothing: Any = None
    with pytest.raises(vlm.UsageError, match="NoneType is not a state"):
        vlm.stream(train_shards, **OPTIONS).load_state_dict(nothing)


@pytest.mark.parametrize("transform", ["training", "evaluation"])
def test_of_a_state_saved_at_the_last_batch_nothing_is_left_and_after_the_loop_a_pass_begins(train_shards, transform):
    options = changed({"transform": transform})
    in_loop: dict[str, Any] = {}
    with vlm.stream(train_shards, **options) as stream:
        for _ in stream:
            in_loop = stream.state_dict()
        after_loop = stream.state_dict()
        following = contents(stream)
    for state, lengths in ((in_loop, (0, len(following))), (after_loop, (len(following),))):
        with vlm.stream(train_shards, **options) as stream:
            stream.load_state_dict(state)
            passes = [contents(stream) for _ in lengths]
        assert tuple(map(len, passes)) == lengths
        assert passes[-1] == following


def test_closing_ends_the_workers(train_shards):
    with vlm.stream(train_shards, **changed({"workers": 2})) as stream:
        next(iter(stream))
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_an_endless_stream_has_no_length(train_shards):
    stream = vlm.stream(train_shards, **changed({"epochs": None, "batch_size": 64}))
    sizes = [len(batch) for batch, _ in zip(stream, range(5), strict=False)]
    assert sizes == [64] * 5
    with pytest.raises(TypeError, match="endless"):
        len(stream)


def test_images_are_bytes_or_as_the_model_takes_them(train_shards):
    options = OPTIONS | {"transform": "evaluation", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    raw = next(iter(vlm.stream(train_shards, **options, normalised=False))).images
    images = next(iter(vlm.stream(train_shards, **options))).images
    assert (raw.dtype, images.dtype) == (torch.uint8, torch.float32)
    torch.testing.assert_close(images, raw / 127.5 - 1)


def test_tokens_are_those_of_the_tokenizer_that_is_given(train_shards, scene_tokenizer):
    ours = next(iter(vlm.stream(train_shards, **OPTIONS, tokenizer=scene_tokenizer)))
    assert (ours.tokens.numpy() == open_tokenizer(str(scene_tokenizer)).encode(ours.texts)).all()
    theirs = next(iter(vlm.stream(train_shards, **OPTIONS, tokenizer=open_clip.get_tokenizer("ViT-B-32"))))
    assert (theirs.tokens == open_clip.tokenize(list(theirs.texts))).all()
    with pytest.raises(vlm.UsageError, match="a row of ids for each"):
        vlm.stream(train_shards, **OPTIONS, tokenizer=lambda texts: np.zeros(len(texts)))


def test_values_of_fields_are_captions(train_shards, caplog):
    texts = []
    for batch in vlm.stream(train_shards, **OPTIONS, languages=("en", "tags"), tag_fields=("label", "colour")):
        texts += batch.texts
    assert {"black circle", "black heart"} < set(texts)
    assert any(text.startswith("a ") for text in texts)
    assert "in the field 'colour'" in caplog.text
    assert "in the field 'label'" not in caplog.text


def test_uids_are_those_of_an_index(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_tar(folder / "0.tar", ["", ""], prefix="k")
    [batch] = vlm.stream(folders, batch_size=4, image_size=16, workers=0)
    assert sorted(batch.keys) == ["k0-0", "k0-0", "k0-1", "k0-1"]
    assert sorted(batch.uids) == ["k0-0@a/0", "k0-0@b/0", "k0-1@a/0", "k0-1@b/0"]


def test_samples_that_cannot_be_used_are_told(tmp_path):
    write_tar(tmp_path / "0.tar", ["", "unreadable image", "", ""], prefix="k")
    training = vlm.stream(tmp_path, batch_size=4, image_size=16, workers=0)
    [batch] = training
    assert len(batch) == 4
    assert [failure.reason for failure in batch.failures] == ["unreadable image"]
    assert training.num_failures == 1
    evaluation = vlm.stream(tmp_path, batch_size=4, image_size=16, workers=0, transform="evaluation")
    assert [len(batch) for batch in evaluation] == [3]
    assert evaluation.num_failures == 1


def test_an_error_of_the_loop_stays_what_it_is(train_shards):
    def train(stream):
        for _ in stream:
            raise FileNotFoundError("of the loop")

    with vlm.stream(train_shards, **OPTIONS) as stream, pytest.raises(FileNotFoundError):
        train(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs = 0 is not a length"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"transform": "train"}, "give training or evaluation"),
        ({"rank": 2, "world_size": 2}, "rank from 0"),
        ({"rank": 1}, "give both"),
        ({"workers": -1}, "workers = -1"),
        ({"image_size": 0}, "image_size = 0"),
        ({"image_size": (64, 32)}, r"image_size = \(64, 32\)"),
        ({"selection": "nowhere"}, "no selection 'nowhere'"),
        ({"tokenizer": "nowhere"}, "no tokenizer 'nowhere'"),
        ({"tag_fields": ("label",)}, "give --languages en tags"),
        ({"tag_fields": ("label",), "transform": "evaluation"}, "tag_fields is for training"),
    ],
)
def test_what_is_out_of_range_is_said(train_shards, change, message):
    with pytest.raises(vlm.UsageError, match=message):
        list(vlm.stream(train_shards, **changed(change)))
