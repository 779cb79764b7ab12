"""`vlm concepts`: a corpus to the list of concepts that `vlm curate` balances over."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlm.cli.options import JsonOption
from vlm.console import quoted, show_fields, show_json, spaced_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildConcepts:
    """Write a list of concepts for `vlm curate --filter balance:concepts=OUT`, built as MetaCLIP builds its own.

    Frequent words of a corpus, pairs of words of high pointwise mutual information, titles, and WordNet's synsets.
    """

    corpus: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """Shards, whose captions are read, or a text file ending in .txt with a text a line."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.json")]
    """JSON list to write."""

    min_count: int = 100
    """Minimum number of occurrences of a word or a pair; MetaCLIP's 100 is for all of Wikipedia."""

    min_pmi: float = 5.0
    """Minimum pointwise mutual information of a pair, in bits."""

    max_bigrams: int = 0
    """Maximum number of pairs, those of the highest information; 0 takes all."""

    titles: Path | None = None
    """File of titles, one a line, e.g. of Wikipedia."""

    wordnet: Path | None = None
    """Folder of WordNet's database (data.noun, …)."""

    case: Literal["fold", "keep"] = "fold"
    """fold: lower-case everything; keep: leave it as it is written."""

    languages: tuple[str, ...] = ()
    """Caption languages to read; empty uses all."""

    json: JsonOption = False

    def run(self) -> None:
        """Build, show."""
        from vlm.api.data import build_concepts

        summary = build_concepts(
            self.corpus,
            self.out,
            min_count=self.min_count,
            min_pmi=self.min_pmi,
            max_bigrams=self.max_bigrams,
            titles=self.titles,
            wordnet=self.wordnet,
            case=self.case,
            languages=self.languages,
        )
        if self.json:
            show_json(summary)
            return
        show_fields(spaced_names(asdict(summary)))
        logger.info(f"Next: vlm curate SHARDS OUT.selection --filter balance:concepts={quoted(self.out)},cap=CAP")
