"""`vlm caption`: captions of single images, and new captions of all samples of shards."""

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import (
    AllowDamageOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    ModelArgument,
    PrecisionOption,
    RayAddressOption,
    WorkersOption,
)
from vlm.cli.predict import BatchSizeOption, OnErrorOption, check_images
from vlm.console import show_fields, show_json, show_table, spaced_names
from vlm.errors import UsageError
from vlm.models.decoding_options import DecodingOptions

if TYPE_CHECKING:
    from vlm.api.inference import ImageCaption, ImageResults
    from vlm.index.recaption import RecaptionSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Caption images with a model that has a caption decoder, e.g. one of vlm train tiny-coca.

    Of shards, all samples are captioned into a folder beside them, which training mixes in (--captions-from). Safe to
    interrupt: rerun the same command to resume. Several processes can fill one folder together: give --processes, or
    start the command by torchrun, accelerate or srun.
    """

    model: ModelArgument

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|SHARDS")]
    """Image files, and folders of them; or shards: a folder, a pattern, a URL, or several joined by ::."""

    decoding: Annotated[DecodingOptions, tyro.conf.arg(name="")] = field(default_factory=DecodingOptions)

    batch_size: BatchSizeOption = 64

    on_error: OnErrorOption = "raise"

    out: Path | None = None
    """Of shards: folder for the captions; default: captions, in the folder of the shards."""

    workers: WorkersOption = 1

    processes: int = 1
    """Of shards: processes with a model each; on a machine with GPUs each uses one of them."""

    engine: EngineOption = "local"

    ray_address: RayAddressOption = None

    allow_damage: AllowDamageOption = False

    device: DeviceOption = "auto"

    precision: PrecisionOption = "fp32"

    json: JsonOption = False

    def run(self) -> None:
        """Show captions for each image, or what was written for shards."""
        from vlm.api.inference import load

        are_shards = list(map(_is_shards, self.images))
        if any(are_shards):
            if len(are_shards) > 1:
                raise UsageError("Shards are one argument: join several with ::, and caption images by another call.")
            self._caption_shards()
            return
        if self.out is not None or self.processes != 1:
            raise UsageError("--out and --processes are for shards; captions of images go to stdout (--json).")
        if self.engine != "local" or self.ray_address is not None:
            raise UsageError("--engine ray and --ray-address are for shards; images are captioned on this machine.")
        # checked first: a model takes long to load
        check_images(list(map(Path, self.images)))
        results = load(self.model, device=self.device, precision=self.precision).caption(
            self.images, decoding=self.decoding, batch_size=self.batch_size, on_error=self.on_error
        )
        if self.json:
            show_json(results.to_json())
        else:
            _show_captions(results)

    def _caption_shards(self) -> None:
        from vlm.api.training import caption_shards

        summary = caption_shards(
            self.model,
            self.images[0],
            self.out,
            decoding=self.decoding,
            batch_size=self.batch_size,
            workers=self.workers,
            processes=self.processes,
            allow_damage=self.allow_damage,
            device=self.device,
            precision=self.precision,
            engine=self.engine,
            ray_address=self.ray_address,
        )
        if summary.missing_parts:
            logger.info(f"{summary.missing_parts} shards are left to other processes. If those have ended, rerun this.")
        elif self.json:
            show_json(summary)
        else:
            _show_summary(summary, self.images[0])


def _is_shards(argument: str) -> bool:
    from vlm.storage import is_remote, is_shard

    path = Path(argument).expanduser()
    if path.exists():
        return is_shard(path.name) or (path.is_dir() and any(is_shard(entry.name) for entry in path.iterdir()))
    return is_shard(argument) or is_remote(argument) or "::" in argument


def _show_captions(results: "ImageResults[ImageCaption]") -> None:
    rows: list[list[object]] = []
    for result in results:
        if not result.captions:
            rows.append([result.image, "", ""])
        for caption in result.captions:
            rows.append([result.image, caption.caption, f"{caption.log_likelihood:.2f}"])
    show_table(["image", "caption", "log-likelihood"], rows)
    from vlm.evaluation.caption_evaluator import sameness

    if warning := sameness([result.captions[0].caption for result in results if result.captions]):
        logger.warning(warning)


def _show_summary(summary: "RecaptionSummary", shards: str) -> None:
    for reason, count in summary.incidents.items():
        logger.info(f"Skipped for {reason}: {count:,} samples, each listed in {summary.folder}/incidents.jsonl")
    if summary.different == 1 < summary.captioned:
        logger.warning("All captions are the same: the model says one thing of every image.")
    shown = summary.to_json()
    del shown["incidents"]
    show_fields(spaced_names(shown))
    words = ["vlm", "train", "PRESET", "--data", shards, "--captions-from", summary.folder, "--caption-mix", "0.5"]
    logger.info(f"Next: {shlex.join(words)}")
