"""Put what teachers make of pictures and captions into shards, once, for every training that follows.

Each picture is shown to the teachers in drawn views; the seeds of the views and the teachers' embeddings are stored
beside it, with those of every caption. vlm train then shows the student the very same views and needs no teacher:
--objective 'clip + distill' --arrays teacher_image teacher_text, with the --crop-scale and --flip of here. --text-model
stores embeddings of the captions by another model: for --objective text_align, or for a frozen language model as text
tower.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.console import show_fields, show_json

if TYPE_CHECKING:
    from vlm.train.reinforce import Teachers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm reinforce`."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to reinforce, of any origin; they are left as they are."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the new shards; interrupted, the same command goes on."""

    teacher: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run folder, model folder, or open_clip NAME:WEIGHTS; of several, the similarities are averaged."""

    views: int = 5
    """Views of each picture."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of a view's share of the picture's area; the student needs the same."""

    flip: float = 0.0
    """Probability of mirroring a view; the student needs the same."""

    seed: int = 0
    """Of the views."""

    text_model: str = ""
    """MODEL, or Hugging Face folder of a language model, whose embeddings of the captions are stored."""

    pooling: Literal["", "mean", "last"] = ""
    """States of a language model that become the embedding; empty is the last."""

    context_length: int = 0
    """Tokens of a caption a language model reads; 0 is 77."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A facet prompt for a language model; the embeddings of several are laid side by side (FLAME)."""

    half: bool = False
    """Store the embeddings of --text-model in float16; those of teachers always are."""

    batch_size: int = 256
    """Views a teacher sees at once."""

    workers: int = 1
    """Processes that read and decode."""

    allow_damage: bool = False
    """Copy and embed the whole samples of shards that are cut short."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the models; a language model always takes fp32."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Load the models, write the shards, say how to train on them."""
    from vlm.data.shards import expand_shards
    from vlm.train.reinforce import ReinforceConfig, reinforce
    from vlm.train.teacher_views import ViewGeometry

    config = ReinforceConfig(
        num_views=arguments.views,
        geometry=ViewGeometry(crop_scale=arguments.crop_scale, flip=arguments.flip),
        seed=arguments.seed,
        half=arguments.half,
    )
    shards = expand_shards(arguments.shards)
    summary = reinforce(
        shards,
        arguments.out,
        _teachers(arguments),
        config,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        allow_damage=arguments.allow_damage,
    )
    if arguments.json:
        show_json(asdict(summary))
        return
    facts = {name: value for name, value in asdict(summary).items() if value != {}}
    show_fields({name.replace("_", " "): value for name, value in facts.items()})
    logger.info(_next(arguments))


def _teachers(arguments: Arguments) -> "Teachers":
    from vlm.models.load import load_model
    from vlm.models.text_embedder import load_text_model
    from vlm.train.reinforce import Teachers

    on = {"device": arguments.device, "precision": arguments.precision}
    text_model = None
    if arguments.text_model:
        text_model = load_text_model(
            arguments.text_model,
            context_length=arguments.context_length,
            pooling=arguments.pooling,
            prompts=arguments.prompt,
            **on,
        )
    return Teachers(
        models=tuple(load_model(teacher, **on) for teacher in arguments.teacher),
        names=arguments.teacher,
        text_model=text_model,
        text_name=arguments.text_model,
    )


def _next(arguments: Arguments) -> str:
    low, high = arguments.crop_scale
    if not arguments.teacher:
        return f"Next: vlm train … --data {arguments.out} --arrays text_embedding"
    return (
        f"Next: vlm train … --data {arguments.out} --objective 'clip + distill' --arrays teacher_image teacher_text "
        f"--crop-scale {low:g} {high:g} --flip {arguments.flip:g}"
    )
