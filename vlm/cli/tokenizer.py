"""`vlm tokenizer train`: captions to a SentencePiece model."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.options import JsonOption, ShardsArgument
from vlm.console import show_fields, show_json

logger = logging.getLogger(__name__)

_MAX_TOKENS = 512
_MEASURED_CAPTIONS = 20_000


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer on the captions of shards, for `vlm train --tokenizer OUT`."""

    shards: ShardsArgument

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Model file to write, ending in .model."""

    vocabulary: int = 8192
    """Maximum vocabulary size; fewer pieces if the captions do not yield as many."""

    languages: tuple[str, ...] = ()
    """Caption languages to train on; empty uses all."""

    json: JsonOption = False

    def run(self) -> None:
        """Read the captions, train, write."""
        result = train_tokenizer(self.shards, self.out, vocabulary=self.vocabulary, languages=self.languages)
        if self.json:
            show_json(result)
            return
        show_fields(result)
        logger.info(f"Next: vlm train PRESET --data SHARDS --run DIR --tokenizer {self.out}")


def train_tokenizer(shards: str, out: Path, *, vocabulary: int, languages: tuple[str, ...]) -> dict[str, object]:
    """Write a SentencePiece model of the captions to `out`; returns statistics about it.

    Raises:
        UsageError: `out` exists, or there are no captions.
    """
    from vlm.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
    from vlm.errors import UsageError
    from vlm.files import write_bytes

    if out.exists():
        raise UsageError(f"{out} exists already; name another file or remove it.")
    captions = _read_captions(shards, languages)
    if not captions:
        raise UsageError(f"{shards} holds no captions in {languages or 'any language'}.")
    model = train_sentencepiece(captions, vocab_size=vocabulary)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, model)
    # lengths tell which --context-length captions need; a sample of them is enough
    tokens = SentencePieceTokenizer(model, _MAX_TOKENS).encode(captions[:_MEASURED_CAPTIONS])
    lengths = [int((row != 0).sum()) for row in tokens]
    return {
        "tokenizer": str(out),
        "captions": len(captions),
        "pieces": SentencePieceTokenizer(model).vocab_size,
        "longest caption in tokens": max(lengths),
        "mean caption in tokens": sum(lengths) / len(lengths),
    }


def _read_captions(shards: str, languages: tuple[str, ...]) -> list[str]:
    """All captions of the shards in these languages, and those without a language."""
    from vlm.data.pack import shards_at
    from vlm.evaluation.retrieval import iter_sample_batches

    captions: list[str] = []
    for batch in iter_sample_batches(shards_at(shards), None, workers=0):
        for sample in batch.decoded:
            for language, texts in sample.captions.items():
                if not languages or not language or language in languages:
                    captions += texts
    return captions
