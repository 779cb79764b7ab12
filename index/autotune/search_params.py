"""The least search parameters that reach a target: nprobe or efSearch, and how far exact reranking looks.

What reaches the target is asked of the caller, so that this holds for any index and any way of measuring recall.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, log

# the reranking factors that are tried
_RERANK_FACTORS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_TRIED_RERANK = _RERANK_FACTORS[-1]


@dataclass(frozen=True, kw_only=True)
class SearchParams:
    """What may change after the build. effort: nprobe or efSearch, None if there is none; rerank: 0 is none."""

    effort: int | None
    rerank: int

    def less(self) -> "SearchParams | None":
        """With a ninth less effort; None if there is none left.

        >>> SearchParams(effort=90, rerank=2).less()
        SearchParams(effort=80, rerank=2)
        """
        return replace(self, effort=self.effort * 8 // 9) if self.effort is not None and self.effort > 1 else None

    def more(self, max_effort: int | None) -> "SearchParams | None":
        """With an eighth more effort; at the highest effort, with twice the reranking; None at the end of both.

        >>> SearchParams(effort=80, rerank=2).more(100), SearchParams(effort=100, rerank=2).more(100)
        (SearchParams(effort=90, rerank=2), SearchParams(effort=100, rerank=4))
        """
        if self.effort is not None and max_effort is not None and self.effort < max_effort:
            return replace(self, effort=min(max_effort, self.effort + ceil(self.effort / 8)))
        return replace(self, rerank=2 * self.rerank) if 0 < self.rerank < MAX_TRIED_RERANK else None


def min_effort(reaches_target: Callable[[int], bool], max_effort: int) -> int | None:
    """The least effort in 1 … `max_effort` that reaches the target, None if none does; more effort never hurts.

    Doubles until it does, then bisects, so that most of the searches are cheap ones.

    >>> min_effort(lambda effort: effort >= 37, 1000)
    37
    """
    # invariant: `too_low` misses the target, and so does all below it
    too_low = 0
    effort = 1
    while not reaches_target(effort):
        if effort == max_effort:
            return None
        too_low = effort
        effort = min(2 * effort, max_effort)
    # now `effort` reaches the target and `too_low` does not: the least that does lies between
    while effort - too_low > 1:
        middle = (effort + too_low) // 2
        if reaches_target(middle):
            effort = middle
        else:
            too_low = middle
    return effort


def candidate_params(
    reaches_target: Callable[[SearchParams], bool], *, max_effort: int | None, is_reranked: bool
) -> Iterator[SearchParams]:
    """Search parameters that reach the target: the least effort for each reranking factor worth trying.

    Worth trying are the least factor that reaches it when every row is read, and twice it, which may need so much less
    effort that it is faster. Nothing is yielded if the target cannot be reached. An index type with neither effort nor
    reranking is exact, so its only parameters are yielded untried.
    """
    # how far reranking must look is known by reading every row: then only the codes can miss
    factors: list[int] = [0]
    if is_reranked:
        factors = []
        for factor in _RERANK_FACTORS:
            if reaches_target(SearchParams(effort=max_effort, rerank=factor)):
                factors = [factor] if max_effort is None else [factor, 2 * factor]
                break
    for factor in factors:
        if max_effort is None:
            yield SearchParams(effort=None, rerank=factor)
            continue
        effort = min_effort(
            lambda effort, factor=factor: reaches_target(SearchParams(effort=effort, rerank=factor)), max_effort
        )
        if effort is not None:
            yield SearchParams(effort=effort, rerank=factor)


def minimize_params(
    start: SearchParams, meets_target: Callable[[SearchParams], bool], *, max_effort: int | None
) -> SearchParams | None:
    """Nearly the least parameters that meet the target, from a start that meets or nearly meets it; None if none do.

    >>> minimize_params(SearchParams(effort=50, rerank=0), lambda params: (params.effort or 0) >= 60, max_effort=1000)
    SearchParams(effort=60, rerank=0)
    >>> meets = lambda params: params.rerank == 2 and params.effort >= 30
    >>> minimize_params(SearchParams(effort=50, rerank=1), meets, max_effort=1000)
    SearchParams(effort=30, rerank=2)
    """
    search_params = start
    if meets_target(search_params):
        while (less := search_params.less()) is not None and meets_target(less):
            search_params = less
        too_low = less.effort if less is not None else None
        return _bisect_effort(search_params, too_low or 0, meets_target)
    while (more := search_params.more(max_effort)) is not None:
        if meets_target(more):
            # the effort that was too low says nothing once the reranking has changed
            too_low = search_params.effort if more.rerank == search_params.rerank else None
            return _bisect_effort(more, too_low or 0, meets_target)
        search_params = more
    return None


def _bisect_effort(
    search_params: SearchParams, too_low: int, meets_target: Callable[[SearchParams], bool]
) -> SearchParams:
    """Parameters that meet the target with at most a fiftieth more effort than some that do not."""
    while search_params.effort is not None and search_params.effort - too_low > max(1, search_params.effort // 50):
        middle = replace(search_params, effort=(search_params.effort + too_low) // 2)
        if meets_target(middle):
            search_params = middle
        else:
            too_low = middle.effort or 0
    return search_params


def extrapolate_power_law(small: tuple[int, int], large: tuple[int, int], rows: int) -> int:
    """A number measured at two sizes, both as (rows, number), extrapolated to more rows by a power law.

    The exponent is kept between 0 and 1: effort does not fall as rows are added, and need not outgrow them.

    >>> extrapolate_power_law((10_000, 10), (40_000, 20), 160_000)
    40
    """
    small_rows, small_number = small
    large_rows, large_number = large
    exponent = 0.0
    if large_rows > small_rows:
        exponent = log(large_number / small_number) / log(large_rows / small_rows)
        exponent = min(max(exponent, 0.0), 1.0)
    # the small number keeps a product that should be whole from being rounded up
    return ceil(large_number * (rows / large_rows) ** exponent - 1e-9)
