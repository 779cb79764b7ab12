"""`vlm embed`: shards to embeddings, in one process or several."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.options import (
    AllowDamageOption,
    BackendOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    PrecisionOption,
    RayAddressOption,
    ShardsArgument,
    WorkersOption,
    call_options,
)
from vlm.console import quoted, show_fields, show_json, spaced_names

if TYPE_CHECKING:
    from vlm.api.embedding import EmbedResult
    from vlm.index.embed import EmbedSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed the images, the captions, or both, of shards.

    Safe to interrupt: rerun the same command to resume. Several processes can fill one folder together: give
    --processes, or start the command by torchrun, accelerate or srun. On the CPU the model's ONNX export (vlm export
    MODEL --to onnx) is taken where there is one; a folder is finished by the backend that it was begun with.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, checkpoint, model folder, or open_clip NAME:WEIGHTS; MODEL#64 truncates to 64 dimensions,
    MODEL#mirror embeds each image with its mirror image, at twice the time."""

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

    backend: BackendOption = ""

    engine: EngineOption = "local"

    ray_address: RayAddressOption = None

    compile: bool = False
    """Compile the image tower (torch.compile): a minute or more at the start, then faster."""

    json: JsonOption = False

    def run(self) -> None:
        """Embed, show the summary in the process that finished the work."""
        from vlm.api.embedding import embed

        result = embed(**call_options(self))
        share = result.share
        # a process that is done early cannot tell what is left from what others are still writing
        if share.world_size > 1 and result.missing_parts:
            rows = sum(summary.new_rows for summary in result.summaries)
            logger.info(
                f"Process {share.rank} of {share.world_size} has written {rows:,} rows; {result.missing_parts} parts "
                "are left to other processes. If those have ended, rerun the command."
            )
        # of several processes, only the one that completed the folder reports it
        elif share.world_size == 1 or result.summaries[0].ended_here:
            self._show(result)

    def _show(self, result: "EmbedResult") -> None:
        for summary in result.summaries:
            _log_skipped(summary)
        if self.json:
            show_json(result)
            return
        for summary in result.summaries:
            shown = asdict(summary)
            del shown["incidents"]
            show_fields(spaced_names(shown))
        texts = f" --texts {quoted(result.text.folder)}" if result.image and result.text else ""
        logger.info(f"Next: vlm index build {quoted(result.summaries[0].folder)} INDEX{texts}")


def _log_skipped(summary: "EmbedSummary") -> None:
    """Log the number of skipped samples for each reason."""
    if not summary.incidents:
        return
    width = max(map(len, summary.incidents))
    rows = [f"  {reason:<{width}}  {count:>9,}" for reason, count in summary.incidents.items()]
    logger.info("\n".join([f"Skipped samples, each listed in {summary.folder}/incidents.jsonl:", *rows]))
