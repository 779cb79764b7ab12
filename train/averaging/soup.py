"""One model out of several tuned from the same start: uniform, weighted and greedy soups, and interpolation."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm.errors import UsageError
from vlm.models.encoder import VisionLanguageModel
from vlm.train.averaging.likeness import refuse_not_finite, refuse_unlike
from vlm.train.averaging.weighted_mean import WeightedMean

OpenModel = Callable[[str], VisionLanguageModel]
"""From MODEL, as people write it, to the model."""

Measure = Callable[[VisionLanguageModel], float]
"""A metric on held-out data; more is better."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A model that went into a soup, or was tried.

    share: its part of the result in [0, 1], 0 where it was left out. metric: of it alone.
    metric_with: of the soup so far with it added (greedy).
    """

    model: str
    fingerprint: str
    share: float
    metric: float | None = None
    metric_with: float | None = None


@dataclass(frozen=True, kw_only=True)
class Soup:
    """The averaged model, what it is made of, and its metric where one was measured.

    sweep: (α, metric) of each interpolation tried.
    """

    model: VisionLanguageModel
    ingredients: tuple[Ingredient, ...]
    metric: float | None
    sweep: tuple[tuple[float, float | None], ...] = ()


def weighted_soup(
    names: Sequence[str], shares: Sequence[float], *, open_model: OpenModel, measure: Measure | None = None
) -> Soup:
    """The mean of the models, each with its share; equal shares are the uniform soup (Wortsman et al. 2022, §2).

    shares: above 0, one for each model; only their proportions count.

    Raises:
        UsageError: the models differ in more than their weights, or two are the same. VlmError: one has diverged.
    """
    if len(shares) != len(names) or not all(0 < share < math.inf for share in shares):
        raise UsageError(f"{len(names)} models need {len(names)} weights above 0; got {', '.join(map(str, shares))}.")
    pot, mean = _Pot(open_model), WeightedMean()
    ingredients: list[Ingredient] = []
    for name, share in zip(names, shares, strict=True):
        model = pot.open(name)
        mean = mean.plus(model.network.state_dict(), share)
        metric = measure(model) if measure else None
        ingredients.append(
            Ingredient(model=name, fingerprint=model.fingerprint, share=share / math.fsum(shares), metric=metric)
        )
    soup = pot.fill(mean)
    return Soup(model=soup, ingredients=tuple(ingredients), metric=measure(soup) if measure else None)


def greedy_soup(names: Sequence[str], *, open_model: OpenModel, measure: Measure) -> Soup:
    """Best model first, each next one kept if the metric does not fall (Wortsman et al. 2022, recipe 1).

    So the metric is never below that of the best model, on the data it was measured on. However many they are, two
    models are in memory at a time, and two sums in float64.

    Raises:
        UsageError: the models differ in more than their weights, or two are the same. VlmError: one has diverged.
    """
    pot = _Pot(open_model)
    alone = sorted(((measure(pot.open(name)), name) for name in names), key=lambda found: -found[0])
    mean, best, tried = WeightedMean(), -math.inf, list[tuple[str, float, float]]()
    taken: set[str] = set()
    for metric, name in alone:
        candidate = mean.plus(open_model(name).network.state_dict())
        metric_with = measure(pot.fill(candidate)) if taken else metric
        tried.append((name, metric, metric_with))
        if metric_with >= best:
            mean, best = candidate, metric_with
            taken.add(name)
    ingredients = tuple(
        Ingredient(
            model=name,
            fingerprint=pot.fingerprints[name],
            share=1 / len(taken) if name in taken else 0.0,
            metric=metric,
            metric_with=metric_with,
        )
        for name, metric, metric_with in tried
    )
    return Soup(model=pot.fill(mean), ingredients=ingredients, metric=best)


def interpolate(
    start: str, tuned: str, alphas: Sequence[float], *, open_model: OpenModel, measure: Measure | None = None
) -> Soup:
    """(1 - α) · start + α · tuned (WiSE-FT, Wortsman et al. 2021, eq. 1): of several α the one with the best metric.

    alphas: in [0, 1]; 0 gives the start's weights and 1 the tuned ones bit for bit. Of equal metrics the first counts.

    Raises:
        UsageError: an α outside [0, 1], several without a measure, models that differ in more than their weights.
        VlmError: one has diverged.
    """
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UsageError(f"alphas = {', '.join(map(str, alphas)) or 'none'}: give numbers from 0 to 1.")
    if len(alphas) > 1 and not measure:
        raise UsageError(f"To choose between {len(alphas)} alphas, give held-out data (--val SHARDS), or a single one.")
    pot = _Pot(open_model)
    opened = [pot.open(name) for name in (start, tuned)]
    ends = [{name: value.cpu().clone() for name, value in model.network.state_dict().items()} for model in opened]

    def between(alpha: float) -> VisionLanguageModel:
        return pot.fill(WeightedMean().plus(ends[0], 1 - alpha).plus(ends[1], alpha))

    sweep = tuple((alpha, measure(between(alpha)) if measure else None) for alpha in alphas)
    best, metric = max(sweep, key=lambda point: -math.inf if point[1] is None else point[1])
    ingredients = tuple(
        Ingredient(model=name, fingerprint=pot.fingerprints[name], share=share)
        for name, share in ((start, 1 - best), (tuned, best))
    )
    return Soup(model=between(best), ingredients=ingredients, metric=metric, sweep=sweep)


class _Pot:
    """Models opened one at a time; the network of the first takes up the soup, so its own weights are read before."""

    def __init__(self, open_model: OpenModel) -> None:
        self._open_model = open_model
        self._first: VisionLanguageModel | None = None
        self.fingerprints: dict[str, str] = {}

    def open(self, name: str) -> VisionLanguageModel:
        """A model, after it was found to fit those before and to be none of them."""
        model = self._open_model(name)
        self._first = self._first or model
        refuse_unlike(self._first, model)
        refuse_not_finite(model)
        for other, fingerprint in self.fingerprints.items():
            if fingerprint == model.fingerprint:
                raise UsageError(f"{other} and {name} are the same model; name it once.")
        self.fingerprints[name] = model.fingerprint
        return model

    def fill(self, mean: WeightedMean) -> VisionLanguageModel:
        """The mean as a model, until the next one is filled in."""
        assert self._first is not None
        self._first.network.load_state_dict(mean.weights())
        return dataclasses.replace(self._first, name="soup")
