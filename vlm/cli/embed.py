"""Embed the pictures, the captions, or both, of shards. Killed and repeated, it goes on where it was.

Several processes fill one folder together: give --processes, or start the command by torchrun, accelerate or srun.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.launch import run_in_processes
from vlm.console import show_fields, show_json
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.index.embed import EmbedSummary, ProcessRank
    from vlm.index.embeddings import Modality

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm embed`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, model folder, or open_clip NAME:WEIGHTS; MODEL#64 keeps the first 64 dimensions."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards to embed."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the embeddings."""

    modality: Literal["image", "text", "both"] = "image"
    """Embed each picture, or each caption; both in one pass into OUT/images and OUT/texts."""

    batch_size: int | Literal["auto"] = 256
    """Samples at once; auto tries which is fastest."""

    workers: int = 1
    """Processes that read and decode ahead of the model; with 0, reading and the model take turns."""

    processes: int = 1
    """Processes with a model each, on the GPUs of this machine in turn."""

    allow_damage: bool = False
    """Embed the whole samples of shards that are cut short."""

    selection: Path | None = None
    """Embed only what this file of vlm curate selects."""

    store: Literal["float16", "float32"] = "float16"
    """How vectors are kept."""

    codes: tuple[Literal["int8", "binary"], ...] = ()
    """Short forms to keep beside them."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model."""

    compile: bool = False
    """Compile the model's part for pictures, which takes a minute or more and makes it faster."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Embed, in as many processes as wished for."""
    from vlm.index.embed import ProcessRank

    share = ProcessRank.from_environment()
    if arguments.processes < 1:
        raise UsageError(f"--processes {arguments.processes}: one at least is needed.")
    if arguments.processes == 1:
        embed(arguments)
        return
    if share.world_size > 1:
        raise UsageError(f"A launcher has started {share.world_size} processes already; leave --processes out.")
    if arguments.device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {arguments.device}: each of several processes takes a GPU of its own; leave it out."
        )
    run_in_processes(embed, arguments, arguments.processes)


def embed(arguments: Arguments) -> None:
    """Load the model, embed this process's share; the process that ends the work says what there is."""
    from vlm.data.selection import read_selection
    from vlm.data.shards import expand_shards
    from vlm.index.embed import EmbedOptions, ProcessRank, embed_into
    from vlm.index.embeddings import VectorStorage
    from vlm.models.load import load_model

    share, shards, folders = ProcessRank.from_environment(), expand_shards(arguments.shards), _folders(arguments)
    options = EmbedOptions(
        model_spec=arguments.model,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        allow_damage=arguments.allow_damage,
        selection=read_selection(arguments.selection) if arguments.selection else None,
        storage=VectorStorage(store=arguments.store, codes=tuple(sorted(set(arguments.codes)))),
        is_compiled=arguments.compile,
        precision=arguments.precision,
        share=share,
    )
    model = load_model(arguments.model, device=_device(arguments.device, share), precision=arguments.precision)
    summaries = list(embed_into(model, shards, folders, options).values())
    if share.world_size > 1 and (missing := max(summary.missing_parts for summary in summaries)):
        rows = sum(summary.new_rows for summary in summaries)
        logger.info(
            f"Process {share.rank} of {share.world_size} has written {rows:,} rows; "
            f"{missing} parts are left to others. "
            "If those have ended, repeat the command."
        )
    elif share.world_size == 1 or summaries[0].ended_here:
        _show(summaries, arguments)


def _folders(arguments: Arguments) -> "dict[Modality, Path]":
    if arguments.modality != "both":
        return {arguments.modality: arguments.out}
    from vlm.manifest import MANIFEST, PROGRESS

    if any((arguments.out / name).exists() for name in (MANIFEST, PROGRESS)):
        raise UsageError(f"{arguments.out} holds other work; --modality both needs a folder of its own.")
    return {"image": arguments.out / "images", "text": arguments.out / "texts"}


def _device(wished: str, share: "ProcessRank") -> str:
    """Of several processes on a machine with GPUs, each takes the one of its number."""
    import torch

    if wished != "auto" or share.world_size == 1 or not torch.cuda.is_available():
        return wished
    return f"cuda:{share.local_rank % torch.cuda.device_count()}"


def _show(summaries: "list[EmbedSummary]", arguments: Arguments) -> None:
    for summary in summaries:
        _say_incidents(summary)
    if arguments.json:
        by_modality = {summary.modality: asdict(summary) for summary in summaries}
        show_json(by_modality if arguments.modality == "both" else asdict(summaries[0]))
        return
    for summary in summaries:
        facts = {name.replace("_", " "): value for name, value in asdict(summary).items() if name != "incidents"}
        show_fields(facts)
    texts = " --texts " + summaries[1].folder if len(summaries) > 1 else ""
    logger.info(f"Next: vlm index build {summaries[0].folder} INDEX{texts}")


def _say_incidents(summary: "EmbedSummary") -> None:
    """A table of what was left out, on stderr."""
    if not summary.incidents:
        return
    width = max(map(len, summary.incidents))
    rows = [f"  {reason:<{width}}  {count:>9,}" for reason, count in summary.incidents.items()]
    logger.info("\n".join([f"Left out, each named in {summary.folder}/incidents.jsonl:", *rows]))
