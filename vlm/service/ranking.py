"""One page of answers out of one generation of an index: chosen, fused, without duplicates, diverse.

Answers put in another order: several rankings fused, near-duplicates behind one, diverse ones first.

The first answers of a question, put in the order in which a captioner finds the question's texts likely.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.catalog import Catalogue, Entry
from vlm.index.filters import parse_filter
from vlm.index.metadata import sanitize_text
from vlm.index.reader import IndexSnapshot
from vlm.index.segments import nearest
from vlm.service.images import read_image_bytes
from vlm.service.query import Cursor, Query
from vlm.tensors import Array, Float32, Int64, Tensor, UInt8

RANK_CONSTANT = 60


def fuse_ranks(
    rankings: Sequence[Int64[Array, " _"]], *, constant: int = RANK_CONSTANT
) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): each row once, rising, with its score.

    A row's score is the sum over the rankings that have it of 1 / (constant + rank), ranks from 1.

    >>> rows, scores = fuse_ranks([np.array([7, 3]), np.array([3])])
    >>> rows.tolist(), [round(score, 5) for score in scores.tolist()]
    ([3, 7], [0.03252, 0.01639])
    """
    rows, places = np.unique(np.concatenate([np.zeros(0, np.int64), *rankings]), return_inverse=True)
    ranks = np.concatenate([np.zeros(0), *(np.arange(1.0, len(ranking) + 1) for ranking in rankings)])
    return rows, np.bincount(places, 1 / (constant + ranks), len(rows)).astype(np.float32)


def duplicate_leaders(vectors: Float32[Array, "N D"], threshold: float, *, max_leaders: int) -> Int64[Array, " N"]:
    """For each of the unit vectors, best first, the number of the one that stands for it.

    That is itself, or the first of those that stand for themselves whose cosine with it is at least `threshold`.
    Only `most` are looked for that stand for themselves; -1 if none of these stands for a vector.
    """
    leaders = np.full(len(vectors), -1, np.int64)
    for _ in range(max_leaders):
        open_ones = np.flatnonzero(leaders < 0)
        if not len(open_ones):
            break
        first = open_ones[0]
        is_like = vectors[open_ones] @ vectors[first] >= threshold
        # a vector is its own duplicate, whatever rounding says
        is_like[0] = True
        leaders[open_ones[is_like]] = first
    return leaders


def diversify(
    relevance: Float32[Array, " N"], vectors: Float32[Array, "N D"], diversity: float, top: int
) -> Int64[Array, " K"]:
    """The `top` candidates by maximal marginal relevance (Carbonell and Goldstein 1998), in the order they are chosen.

    Each next one has the highest (1 - diversity) relevance - diversity * likeness, where likeness is its highest cosine
    with those chosen before. Unlike in the paper, relevance is first brought to 0 for the least and 1 for the most of
    the candidates: cosines of a text with pictures lie so close together that likeness would decide alone.

    Args:
        relevance: of each candidate, in any unit.
        vectors: unit vectors of the candidates.
        diversity: 0 keeps the order of relevance, 1 looks at likeness alone.
    """
    spread = float(np.ptp(relevance)) if len(relevance) else 0.0
    scaled = (relevance - relevance.min()) / spread if spread else np.zeros(len(relevance), np.float32)
    likeness = np.zeros(len(relevance), np.float32)
    is_left, chosen = np.ones(len(relevance), bool), []
    while len(chosen) < min(top, len(relevance)):
        gain = np.where(is_left, (1 - diversity) * scaled - diversity * likeness, -np.inf)
        best = int(gain.argmax())
        is_left[best] = False
        cosines = vectors @ vectors[best]
        likeness = np.maximum(likeness, cosines) if chosen else cosines
        chosen.append(best)
    return np.array(chosen, np.int64)


_IMAGES_AT_ONCE = 64
_READERS = 8


@runtime_checkable
class Captioner(Protocol):
    """A model that says how likely a text is, given a picture."""

    @property
    def view(self) -> EvalTransform:
        """From an encoded picture to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same likelihoods."""
        ...

    @property
    def can_caption(self) -> bool:
        """Whether it has a caption decoder."""
        ...

    def text_log_likelihoods(self, images: UInt8[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float32[Tensor, "B T"]:
        """Mean log-likelihood of each text's tokens given each picture, in nats."""
        ...


def require_captioner(model: object, spec: str) -> Captioner:
    """The model, if it can re-rank.

    Raises:
        UsageError: it has no caption decoder.
    """
    if isinstance(model, Captioner) and model.can_caption:
        return model
    raise UsageError(f"{spec} has no caption decoder to re-rank with; train one, e.g. vlm train tiny-coca.")


class Reranker:
    """The re-ranking of one question.

    unread: why a picture could not be read, by uid. milliseconds: spent reading pictures and asking the captioner.
    """

    def __init__(self, captioner: Captioner, query: Query, catalogue: Catalogue) -> None:
        self.captioner, self.catalogue = captioner, catalogue
        self.unread: dict[str, str] = {}
        self.milliseconds = 0.0
        self._texts = [*query.texts, *query.minus]
        weights = query.signed_weights()
        chosen = [*weights[: len(query.texts)], *weights[len(weights) - len(query.minus) :]]
        self._weights = torch.tensor(chosen) / sum(map(abs, chosen))

    def order(self, rows: Int64[Array, " N"]) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
        """Places of the rows, the likeliest first, and the likelihood of each in this order.

        The likelihood of a row is the weighted mean over the texts of log p(text | picture) / tokens, in nats; minus
        texts count against it. A row whose picture cannot be read keeps its place, and its likelihood is NaN.
        """
        started = time.perf_counter()
        likelihoods = self._likelihoods(self.catalogue.entries(rows.tolist()))
        is_read = ~np.isnan(likelihoods)
        places, readable = np.arange(len(rows)), np.flatnonzero(is_read)
        places[is_read] = readable[np.argsort(-likelihoods[readable], kind="stable")]
        self.milliseconds += (time.perf_counter() - started) * 1000
        return places, likelihoods[places]

    def _likelihoods(self, entries: Sequence[Entry]) -> Float32[Array, " N"]:
        found = np.full(len(entries), np.nan, np.float32)
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(entries), _IMAGES_AT_ONCE):
                views = list(readers.map(self._view, entries[first : first + _IMAGES_AT_ONCE]))
                places = [first + place for place, view in enumerate(views) if view is not None]
                pixels = [view for view in views if view is not None]
                if pixels:
                    images = torch.from_numpy(np.stack(pixels))
                    found[places] = (self.captioner.text_log_likelihoods(images, self._texts) @ self._weights).numpy()
        return found

    def _view(self, entry: Entry) -> UInt8[Array, "3 H W"] | None:
        try:
            return self.captioner.view(read_image_bytes(entry))
        except (VlmError, BadSample) as error:
            self.unread[entry.uid] = str(error)
            return None


CANDIDATES = 1000
"""How many of each ranking are fused, and how many are put in a diverse order; the others follow as they were."""

# FAISS adds up in single precision, and keeps any of several rows of one score
_TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Rows with the cosine of each to the question, best first.

    fused: the score of the fusion that orders them, NaN where the cosine does; None where it does for all.
    similar: how many worse answers each stands for. likelihoods: those of the re-ranking, NaN where it gave none.
    """

    rows: Int64[Array, " N"]
    cosines: Float32[Array, " N"]
    fused: Float32[Array, " N"] | None = None
    similar: Int64[Array, " N"] | None = None
    likelihoods: Float32[Array, " N"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def behind(self, after: Cursor) -> "Ranking":
        """Those that rank after the cursor."""
        last = np.float32(after.score)
        is_behind = (self.cosines < last) | ((self.cosines == last) & (self.rows > after.row))
        return self.take(np.flatnonzero(is_behind))

    def joined(self, others: "Ranking") -> "Ranking":
        """These, then of the others those that are not among them; of neither duplicates were left out."""
        others = others.take(np.flatnonzero(~np.isin(others.rows, self.rows)))
        fused = None if self.fused is None else np.append(self.fused, np.full(len(others), np.nan, np.float32))
        rows, cosines = np.append(self.rows, others.rows), np.append(self.cosines, others.cosines)
        return Ranking(rows=rows, cosines=cosines, fused=fused)

    def take(self, places: Int64[Array, " M"]) -> "Ranking":
        """Those at the given places, in that order."""
        extras = {"fused": self.fused, "similar": self.similar, "likelihoods": self.likelihoods}
        given = {name: values[places] for name, values in extras.items() if values is not None}
        return Ranking(rows=self.rows[places], cosines=self.cosines[places], **given)


@dataclass(frozen=True)
class Ranker:
    """Answers one question from one generation.

    query: unit vector. among: the rows that may answer, rising; None: all that live. reranking: of the first answers.
    """

    snapshot: IndexSnapshot
    query_vector: Float32[Array, " D"]
    query: Query
    allowed_rows: Int64[Array, " N"] | None
    reranker: Reranker | None = None

    def page(self) -> tuple[Ranking, str]:
        """The answers after the question's cursor, and the cursor to go on from; empty at the end.

        Raises:
            UsageError: the cursor is none, of another question, or of another generation where the order may have
                changed with it.
        """
        after = self._cursor()
        seen = after.seen if after else 0
        if after and after.generation != self.snapshot.number:
            found = self._next_nearest(after)
        else:
            found = self._in_order(seen, after.first if after else self.query.top)
        page = found.take(np.arange(min(len(found), self.query.top)))
        if self.query.is_plain:
            page = page.take(np.lexsort((page.rows, -page.cosines)))
        if len(page) == len(found):
            return page, ""
        end = Cursor(
            generation=after.generation if after else self.snapshot.number,
            query_digest=self._digest,
            first=after.first if after else self.query.top,
            seen=seen + len(page),
            score=float(page.cosines[-1]),
            row=int(page.rows[-1]),
        )
        return page, end.to_token()

    @property
    def _digest(self) -> int:
        return self.query.digest(reranker=self.reranker.captioner.fingerprint if self.reranker else "")

    def _cursor(self) -> Cursor | None:
        if not self.query.after:
            return None
        after = Cursor.from_token(self.query.after)
        if after.query_digest != self._digest:
            raise UsageError("The cursor belongs to another question; ask this one from its first page.")
        if after.generation != self.snapshot.number and not self.query.is_plain:
            raise UsageError(
                f"The index has moved from generation {after.generation} to {self.snapshot.number} since the last "
                "page, and the order of these answers with it; ask again from the first page."
            )
        return after

    def _next_nearest(self, after: Cursor) -> Ranking:
        """The nearest rows that rank after a cursor of another generation, one more than asked for if there are."""
        depth = after.seen + self.query.top + 2
        while True:
            found, is_all = self._nearest_above_ties(depth)
            behind = found.behind(after)
            # rows that came into the index since may rank before the cursor, so that more have to be passed over
            if is_all or len(behind) > self.query.top:
                return behind
            depth *= 2

    def _in_order(self, seen: int, first: int) -> Ranking:
        """The answers in the order of fusion, without duplicates, re-ranked or diverse; those seen passed over.

        There is one more than asked for, if there are so many. first: answers on the first page, on which the order
        hangs.
        """
        query = self.query
        wanted = seen + query.top + 1
        found = self._deduplicated(max(wanted, query.rerank_top, CANDIDATES if query.diversity else 0), first)
        if self.reranker and seen < query.rerank_top:
            found = _apply_reranking(found, self.reranker, query.rerank_top)
        if query.diversity:
            found = self._diverse(found, wanted)
        return found.take(np.arange(seen, len(found)))

    def _diverse(self, found: Ranking, wanted: int) -> Ranking:
        """The first in a diverse order, the others behind them as they were."""
        chosen = found.take(np.arange(min(len(found), CANDIDATES)))
        relevance = chosen.cosines if chosen.fused is None else chosen.fused
        vectors = self.snapshot.vectors(chosen.rows)
        order = diversify(relevance, vectors, self.query.diversity, wanted)
        rest = np.arange(len(chosen), len(found)) if wanted > len(chosen) else np.arange(0)
        return found.take(np.concatenate([order, rest]))

    def _deduplicated(self, wanted: int, first: int) -> Ranking:
        """The answers that stand for themselves, or without a wish to see no duplicates all: the first `wanted` at
        least, if there are so many."""
        threshold = self.query.duplicates
        if threshold is None:
            return self._ranked(wanted, first)[0]
        depth = max(wanted, CANDIDATES)
        while True:
            found, is_all = self._ranked(depth, first)
            leaders = duplicate_leaders(self.snapshot.vectors(found.rows), threshold, max_leaders=wanted)
            places, sizes = np.unique(leaders[leaders >= 0], return_counts=True)
            if is_all or len(places) >= wanted:
                return replace(found.take(places), similar=sizes - 1)
            depth *= 4

    def _ranked(self, wanted: int, first: int) -> tuple[Ranking, bool]:
        """The first `wanted` rows at least, and whether these are all.

        Those fused with words come first, then the nearest of the others. An index that is not exact may find, searched
        deeper, rows that it missed before; they follow those found before, so that the order is the same however far
        it is asked for, and pages show every row once.
        """
        nobody = Ranking(rows=np.zeros(0, np.int64), cosines=np.zeros(0, np.float32))
        ranked, is_all = self._fused() if self.query.words else nobody, False
        depth = max(first, self.query.rerank_top) + 3
        while len(ranked) < wanted and not is_all:
            found, is_all = self._nearest_above_ties(depth)
            ranked = ranked.joined(found)
            depth *= 4
        return ranked, is_all

    def _nearest_above_ties(self, depth: int) -> tuple[Ranking, bool]:
        """The nearest rows down to a score of which none was cut off among equals, and whether these are all rows."""
        found = self._nearest(depth)
        if len(found) < depth:
            return found, True
        return found.take(np.flatnonzero(found.cosines > found.cosines[-1] + _TIE)), False

    def _nearest(self, depth: int) -> Ranking:
        _, rows = nearest(self.snapshot.views, self.query_vector[None], depth, self.allowed_rows)
        cosines = self._cosines(rows[0])
        order = np.lexsort((rows[0], -cosines))
        return self._above_min_cosine(Ranking(rows=rows[0][order], cosines=cosines[order]))

    def _fused(self) -> Ranking:
        by_cosine = self._nearest(CANDIDATES).rows
        rows, fused = fuse_ranks([by_cosine, self._with_words(CANDIDATES)])
        cosines = self._cosines(rows)
        order = np.lexsort((rows, -cosines, -fused))
        return self._above_min_cosine(Ranking(rows=rows[order], cosines=cosines[order], fused=fused[order]))

    def _with_words(self, depth: int) -> Int64[Array, " N"]:
        """The rows whose captions hold the words, best first."""
        asked = depth
        while True:
            found = self.snapshot.catalogue.search_text(sanitize_text(self.query.words), asked)
            rows = np.array([entry.row for entry in found], np.int64)
            kept = rows if self.allowed_rows is None else rows[np.isin(rows, self.allowed_rows)]
            if len(kept) >= depth or len(found) < asked:
                return kept[:depth]
            asked *= 4

    def _above_min_cosine(self, found: Ranking) -> Ranking:
        lowest = self.query.at_least
        return found if lowest is None else found.take(np.flatnonzero(found.cosines >= lowest))

    def _cosines(self, rows: Int64[Array, " N"]) -> Float32[Array, " N"]:
        # in double precision, so that a row has the same score whichever way and in whatever company it was found
        exact = self.snapshot.vectors(rows).astype(np.float64) @ self.query_vector.astype(np.float64)
        return exact.astype(np.float32)


def _apply_reranking(found: Ranking, reranker: Reranker, count: int) -> Ranking:
    """The first `count` in the order of likelihood, the others behind them as they were."""
    places, likelihoods = reranker.order(found.rows[:count])
    rest = np.arange(len(places), len(found))
    nothing = np.full(len(rest), np.nan, np.float32)
    ordered = found.take(np.concatenate([places, rest]))
    return replace(ordered, likelihoods=np.concatenate([likelihoods, nothing]))


def rows_among(snapshot: IndexSnapshot, where: str) -> Int64[Array, " N"] | None:
    """The living rows that a filter chooses; None without a filter.

    Raises:
        UsageError: the filter is malformed or fits no field.
    """
    return snapshot.catalogue.where(parse_filter(where)) if where else None
