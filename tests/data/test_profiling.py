import os
from dataclasses import replace
from typing import Any, cast

import pytest

from vlm.data.bottleneck_report import find_bottleneck
from vlm.data.profiling import (
    PARTS,
    LoaderRate,
    PipelineProfile,
    ProfileSetup,
    Stage,
    StageName,
    cached_share,
    measure_disk,
    measure_index,
    measure_loader,
    measure_preparation,
    measure_worker_transfer,
    seconds_of,
)
from vlm.data.shards import expand_shards
from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import UsageError, VlmError

RATES = {
    "disk, in order": 90_000,
    "disk, at random": 40_000,
    "index, scanned": 50_000,
    "index, cached": 1_000_000,
    "read": 20_000,
    "decode": 1_000,
    "view": 4_000,
    "tokenize": 30_000,
    "stack": 20_000,
    "assemble": 720,
    "hand-over": 20_000,
}
COMPUTING = {"copy to device": 100_000, "model, forward": 5_000, "model, forward and backward": 1_200}


def profile(*, cores=8, loader=((0, 740), (1, 730), (2, 1_450), (4, 2_900)), shares_cores=False, **changes):
    """Made-up measurements: rates by stage, `_` for spaces; None leaves a stage out."""
    rates = RATES | COMPUTING
    for name, rate in changes.items():
        rates[
            {
                "step": "model, forward and backward",
                "copy": "copy to device",
                "in_order": "disk, in order",
                "at_random": "disk, at random",
                "hand_over": "hand-over",
                "forward": "model, forward",
            }.get(name, name)
        ] = rate
    stages = tuple(
        Stage(name=cast(StageName, name), rate=rate, cores=1, each="process")
        for name, rate in rates.items()
        if rate is not None
    )
    return PipelineProfile(
        cores=cores,
        busy_cores=0.0,
        device="made up",
        shares_cores=shares_cores,
        precision="fp32",
        samples=512,
        unusable=0,
        batch_size=64,
        size=224,
        picture_format="JPEG",
        shrink=1.2,
        stages=stages,
        loader=tuple(LoaderRate(workers=w, rate=rate, first_batch_seconds=0.1) for w, rate in loader),
    )


NO_MODEL: dict[str, Any] = {"step": None, "forward": None, "copy": None}


@pytest.mark.parametrize(
    ("changes", "slowest", "workers"),
    [
        ({}, "model, forward and backward", 2),
        ({"step": 300}, "model, forward and backward", 1),
        ({"step": None}, "decode", 4),
        ({"step": None, "forward": 1_000}, "model, forward", 2),
        ({"step": 50_000}, "decode", 4),
        ({"step": 50_000, "view": 500}, "view", 4),
        ({"step": 50_000, "tokenize": 400}, "tokenize", 4),
        ({"step": 50_000, "read": 300}, "read", 4),
        ({"step": 50_000, "stack": 600}, "stack", 4),
        ({"step": 50_000, "hand_over": 500}, "hand-over", 4),
        ({"step": 50_000, "at_random": 500}, "disk, at random", 4),
        ({"step": 50_000, "in_order": 1_000}, "disk, in order", 4),
        ({"step": 50_000, "copy": 2_000}, "copy to device", 4),
        (NO_MODEL, "decode", 4),
    ],
)
def test_the_slowest_stage_of_the_chain_is_named(changes, slowest, workers):
    report = find_bottleneck(profile(**changes))
    assert (report.slowest, report.workers) == (slowest, workers)


def test_the_rate_of_the_chain_is_that_of_its_slowest_stage():
    assert find_bottleneck(profile()).rate == 1_200
    assert find_bottleneck(profile(step=50_000)).rate == 2_900


def test_on_a_cpu_model_and_workers_take_turns():
    report = find_bottleneck(profile(shares_cores=True, cores=2, step=1_000, loader=((0, 740), (1, 750), (2, 1_500))))
    assert report.rate == pytest.approx(1 / (1 / 1_000 + 1 / 1_500))
    assert "share the 2 cores" in report.sentences[-1]


def test_workers_past_the_cores_are_not_advised():
    report = find_bottleneck(profile(cores=2, loader=((0, 740), (1, 730), (2, 1_450), (4, 1_460)), step=50_000))
    assert report.workers == 2
    assert any("more bring nothing (you have 2 cores)" in sentence for sentence in report.sentences)
    assert any("give 2.0× one" in sentence for sentence in report.sentences)


def test_more_workers_are_advised_where_cores_are_left():
    assert any("try more" in sentence for sentence in find_bottleneck(profile(step=50_000)).sentences)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"picture_format": "PNG"}, "store the images as JPEG"),
        ({"shrink": 4.0}, "shrink them to a shorter side of 258 px"),
        ({}, "more cores"),
    ],
)
def test_the_remedy_for_decoding_depends_on_the_images(changes, words):
    assert words in find_bottleneck(replace(profile(step=50_000), **changes)).sentences[1]


def test_the_precision_in_use_is_not_advised_again():
    assert "bf16" in find_bottleneck(profile()).sentences[1]
    assert "bf16" not in find_bottleneck(replace(profile(), precision="bf16")).sentences[1]


def test_other_work_on_the_machine_is_told():
    assert "repeat this when the machine is quiet" in find_bottleneck(replace(profile(), busy_cores=1.5)).sentences[-1]
    assert not any("quiet" in sentence for sentence in find_bottleneck(replace(profile(), busy_cores=0.4)).sentences)


def test_without_a_model_its_absence_is_said():
    assert "Give MODEL" in find_bottleneck(profile(**NO_MODEL)).sentences[0]


@pytest.fixture
def setup(scene_shards, scene_tokenizer):
    return ProfileSetup(
        shards=tuple(expand_shards(str(scene_shards / "train"))),
        view=RandomResizedCrop(size=32),
        tokenizer=open_tokenizer(str(scene_tokenizer)),
        samples=48,
        batch_size=16,
    )


def test_every_stage_of_preparing_is_measured(setup):
    found = measure_preparation(setup)
    assert [stage.name for stage in found.stages] == [*PARTS, "assemble"]
    assert all(stage.rate > 0 and stage.each == "process" for stage in found.stages)
    assert (found.unusable, found.picture_format, found.shrink) == (0, "JPEG", 1.0)


def test_the_disk_and_the_index_are_measured(setup):
    places = [(sample_index.shard, sample_index.number) for sample_index in setup.plan()[0]]
    disk = measure_disk(setup.shards, places)
    assert [stage.name for stage in disk] == ["disk, in order", "disk, at random"]
    assert all(stage.bytes_rate and stage.bytes_rate > stage.rate for stage in disk)
    assert [stage.name for stage in measure_index(setup.shards)] == ["index, scanned", "index, cached"]


def test_measuring_the_index_writes_nothing_new(setup):
    measure_index(setup.shards)
    folder = os.path.dirname(setup.shards[0])
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder)}
    measure_index(setup.shards)
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder)} == before


def test_the_loader_is_measured_with_each_number_of_workers(setup):
    hand_over = measure_worker_transfer(setup)
    assert hand_over.rate > 0
    assert hand_over.bytes_rate == pytest.approx(hand_over.rate * (3 * 32 * 32 + 8 * setup.tokenizer.context_length))
    assert [tried.workers for tried in measure_loader(setup, (0, 1))] == [0, 1]


def test_samples_that_cannot_be_used_are_counted(tmp_path, make_image, setup):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as tar:
        for number in range(16):
            image = make_image(number) if number else b"no image"
            tar.write({"__key__": str(number), "jpg": image, "txt": b"a thing"})
    found = measure_preparation(replace(setup, shards=(str(tmp_path / "0.tar"),), samples=16))
    assert found.unusable == 1


def test_shards_without_a_usable_sample_end_in_a_sentence(tmp_path, setup):
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "0.tar"), encoder=False, mtime=0) as tar:
        for number in range(16):
            tar.write({"__key__": str(number), "jpg": b"no image", "txt": b"a thing"})
    with pytest.raises(VlmError, match="None of 16 samples can be used"):
        measure_preparation(replace(setup, shards=(str(tmp_path / "0.tar"),), samples=16))


@pytest.mark.parametrize(("samples", "batch_size"), [(8, 16), (0, 1), (8, 0)])
def test_samples_must_hold_a_batch(setup, samples, batch_size):
    with pytest.raises(UsageError, match="must hold a batch"):
        replace(setup, samples=samples, batch_size=batch_size)


def test_a_file_just_written_lies_in_the_page_cache(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert cached_share(str(tmp_path / "file")) in (1.0, None)


def test_seconds_are_the_median_and_leave_out_what_comes_before():
    calls = []
    assert seconds_of(lambda: calls.append("work"), before=lambda: calls.append("before")) > 0
    assert calls == ["before", "work"] * 3
