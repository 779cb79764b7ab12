"""`vlm embed`: shards to embeddings, in one process or several."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.launch import run_in_processes
from vlm.cli.options import AllowDamageOption, DeviceOption, JsonOption, PrecisionOption, ShardsArgument, WorkersOption
from vlm.console import show_fields, show_json, spaced_names
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.index.embed import EmbedSummary, ProcessRank
    from vlm.index.embeddings_folder import Modality

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed the images, the captions, or both, of shards.

    Safe to interrupt: rerun the same command to resume. Several processes can fill one folder together: give
    --processes, or start the command by torchrun, accelerate or srun.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, checkpoint, model folder, or open_clip NAME:WEIGHTS; MODEL#64 truncates to 64 dimensions."""

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the embeddings."""

    modality: Literal["image", "text", "both"] = "image"
    """Embed each image, each caption, or both in one pass into OUT/images and OUT/texts."""

    batch_size: int | Literal["auto"] = 256
    """Batch size; auto times several and uses the fastest."""

    workers: WorkersOption = 1

    processes: int = 1
    """Processes with a model each; on a machine with GPUs each uses one of them."""

    allow_damage: AllowDamageOption = False

    selection: Path | None = None
    """Embed only samples of this selection file of vlm curate."""

    store: Literal["float16", "float32"] = "float16"
    """Precision of the stored vectors."""

    quantize: tuple[Literal["int8", "binary"], ...] = ()
    """Store quantized embeddings, too."""

    device: DeviceOption = "auto"

    precision: PrecisionOption = "fp32"

    compile: bool = False
    """Compile the image tower (torch.compile): a minute or more at the start, then faster."""

    json: JsonOption = False

    def run(self) -> None:
        """Embed in this process, or start the others that do."""
        from vlm.index.embed import ProcessRank

        rank = ProcessRank.from_environment()
        if self.processes < 1:
            raise UsageError(f"--processes {self.processes} is out of range: give at least 1.")
        if self.processes == 1:
            embed_share(self)
            return
        if rank.world_size > 1:
            raise UsageError(f"A launcher has started {rank.world_size} processes already; omit --processes.")
        # one named GPU would hold a model of each process
        if self.device not in ("auto", "cpu"):
            raise UsageError(f"--device {self.device}: each of several processes uses a GPU of its own; omit --device.")
        run_in_processes(embed_share, self, self.processes)


def embed_share(arguments: Embed) -> None:
    """Load the model and embed this process's share; the process that finishes the work shows the result."""
    from vlm.data.pack import shards_at
    from vlm.data.selection import read_selection
    from vlm.index.embed import EmbedOptions, ProcessRank, embed_into
    from vlm.index.embeddings_folder import VectorStorage
    from vlm.models.load import load_model

    rank = ProcessRank.from_environment()
    shards = shards_at(arguments.shards)
    # both modalities in one pass, so that each shard is read once
    folders = _output_folders(arguments)
    options = EmbedOptions(
        model_spec=arguments.model,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        allow_damage=arguments.allow_damage,
        selection=read_selection(arguments.selection) if arguments.selection else None,
        storage=VectorStorage(store=arguments.store, codes=tuple(sorted(set(arguments.quantize)))),
        is_compiled=arguments.compile,
        precision=arguments.precision,
        share=rank,
    )
    device = _device_of_rank(arguments.device, rank)
    model = load_model(arguments.model, device=device, precision=arguments.precision)
    summaries = list(embed_into(model, shards, folders, options).values())
    # a process that is done early cannot tell what is left from what others are still writing
    missing_parts = max(summary.missing_parts for summary in summaries)
    if rank.world_size > 1 and missing_parts:
        rows = sum(summary.new_rows for summary in summaries)
        logger.info(
            f"Process {rank.rank} of {rank.world_size} has written {rows:,} rows; {missing_parts} parts are left to "
            "other processes. If those have ended, rerun the command."
        )
    # of several processes, only the one that completed the folder reports it
    elif rank.world_size == 1 or summaries[0].ended_here:
        _show_summaries(summaries, arguments)


def _output_folders(arguments: Embed) -> "dict[Modality, Path]":
    if arguments.modality != "both":
        return {arguments.modality: arguments.out}
    from vlm.manifest import MANIFEST, PROGRESS

    # the marks of an output folder of one modality, which subfolders would be lost in
    if any((arguments.out / name).exists() for name in (MANIFEST, PROGRESS)):
        raise UsageError(f"{arguments.out} holds other output; --modality both needs a folder of its own.")
    return {"image": arguments.out / "images", "text": arguments.out / "texts"}


def _device_of_rank(device: str, rank: "ProcessRank") -> str:
    """With several processes on a machine with GPUs, each uses the GPU of its local rank."""
    import torch

    if device != "auto" or rank.world_size == 1 or not torch.cuda.is_available():
        return device
    # more processes than GPUs share them in turn
    return f"cuda:{rank.local_rank % torch.cuda.device_count()}"


def _show_summaries(summaries: "list[EmbedSummary]", arguments: Embed) -> None:
    for summary in summaries:
        _log_skipped(summary)
    if arguments.json:
        by_modality = {summary.modality: asdict(summary) for summary in summaries}
        show_json(by_modality if arguments.modality == "both" else asdict(summaries[0]))
        return
    for summary in summaries:
        fields = asdict(summary)
        del fields["incidents"]
        show_fields(spaced_names(fields))
    texts = f" --texts {summaries[1].folder}" if len(summaries) > 1 else ""
    logger.info(f"Next: vlm index build {summaries[0].folder} INDEX{texts}")


def _log_skipped(summary: "EmbedSummary") -> None:
    """Log the number of skipped samples for each reason."""
    if not summary.incidents:
        return
    width = max(map(len, summary.incidents))
    rows = [f"  {reason:<{width}}  {count:>9,}" for reason, count in summary.incidents.items()]
    logger.info("\n".join([f"Skipped samples, each listed in {summary.folder}/incidents.jsonl:", *rows]))
