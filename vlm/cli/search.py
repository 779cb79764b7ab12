"""Ask an index: by texts, by pictures, by a mix of both, less what is not wanted."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import say, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.service.question import Question
    from vlm.service.search import Answer, SearchService

_QUESTIONS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm search`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = ()
    """What to look for; several are added up."""

    image: tuple[Path, ...] = ()
    """Pictures to look for the like of; added to the texts."""

    like: tuple[str, ...] = ()
    """Items of the index to look for the like of, by uid; added too. Alone they need no model."""

    minus: tuple[str, ...] = ()
    """Texts taken away."""

    weights: tuple[float, ...] = ()
    """One for each term, in the order texts, pictures, items, minus; empty weighs all alike."""

    top: int = 10
    """Answers wanted."""

    at_least: float | None = None
    """The lowest cosine of an answer."""

    where: str = ""
    """Only rows that this filter chooses: "language = 'en' and width >= 512 and tags has 'dog'"; also !=, in (…), like
    'a%', is missing, not, or, parentheses. Fields are those of the metadata, and key, language and caption."""

    words: str = ""
    """Put captions with all these words first: their rank in the full text is fused with the rank of the vectors."""

    group_duplicates: float | None = None
    """Show one of the answers that are alike, with their number: those with at least this cosine, as 0.95."""

    diversity: float = 0.0
    """From 0, the nearest first, to 1, the most unlike each other first."""

    after: str = ""
    """The cursor an answer ended with: the next page of the same question."""

    queries: Path | None = None
    """A file of questions, - for stdin: a text a line, or a JSON object with texts, images, items, minus, weights, top,
    where, at_least, words, duplicates, diversity, after. What a line leaves out is as the options say. Answers are
    JSON, one a line."""

    model: str = ""
    """Another place of the index's model, should it have moved."""

    html: Path | None = None
    """Write a page of thumbnails here."""

    json: bool = False
    """Print the answer as JSON."""


def run(arguments: Arguments) -> None:
    """Open the index, ask, show."""
    from vlm.service.question import Question
    from vlm.service.search import SearchService

    question = Question(
        texts=arguments.texts,
        images=arguments.image,
        items=arguments.like,
        minus=arguments.minus,
        weights=arguments.weights,
        top=arguments.top,
        where=arguments.where,
        at_least=arguments.at_least,
        words=arguments.words,
        duplicates=arguments.group_duplicates,
        diversity=arguments.diversity,
        after=arguments.after,
    )
    if arguments.queries is None:
        question.check()
        _show(arguments, SearchService.open(arguments.index, model_spec=arguments.model), question)
        return
    if arguments.texts or arguments.html:
        raise UsageError("--queries brings its texts, and answers in lines of JSON; leave TEXT and --html out.")
    questions = _read_file(arguments.queries, question)
    service = SearchService.open(arguments.index, model_spec=arguments.model)
    for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
        for answer in service.answer_all(questions[first : first + _QUESTIONS_AT_ONCE]):
            print(json.dumps(answer.to_json(), ensure_ascii=False), flush=True)


def show_answer(answer: "Answer") -> None:
    """The hits as a table."""
    asked = answer.question
    terms = [*asked.texts, *asked.to_json()["images"], *asked.items, *(f"−{text}" for text in asked.minus)]
    narrowed = f"  where {asked.where}" if asked.where else ""
    columns, rows = ["", "score", "uid", "caption"], []
    for rank, hit in enumerate(answer.hits, 1):
        caption = next((texts[0] for texts in hit.entry.captions.values() if texts), "")
        rows.append([rank, hit.score, hit.entry.uid, caption, *([] if hit.similar is None else [hit.similar])])
    if asked.duplicates is not None:
        columns.append("more like it")
    show_table(columns, rows, title=" + ".join(terms) + narrowed)
    say(f"embedded in {answer.embed_milliseconds:.0f} ms, searched in {answer.search_milliseconds:.2f} ms")
    if answer.next:
        say(f"There is more: --after {answer.next}")


def _show(arguments: Arguments, service: "SearchService", question: "Question") -> None:
    from vlm.service.gallery import write_gallery

    answer = service.answer(question)
    if arguments.html:
        write_gallery(arguments.html, [answer], title="Search", info=service.index.info())
        say(f"Page: {arguments.html}")
    if arguments.json:
        show_json(answer.to_json())
    else:
        show_answer(answer)


def _read_file(path: Path, defaults: "Question") -> "list[Question]":
    from vlm.service.question_file import read_questions

    if str(path) == "-":
        return read_questions(sys.stdin, defaults)
    try:
        with path.open(encoding="utf-8") as lines:
            return read_questions(lines, defaults)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
