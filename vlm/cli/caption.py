"""`vlm caption`: captions of single images, and of all images of shards."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from vlm.cli.options import DeviceOption, ImageArguments, JsonOption, ModelArgument
from vlm.cli.predict import BatchSizeOption, OnErrorOption, check_images
from vlm.console import show_json, show_table
from vlm.models.decoding_options import DecodingOptions


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Caption images with a model that has a caption decoder, e.g. one of vlm train tiny-coca."""

    model: ModelArgument

    images: ImageArguments

    decoding: Annotated[DecodingOptions, tyro.conf.arg(name="")] = field(default_factory=DecodingOptions)

    batch_size: BatchSizeOption = 64

    on_error: OnErrorOption = "raise"

    device: DeviceOption = "auto"

    json: JsonOption = False

    def run(self) -> None:
        """Show captions for each image."""
        from vlm.api.inference import load

        # checked first: a model takes long to load
        check_images(self.images)
        results = load(self.model, device=self.device).caption(
            self.images, decoding=self.decoding, batch_size=self.batch_size, on_error=self.on_error
        )
        if self.json:
            show_json(results.to_json())
            return
        rows: list[list[object]] = []
        for result in results:
            if not result.captions:
                rows.append([result.image, "", ""])
            for caption in result.captions:
                rows.append([result.image, caption.caption, f"{caption.log_likelihood:.2f}"])
        show_table(["image", "caption", "log-likelihood"], rows)
