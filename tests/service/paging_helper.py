"""What an answer names, on one page and on all."""

from dataclasses import replace

from vlm.service.query import Query
from vlm.service.search import SearchResult, SearchService


def uids(result: SearchResult) -> list[str]:
    """Of its hits, best first."""
    return [hit.entry.uid for hit in result.hits]


def pages(service: SearchService, query: Query) -> list[str]:
    """The uids of all pages, one after the other."""
    found, result = [], service.search(query)
    while len(found) < 100_000:
        found += uids(result)
        if not result.next:
            return found
        assert len(result.hits) == query.top
        result = service.search(replace(query, after=result.next))
    raise AssertionError("pages without end")
