"""`vlm export`: a model for other tools."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.cli.options import JsonOption, ModelArgument
from vlm.console import show_fields, show_json, spaced_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model to another tool's format and verify there that its embeddings are the same.

    open-clip is a folder for open_clip.create_model_and_transforms("local-dir:OUT").
    """

    model: ModelArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write."""

    to: Literal["open-clip"] = "open-clip"
    """Target tool."""

    json: JsonOption = False

    def run(self) -> None:
        """Export, then log how the other tool opens it."""
        from vlm.files import check_not_exists
        from vlm.models.export import export_open_clip
        from vlm.models.load import load_network

        # before a model is loaded, which may take a minute
        check_not_exists(self.out)
        export = export_open_clip(load_network(self.model, device="cpu"), self.out)
        if self.json:
            show_json(export.to_json())
            return
        fields = spaced_names(asdict(export))
        # show_fields has four decimals, and a difference of 1e-7 would be shown as 0.0000
        show_fields(fields | {"largest difference": f"{export.largest_difference:.1e}"})
        logger.info(f"Next, in Python:\n\n{export.snippet}")
