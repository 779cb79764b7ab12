"""The living rows of an index for other tools: npy, clip-retrieval's folders, a FAISS file, Parquet."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.console import show_fields, show_json


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index export`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the files."""

    to: Literal["npy", "clip-retrieval", "faiss", "parquet"]
    """npy: embeddings.npy with metadata.parquet. clip-retrieval: its folders img_emb (or text_emb) and metadata, which
    autofaiss reads too. faiss: index.faiss, whose ids are the rows of metadata.parquet. parquet: embeddings.parquet,
    with a column of vectors."""

    where: str = ""
    """Only rows that this filter chooses, as for vlm search."""

    precision: Literal["float16", "float32"] | None = None
    """Of the vectors; float16, as they are stored, or float32 for parquet, if not given."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Export, then list the files."""
    from vlm.index.interop.exporter import export_index

    summary = export_index(
        arguments.index, arguments.out, to=arguments.to, where=arguments.where, precision=arguments.precision
    )
    if arguments.json:
        show_json(asdict(summary))
    else:
        show_fields(asdict(summary))
