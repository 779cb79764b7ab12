"""`vlm models`: models that load here, and how to fetch another ahead; `vlm export`: a model for other tools."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm.cli.options import JsonOption, ModelArgument, call_options
from vlm.console import format_bytes, quoted, show_fields, show_json, show_table, spaced_names

if TYPE_CHECKING:
    from vlm.api.model_export import OnnxExport

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


_TO_HELP = "Target: open-clip, a folder for its create_model_and_transforms; onnx, both towers for onnxruntime."
_OUT_HELP = (
    "New folder to write. --to onnx needs none: it then writes beside the model, where vlm embed, index add, search, "
    "classify and eval find it."
)
_EVALUATE_HELP = "Shards with captions on which the loss of int8 is measured; needed for int8."


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model to another tool's format and verify there that its embeddings are the same.

    With an ONNX export beside the model, embed, index add, search, classify and eval need no torch and start in a
    fraction of the time. It is used as long as the model's files are unchanged; VLM_BACKEND=torch or --backend torch
    ignores it.
    """

    model: ModelArgument

    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help=_OUT_HELP)] = None

    to: Annotated[Literal["open-clip", "onnx"], tyro.conf.arg(help=_TO_HELP)] = "open-clip"

    precision: Literal["float32", "int8"] = "float32"
    """Precision of an ONNX export; int8 is smaller and faster, for some loss."""

    evaluate: Annotated[str, tyro.conf.arg(help=_EVALUATE_HELP)] = ""

    max_recall_loss: float = 0.01
    """Refuse an int8 export whose recall falls by more than this fraction."""

    json: JsonOption = False

    def run(self) -> None:
        """Export, then log how the other tool opens it."""
        from vlm.api.model_export import OnnxExport, export

        result = export(**call_options(self))
        if self.json:
            show_json(result)
            return
        fields = spaced_names(result.to_json())
        # show_fields has four decimals, and a difference of 1e-7 would be shown as 0.0000
        fields["largest difference"] = f"{result.largest_difference:.1e}"
        if isinstance(result, OnnxExport):
            show_fields(fields | {"bytes": format_bytes(result.bytes), "quality": _quality(result)})
            logger.info(
                "Embedding, search and evaluation with this model now start without torch; --backend torch ignores the "
                "export."
            )
        else:
            show_fields(fields)
            logger.info(f"Next, in Python:\n\n{result.snippet}")


def _quality(result: "OnnxExport") -> str:
    """What int8 costs, for people."""
    if not result.quality:
        return f"as of torch, up to {result.largest_difference:.1e}"
    cosines = {name: result.quality[name]["mean"] for name in ("text_cosine", "image_cosine")}
    return (
        f"recall falls by {100 * result.quality['recall_loss']:.1f} points; mean cosine with float32 "
        f"{cosines['text_cosine']:.4f} (texts), {cosines['image_cosine']:.4f} (images)"
    )
