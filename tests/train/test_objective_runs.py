"""Every objective trains from shards, in parts, is resumed, and is refused where its inputs are missing."""

import math
from pathlib import Path

import pytest

from vlm.data.synthetic.shapes import SHAPES
from vlm.errors import UsageError
from vlm.models.model import normalise
from vlm.train.logger import RunLogger
from vlm.train.run import train
from vlm.train.run_setup import open_session
from vlm.train.task import LOSS_TERMS

CAPTIONER = {"architecture": "micro-coca"}
SETTINGS = {
    "clip": {},
    "siglip": {},
    "dcl": {"objective": {"same_pairs": "ignore"}},
    "weighted_dcl": {},
    "sogclr": {},
    "fastclip": {},
    "ranking": {"objective": {"negatives": "hardest"}},
    "caption": {"model": CAPTIONER},
    "cappa": {"model": CAPTIONER},
    "sub_captions": {"objective": {"sub_captions": 2}},
    "joint_sub_captions": {"objective": {"sub_captions": 2}},
    "grouping": {"objective": {"sub_captions": 2}},
    "sparc": {"objective": {"sub_captions": 2}},
    "local_to_global": {"objective": {"local_views": 2}, "optimizer": {"average_decay": 0.9}},
    "dino": {"objective": {"local_views": 2, "prototypes": 32}, "optimizer": {"average_decay": 0.9}},
}
OF_STORED_ARRAYS = {"distill", "text_align"}
OF_CLASSES = {"classify"}


def test_every_term_is_tried():
    assert SETTINGS.keys() | OF_STORED_ARRAYS | OF_CLASSES == LOSS_TERMS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_term_trains_in_parts_and_is_resumed(configure, name):
    settings = {group: dict(values) for group, values in SETTINGS[name].items()}
    expression = f"clip + {name}" if name == "local_to_global" else name
    settings["objective"] = settings.get("objective", {}) | {"objective": expression}
    summary = train(configure(name, steps=2, micro_batch=5, **settings))
    assert math.isfinite(summary.metrics[name])
    summary = train(configure(name, steps=3, micro_batch=10, **settings), resume=True, allow=("steps", "micro_batch"))
    assert summary.steps == 3
    assert summary.skipped_steps == 0


@pytest.fixture
def shapes_file(tmp_path):
    path = tmp_path / "shapes.txt"
    path.write_text("\n".join(SHAPES), encoding="utf-8")
    return path


def test_a_classifier_trains_in_parts_and_is_resumed(configure, shapes_file):
    objective = {"objective": "classify", "class_field": "scene.shape", "class_names": str(shapes_file)}
    summary = train(configure("run", steps=2, micro_batch=5, objective=objective))
    assert 0 < summary.metrics["classify"] < 2 * math.log(len(SHAPES))
    config = configure("run", steps=3, micro_batch=10, objective=objective)
    summary = train(config, resume=True, allow=("steps", "micro_batch"))
    assert (summary.steps, summary.skipped_steps) == (3, 0)


def test_samples_without_a_class_are_replaced_and_counted(configure, shapes_file):
    shapes_file.write_text("\n".join(SHAPES[:-1]), encoding="utf-8")
    objective = {"objective": "classify", "class_field": "scene.shape", "class_names": str(shapes_file)}
    config = configure("run", steps=2, objective=objective, loader={"max_bad": 0.9})
    train(config)
    assert "no class" in (Path(config.run) / "ledger.json").read_text()


def test_a_live_teacher_is_learnt_from(configure):
    teacher = configure("teacher", steps=2)
    train(teacher)
    told = {"objective": "clip + distill", "teacher": teacher.run}
    summary = train(configure("student", steps=3, micro_batch=5, objective=told))
    assert summary.metrics["distill"] > 0


@pytest.mark.parametrize(
    ("objective", "cure"),
    [
        ("distill", "--teacher MODEL"),
        ("sub_captions", "--sub-captions N"),
        ("local_to_global", "--ema-decay"),
        ("classify", "--class-names FILE"),
        ("clip + nonsense", "did you mean|known"),
        ("2**clip", "is not a term"),
        ("clip + clip", "twice"),
    ],
)
def test_what_is_missing_is_named_with_its_cure(configure, objective, cure):
    config = configure("run", objective={"objective": objective})
    with pytest.raises(UsageError, match=cure):
        train(config)
    assert not Path(config.run).exists()


def test_a_locked_tower_stays(configure):
    import torch
    from safetensors.torch import load_file

    first, second = configure("fresh", steps=0), configure("lit", steps=3, model={"lock": "image"})
    train(first)
    train(second)
    before, after = (load_file(Path(run.run) / "model" / "open_clip_model.safetensors") for run in (first, second))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith("visual.")]


def test_trimmed_texts_train_as_whole_ones(configure, history):
    runs = [
        configure(f"trim{trim}", steps=3, model={"architecture": "small"}, loader={"trim_text": trim})
        for trim in (True, False)
    ]
    for config in runs:
        train(config)
    trim_tokens, whole = (history(config.run) for config in runs)
    assert [loss for _, loss, _ in trim_tokens] == pytest.approx([loss for _, loss, _ in whole], rel=1e-5)


def test_flops_are_those_of_rows_of_like_length(configure):
    def flops(name, **loader):
        session = open_session(configure(name, steps=1, model={"architecture": "small"}, loader=loader), resume=False)
        batch = next(session.open_batches())[0]
        padding, session.state.task.padding = session.state.task.padding, None
        inputs = {"pixels": normalise(batch.images, session.state.model.view), "tokens": batch.tokens}
        whole = session.flops.of(inputs)
        session.state.task.padding = padding
        with RunLogger(session) as logger:
            return logger.flops_of(batch), whole, padding

    counted, whole, padding = flops("grouped")
    assert padding is not None
    assert 0.5 * whole < counted < whole
    assert open_session(configure("parts", micro_batch=10), resume=False).state.task.padding is not None
    # groups take a tenth more of the memory that parts of a batch are to save
    grouped = configure("grouped_parts", micro_batch=10, model={"architecture": "timm:test_vit+bag@16"})
    assert open_session(grouped, resume=False).state.task.padding is None
    counted, whole, padding = flops("padded", trim_text=False)
    assert padding is None
    assert counted == pytest.approx(whole, rel=1e-9)


def test_parts_of_trimmed_texts_train_as_the_whole_batch(configure, history):
    objective = {"objective": "dreamlip", "sub_captions": 2}
    runs = [configure(f"parts{size}", steps=3, micro_batch=size, objective=objective) for size in (0, 5)]
    for config in runs:
        train(config)
    whole, parts = (history(config.run) for config in runs)
    assert [loss for _, loss, _ in parts] == pytest.approx([loss for _, loss, _ in whole], rel=1e-4)


def test_runs_of_two_precisions_follow_each_other_in_one_process(configure, history):
    runs = [configure(name, steps=2, precision=precision) for name, precision in (("a", "fp32"), ("b", "bf16"))]
    losses = []
    for config in [*runs, configure("again", steps=2)]:
        train(config)
        losses.append([loss for _, loss, _ in history(config.run)])
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
