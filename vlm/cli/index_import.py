"""Embeddings that clip-retrieval, autofaiss or others made, as a folder for vlm index build and vlm index add."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.console import show_fields, show_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index import`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Output folder of clip-retrieval (img_emb, text_emb, metadata); folder of .npy with Parquet files of the same
    names or numbers, of .npy alone, of Parquet with a column of vectors, or with one FAISS file (knn.index,
    image.index) and Parquet files beside it or in metadata; one such file; or what vlm index export wrote."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the embeddings."""

    model: str = ""
    """The model that made the vectors: run folder, model folder, or open_clip NAME:WEIGHTS. With "unknown" only stored
    items can be asked with. Exports of vlm say it themselves."""

    modality: Literal["image", "text"] | None = None
    """What was embedded; image if not given."""

    metadata: Path | None = None
    """Parquet file or folder of the tables, if not beside the vectors; row i tells about vector i."""

    uid_column: str = ""
    """Names the rows: uid, key or image_path if not given, else their numbers."""

    caption_column: str = ""
    """Captions, a text or a list: caption, captions or text if not given."""

    embedding_column: str = ""
    """Vectors in a Parquet source: embedding, or the only column of such lists, if not given."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Import, then say what could not be as it was."""
    from vlm.index.interop.import_sources import ColumnChoice
    from vlm.index.interop.importer import UNKNOWN, import_embeddings
    from vlm.service.search import load_encoder

    summary = import_embeddings(
        arguments.source,
        arguments.out,
        model_spec=arguments.model,
        load=load_encoder,
        modality=arguments.modality,
        metadata=arguments.metadata,
        column_choice=ColumnChoice(
            uid=arguments.uid_column,
            caption=arguments.caption_column,
            embedding=arguments.embedding_column,
        ),
    )
    if summary.bad:
        incidents = arguments.out / "incidents.jsonl"
        logger.info(f"{summary.bad:,} vectors are zero or not finite and were skipped: {incidents}")
    if summary.scaled:
        logger.info(f"{summary.scaled:,} vectors were not of unit length and were brought to it; cosines are compared.")
    if summary.approximate:
        logger.info(
            f"The FAISS file ({summary.approximate}) keeps codes of the vectors: the rows are only near to what they "
            "were. Import the vectors themselves where they still are."
        )
    if summary.renamed:
        logger.info(f"{summary.renamed:,} rows share their {summary.uid_column}; their uids name file and row too.")
    if summary.left_out:
        names = ", ".join(name or "one without a name" for name in summary.left_out)
        logger.info(f"Columns that cannot be metadata were left out: {names}")
    if summary.model == UNKNOWN:
        logger.info("The model is unknown: ask by vlm search --like UID, and add only what the same model made.")
    if arguments.json:
        show_json(asdict(summary))
        return
    show_fields({name.replace("_", " "): value for name, value in asdict(summary).items()})
    logger.info(f"Next: vlm index build {arguments.out} INDEX")
