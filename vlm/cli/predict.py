"""Zero-shot classification of single images: `vlm classify`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.cli.options import BackendOption, DeviceOption, ImageArguments, JsonOption, ModelArgument
from vlm.console import bar, show_json, show_table
from vlm.errors import UsageError

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
        from vlm.service.query_encoder import chosen_backend

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
