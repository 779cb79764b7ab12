"""How much effort, and how much re-ranking, a recall needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, log

# the factors of re-ranking that are tried
_FACTORS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a search may be told after the build. effort: nprobe or ef_search; rerank: see `Prepared`."""

    effort: int | None
    rerank: int

    def less(self) -> "Setting | None":
        """With a ninth less effort; None if there is none to spare.

        >>> Setting(effort=90, rerank=2).less()
        Setting(effort=80, rerank=2)
        """
        return replace(self, effort=self.effort * 8 // 9) if self.effort is not None and self.effort > 1 else None

    def more(self, most: int | None) -> "Setting | None":
        """With an eighth more effort; where there is no more, with twice the re-ranking; None at the end of both.

        >>> Setting(effort=80, rerank=2).more(100), Setting(effort=100, rerank=2).more(100)
        (Setting(effort=90, rerank=2), Setting(effort=100, rerank=4))
        """
        if self.effort is not None and most is not None and self.effort < most:
            return replace(self, effort=min(most, self.effort + ceil(self.effort / 8)))
        return replace(self, rerank=2 * self.rerank) if 0 < self.rerank < _FACTORS[-1] else None


def least_effort(reaches: Callable[[int], bool], most: int) -> int | None:
    """The least effort in 1 … most that reaches the goal, if more effort never reaches less; None if not even `most`.

    Doubles until it does, then halves the interval, so that most trials are cheap.

    >>> least_effort(lambda effort: effort >= 37, 1000)
    37
    """
    missed, effort = 0, 1
    while not reaches(effort):
        if effort == most:
            return None
        missed, effort = effort, min(2 * effort, most)
    while effort - missed > 1:
        middle = (effort + missed) // 2
        missed, effort = (missed, middle) if reaches(middle) else (middle, effort)
    return effort


def settings_that_reach(
    reaches: Callable[[Setting], bool], *, most: int | None, is_reranked: bool
) -> Iterator[Setting]:
    """Settings that reach the goal: each with the least effort for its factor of re-ranking.

    Of the factors those are tried that suffice when every row is read: the least, and twice it, which may need so much
    less effort that it is quicker. Nothing comes if the goal cannot be reached. What has neither effort nor re-ranking
    is exact, and not asked.
    """
    factors: tuple[int, ...] = (0,)
    if is_reranked:
        enough = next((factor for factor in _FACTORS if reaches(Setting(effort=most, rerank=factor))), None)
        factors = () if enough is None else (enough,) if most is None else (enough, 2 * enough)
    for factor in factors:
        if most is None:
            yield Setting(effort=None, rerank=factor)
            continue
        effort = least_effort(lambda effort, factor=factor: reaches(Setting(effort=effort, rerank=factor)), most)
        if effort is not None:
            yield Setting(effort=effort, rerank=factor)


def settled(start: Setting, holds: Callable[[Setting], bool], *, most: int | None) -> Setting | None:
    """From a setting that holds or nearly does, to nearly the least that holds; None if none above does.

    >>> settled(Setting(effort=50, rerank=0), lambda setting: (setting.effort or 0) >= 60, most=1000)
    Setting(effort=60, rerank=0)
    >>> settled(Setting(effort=50, rerank=1), lambda setting: setting.rerank == 2 and setting.effort >= 30, most=1000)
    Setting(effort=30, rerank=2)
    """
    setting = start
    if holds(setting):
        while (less := setting.less()) is not None and holds(less):
            setting = less
        return _finest(setting, (less and less.effort) or 0, holds)
    while (more := setting.more(most)) is not None:
        if holds(more):  # with more re-ranking, anything may be enough
            return _finest(more, (setting.effort or 0) if more.rerank == setting.rerank else 0, holds)
        setting = more
    return None


def _finest(setting: Setting, missing: int, holds: Callable[[Setting], bool]) -> Setting:
    """A setting that holds, with an effort at most a fiftieth above one that does not, as `missing` does not."""
    while setting.effort is not None and setting.effort - missing > max(1, setting.effort // 50):
        middle = replace(setting, effort=(setting.effort + missing) // 2)
        if holds(middle):
            setting = middle
        else:
            missing = middle.effort or 0
    return setting


def extrapolated(small: tuple[int, int], large: tuple[int, int], rows: int) -> int:
    """A number measured at two sizes, as (rows, number), carried on to more rows by the power of the size they show.

    The power is held between 0 and 1: no effort falls as rows are added, and none need outgrow them.

    >>> extrapolated((10_000, 10), (40_000, 20), 160_000)
    40
    """
    (few, less), (many, more) = small, large
    power = min(max(log(more / less) / log(many / few), 0.0), 1.0) if many > few else 0.0
    return ceil(more * (rows / many) ** power - 1e-9)
