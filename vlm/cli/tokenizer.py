"""Train a SentencePiece tokenizer on the captions of shards, for `vlm train --tokenizer OUT`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_fields, show_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm tokenizer train`."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Shards whose captions are read."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The model file to write, ending in .model."""

    vocabulary: int = 8192
    """Pieces at most; fewer when the captions do not hold that many."""

    languages: tuple[str, ...] = ()
    """Languages whose captions are read; empty reads all."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Read the captions, train, write."""
    result = train_tokenizer(
        arguments.shards, arguments.out, vocabulary=arguments.vocabulary, languages=arguments.languages
    )
    if arguments.json:
        show_json(result)
        return
    show_fields(result)
    logger.info(f"Next: vlm train PRESET --data SHARDS --run DIR --tokenizer {arguments.out}")


def train_tokenizer(shards: str, out: Path, *, vocabulary: int, languages: tuple[str, ...]) -> dict[str, object]:
    """Write a SentencePiece model of the captions to `out`; returns what it was made of.

    Raises:
        UsageError: `out` exists, or there are no captions.
    """
    from vlm.data.shards import expand_shards
    from vlm.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
    from vlm.errors import UsageError
    from vlm.evaluation.retrieval import iter_sample_batches
    from vlm.files import write_bytes

    if out.exists():
        raise UsageError(f"{out} exists already; name another file or remove it.")
    captions = [
        text
        for batch in iter_sample_batches(expand_shards(shards), None, workers=0)
        for item in batch.decoded
        for language, texts in item.captions.items()
        if not languages or not language or language in languages
        for text in texts
    ]
    if not captions:
        raise UsageError(f"{shards} holds no captions in {languages or 'any language'}.")
    model = train_sentencepiece(captions, vocab_size=vocabulary)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, model)
    lengths = [int((row != 0).sum()) for row in SentencePieceTokenizer(model, 512).encode(captions[:20000])]
    return {
        "tokenizer": str(out),
        "captions": len(captions),
        "pieces": SentencePieceTokenizer(model).vocab_size,
        "longest caption in tokens": max(lengths),
        "mean caption in tokens": sum(lengths) / len(lengths),
    }
