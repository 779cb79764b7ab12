"""`vlm soup`: several fine-tuned models to one."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import DeviceOption, JsonOption, PrecisionOption, WorkersOption, call_options, parse_numbers
from vlm.console import percent, quoted, show_json, show_table

if TYPE_CHECKING:
    from vlm.api.training import SoupSummary

logger = logging.getLogger(__name__)


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
        from vlm.api.training import soup

        weights = parse_numbers(self.weights, "--weights")
        alphas = parse_numbers(self.alphas, "--alphas")
        summary = soup(**call_options(self, weights=weights, alphas=alphas))
        if self.json:
            show_json(summary)
        else:
            self._show(summary)

    def _show(self, soup: "SoupSummary") -> None:
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
        value = "" if soup.value is None else f": {self.metric} {percent(soup.value)}"
        show_table(columns, rows, title=f"{soup.method}{value}")
        if self.val and soup.sweep:
            self._show_path(soup)
        best = max((part.metric for part in soup.ingredients if part.metric is not None), default=None)
        if best is not None and soup.value is not None and soup.value < best:
            logger.info(
                f"The soup is below its best ingredient ({percent(soup.value)} < {percent(best)}); --greedy never is."
            )
        logger.info(f"Next: vlm eval {quoted(self.out)} --retrieval SHARDS")

    def _show_path(self, soup: "SoupSummary") -> None:
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
