"""`vlm train`: shards to a run, with what it may take beside them: `vlm tokenizer train`, `vlm relate`."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.cli.options import (
    JsonOption,
    PresetArgument,
    ShardsArgument,
    WorkersOption,
    call_options,
    preset_defaults,
)
from vlm.console import quoted, show_fields, show_json, show_table, spaced_names
from vlm.train.run_config import TrainConfig

if TYPE_CHECKING:
    from vlm.train.run import RunSummary

logger = logging.getLogger(__name__)


_HIDDEN_METRICS = ("memory_bytes", "samples_per_second", "images_per_second", "eta_seconds", "seconds")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Pretrain or fine-tune on shards.

    PRESET is a preset (tiny, fashion, flickr8k, finetune, cc3m, …: docs/recipes.md), a TOML file, a run folder (its
    configuration), or an architecture. The options override its settings. A TOML file holds what differs from the
    preset that it names: preset = "tiny" in its first line, then settings, those of a group in its [table].
    """

    preset: PresetArgument

    resume: bool = False
    """Resume from the newest checkpoint of the run, if there is one."""

    allow: tuple[str, ...] = ()
    """Settings, or groups of them, that may change on resume, e.g. optimizer.learning_rate."""

    processes: int = 1
    """Processes on this machine that share each batch, each with a GPU of its own if there are any."""

    json: JsonOption = False

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    @classmethod
    def defaults(cls, words: list[str]) -> "Train":
        """The configuration of the preset; without one that of the first preset, for the help text."""
        return cls(**preset_defaults(words, resume="--resume" in words))

    def run(self) -> None:
        """Train, then show the summary on the main process."""
        from accelerate import PartialState

        from vlm.api.training import train

        summary = train(self.config, resume=self.resume, allow=self.allow, processes=self.processes)
        # under torchrun every process runs this verb; one of them reports
        if not PartialState().is_main_process:
            return
        if self.json:
            show_json(summary)
            return
        show_summary(summary)


def show_summary(summary: "RunSummary") -> None:
    """The metrics of a run, and what became of its samples."""
    from vlm.train.history import format_metric

    fields: dict[str, Any] = {
        "steps": summary.steps,
        "samples": summary.samples,
        "bad samples": summary.bad_samples,
        "skipped steps": summary.skipped_steps,
        "minutes": round(summary.seconds / 60, 2),
        "samples/s": round(summary.samples_per_second, 1),
    }
    for name, value in summary.metrics.items():
        if name in _HIDDEN_METRICS or not isinstance(value, float):
            continue
        fields[name] = format_metric(name, value)
    show_fields(fields, title=summary.run)
    columns, rows = summary.ledger
    show_table(columns, rows, title="sample ledger (visits; the shards that lost most)")
    if summary.band:
        # outside is worth more than a line among others
        tell = logger.info if summary.band.is_inside else logger.warning
        tell(summary.band.summary())
    logger.info(f"Curves: {Path(summary.run) / 'curves.png'}\nNext: vlm eval {quoted(summary.run)} --retrieval SHARDS")


@dataclass(frozen=True, kw_only=True)
class Relate:
    """Find samples with equal captions or nearly the same image and, given embeddings, the nearest neighbours of each.

    vlm train --batches distinct keeps equal samples out of one batch, --batches hard puts similar ones into one; both
    read the file by --relations.
    """

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.relations")]
    """File to write."""

    languages: tuple[str, ...] = ()
    """Languages of the captions to compare; empty takes the first of each sample, as vlm train does."""

    captions_only: bool = False
    """Do not look for near-duplicate images, which decodes every image."""

    embeddings: Path | None = None
    """Image embeddings of the same shards, made by vlm embed: store the nearest neighbours of each sample."""

    neighbours: int = 32
    """Number of neighbours of a sample."""

    workers: WorkersOption = 1

    json: JsonOption = False

    def run(self) -> None:
        """Relate, show the counts."""
        from vlm.api.data import relate

        summary = relate(
            self.shards,
            self.out,
            languages=self.languages,
            images=not self.captions_only,
            embeddings=self.embeddings,
            neighbours=self.neighbours,
            workers=self.workers,
        )
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        batches = "hard" if summary.neighbours else "distinct"
        logger.info(f"Next: vlm train PRESET --data SHARDS --relations {quoted(self.out)} --batches {batches}")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer on the captions of shards, for `vlm train --tokenizer OUT`."""

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Model file to write, ending in .model."""

    vocabulary: int = 8192
    """Maximum vocabulary size; fewer pieces if the captions do not yield as many."""

    languages: tuple[str, ...] = ()
    """Caption languages to train on; empty uses all."""

    json: JsonOption = False

    def run(self) -> None:
        """Train, show."""
        from vlm.api.data import train_tokenizer

        summary = train_tokenizer(**call_options(self))
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        logger.info(f"Next: vlm train PRESET --data SHARDS --run DIR --tokenizer {quoted(self.out)}")
