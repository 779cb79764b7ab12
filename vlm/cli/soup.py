"""Average models that were tuned from the same start into one that costs no more to use.

Several MODELs give their mean (a uniform soup), a weighted mean (--weights), or, with --greedy, the mean of those that
help on held-out shards. One MODEL and --interpolate START give a model between the two; of several --alphas the best.
"""

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vlm.console import progress, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.train.averaging import Measure, ModelLoader, Soup

logger = logging.getLogger(__name__)

RECIPE = "soup.json"
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm soup`."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folders, their checkpoints (RUN/checkpoints/step-…), model folders, or open_clip NAME:WEIGHTS."""

    out: Path
    """Model folder to write."""

    greedy: bool = False
    """Best model first, then each that does not lower the metric; needs --val."""

    weights: str = ""
    """Share of each MODEL in their order, as 0.7,0.3; empty gives each the same."""

    interpolate: str = ""
    """MODEL that the one MODEL was tuned from: (1 - α) of it + α of the tuned one."""

    alphas: str = ""
    """α of --interpolate, as 0.25,0.5; empty takes 0.5, or with --val the best of 0, 0.25, 0.5, 0.75, 1."""

    val: str = ""
    """Held-out shards on which retrieval is measured."""

    metric: str = "recall@10"
    """recall@1, @5 or @10, the mean of both directions, or one direction: text_to_image_recall@10, …"""

    languages: tuple[str, ...] = ()
    """Languages of the captions used; empty takes the first of each sample."""

    captions_each: int = 0
    """Captions of a picture used, in each language: the first so many; 0 uses all."""

    workers: int = 1
    """Processes that read and decode."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the measurement; weights are averaged in fp64."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Average, write, show what went in."""
    from vlm.data.shards import expand_shards, shards_fingerprint
    from vlm.files import atomic_folder, check_not_exists, write_text
    from vlm.models.load import save_model_folder

    validate_arguments(arguments)
    check_not_exists(arguments.out)
    shards = expand_shards(arguments.val) if arguments.val else []
    inputs = {"val": shards_fingerprint(shards)} if shards else {}
    soup = build_soup(arguments, shards)
    inputs |= {f"model {part.model}": part.fingerprint for part in soup.ingredients if part.share}
    facts = summarize(soup, arguments)
    with atomic_folder(arguments.out) as folder:
        write_text(folder / RECIPE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        save_model_folder(folder, soup.model, inputs=inputs)
    if arguments.json:
        show_json(facts)
    else:
        show(soup, arguments)


def validate_arguments(arguments: Arguments) -> None:
    """Refuse options that do not go together, before anything is read.

    Raises:
        UsageError: naming them and the cure.
    """
    number = len(arguments.models)
    ways = {"--greedy": arguments.greedy, "--weights": arguments.weights, "--interpolate": arguments.interpolate}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different ways to average; give one of them.")
    if arguments.interpolate and number != 1:
        raise UsageError(f"--interpolate takes one tuned MODEL beside its start; {number} were given.")
    if not arguments.interpolate and number < 2:
        raise UsageError("A soup needs two models or more; for one and its start give --interpolate START.")
    if arguments.alphas and not arguments.interpolate:
        raise UsageError("--alphas belongs to --interpolate START.")
    if arguments.greedy and not arguments.val:
        raise UsageError("--greedy chooses by a metric on held-out shards: give --val SHARDS.")
    choose_metric(arguments.metric)


def build_soup(arguments: Arguments, shards: list[str]) -> "Soup":
    """The soup that was asked for, with a bar of the models opened or measured."""
    from vlm.models.load import load_network
    from vlm.train.averaging import greedy_soup, interpolate, weighted_soup

    open_model = functools.partial(load_network, device=arguments.device, precision=arguments.precision)
    names, number = arguments.models, len(arguments.models)
    alphas = read_numbers(arguments.alphas, "--alphas") or (_ALPHAS if shards else (0.5,))
    if arguments.interpolate:
        total = len(alphas) if shards else 2
    else:
        total = number + (number - 1 if arguments.greedy else 1) if shards else number
    with progress(total=total, what="measuring" if shards else "averaging", unit="model") as shown:
        measure = with_progress(make_metric(shards, arguments), shown.update) if shards else None
        opening: ModelLoader = open_model if shards else with_progress(open_model, shown.update)
        if arguments.interpolate:
            return interpolate(arguments.interpolate, names[0], alphas, open_model=opening, measure=measure)
        if arguments.greedy and measure:
            return greedy_soup(names, open_model=opening, measure=measure)
        shares = read_numbers(arguments.weights, "--weights") or (1.0,) * number
        return weighted_soup(names, shares, open_model=opening, measure=measure)


def make_metric(shards: list[str], arguments: Arguments) -> "Measure":
    """The metric on held-out shards."""
    from vlm.evaluation.retrieval import evaluate_retrieval

    parts = choose_metric(arguments.metric)

    def measure(model: Any) -> float:
        metrics = evaluate_retrieval(
            model,
            shards,
            languages=arguments.languages,
            captions_each=arguments.captions_each,
            workers=arguments.workers,
        ).metrics()
        return sum(metrics[part] for part in parts) / len(parts)

    return measure


def choose_metric(name: str) -> tuple[str, ...]:
    """The recalls of which a metric is the mean.

    Raises:
        UsageError: there is no such metric; the nearest is named.
    """
    from vlm.config import lookup
    from vlm.evaluation.retrieval import RECALL_AT

    table: dict[str, tuple[str, ...]] = {}
    for k in RECALL_AT:
        both = tuple(f"{direction}_recall@{k}" for direction in ("text_to_image", "image_to_text"))
        table |= {f"recall@{k}": both} | {part: (part,) for part in both}
    return lookup(table, name, "metric")


def read_numbers(given: str, option: str) -> tuple[float, ...]:
    """Numbers from `0.7,0.3`.

    Raises:
        UsageError: it is no list of numbers.
    """
    try:
        return tuple(float(part) for part in given.split(",")) if given else ()
    except ValueError as error:
        raise UsageError(f"{option} {given!r} is no list of numbers; write them as 0.7,0.3.") from error


def with_progress(function: Callable[[Any], Any], update: Callable[[], object]) -> Callable[[Any], Any]:
    """The function, with a step of the bar after each call."""

    def call(argument: Any) -> Any:
        result = function(argument)
        update()
        return result

    return call


def summarize(soup: "Soup", arguments: Arguments) -> dict[str, Any]:
    """What came out, as plain values; it is saved in the model folder as well."""
    return {
        "out": str(arguments.out),
        "method": method_of(arguments),
        "fingerprint": soup.model.fingerprint,
        "metric": arguments.metric if arguments.val else None,
        "value": soup.metric,
        "ingredients": [asdict(part) for part in soup.ingredients],
        "sweep": [{"alpha": alpha, "value": value} for alpha, value in soup.sweep],
    }


def method_of(arguments: Arguments) -> str:
    """The way of averaging, in a word."""
    if arguments.interpolate:
        return "interpolation"
    return "greedy" if arguments.greedy else "weighted" if arguments.weights else "uniform"


def show(soup: "Soup", arguments: Arguments) -> None:
    """Tables for people, and what to do next."""
    columns, rows = ["ingredient", "share"], [[part.model, part.share] for part in soup.ingredients]
    if arguments.val and not arguments.interpolate:
        columns.append(f"{arguments.metric} alone")
        rows = [[*row, part.metric] for row, part in zip(rows, soup.ingredients, strict=True)]
    if arguments.greedy:
        columns += ["of the soup with it", "taken"]
        told = [[part.metric_with, "yes" if part.share else "no"] for part in soup.ingredients]
        rows = [[*row, *more] for row, more in zip(rows, told, strict=True)]
    value = "" if soup.metric is None else f": {arguments.metric} {soup.metric:.4f}"
    show_table(columns, rows, title=f"{method_of(arguments)}{value}")
    if arguments.val and soup.sweep:
        show_table(["α", arguments.metric], soup.sweep)
    best = max((part.metric for part in soup.ingredients if part.metric is not None), default=None)
    if best is not None and soup.metric is not None and soup.metric < best:
        logger.info(f"The soup is below its best ingredient ({soup.metric:.4f} < {best:.4f}); --greedy never is.")
    logger.info(f"Next: vlm eval {arguments.out} --retrieval SHARDS")
