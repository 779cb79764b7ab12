"""Averages of weights: the EMA kept while training, and soups of several models tuned from the same start.

Soups are uniform, weighted or greedy (Model soups, Wortsman et al. 2022), or interpolate between a start and a tuned
model (WiSE-FT, Wortsman et al. 2022).
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn

from vlm.config import config_differences, lookup
from vlm.console import progress, without_progress
from vlm.errors import UsageError, VlmError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, PixelMemory
from vlm.evaluation.retrieval import Retrieval
from vlm.evaluation.retrieval_metrics import RECALL_AT
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Tensor
from vlm.train.feature_cache import LockedFeatures, evaluated_paths, keep_evaluated_features

logger = logging.getLogger(__name__)

# of decoded images: 5,000 of 256 px; more are read again for each model
_PIXEL_BYTES = 1 << 30


class EMA:
    """mean ← d · mean + (1 - d) · weights after each step (Polyak and Juditsky 1992, in its exponential form).

    Early on d = min(decay, (1 + step) / (10 + step)), so that the fresh weights are soon forgotten (the warm-up of
    TensorFlow's ExponentialMovingAverage). Parameters are averaged in float32 at least; buffers, and whatever holds
    whole numbers, are those of the last step. Processes that train the same weights each keep the same mean.

    weights: the mean, by the names of `state_dict`; nothing else has to be saved. The dict stays the same object.
    """

    def __init__(self, decay: float, weights: dict[str, Tensor]) -> None:
        self.decay = decay
        self.weights = weights

    @classmethod
    def from_network(cls, decay: float, network: nn.Module) -> "EMA":
        """The mean before the first step: the weights themselves."""
        averaged = _averaged_parameter_names(network)
        means: dict[str, Tensor] = {}
        for name, value in network.state_dict().items():
            dtype = torch.promote_types(value.dtype, torch.float32) if name in averaged else value.dtype
            means[name] = value.to(dtype, copy=True)
        return cls(decay, means)

    @torch.no_grad()
    def decay_at(self, step: int) -> float:
        """d of the update after a step, which is smaller than the decay in the beginning."""
        return min(self.decay, (1 + step) / (10 + step))

    def update(self, network: nn.Module, step: int) -> None:
        """Include the weights after optimizer step number `step`, counted from 1.

        Raises:
            VlmError: the mean is that of another network.
        """
        current = self._weights_of(network)
        averaged = _averaged_parameter_names(network)
        # 1/5.5 at step 1, 0.99 at step 900
        decay = self.decay_at(step)
        means: list[Tensor] = []
        values: list[Tensor] = []
        for name, value in current.items():
            if name in averaged:
                means.append(self.weights[name])
                values.append(value.to(self.weights[name].dtype))
        if means:
            # one fused call instead of hundreds of small ones
            torch._foreach_lerp_(means, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for name in current.keys() - averaged:
            self.weights[name].copy_(current[name])

    @contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """The network with the mean as its weights; afterwards its own are restored, bit for bit.

        Raises:
            VlmError: the mean is that of another network.
        """
        # cloned, since the tensors of a state_dict share the memory of the network
        own = {name: value.clone() for name, value in self._weights_of(network).items()}
        try:
            _copy(self.weights, into=network)
            yield
        finally:
            _copy(own, into=network)

    def _weights_of(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's own tensors; the mean is moved to their devices."""
        current: dict[str, Tensor] = network.state_dict()
        differing = _differing_names(current, self.weights)
        if differing:
            raise VlmError(f"The EMA is of another network: they differ in {', '.join(differing[:3])}.")
        for name, value in current.items():
            self.weights[name] = self.weights[name].to(value.device)
        return current


def _averaged_parameter_names(network: nn.Module) -> set[str]:
    parameters = network.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.is_floating_point()}


@torch.no_grad()
def _copy(weights: dict[str, Tensor], *, into: nn.Module) -> None:
    # a new state_dict each time, which makes FSDP drop the whole weights that its last forward pass gathered
    for name, own in into.state_dict().items():
        own.copy_(weights[name])


Weights = Mapping[str, Tensor]
"""Tensors by the names of `state_dict`."""


@dataclass(frozen=True, kw_only=True)
class WeightedMean:
    """Σ share · weights / Σ share, one network after the other, summed in float64; `plus` returns a new mean.

    A network alone, with share 1, comes out bit for bit. The statistics of batch normalisation are averaged like
    weights. Integers (counters, indices) cannot be averaged: those of the network with the largest share are taken, of
    the first among equals.
    """

    total: float = 0.0
    largest: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def plus(self, weights: Weights, share: float = 1.0) -> "WeightedMean":
        """The mean with one network more; a share of 0 changes nothing.

        Raises:
            VlmError: other names or shapes than those of the networks before.
        """
        if share == 0:
            return self
        if self.sums:
            self._check_compatible(weights)
        sums: dict[str, Tensor] = {}
        for name, value in weights.items():
            if value.is_floating_point():
                # in float64, a sum of float32 weights times shares is exact enough to give one network back bit for
                # bit
                term = value.detach().to("cpu", torch.float64) * share
                sums[name] = self.sums[name] + term if self.sums else term
            else:
                sums[name] = value.detach().to("cpu", copy=True) if share > self.largest else self.sums[name]
        return WeightedMean(
            total=self.total + share,
            largest=max(self.largest, share),
            sums=sums,
            # sums are float64; the result must have the types of the first network again
            dtypes=self.dtypes or {name: value.dtype for name, value in weights.items()},
        )

    def weights(self) -> dict[str, Tensor]:
        """The mean, in the types of the first network, on the CPU."""
        means: dict[str, Tensor] = {}
        for name, value in self.sums.items():
            if value.is_floating_point():
                means[name] = (value / self.total).to(self.dtypes[name])
            else:
                means[name] = value.clone()
        return means

    def _check_compatible(self, weights: Weights) -> None:
        differing = _differing_names(weights, self.sums)
        if differing:
            names = ", ".join(differing[:3])
            raise VlmError(f"Weights of different networks cannot be averaged; they differ in {names}.")


def _differing_names(one: Weights, other: Weights) -> list[str]:
    """Names that only one of the two has, or else those whose shapes differ."""
    # sorted, so that the message names the same ones each time
    differing = sorted(one.keys() ^ other.keys())
    return differing or [name for name in one if one[name].shape != other[name].shape]


_TRAINING_ONLY = frozenset({"patch_dropout", "timm_drop", "timm_drop_path"})
"""Keys of open_clip's configuration without effect in evaluation; the runs of one soup may differ in them."""

_NUM_SHOWN = 4
_ABSENT = object()


def check_compatible(first: VisionLanguageModel, other: VisionLanguageModel) -> None:
    """Check that two models differ in nothing but the values of their weights.

    Raises:
        UsageError: they differ in configuration, view, tokenizer, names or shapes of weights; it says where.
    """
    differences = model_differences(first, other)
    if differences:
        more = f" and {len(differences) - _NUM_SHOWN} more" if len(differences) > _NUM_SHOWN else ""
        raise UsageError(
            f"{first.name} and {other.name} cannot be averaged, they are different networks: "
            f"{'; '.join(differences[:_NUM_SHOWN])}{more}. Average models that were tuned from the same start."
        )


def model_differences(first: VisionLanguageModel, other: VisionLanguageModel) -> list[str]:
    """In what two models differ in addition to the values of their weights, with both values."""
    # the view counts: averaged weights are of use only for images that both models see the same way
    spaces = [{"model_cfg": model.config, "view": asdict(model.view)} for model in (first, other)]
    differences: list[str] = []
    for key, values in sorted(config_differences(spaces, absent=_ABSENT).items()):
        if key.rpartition(".")[2] in _TRAINING_ONLY:
            continue
        one, two = map(_shown_value, values)
        differences.append(f"{key} {one} against {two}")
    if first.tokenizer.fingerprint() != other.tokenizer.fingerprint():
        differences.append("the tokenizer")
    return differences + _shape_differences(first.network.state_dict(), other.network.state_dict())


def _shown_value(value: object) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def check_finite(model: VisionLanguageModel) -> None:
    """Check that a model has not diverged: one NaN spoils a whole soup.

    Raises:
        VlmError: a weight is NaN or infinite; the tensor is named.
    """
    for name, value in model.network.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise VlmError(f"{model.name} has weights that are not finite (in {name}); leave it out.")


def _shape_differences(first: Weights, other: Weights) -> list[str]:
    differences: list[str] = []
    for name in dict.fromkeys([*first, *other]):
        one = _shape_text(first, name)
        two = _shape_text(other, name)
        if one != two:
            differences.append(f"{name} {one} against {two}")
    return differences


def _shape_text(weights: Weights, name: str) -> str:
    return str(list(weights[name].shape)) if name in weights else "absent"


ModelLoader = Callable[[str], VisionLanguageModel]
"""From MODEL, as people write it, to the model."""

Measure = Callable[[VisionLanguageModel], float]
"""A metric on held-out data; more is better."""

DEFAULT_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The interpolations tried where held-out data can choose between them."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A model that is part of a soup, or was tried.

    share: its share of the result in [0, 1], 0 if it was left out. metric: of it alone.
    metric_with: of the soup so far with it added (greedy).
    """

    model: str
    fingerprint: str
    share: float
    metric: float | None = None
    metric_with: float | None = None


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """A place on the line between two models: α, the metric there, and the metric on other data; None if not measured.

    is_allowed: whether the metric on other data is no further below that of the start than it may be.
    """

    alpha: float
    metric: float | None = None
    other: float | None = None
    is_allowed: bool = True


@dataclass(frozen=True, kw_only=True)
class Soup:
    """The averaged model, its ingredients, and its metric if one was measured.

    sweep: the interpolations tried.
    """

    model: VisionLanguageModel
    ingredients: tuple[Ingredient, ...]
    metric: float | None
    sweep: tuple[PathPoint, ...] = ()


def weighted_soup(
    names: Sequence[str], shares: Sequence[float], *, open_model: ModelLoader, measure: Measure | None = None
) -> Soup:
    """The mean of the models, each with its share; equal shares are the uniform soup (Wortsman et al. 2022, §2).

    shares: above 0, one for each model; only their proportions count.

    Raises:
        UsageError: the models differ in more than their weights, or two are the same. VlmError: one has diverged.
    """
    if len(shares) != len(names) or not all(0 < share < math.inf for share in shares):
        raise UsageError(f"{len(names)} models need {len(names)} weights above 0; got {', '.join(map(str, shares))}.")
    builder = _SoupBuilder(open_model)
    mean = WeightedMean()
    ingredients: list[Ingredient] = []
    for name, share in zip(names, shares, strict=True):
        model = builder.open(name)
        mean = mean.plus(model.network.state_dict(), share)
        metric = measure(model) if measure else None
        ingredients.append(
            Ingredient(model=name, fingerprint=model.fingerprint, share=share / math.fsum(shares), metric=metric)
        )
    soup = builder.fill(mean)
    return Soup(model=soup, ingredients=tuple(ingredients), metric=measure(soup) if measure else None)


def greedy_soup(names: Sequence[str], *, open_model: ModelLoader, measure: Measure) -> Soup:
    """Best model first, each further one kept if the metric does not fall (Wortsman et al. 2022, recipe 1).

    So the metric is never below that of the best model, on the data it was measured on. However many models there are,
    two are in memory at a time, and two sums in float64.

    Raises:
        UsageError: the models differ in more than their weights, or two are the same. VlmError: one has diverged.
    """
    builder = _SoupBuilder(open_model)
    metrics_alone: list[tuple[float, str]] = []
    for name in names:
        # opened again when its turn comes: all of them at once would not fit into memory
        metrics_alone.append((measure(builder.open(name)), name))
    metrics_alone.sort(key=lambda entry: -entry[0])

    mean = WeightedMean()
    best = -math.inf
    tried: list[tuple[str, float, float]] = []
    included: set[str] = set()
    for metric, name in metrics_alone:
        # opened a second time, since all models together may not fit into memory
        candidate = mean.plus(open_model(name).network.state_dict())
        # the first candidate is the best model itself, which has been measured
        metric_with = measure(builder.fill(candidate)) if included else metric
        tried.append((name, metric, metric_with))
        # an equal metric counts, as in the paper
        if metric_with >= best:
            mean = candidate
            best = metric_with
            included.add(name)

    ingredients: list[Ingredient] = []
    for name, metric, metric_with in tried:
        share = 1 / len(included) if name in included else 0.0
        fingerprint = builder.fingerprints[name]
        ingredients.append(
            Ingredient(model=name, fingerprint=fingerprint, share=share, metric=metric, metric_with=metric_with)
        )
    return Soup(model=builder.fill(mean), ingredients=tuple(ingredients), metric=best)


def interpolate(
    start: str,
    tuned: str,
    alphas: Sequence[float],
    *,
    open_model: ModelLoader,
    measure: Measure | None = None,
    measure_other: Measure | None = None,
    max_drift: float = 1.0,
    feature_folder: Path | None = None,
) -> Soup:
    """(1 - α) · start + α · tuned (WiSE-FT, Wortsman et al. 2022, eq. 1): of several α the one with the best metric.

    alphas: in [0, 1]; 0 gives the start's weights and 1 the tuned ones bit for bit. Of equal metrics the first counts.
    measure_other: on data that the start was good at. Only an α counts at which it is at most `max_drift` below its
        value at α = 0, which is then measured, too; that one always counts.
    feature_folder: where what equal trunks give is kept for other calls and runs.

    Raises:
        UsageError: an α outside [0, 1], several without a measure, models that differ in more than their weights.
        VlmError: one has diverged.
    """
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UsageError(f"alphas = {', '.join(map(str, alphas)) or 'none'}: give numbers from 0 to 1.")
    if len(alphas) > 1 and not measure:
        raise UsageError(f"To choose between {len(alphas)} alphas, give held-out data (--val SHARDS), or a single one.")
    builder = _SoupBuilder(open_model)
    # copied, since the network that holds the first model's weights takes up the mean
    start_weights = _copy_to_cpu(builder.open(start))
    tuned_weights = _copy_to_cpu(builder.open(tuned))
    trunks = builder.keep_equal_trunks(start_weights, tuned_weights, feature_folder)

    def between(alpha: float) -> VisionLanguageModel:
        return builder.fill(WeightedMean().plus(start_weights, 1 - alpha).plus(tuned_weights, alpha))

    if measure_other and 0.0 not in alphas:
        # drift is since the start
        alphas = (0.0, *alphas)
    sweep: list[PathPoint] = []
    for alpha in alphas:
        # without a measure there is one α, and nothing to choose: the network is filled once, below
        model = between(alpha) if measure else None
        sweep.append(
            PathPoint(
                alpha=alpha,
                metric=measure(model) if measure and model else None,
                other=measure_other(model) if measure_other and model else None,
            )
        )
        for trunk in trunks:
            trunk.save()
    sweep = _mark_allowed(sweep, max_drift)
    allowed = list(filter(attrgetter("is_allowed"), sweep))
    # max returns the first of equal values
    best = max(allowed, key=lambda point: -math.inf if point.metric is None else point.metric)
    ingredients = (
        Ingredient(model=start, fingerprint=builder.fingerprints[start], share=1 - best.alpha),
        Ingredient(model=tuned, fingerprint=builder.fingerprints[tuned], share=best.alpha),
    )
    # filled again: the network holds the last interpolation tried, not the best one
    return Soup(model=between(best.alpha), ingredients=ingredients, metric=best.metric, sweep=tuple(sweep))


def _mark_allowed(sweep: Sequence[PathPoint], max_drift: float) -> list[PathPoint]:
    at_start: float | None = None
    for point in sweep:
        if point.alpha == 0:
            at_start = point.other
    marked: list[PathPoint] = []
    for point in sweep:
        drift = 0.0 if at_start is None or point.other is None else at_start - point.other
        marked.append(dataclasses.replace(point, is_allowed=drift <= max_drift))
    return marked


def build_soup(
    models: Sequence[str],
    *,
    open_model: ModelLoader,
    measure: Measure | None = None,
    greedy: bool = False,
    shares: Sequence[float] = (),
    start: str = "",
    alphas: Sequence[float] = (),
    measure_other: Measure | None = None,
    max_drift: float = 1.0,
    feature_folder: Path | None = None,
) -> Soup:
    """Average models in one of three ways, with a progress bar.

    greedy: greedy soup; needs `measure`. start: interpolate between it and the one model. Else the weighted soup.
    shares: of the weighted soup; empty gives all the same. alphas: of the interpolation; empty is 0.5, or with a
        measure the best of 0, 0.25, 0.5, 0.75, 1. measure_other, max_drift, feature_folder: as of
        `interpolate`.

    Raises: as of `greedy_soup`, `interpolate` and `weighted_soup`.
    """
    alphas = alphas or (DEFAULT_ALPHAS if measure else (0.5,))
    if start:
        num_opened, num_measured = 2, len(alphas)
    else:
        num_opened = len(models)
        num_measured = len(models) + (len(models) - 1 if greedy else 1)
    total = num_measured if measure else num_opened
    with progress(total=total, what="measuring" if measure else "averaging", unit="model") as progress_bar:

        def open_and_count(name: str) -> VisionLanguageModel:
            model = open_model(name)
            if measure is None:
                progress_bar.update()
            return model

        def measure_and_count(model: VisionLanguageModel) -> float:
            assert measure is not None
            metric = measure(model)
            progress_bar.update()
            return metric

        counted = measure_and_count if measure else None
        if start:
            return interpolate(
                start,
                models[0],
                alphas,
                open_model=open_and_count,
                measure=counted,
                measure_other=measure_other,
                max_drift=max_drift,
                feature_folder=feature_folder,
            )
        if greedy:
            return greedy_soup(models, open_model=open_and_count, measure=measure_and_count)
        return weighted_soup(models, shares or (1.0,) * len(models), open_model=open_and_count, measure=counted)


def parse_metric(name: str) -> tuple[str, ...]:
    """The recalls whose mean is a metric: `recall@10` is that of both directions.

    Raises:
        UsageError: there is no such metric; the nearest is named.
    """
    return lookup(recall_metrics(), name, "metric")


def recall_metrics() -> dict[str, tuple[str, ...]]:
    """The recalls of each metric."""
    table: dict[str, tuple[str, ...]] = {}
    for k in RECALL_AT:
        both = (f"text_to_image_recall@{k}", f"image_to_text_recall@{k}")
        table[f"recall@{k}"] = both
        for recall in both:
            table[recall] = (recall,)
    return table


def retrieval_measure(
    metric: str, shards: Sequence[str], *, languages: tuple[str, ...] = (), captions_each: int = 0, workers: int = 0
) -> Measure:
    """The metric on held-out shards, as `build_soup` uses it; options as of `Retrieval`, and workers that decode."""
    recalls = parse_metric(metric)
    retrieval = Retrieval(languages=languages, captions_each=captions_each)
    data = open_evaluation_set("::".join(shards))
    # the models of a soup see images alike, so that they are decoded once
    pixels = PixelMemory(max_bytes=_PIXEL_BYTES)

    def measure(model: VisionLanguageModel) -> float:
        # the models are counted, not the images of each
        with without_progress():
            result, warnings = retrieval.measure(EvaluatedModel(model, workers=workers, pixels=pixels), data)
        for warning in warnings:
            logger.warning(warning)
        values = result.metrics()
        return sum(values[recall] for recall in recalls) / len(recalls)

    return measure


def _copy_to_cpu(model: VisionLanguageModel) -> dict[str, Tensor]:
    # cpu() alone copies nothing where the network is there already
    return {name: value.cpu().clone() for name, value in model.network.state_dict().items()}


class _SoupBuilder:
    """Opens models one at a time; the network of the first holds the soup later, so its own weights are read before."""

    def __init__(self, open_model: ModelLoader) -> None:
        self._open_model = open_model
        self._first: VisionLanguageModel | None = None
        self.fingerprints: dict[str, str] = {}

    def open(self, name: str) -> VisionLanguageModel:
        """A model, checked to be compatible with those before and none of them."""
        model = self._open_model(name)
        self._first = self._first or model
        check_compatible(self._first, model)
        check_finite(model)
        for other, fingerprint in self.fingerprints.items():
            if fingerprint == model.fingerprint:
                raise UsageError(f"{other} and {name} are the same model; name it once.")
        self.fingerprints[name] = model.fingerprint
        return model

    def keep_equal_trunks(self, one: Weights, other: Weights, folder: Path | None) -> list[LockedFeatures]:
        """Run a trunk once for each image or text where both have the same one, as after tuning heads alone."""
        assert self._first is not None
        network = self._first.network
        for tower in ("visual", "text"):
            names = [name for name in one if name.startswith(f"{tower}.trunk.")]
            if names and all(torch.equal(one[name], other[name]) for name in names):
                network.get_submodule(f"{tower}.trunk").requires_grad_(False)
        return keep_evaluated_features(network, evaluated_paths(folder, self._first) if folder else None)

    def fill(self, mean: WeightedMean) -> VisionLanguageModel:
        """The mean as a model, until `fill` is called again."""
        assert self._first is not None
        self._first.network.load_state_dict(mean.weights())
        return dataclasses.replace(self._first, name="soup")
