"""A page of answers that needs nothing but itself: thumbnails, scores, captions."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from vlm.errors import VlmError
from vlm.files import write_text
from vlm.index.read import Hit, IndexInfo
from vlm.service.gallery_style import STYLE
from vlm.service.pictures import read_picture, thumbnail
from vlm.service.question import Question
from vlm.service.search import Answer, Found

# twice the width of a card's picture, for screens with two pixels a point
THUMBNAIL_PIXELS = 420
_QUESTION_PIXELS = 160


def write_gallery(path: Path, answers: Sequence[Answer], *, title: str, info: IndexInfo) -> None:
    """Write `gallery_page` to a file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, gallery_page(answers, title=title, info=info))


def gallery_page(answers: Sequence[Answer], *, title: str, info: IndexInfo) -> str:
    """One HTML page with a section for each answer; pictures are read from their shards by byte range.

    A hit whose shard is gone or whose picture cannot be read gets a tile that says so.
    """
    facts = f"{info.rows:,} {info.modality} embeddings · {info.dimension} dimensions · {info.kind} index · {info.model}"
    sections = "\n".join(_section(answer, number) for number, answer in enumerate(answers, 1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="facts">{escape(facts)}</p>
{_contents(answers) if len(answers) > 1 else ""}</header>
<main>
{sections}
</main>
<footer>Scores are cosines; a bar shows a score's share of the best one. {escape(info.made_by)}, generation \
{info.generation} of {escape(info.folder)}.</footer>
</body>
</html>
"""


def _contents(answers: Sequence[Answer]) -> str:
    links = [
        f'<a href="#q{number}">{escape(answer.question.in_words())}</a>' for number, answer in enumerate(answers, 1)
    ]
    return f"<nav>{''.join(links)}</nav>\n"


def _section(answer: Answer, number: int) -> str:
    best = max((hit.score for hit in answer.hits), default=0.0)
    hits = "\n".join(_card(hit, rank, best) for rank, hit in enumerate(answer.hits, 1))
    took = f"embedded in {answer.embed_milliseconds:.1f} ms, found in {answer.search_milliseconds:.1f} ms"
    if answer.rerank_milliseconds is not None:
        took += f", re-ranked in {answer.rerank_milliseconds:.0f} ms"
    if answer.unread:
        took += f", but for {len(answer.unread)} whose pictures cannot be read"
    return f"""<section id="q{number}">
<h2 class="question">{_terms(answer)}</h2>
<p class="took">{escape(" · ".join([f"{len(answer.hits)} nearest", *_limits(answer.question), took]))}</p>
{f'<ol class="hits">{hits}</ol>' if hits else '<p class="none">Nothing was found.</p>'}
</section>"""


def _limits(question: Question) -> list[str]:
    """What narrows and orders the answers, where it is asked for."""
    limits = {
        "where": question.where,
        "with the words": question.words,
        "cosine at least": "" if question.at_least is None else f"{question.at_least:g}",
        "one of those alike from": "" if question.duplicates is None else f"{question.duplicates:g}",
        "diversity": f"{question.diversity:g}" if question.diversity else "",
        "re-ranked by likelihood: the first": str(question.rerank_top or ""),
    }
    return [f"{name} {value}" for name, value in limits.items() if value]


def _terms(answer: Answer) -> str:
    question, terms = answer.question, []
    shown = [f"“{escape(text)}”" for text in question.texts]
    shown += [_question_picture(image) for image in question.images]
    shown += [escape(uid) for uid in question.items]
    shown += [escape(vector.name) if isinstance(vector, Path) else "a vector" for vector in question.vectors]
    shown += [f"“{escape(text)}”" for text in question.minus]
    for term, weight in zip(shown, question.signed_weights(), strict=True):
        sign = "−" if weight < 0 else "+" if terms else ""
        factor = f' <span class="weight">×{abs(weight):g}</span>' if abs(weight) != 1 else ""
        terms.append(
            f'<span class="sign">{sign}</span>' * bool(sign)
            + f'<span class="term{" minus" if weight < 0 else ""}"><span class="text">{term}</span>{factor}</span>'
        )
    return "\n".join(terms)


def _question_picture(image: Path | bytes) -> str:
    data = image if isinstance(image, bytes) else image.read_bytes()
    name = "the picture asked with" if isinstance(image, bytes) else image.name
    return f'<img src="{thumbnail(data, pixels=_QUESTION_PIXELS)}" alt="{escape(name)}" title="{escape(name)}">'


def _card(hit: Found, rank: int, best: float) -> str:
    entry = hit.entry
    captions = [text for texts in entry.captions.values() for text in texts]
    share = max(hit.score, 0.0) / best if best > 0 else 0.0
    likely = "" if hit.likelihood is None else f"{hit.likelihood:.3f} nats a token"
    notes = [note for note in (likely, f"{hit.similar} more like it" if hit.similar else "") if note]
    more = f'<p class="note">{" · ".join(notes)}</p>\n' if notes else ""
    place = f"{entry.uid} · sample {entry.number} of {entry.shard}"
    return f"""<li class="hit">
<div class="picture">{_picture(hit)}</div>
<div class="score"><span class="rank">{rank}</span><div class="track"><span style="width:{share:.1%}"></span></div>\
<span class="value">{hit.score:.3f}</span></div>
{f'<p class="caption" title="{escape(captions[0])}">{escape(captions[0])}</p>' if captions else ""}
{_more(captions[1:])}{more}<p class="key" title="{escape(place)}">{escape(entry.key)}</p>
</li>"""


def _picture(hit: Hit) -> str:
    try:
        address = thumbnail(read_picture(hit.entry), pixels=THUMBNAIL_PIXELS)
    except VlmError as error:
        return f'<p class="missing">{escape(str(error))}</p>'
    return f'<img src="{address}" alt="{escape(hit.entry.key)}">'


def _more(captions: Sequence[str]) -> str:
    if not captions:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in captions)
    return f"<details><summary>{len(captions)} more</summary><ul>{items}</ul></details>\n"
