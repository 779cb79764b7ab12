"""Ask an index: by texts, by pictures, by a mix of both, less what is not wanted."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import say, show_json, show_table

if TYPE_CHECKING:
    from vlm.service.search import Answer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm search`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ()
    """What to look for; several are added up."""

    image: tuple[Path, ...] = ()
    """Pictures to look for the like of; added to the texts."""

    minus: tuple[str, ...] = ()
    """Texts taken away."""

    weights: tuple[float, ...] = ()
    """One for each term, in the order texts, pictures, minus; empty weighs all alike."""

    top: int = 10
    """Answers wanted."""

    model: str = ""
    """Another place of the index's model, should it have moved."""

    html: Path | None = None
    """Write a page of thumbnails here."""

    json: bool = False
    """Print the answer as JSON."""


def run(arguments: Arguments) -> None:
    """Open the index, ask, show."""
    from vlm.service.gallery import write_gallery
    from vlm.service.search import Question, SearchService

    question = Question(
        texts=arguments.texts,
        images=arguments.image,
        minus=arguments.minus,
        weights=arguments.weights,
        top=arguments.top,
    )
    question.signed_weights()
    service = SearchService.open(arguments.index, model_spec=arguments.model)
    answer = service.answer(question)
    if arguments.html:
        write_gallery(arguments.html, [answer], title="Search", info=service.index.info())
        say(f"Page: {arguments.html}")
    if arguments.json:
        show_json(answer.to_json())
    else:
        show_answer(answer)


def show_answer(answer: "Answer") -> None:
    """The hits as a table."""
    asked = answer.question
    terms = [*asked.texts, *asked.to_json()["images"], *(f"−{text}" for text in asked.minus)]
    rows = [
        [rank, hit.score, hit.entry.uid, next((texts[0] for texts in hit.entry.captions.values() if texts), "")]
        for rank, hit in enumerate(answer.hits, 1)
    ]
    show_table(["", "score", "uid", "caption"], rows, title=" + ".join(terms))
    say(f"embedded in {answer.embed_milliseconds:.0f} ms, searched in {answer.search_milliseconds:.2f} ms")
