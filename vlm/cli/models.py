"""`vlm models`: models that load here and now, and how to fetch another ahead."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.options import JsonOption
from vlm.console import format_bytes, quoted, show_json, show_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ListModels:
    """List the models that load without a network: runs, model folders, those in local caches and in packages.

    A model is given to other verbs by its name here. --fetch brings one into the caches ahead, where there is a
    network; on a machine without one, copy the cache folder, or the folder that vlm export writes.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Directory of runs and model folders, searched recursively."""

    known: bool = False
    """List the weights that open_clip can fetch, too."""

    fetch: str = ""
    """MODEL to fetch with its tokenizer, e.g. ViT-B-32:laion2b_s34b_b79k or ORGANISATION/NAME."""

    json: JsonOption = False

    def run(self) -> None:
        """Fetch what is to be fetched, then list."""
        from vlm.api.local_models import fetch_model, list_models

        if self.fetch:
            fetched = fetch_model(self.fetch)
            logger.info(f"{fetched.model} is here and loads: {format_bytes(fetched.bytes)}.")
        models = list_models(self.folder, known=self.known)
        if self.json:
            show_json(models)
            return
        rows: list[list[str]] = []
        for model in models.models:
            size = format_bytes(model.bytes) if model.bytes else "–"
            rows.append([model.model, model.source, size, f"fetch its {model.missing}" if model.missing else "loads"])
        if rows:
            show_table(["MODEL", "from", "weights", ""], rows)
        else:
            logger.info(f"No model is in {self.folder} or in the caches.")
        example = next((model.model for model in models.models if model.missing), "ViT-B-32:laion2b_s34b_b79k")
        logger.info(f"Fetch one ahead: vlm models --fetch {quoted(example)}   (into {models.cache})")
