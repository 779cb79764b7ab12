"""What FAISS's HNSW graph gets beyond its own build: links among the answers to queries, and an order in memory.

The rows that answer a text are far from each other, since its embedding lies off the images' manifold. A graph of near
rows links few of them, so a search must keep many candidates until it has met all. Graphs for such queries are built
from samples of them (OOD-DiskANN, Jaiswal et al. 2022; RoarGraph, Chen et al. 2024). `link_answers` adds such links to
HNSW, in the slots that its build leaves free, a third of all: no link between near rows is lost, and the memory stays
the same.
"""

from typing import Any

import numpy as np

from vlm.console import progress
from vlm.index.ann.faiss_search import (
    graph_rows,
    load_faiss,
    make_search_function,
    search_parameters,
    stored_to_float32,
    unwrap_transforms,
)
from vlm.tensor_types import Array, Bool, Float, Int, Int64

# with 30,000 texts a search of 50,000 rows for recall@10 of 0.99 compares 964, 957 and 956 for 32, 48 and 64 answers,
# and 1,100 without links
_NUM_ANSWERS = 32
_EF_SEARCH = 200
# a block sees the links of those before: all at once would ask for a link in several places, or of a row without room
_QUERIES_AT_ONCE = 256


def link_answers(index: Any, queries: Float[Array, "Q D"], *, is_shown: bool = False) -> int:
    """Link the answers to queries in a graph: each answer but the best gets a link from a better one.

    So whichever answer a search meets leads to those behind it. The link comes from the nearest better answer that has
    a free slot; where more links are asked of a row than it has room for, those to the nearest are set.
    Returns the number of new links.

    index: a filled graph, which may be wrapped. queries: finite, none of which recall is measured with.
    is_shown: with a progress bar.
    """
    graph = unwrap_transforms(index)
    num_answers = min(_NUM_ANSWERS, graph.ntotal)
    if num_answers < 2:
        return 0
    search = make_search_function(graph)
    parameters = search_parameters(graph, effort=_EF_SEARCH)
    rows, slots = graph_rows(graph), _Slots(graph)
    num_links = 0
    with progress(total=len(queries), what="link answers", unit=" queries", is_shown=is_shown) as bar:
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            some = stored_to_float32(queries[first : first + _QUERIES_AT_ONCE])
            _, answers = search(some, num_answers, parameters)
            num_links += slots.fill(*_missing_links(answers, slots.of(answers), rows))
            bar.update(len(some))
    return num_links


def _missing_links(
    answers: Int64[Array, "Q K"], links: Int[Array, "Q K M"], rows: Float[Array, "N D"]
) -> tuple[Int64[Array, " L"], Int64[Array, " L"]]:
    """The links (source, target) for answers that no better one is linked to; by source, of one the nearest first.

    answers: best first, -1 and last where none was found. links: of each answer, free slots last.
    """
    count = answers.shape[1]
    # a pair of ranks: is the one of the row axis linked to that of the column axis
    is_linked: Bool[Array, "Q K K"] = np.zeros((*answers.shape, count), bool)
    for slot in range((links >= 0).sum(axis=2).max()):
        is_linked |= links[:, :, slot, None] == answers[:, None, :]
    is_better = np.triu(np.ones((count, count), bool), 1)
    is_reached = (is_linked & is_better).any(axis=1) | (answers < 0)
    can_link = is_better & (links[:, :, -1:] < 0)
    near = stored_to_float32(rows.take(answers, axis=0, mode="wrap"))
    cosines = np.where(can_link, near @ near.transpose(0, 2, 1), -np.inf)
    query, target = np.nonzero(~is_reached & can_link.any(axis=1))
    source = cosines.argmax(axis=1)[query, target]
    pairs = np.stack([answers[query, source], answers[query, target]], axis=1)
    distinct, first = np.unique(pairs, axis=0, return_index=True)
    order = np.lexsort((-cosines[query, source, target][first], distinct[:, 0]))
    return distinct[order, 0], distinct[order, 1]


class _Slots:
    """The slots for links at the lowest level of a graph; a free one is -1, and comes after those that are taken."""

    def __init__(self, graph: Any) -> None:
        faiss = load_faiss()
        self.count = graph.hnsw.nb_neighbors(0)
        self._begins = faiss.vector_to_array(graph.hnsw.offsets)[:-1].astype(np.int64)
        self._links = faiss.rev_swig_ptr(graph.hnsw.neighbors.data(), graph.hnsw.neighbors.size())

    def of(self, nodes: Int64[Array, "*shape"]) -> Int[Array, "*shape M"]:
        """The links of these nodes; of some node for -1."""
        return self._links[self._begins[nodes][..., None] + np.arange(self.count)]

    def fill(self, sources: Int64[Array, " L"], targets: Int64[Array, " L"]) -> int:
        """Add links, sorted by source, as far as there are free slots; returns how many were added."""
        nodes, first, num_links = np.unique(sources, return_index=True, return_counts=True)
        num_taken = (self.of(nodes) >= 0).sum(axis=1)
        places = np.arange(len(sources)) - np.repeat(first - num_taken, num_links)
        fits = places < self.count
        self._links[self._begins[sources[fits]] + places[fits]] = targets[fits]
        return int(fits.sum())


def order_graph(index: Any, graph: Any) -> None:
    """Move the nodes of a graph, so that those linked to each other are near in memory; `index` tells their positions.

    In the order of a walk in breadth from the entry point a search finds a third of the pages and cache lines that it
    reads there already, and takes a fifth less time.
    """
    order = _breadth_first_order(graph)
    graph.permute_entries(order)
    load_faiss().copy_array_to_vector(order, index.id_map)
    index.ntotal = len(order)


def _breadth_first_order(graph: Any) -> Int64[Array, " N"]:
    """The nodes of the lowest level as a walk from the entry point reaches them; those that it does not, last."""
    slots = _Slots(graph)
    is_reached = np.zeros(graph.ntotal, bool)
    waves: list[Int64[Array, " _"]] = []
    wave = np.array([graph.hnsw.entry_point])
    while len(wave):
        is_reached[wave] = True
        waves.append(wave)
        linked = slots.of(wave).ravel()
        linked = linked[linked >= 0]
        fresh = linked[~is_reached[linked]]
        # each once, where it came first
        _, first = np.unique(fresh, return_index=True)
        wave = fresh[np.sort(first)].astype(np.int64)
    return np.concatenate([*waves, np.flatnonzero(~is_reached)])
