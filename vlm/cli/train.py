"""Pretrain or fine-tune on shards.

The first word is a preset (tiny, fashion, flickr8k, emoji, cc3m, …: docs/recipes.md), a TOML file, a run folder (its
configuration), or an architecture. Everything it sets can be overridden by the options below.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_fields, show_json, show_table
from vlm.train.presets import PRESETS, open_preset
from vlm.train.run_config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm train`."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Preset, TOML file, run folder, or open_clip architecture."""

    resume: bool = False
    """Go on from the newest checkpoint of the run, if there is one."""

    allow: tuple[str, ...] = ()
    """Settings, or groups of them, that may change as a run is resumed, e.g. optimizer.learning_rate."""

    json: bool = False
    """Print the result as JSON."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


def defaults(words: list[str]) -> Arguments:
    """The arguments a preset stands for; without one, those of the first preset, for the help text."""
    if not words or words[0].startswith("-"):
        return Arguments(preset=tyro.MISSING, config=next(iter(PRESETS.values()))[1])
    return Arguments(preset=words[0], config=open_preset(words[0]))


def run(arguments: Arguments) -> None:
    """Train, then say what came out and what to type next."""
    from accelerate import PartialState

    from vlm.train.run import train

    summary = train(arguments.config, resume=arguments.resume, allow=arguments.allow)
    if not PartialState().is_main_process:
        return
    if arguments.json:
        show_json(asdict(summary))
        return
    facts = {"steps": summary.steps, "samples": summary.samples, "bad samples": summary.bad_samples}
    facts |= {"skipped steps": summary.skipped_steps}
    facts |= {"minutes": round(summary.seconds / 60, 2)}
    facts |= {
        name: value for name, value in summary.metrics.items() if isinstance(value, float) and "memory" not in name
    }
    show_fields(facts, title=summary.run)
    columns, rows = summary.ledger
    show_table(columns, rows, title="what became of the samples (visits; the shards that lost most)")
    logger.info(f"Curves: {Path(summary.run) / 'curves.png'}\nNext: vlm eval {summary.run} --retrieval SHARDS")
