"""What an answer names, on one page and on all."""

from dataclasses import replace

from vlm.service.query import Question
from vlm.service.search import Answer, SearchService


def uids(answer: Answer) -> list[str]:
    """Of its hits, best first."""
    return [hit.entry.uid for hit in answer.hits]


def pages(service: SearchService, question: Question) -> list[str]:
    """The uids of all pages, one after the other."""
    found, answer = [], service.answer(question)
    while True:
        found += uids(answer)
        if not answer.next:
            return found
        assert len(answer.hits) == question.top
        answer = service.answer(replace(question, after=answer.next))
