"""`vlm reinforce`: shards to shards with precomputed teacher embeddings."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.cli.options import DeviceOption, JsonOption, ShardsArgument, WorkersOption, call_options
from vlm.console import quoted, show_fields, show_json, spaced_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Precompute teacher embeddings and store them in the shards (dataset reinforcement).

    The teachers see several augmented views of each image; the seeds of the views and the teachers' embeddings are
    stored next to the image, with those of every caption. vlm train then shows the student the very same views and
    needs no teacher: --objective 'clip + distill' --arrays teacher_image teacher_text, with the same --crop-scale and
    --flip as here. --text-model stores embeddings of the captions by another model: for --objective text_align, or for
    a frozen language model as text tower.
    """

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the new shards; to resume, rerun the same command."""

    teacher: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run folder, model folder, or open_clip NAME:WEIGHTS; similarities of several teachers are averaged."""

    views: int = 5
    """Augmented views per image."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of a view's share of the image area; the student needs the same."""

    flip: float = 0.0
    """Probability of a horizontal flip; the student needs the same."""

    seed: int = 0
    """Random seed of the views."""

    text_model: str = ""
    """MODEL, or Hugging Face folder of a language model, whose caption embeddings are stored."""

    pooling: Literal["", "mean", "last"] = ""
    """Pooling of a language model's hidden states; empty uses the last."""

    context_length: int = 0
    """Context length of a language model in tokens; 0 uses 77."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Facet prompt for a language model; embeddings of several prompts are concatenated (FLAME)."""

    half: bool = False
    """Store the embeddings of --text-model in float16; those of teachers always are."""

    batch_size: int = 256
    """Views per batch of a teacher."""

    workers: WorkersOption = 1

    allow_damage: Annotated[bool, tyro.conf.arg(help="Copy and embed the intact samples of truncated shards.")] = False

    device: DeviceOption = "auto"

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the models' forward pass; a language model always uses fp32."""

    json: JsonOption = False

    def run(self) -> None:
        """Load the models, write the shards, log how to train on them."""
        from vlm.api.training import reinforce

        summary = reinforce(**call_options(self))
        if self.json:
            show_json(summary)
            return
        fields = {name: value for name, value in asdict(summary).items() if value != {}}
        show_fields(spaced_names(fields))
        logger.info(f"Next: vlm train … --data {quoted(self.out)} {self._train_flags()}")

    def _train_flags(self) -> str:
        # without a teacher only --text-model has stored something
        if not self.teacher:
            return "--arrays text_embedding"
        # stored teacher embeddings belong to views of this geometry: training must draw the same ones
        low, high = self.crop_scale
        return (
            f"--objective 'clip + distill' --arrays teacher_image teacher_text --crop-scale {low:g} {high:g} "
            f"--flip {self.flip:g}"
        )
