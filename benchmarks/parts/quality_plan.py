"""The runs of the quality benchmark, checked before the first starts."""

from dataclasses import replace
from pathlib import Path

from parts.messages import say
from parts.quality_data import DataSet
from parts.quality_runs import Run, Trainer, our_words
from parts.quality_settings import ABLATIONS, EVERYTHING, OPEN_CLIP, OURS, THEIR_VARIANTS

from vlm.cli.main import parse_verb
from vlm.cli.train import Train
from vlm.train.run_config import TrainConfig


def recipe_run(data: DataSet, trainer: Trainer, *, seed: int, epochs: int, batch_size: int) -> Run:
    """A run of a side's recipe."""
    words = OURS[data.name] if trainer == "ours" else OPEN_CLIP
    run = Run(
        data=data,
        trainer=trainer,
        name=trainer,
        seed=seed,
        words=tuple(words),
        epochs=epochs,
        batch_size=batch_size,
    )
    configuration(run)
    return run


def ablated_runs(ours: Run) -> list[Run]:
    """Ours with each changed default reverted, one at a time, then all of them."""
    found = [replace(ours, name=name, words=(*ours.words, *words)) for name, words in ABLATIONS.items()]
    changed = [run for run in found if configuration(run) != configuration(ours)]
    left_out = [run.name for run in found if run not in changed]
    if left_out:
        say(f"{ours.data.name}: nothing to revert, since our recipe has open_clip's setting: {', '.join(left_out)}")
    everything = tuple(word for words in ABLATIONS.values() for word in words)
    return [*changed, replace(ours, name=EVERYTHING, words=(*ours.words, *everything))]


def their_variants(theirs: Run) -> list[Run]:
    """open_clip with one of our settings."""
    return [
        replace(theirs, name=f"open_clip, {name}", words=(*theirs.words, *words))
        for name, words in THEIR_VARIANTS.items()
    ]


def configuration(run: Run) -> TrainConfig | None:
    """The configuration that our trainer derives from the options; None for open_clip."""
    if run.trainer != "ours":
        return None
    verb = parse_verb("train", our_words(run, Path("run")))
    assert isinstance(verb, Train)
    verb.config.check()
    return verb.config
