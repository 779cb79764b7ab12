"""`vlm soup`: several fine-tuned models to one."""

import functools
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.cli.options import DeviceOption, JsonOption, PrecisionOption, WorkersOption
from vlm.console import percent, quoted, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.train.averaging import PathPoint, Soup

logger = logging.getLogger(__name__)

SOUP_FILE = "soup.json"


@dataclass(frozen=True, kw_only=True)
class MakeSoup:
    """Average fine-tuned models of the same base model into one, at no extra inference cost (model soup).

    Several MODELs give a uniform soup, a weighted one (--weights), or with --greedy one of those models that improve a
    metric on held-out shards. One MODEL and --interpolate START give an interpolation between the two (WiSE-FT); of
    several --alphas the best. With --val-other, which the base is good at, both are measured along the way and drawn
    into OUT/path.png, and the best is of those where no more than --max-drift is lost.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folders, their checkpoints (RUN/checkpoints/step-…), model folders, or open_clip NAME:WEIGHTS."""

    out: Path
    """Model folder to write."""

    greedy: bool = False
    """Start with the best model and add each that does not lower the metric; needs --val."""

    weights: str = ""
    """Weight of each MODEL in order, e.g. 0.7,0.3; empty weighs all equally."""

    interpolate: str = ""
    """Base MODEL of the one MODEL: the result is (1 - α) · base + α · MODEL."""

    alphas: str = ""
    """α of --interpolate, e.g. 0.25,0.5; empty uses 0.5, or with --val the best of 0, 0.25, 0.5, 0.75, 1."""

    val: str = ""
    """Held-out shards to measure retrieval on."""

    val_other: str = ""
    """Shards of other data that the base is good at, for --interpolate."""

    max_drift: float = 0.01
    """How far the metric on --val-other may be below the base's, e.g. 0.01 for a point."""

    feature_folder: str = ""
    """Folder of a run's features (its --feature-folder, or RUN/features): equal trunks then need not run again."""

    metric: str = "recall@10"
    """recall@1, @5 or @10, the mean of both directions, or one direction: text_to_image_recall@10, …"""

    languages: tuple[str, ...] = ()
    """Caption languages; empty uses the first of each sample."""

    captions_each: int = 0
    """Captions per image and language, the first ones; 0 uses all."""

    workers: WorkersOption = 1

    device: DeviceOption = "auto"

    precision: PrecisionOption = "fp32"

    json: JsonOption = False

    def run(self) -> None:
        """Average, write, show the ingredients."""
        from vlm.data.shards import expand_shards, shards_fingerprint
        from vlm.files import atomic_folder, check_not_exists, write_text
        from vlm.models.load import save_model_folder
        from vlm.train.plots import draw_path

        self._check()
        check_not_exists(self.out)
        shards = expand_shards(self.val) if self.val else []
        # the choice of ingredients depends on the held-out shards as well
        other = expand_shards(self.val_other) if self.val_other else []
        inputs: dict[str, str] = {}
        for name, paths in (("val", shards), ("val-other", other)):
            if paths:
                inputs[name] = shards_fingerprint(paths)
        soup = self._build(shards, other)
        for ingredient in soup.ingredients:
            # models that greedy selection left out have no part in the weights
            if ingredient.share:
                inputs[f"model {ingredient.model}"] = ingredient.fingerprint
        summary = self._summarize(soup)
        # the summary first, so that the manifest, written last, lists it
        with atomic_folder(self.out) as folder:
            write_text(folder / SOUP_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            if other:
                draw_path(soup.sweep, folder / "path.png", metric=self.metric, max_drift=self.max_drift)
            save_model_folder(folder, soup.model, inputs=inputs)
        if self.json:
            show_json(summary)
        else:
            self._show(soup)

    @property
    def method(self) -> str:
        """The way of averaging, in a word."""
        if self.interpolate:
            return "interpolation"
        if self.greedy:
            return "greedy"
        return "weighted" if self.weights else "uniform"

    def _check(self) -> None:
        """Refuse options that exclude each other, before anything is read.

        Raises:
            UsageError: naming them and the cure.
        """
        from vlm.train.averaging import parse_metric

        number = len(self.models)
        methods = {"--greedy": self.greedy, "--weights": self.weights, "--interpolate": self.interpolate}
        requested = [name for name, value in methods.items() if value]
        if len(requested) > 1:
            raise UsageError(f"{' and '.join(requested)} are different ways to average; give one of them.")
        if self.interpolate and number != 1:
            raise UsageError(f"--interpolate needs one tuned MODEL besides its base; {number} were given.")
        if not self.interpolate and number < 2:
            raise UsageError("A soup needs two models or more; for one and its base give --interpolate START.")
        if self.alphas and not self.interpolate:
            raise UsageError("--alphas requires --interpolate START.")
        if self.val_other and not (self.interpolate and self.val):
            raise UsageError("--val-other is measured beside --val along --interpolate START; give both.")
        if not 0 <= self.max_drift <= 1:
            raise UsageError(f"--max-drift {self.max_drift} is not a share; give a number from 0 to 1.")
        if self.greedy and not self.val:
            raise UsageError("--greedy chooses by a metric on held-out shards: give --val SHARDS.")
        parse_metric(self.metric)

    def _build(self, shards: list[str], other: list[str]) -> "Soup":
        from vlm.models.load import load_network
        from vlm.train.averaging import build_soup, retrieval_measure

        measure_on = functools.partial(
            retrieval_measure,
            self.metric,
            languages=self.languages,
            captions_each=self.captions_each,
            workers=self.workers,
        )
        return build_soup(
            self.models,
            # a function, so that models are opened one by one: large ones need not fit into memory together
            open_model=functools.partial(load_network, device=self.device, precision=self.precision),
            measure=measure_on(shards) if shards else None,
            greedy=self.greedy,
            shares=_parse_numbers(self.weights, "--weights"),
            start=self.interpolate,
            alphas=_parse_numbers(self.alphas, "--alphas"),
            measure_other=measure_on(other) if other else None,
            max_drift=self.max_drift,
            feature_folder=Path(self.feature_folder) if self.feature_folder else None,
        )

    def _summarize(self, soup: "Soup") -> dict[str, Any]:
        """The result as plain values; it is saved in the model folder, too."""
        return {
            "out": str(self.out),
            "method": self.method,
            "fingerprint": soup.model.fingerprint,
            "metric": self.metric if self.val else None,
            "value": soup.metric,
            "ingredients": [asdict(ingredient) for ingredient in soup.ingredients],
            "sweep": [_point_values(point) for point in soup.sweep],
        }

    def _show(self, soup: "Soup") -> None:
        columns = ["ingredient", "share"]
        if self.val and not self.interpolate:
            columns.append(f"{self.metric} alone")
        if self.greedy:
            columns += ["of the soup with it", "added"]
        rows: list[list[object]] = []
        for ingredient in soup.ingredients:
            row: list[object] = [ingredient.model, ingredient.share]
            if self.val and not self.interpolate:
                row.append(percent(ingredient.metric))
            if self.greedy:
                row += [percent(ingredient.metric_with), "yes" if ingredient.share else "no"]
            rows.append(row)
        value = "" if soup.metric is None else f": {self.metric} {percent(soup.metric)}"
        show_table(columns, rows, title=f"{self.method}{value}")
        if self.val and soup.sweep:
            self._show_path(soup)
        best = max((part.metric for part in soup.ingredients if part.metric is not None), default=None)
        if best is not None and soup.metric is not None and soup.metric < best:
            logger.info(
                f"The soup is below its best ingredient ({percent(soup.metric)} < {percent(best)}); --greedy never is."
            )
        logger.info(f"Next: vlm eval {quoted(self.out)} --retrieval SHARDS")

    def _show_path(self, soup: "Soup") -> None:
        columns = ["α", self.metric]
        if self.val_other:
            columns += ["on other data", "drift", "allowed"]
        at_start = next((point.other for point in soup.sweep if point.alpha == 0), None)
        rows: list[list[object]] = []
        for point in soup.sweep:
            row: list[object] = [point.alpha, percent(point.metric)]
            if self.val_other and point.other is not None and at_start is not None:
                row += [percent(point.other), f"{point.other - at_start:+.1%}", "yes" if point.is_allowed else "no"]
            rows.append(row)
        show_table(columns, rows)
        chosen = soup.ingredients[-1].share
        tuned = soup.sweep[-1]
        if self.val_other and not tuned.is_allowed:
            logger.info(
                f"At α = {tuned.alpha:g} more than {self.max_drift:.1%} is lost on other data; α = {chosen:g} is the "
                f"best of those that keep it. The path: {self.out / 'path.png'}"
            )


def _point_values(point: "PathPoint") -> dict[str, Any]:
    values: dict[str, Any] = {"alpha": point.alpha, "value": point.metric}
    return values if point.other is None else values | {"other": point.other, "is_allowed": point.is_allowed}


def _parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers from `0.7,0.3`.

    Raises:
        UsageError: it is not a list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers; write them as 0.7,0.3.") from error
