"""What a model says of single images: `vlm classify`, `vlm caption` (also of all samples of shards), `vlm explain`."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.options import (
    AllowDamageOption,
    BackendOption,
    DeviceOption,
    EngineOption,
    ImageArguments,
    JsonOption,
    ModelArgument,
    PrecisionOption,
    RayAddressOption,
    WorkersOption,
)
from vlm.console import bar, show_fields, show_json, show_table, spaced_names
from vlm.errors import UsageError
from vlm.models.decoding_options import DecodingOptions

if TYPE_CHECKING:
    from vlm.api.inference import ImageCaption, ImageResults
    from vlm.index.recaption import RecaptionSummary

logger = logging.getLogger(__name__)


BatchSizeOption = Annotated[int, tyro.conf.arg(help="Images in one forward pass of the model.")]
OnErrorOption = Annotated[
    Literal["raise", "skip"], tyro.conf.arg(help="What to do with an image that cannot be used: end, or report it.")
]


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Classify images into any classes by their names: vlm classify MODEL cat.jpg --classes cat,dog,car."""

    model: ModelArgument

    images: ImageArguments

    classes: str
    """Candidate classes: a,b,c or a file with one per line."""

    templates: tuple[str, ...] = ()
    """Prompt templates with {} or {c} for the class name, files with one per line, or names of sets such as openai (80)
    and simple (7); default: three common ones."""

    class_descriptions: str = ""
    """JSON file with a list of sentences for each class, as prompts beside the templates given, or alone."""

    top: int = 5
    """Classes shown per image."""

    reject: str = ""
    """Say `none of these` of images below this threshold: a cosine with the nearest class, or the reject.safetensors of
    vlm eval --out-of-distribution."""

    batch_size: BatchSizeOption = 64

    on_error: OnErrorOption = "raise"

    device: DeviceOption = "auto"

    backend: BackendOption = ""

    json: JsonOption = False

    def run(self) -> None:
        """Show the most probable classes of each image."""
        from vlm.api.inference import load, read_prompts
        from vlm.evaluation.rejection import read_reject_rule
        from vlm.service.query import chosen_backend

        # these are checked first: a model takes long to load
        prompts = read_prompts(self.classes, self.templates, self.class_descriptions)
        rule = read_reject_rule(self.reject) if self.reject else None
        check_images(self.images)
        results = load(self.model, device=self.device, backend=chosen_backend(self.backend)).classify(
            self.images,
            prompts,
            top=self.top,
            reject=rule,
            batch_size=self.batch_size,
            on_error=self.on_error,
        )
        if self.json:
            show_json(results.to_json())
            return
        for result in results:
            rows = [[entry.name, entry.probability, bar(entry.probability)] for entry in result.classes]
            rejected = f": {result.best} (score {result.reject_score:.4g})" if result.is_rejected else ""
            show_table(["class", "probability", ""], rows, title=f"{result.image}{rejected}")


def check_images(images: Sequence[Path]) -> None:
    """Refuse folders without images, and no image at all."""
    from vlm.api.image_batches import name_images

    if not name_images(images):
        raise UsageError("No image was given.")


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
        from vlm.api.embedding import caption_shards

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


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Show which parts of an image make a model match it with a text: vlm explain MODEL cat.jpg "a cat" --out why.png.

    Writes the image and, beside it in grey, the heat map of the text and of each word: dark where nothing is for it.
    """

    model: ModelArgument

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What the image is compared with."""

    out: Path = Path("explanation.png")
    """File to write: .png for the figure, .npy for the map of the text as numbers."""

    method: Literal["auto", "attention", "grad-cam", "hires-cam", "similarity", "eigen-cam", "occlusion"] = "auto"
    """How maps are computed; auto: attention where the image tower has any, else grad-cam. Occlusion works with any
    tower, slowly; eigen-cam knows no text."""

    against: tuple[str, ...] = ()
    """Other texts: show what speaks for the text rather than for them."""

    words: bool = False
    """Also a map for each word by itself."""

    shifts: int = 0
    """Shifts of the image along each axis that maps are averaged over; 0: as many as make 14 places a side."""

    device: DeviceOption = "auto"

    json: JsonOption = False

    def run(self) -> None:
        """Explain, write, show."""
        from vlm.api.explanation import check_out, explain

        check_out(self.out)
        if not self.image.is_file():
            raise UsageError(f"There is no image {str(self.image)!r}.")
        explanation = explain(
            self.model,
            self.image,
            self.text,
            method=self.method,
            against=self.against,
            words=self.words,
            shifts=self.shifts,
            device=self.device,
        )
        explanation.save(self.out)
        if self.json:
            show_json(explanation.to_json() | {"out": str(self.out)})
            return
        rows: list[list[object]] = []
        for heat_map in (explanation.whole, *explanation.words):
            right, down = heat_map.peak
            rows.append([heat_map.text, f"{heat_map.similarity:.3f}", f"{right:.0%} right, {down:.0%} down"])
        show_table(["text", "similarity", "hottest place"], rows, title=f"{explanation.method} → {self.out}")
