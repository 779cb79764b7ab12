"""`vlm tokenizer train`: captions to a SentencePiece model."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.options import JsonOption, ShardsArgument
from vlm.console import quoted, show_fields, show_json, spaced_names

logger = logging.getLogger(__name__)


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
        """Train, show."""
        from vlm.api.data import train_tokenizer

        summary = train_tokenizer(self.shards, self.out, vocabulary=self.vocabulary, languages=self.languages)
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        logger.info(f"Next: vlm train PRESET --data SHARDS --run DIR --tokenizer {quoted(self.out)}")
